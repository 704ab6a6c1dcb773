"""`tuner generate`: prompts from the command line and from files, models, adapters and runs, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tuner.errors import DataError, ModelError, RunDirError, UserError
from tuner.model.adapter import AdapterMeta, attach, save_adapter
from tuner.model.load import base_fingerprint, load_base
from tuner.recipe import AdapterSection, GenerateSection, ModelSection
from tuner.stages import sample
from tuner.types import Message

FEW = {"max_new_tokens": 6}


def ask(model: Path | None, prompt: str = "What is the capital?", **given: Any) -> sample.Answer:
    options: dict[str, Any] = {"adapter": None, "file": None, "chat_template": "llama3", "settings": FEW} | given
    (answer,) = sample.run(model=str(model) if model else None, prompt=prompt, **options)
    return answer


@pytest.fixture
def run_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A run that holds an adapter with random weights, and the recipe it was made from."""
    base = load_base(ModelSection(name_or_path=str(tiny_model_dir), dtype="float32"), "cpu", trainable=False)
    model = attach(base, AdapterSection(r=4))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    run = tmp_path / "run"
    meta = AdapterMeta(str(tiny_model_dir), None, base_fingerprint(str(tiny_model_dir)), None, "llama3", (4,))
    save_adapter(model, run / "adapter", meta)
    (run / "recipe.yaml").write_text(
        f"model: {{name_or_path: {tiny_model_dir}}}\ndata: {{train: gone.jsonl}}\n"
        "train: {output_dir: runs/x, learning_rate: 1e-4}\ngenerate: {max_new_tokens: 3}\n"
    )
    return run


def test_a_prompt_is_answered_as_plain_transformers_would(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = ask(tiny_model_dir)
    out = capsys.readouterr()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    text = (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is the capital?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    lm = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    stop = [tokenizer.convert_tokens_to_ids(t) for t in ("<|eot_id|>", "<|end_of_text|>")]
    new = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=stop)
    expected = [i for i in new[0, ids.shape[1] :].tolist() if i not in stop]
    assert answer.text == tokenizer.decode(expected)
    assert out.out == answer.text + "\n"
    assert answer.stopped or out.err.endswith("the answer was cut at --max-new-tokens 6\n")


def test_a_system_message_comes_first_and_changes_the_prompt(tiny_model_dir: Path) -> None:
    answer = ask(tiny_model_dir, system="Be brief.")
    assert answer.prompt.messages == (Message("system", "Be brief."), Message("user", "What is the capital?"))


def test_ghost_attention_asks_with_the_system_message_in_every_turn(tiny_model_dir: Path) -> None:
    haunted = ask(tiny_model_dir, system="Be brief.", ghost_attention=True)
    spelled = ask(tiny_model_dir, "Be brief.\n\nWhat is the capital?", system="Be brief.")
    assert haunted.text == spelled.text != ask(tiny_model_dir, system="Be brief.").text
    assert haunted.prompt.messages == (Message("system", "Be brief."), Message("user", "What is the capital?"))
    with pytest.raises(UserError, match="there is none; give --system too"):
        ask(tiny_model_dir, ghost_attention=True)


def test_raw_continues_text_without_a_template(tiny_model_dir: Path) -> None:
    answer = ask(tiny_model_dir, "The cat", raw=True, chat_template=None)
    assert answer.prompt.messages == (Message("text", "The cat"),)
    with pytest.raises(UserError, match="--system has no effect with --raw"):
        ask(tiny_model_dir, raw=True, system="x")


def test_samples_repeat_with_their_seed(tiny_model_dir: Path) -> None:
    hot = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 50}
    first, again = (ask(tiny_model_dir, settings=hot, seed=3).text for _ in range(2))
    assert first == again
    assert any(ask(tiny_model_dir, settings=hot, seed=seed).text != first for seed in (4, 5, 6))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_file_of_prompts_becomes_rows(
    tiny_model_dir: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / f"prompts{suffix}", tmp_path / "out" / "answers.jsonl"
    if suffix == ".txt":
        file.write_text("One?\n\nTwo?\n")
    else:
        rows = [{"prompt": "One?"}, {"messages": [{"role": "user", "content": "Two?"}], "answer": "ignored"}]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"model": str(tiny_model_dir), "adapter": None, "prompt": None, "file": file}
    sample.run(**options, chat_template="llama3", settings=FEW)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["messages"][-1]["content"] for row in printed] == ["One?", "Two?"]
    sample.run(**options, chat_template="llama3", settings=FEW, output=output)
    assert [json.loads(line) for line in output.read_text().splitlines()] == printed
    assert capsys.readouterr().out == ""
    with pytest.raises(RunDirError, match="answers.jsonl' exists"):
        sample.run(**options, output=output)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "x"}, "line 1: has none of the keys messages, prompt and text; it has question"),
        ({"prompt": ""}, "line 1: the prompt is empty"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "ends with the assistant's turn"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "wizard"),
        ({"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}, "leave out --system"),
    ],
)
def test_rows_that_cannot_be_answered_are_refused(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError) as caught:
        sample.read_prompts(file, "Be brief.", raw=False)
    assert expected in str(caught.value) and str(file) in str(caught.value)


