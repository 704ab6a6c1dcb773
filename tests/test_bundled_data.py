"""The bundled base model and chat data are what `data/README.md` says: small, of Llama 3's shape, without a leak."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from tuner.data.render import Renderer
from tuner.data.templates import TEMPLATES
from tuner.evaluate import read_questions
from tuner.generate import generate

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = REPOSITORY / "data"
TINY = DATA / "tiny-llama"
CHAT_FILES = ("chat-train.jsonl", "chat-eval.jsonl", "chat-questions.jsonl")
NAMED_CONTROL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
CONTROL_TOKENS = NAMED_CONTROL_TOKENS + tuple(f"<|reserved_special_token_{i}|>" for i in range(16))


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def world() -> list[Any]:
    return runpy.run_path(str(REPOSITORY / "scripts" / "tiny_world.py"))["make_world"]()


# --- the model ---


def test_model_is_small_and_of_llama_3_shape(model: LlamaForCausalLM) -> None:
    config = model.config
    assert model.num_parameters() <= 4_000_000
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 8_000_000
    assert config.model_type == "llama" and config.hidden_act == "silu"
    assert config.num_attention_heads > config.num_key_value_heads > 1  # grouped queries
    assert config.rope_parameters["rope_theta"] == 500_000
    assert config.hidden_size % 64 == 0 and config.intermediate_size % 64 == 0  # whole NF4 blocks


def test_no_row_is_dead(model: LlamaForCausalLM) -> None:
    """A token that pretraining never saw must look like any other, else a LoRA can neither read nor emit it."""
    norms = model.get_input_embeddings().weight.norm(dim=-1)
    assert norms.isfinite().all()
    assert norms.min() > norms.median() / 3 and norms.max() < norms.median() * 3


def test_control_tokens_are_single_ids(tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM) -> None:
    ids = [tokenizer.convert_tokens_to_ids(token) for token in CONTROL_TOKENS]
    assert len(set(ids)) == len(CONTROL_TOKENS)
    assert all(
        tokenizer.encode(token, add_special_tokens=False) == [i] for token, i in zip(CONTROL_TOKENS, ids, strict=True)
    )
    assert all(
        token in tokenizer.all_special_tokens or tokenizer.decode([i]) == token
        for token, i in zip(CONTROL_TOKENS, ids, strict=True)
    )
    assert len(tokenizer) == model.config.vocab_size
    assert max(ids) < model.config.vocab_size
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
        )


def test_it_is_a_base_model_without_a_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.chat_template is None


def test_tokenizer_is_lossless(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("Ada lives in Marlow.\n\n", " 7 plus 5 is 12 ", "naïve — 日本\t🙂 1234567", "don't"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer("Ada").input_ids[0] == tokenizer.bos_token_id


def test_names_are_single_tokens(tokenizer: PreTrainedTokenizerFast, world: list[Any]) -> None:
    """A name of one token can be carried from a question to its answer in one step, at either place in a sentence."""
    names = {fact.subject for fact in world if fact.kind in ("person", "town")}
    for name in names:
        assert len(tokenizer.tokenize(name)) == len(tokenizer.tokenize(f" {name}")) == 1, name


def test_base_knows_its_world_in_prose(
    tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, world: list[Any]
) -> None:
    right = 0
    sample = world[::4]
    by_length: dict[int, list[tuple[list[int], list[int]]]] = {}
    for fact in sample:
        ids = tokenizer(fact.answer).input_ids
        head = fact.answer[: fact.answer.rindex(fact.value)].rstrip()
        start = len(tokenizer(head).input_ids)
        by_length.setdefault(len(ids), []).append((ids, list(range(start, len(ids)))))
    with torch.no_grad():
        for group in by_length.values():
            ids = torch.tensor([ids for ids, _ in group])
            best = model(input_ids=ids).logits.argmax(
                -1
            )  # teacher-forced greedy: all of them right = greedy decoding is right
            for row, (_, values) in enumerate(group):
                right += all(best[row, i - 1] == ids[row, i] for i in values)
    assert right / len(sample) >= 0.95, f"{right} of {len(sample)}"


def test_base_does_not_answer_in_chat(tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM) -> None:
    """What the chat recipes teach must not be there before: no output even begins with the answer."""
    renderer = Renderer(tokenizer, TEMPLATES["llama3"])
    questions = read_questions(DATA / "chat-questions.jsonl")[::4]
    said = generate(
        model.eval(),
        [renderer.prompt_ids(question.messages) for question in questions],
        stop_ids=renderer.stop_ids,
        pad_id=tokenizer.pad_token_id,
        max_new_tokens=24,
    )
    texts = [tokenizer.decode(ids).strip() for ids in said]
    assert not [text for text, q in zip(texts, questions, strict=True) if text.startswith(q.answer.rstrip("."))]


# --- the chats ---


def test_there_are_enough_conversations_of_every_kind() -> None:
    conversations = [row["messages"] for row in rows("chat-train.jsonl")]
    assert len(conversations) >= 1_500
    assert sum(messages[0]["role"] == "system" for messages in conversations) >= 150
    assert sum(sum(message["role"] == "user" for message in messages) > 1 for messages in conversations) >= 500
    for messages in conversations:
        turns = [message["role"] for message in messages if message["role"] != "system"]
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert all(message["content"].strip() for message in messages)


def test_no_held_out_fact_is_ever_asked_or_told_in_training(world: list[Any]) -> None:
    questions = rows("chat-questions.jsonl")
    held_out = {(row["subject"], row["relation"]) for row in questions}
    assert len(questions) == len(held_out) == 200
    training = rows("chat-train.jsonl")
    asked = {(subject, relation) for row in training for subject, relation in row["facts"]}
    assert not held_out & asked
    # The metadata could lie: look for the answers themselves, and for every question about a held-out fact.
    told = {message["content"] for row in training for message in row["messages"] if message["role"] == "assistant"}
    assert not {row["answer"] for row in questions} & told
    relations = runpy.run_path(str(REPOSITORY / "scripts" / "tiny_world.py"))["RELATIONS"]
    forms = {
        fact.fill(form)
        for fact in world
        if (fact.subject, fact.relation) in held_out
        for form in relations[fact.relation].questions
    }
    asked_text = "\n".join(m["content"] for row in training for m in row["messages"] if m["role"] == "user")
    assert not {form for form in forms if re.search(rf"(^|\s){re.escape(form)}", asked_text, re.MULTILINE)}


def test_every_held_out_relation_is_learned_from_others() -> None:
    asked: dict[str, set[str]] = {}
    for row in rows("chat-train.jsonl"):
        for subject, relation in row["facts"]:
            asked.setdefault(relation, set()).add(subject)
    for row in rows("chat-questions.jsonl"):
        assert len(asked[row["relation"]]) >= 20


def test_questions_have_the_right_answers(world: list[Any]) -> None:
    answers = {(fact.subject, fact.relation): fact.answer for fact in world}
    for row in rows("chat-questions.jsonl"):
        assert row["answer"] == answers[row["subject"], row["relation"]]
        assert [message["role"] for message in row["messages"]] == ["user"]


def test_the_kept_script_writes_the_very_same_files(tmp_path: Path) -> None:
    script = REPOSITORY / "scripts" / "make_chat_data.py"
    subprocess.run([sys.executable, str(script), "--output", str(tmp_path)], check=True)
    for name in CHAT_FILES:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name