def test_an_adapter_speaks_through_its_run_or_its_directory(run_dir: Path, tiny_model_dir: Path) -> None:
    by_run = ask(None, adapter=run_dir, settings={}, chat_template=None)
    by_directory = ask(None, adapter=run_dir / "adapter", settings={}, chat_template=None)
    assert by_run.text == by_directory.text
    assert by_run.text != ask(tiny_model_dir, settings={"max_new_tokens": 3}).text


def test_a_run_brings_its_own_settings(run_dir: Path) -> None:
    subject = sample.find_subject(None, run_dir)
    assert subject.settings == GenerateSection(max_new_tokens=3)
    assert (subject.chat_template, subject.adapter) == ("llama3", run_dir / "adapter")


@pytest.mark.parametrize("name", ["own", "none"])
def test_a_template_that_is_none_of_ours_is_the_base_tokenizers(run_dir: Path, name: str) -> None:
    file = run_dir / "adapter" / "tuner.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": name}))
    assert sample.find_subject(None, run_dir).chat_template == "auto"


def test_a_quantised_base_is_loaded_as_it_was_trained_on(run_dir: Path) -> None:
    file = run_dir / "adapter" / "tuner.json"
    meta = json.loads(file.read_text())
    meta["quantization"] = {"type": "nf4", "double_quant": False, "compute_dtype": "float32"}
    file.write_text(json.dumps(meta))
    model = sample.find_subject(None, run_dir).model
    assert (model.load_in_4bit, model.bnb_4bit_use_double_quant, model.dtype) == (True, False, "float32")
    assert ask(None, adapter=run_dir, chat_template=None).text


def test_a_base_that_has_moved_or_changed(run_dir: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.move(tiny_model_dir, moved)
    with pytest.raises(ModelError, match="say where it is with --base"):
        sample.find_subject(None, run_dir)
    assert sample.find_subject(None, run_dir, str(moved)).model.name_or_path == str(moved)
    weights = moved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ModelError, match="was trained on another base"):
        sample.find_subject(None, run_dir, str(moved))


def test_model_and_adapter_are_told_apart(run_dir: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"holds an adapter; give it as --adapter {run_dir}"):
        sample.find_subject(str(run_dir), None)
    with pytest.raises(ModelError, match=f"holds a full model; give it as --model {tiny_model_dir}"):
        sample.find_subject(None, tiny_model_dir)
    full = tmp_path / "full"
    shutil.copytree(tiny_model_dir, full / "model")
    assert sample.find_subject(str(full), None).model.name_or_path == str(full / "model")
    with pytest.raises(ModelError, match="holds neither a checkpoint"):
        sample.find_subject(str(tmp_path), None)
    (run_dir / "adapter" / "tuner.json").unlink()
    with pytest.raises(ModelError, match="has no tuner.json"):
        sample.find_subject(None, run_dir)


def test_sampling_settings_without_effect_are_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(UserError, match="--top-k has no effect at temperature 0"):
        ask(tiny_model_dir, settings={"top_k": 3})


def test_odd_arguments_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    nowhere: Any = tmp_path / "nowhere"
    with pytest.raises(DataError, match="the prompt is not UTF-8 text"):
        ask(nowhere, "\udcff")
    with pytest.raises(DataError, match="the prompt is not UTF-8 text"):
        ask(nowhere, system="\udcff")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirError, match="--output: the folder of .* cannot be made"):
        ask(nowhere, output=tmp_path / "file" / "x" / "answers.jsonl")


def test_an_endless_temperature_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(UserError, match="--temperature: expected a finite number, got inf"):
        ask(tiny_model_dir, settings={"temperature": float("inf")})


@pytest.mark.parametrize("damage", ['{"base": 3}', "{}", "[]", "{"])
def test_a_damaged_tuner_json_is_named(run_dir: Path, damage: str) -> None:
    file = run_dir / "adapter" / "tuner.json"
    known = json.loads(file.read_text())
    file.write_text(json.dumps(known | {"base": 3}) if "base" in damage else damage)
    with pytest.raises(ModelError, match="tuner.json cannot be read; the adapter directory is damaged"):
        ask(None, adapter=run_dir)
