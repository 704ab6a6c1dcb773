"""Invariant 9: a merged model scores like the adapter it came from, and says how closely and on which base."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
)

from tuner.checkpoint import RunDir
from tuner.data.templates import TEMPLATES
from tuner.errors import ModelError, RunDirError, RunError
from tuner.export import merge as module
from tuner.export.merge import MARK, MergeReport, merge
from tuner.generate import generate
from tuner.model.adapter import AdapterMeta, attach, save_adapter
from tuner.model.fuse import fuse
from tuner.model.load import base_fingerprint, load_base
from tuner.recipe import AdapterSection, ModelSection

# peft 0.21 asks transformers 5.23 under an older name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

EOT = 4  # <|eot_id|>
PROMPTS = [[0, 40, 50, 60, 70, 80], [0, 200, 201, 31, 99], list(range(100, 140))]
NF4 = {"type": "nf4", "double_quant": True, "compute_dtype": "float32"}


def trained(base_dir: Path, quantization: dict[str, Any] | None = None, *, reward: bool = False, **adapter: Any) -> Any:
    """A model whose adapter has moved, as after training."""
    dtype = quantization["compute_dtype"] if quantization else "float32"
    section = ModelSection(name_or_path=str(base_dir), dtype=dtype, load_in_4bit=quantization is not None)
    torch.manual_seed(1)
    base = load_base(section, "cpu", trainable=False, reward=reward)
    model = attach(base, AdapterSection(**({"r": 4} | adapter)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    fuse(model)
    return model.eval()


def save(model: Any, base_dir: Path, directory: Path, quantization: dict[str, Any] | None = None, **meta: Any) -> Path:
    fields = {
        "base": str(base_dir),
        "revision": None,
        "base_sha256": base_fingerprint(str(base_dir)),
        "quantization": quantization,
        "chat_template": "llama3",
        "stop_ids": (EOT, 1),
    }
    save_adapter(model, directory, AdapterMeta(**(fields | meta)))
    return directory


def fresh_logits(directory: Path) -> list[torch.Tensor]:
    return module.logits(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), PROMPTS)


def largest_difference(expected: list[torch.Tensor], actual: list[torch.Tensor]) -> float:
    return max(float((e - a).abs().max()) for e, a in zip(expected, actual, strict=True))


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "attention": {"target_modules": ("q_proj", "v_proj")},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "head": {"modules_to_save": ("lm_head", "embed_tokens")},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_merged_model_scores_like_what_was_trained(tiny_model_dir: Path, tmp_path: Path, variant: str) -> None:
    model = trained(tiny_model_dir, **VARIANTS[variant])
    expected = module.logits(model, PROMPTS)
    assert largest_difference(expected, fresh_logits(tiny_model_dir)) > 0.05  # the adapter does something
    report = merge(save(model, tiny_model_dir, tmp_path / "adapter"), tmp_path / "out", prompts=PROMPTS)
    assert largest_difference(expected, fresh_logits(tmp_path / "out")) < 1e-4
    assert report.max_difference < 1e-4 and report.agreement == 1.0
    assert report.tokens == sum(map(len, PROMPTS)) and report.dtype == "float32"


def test_mutant_a_merge_with_another_scaling(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merge itself must notice: it compares what it wrote with the adapter, and publishes nothing."""
    adapter = save(trained(tiny_model_dir), tiny_model_dir, tmp_path / "adapter")
    merged = module._merged

    def wrong(*arguments: Any) -> Any:
        model, *rest = merged(*arguments)
        model.model.layers[0].mlp.down_proj.weight.data *= 1.1
        return model, *rest

    monkeypatch.setattr(module, "_merged", wrong)
    with pytest.raises(RunError, match="does not score like the adapter"):
        merge(adapter, tmp_path / "out", prompts=PROMPTS)
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


@pytest.fixture
def qlora(tiny_model_dir: Path, tmp_path: Path) -> tuple[Any, Path]:
    model = trained(tiny_model_dir, NF4)
    return model, save(model, tiny_model_dir, tmp_path / "adapter", NF4)


def test_a_qlora_adapter_merges_onto_the_dequantised_base(qlora: tuple[Any, Path], tmp_path: Path) -> None:
    model, adapter = qlora
    # evaluating and generating before the merge must change nothing (bitsandbytes repacks on some CPUs)
    generate(model, PROMPTS, stop_ids=[EOT], pad_id=7, max_new_tokens=4)
    expected = module.logits(model, PROMPTS)
    report = merge(adapter, tmp_path / "out", prompts=PROMPTS)
    assert largest_difference(expected, fresh_logits(tmp_path / "out")) < 1e-4
    assert "dequantised from NF4, double quantisation" in report.base_weights
    assert any("dequantised from NF4" in line for line in report.lines())
    assert "dequantised from NF4" in json.loads((tmp_path / "out" / MARK).read_text())["base_weights"]
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_mutant_a_qlora_adapter_on_the_original_weights(
    qlora: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stored(section: ModelSection, is_reward: bool) -> tuple[Any, str]:
        plain = section.model_copy(update={"load_in_4bit": False})
        return load_base(plain, "cpu", trainable=False), "dequantised from NF4, double quantisation"

    monkeypatch.setattr(module, "_reference_base", stored)
    with pytest.raises(AssertionError):
        test_a_qlora_adapter_merges_onto_the_dequantised_base(qlora, tmp_path)


def test_the_dequantised_base_is_the_trained_one_in_bf16_too(tiny_model_dir: Path) -> None:
    """Quantised from bf16 weights, norms and head rounded to bf16: what the run saw, not what is stored."""
    section = ModelSection(name_or_path=str(tiny_model_dir), dtype="bfloat16", load_in_4bit=True)
    seen = load_base(section, "cpu", trainable=False)
    plain = module.dequantized_base(section)
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    for name, module_ in seen.named_modules():
        if module.quantize.is_4bit(module_):
            assert torch.equal(plain.get_submodule(name).weight, module.quantize.dequantize(module_, torch.float32))
    assert torch.equal(plain.lm_head.weight, seen.lm_head.weight.float())
    assert torch.equal(plain.model.norm.weight, seen.model.norm.weight.float())


def test_the_merge_is_stored_as_the_base_is(
    make_model: Callable[..., LlamaForCausalLM], tiny_model_dir: Path, tmp_path: Path
) -> None:
    make_model().to(torch.bfloat16).save_pretrained(tiny_model_dir)
    model = trained(tiny_model_dir)
    expected = module.logits(model, PROMPTS)
    adapter = save(model, tiny_model_dir, tmp_path / "adapter")
    report = merge(adapter, tmp_path / "out", prompts=PROMPTS)
    assert report.dtype == "bfloat16" and dtypes(tmp_path / "out") == {"BF16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    rounding = largest_difference(expected, fresh_logits(tmp_path / "out"))
    assert rounding == pytest.approx(report.max_difference, abs=1e-4) and 1e-4 < rounding < 0.2
    # one cast of the fp32 sum: every weight is the nearest bf16 to it
    merged = model.merge_and_unload()
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    weight = merged.model.layers[1].mlp.up_proj.weight.to(torch.bfloat16)
    assert torch.equal(stored.model.layers[1].mlp.up_proj.weight, weight)
    report = merge(adapter, tmp_path / "wide", dtype="float32", prompts=PROMPTS)
    assert report.max_difference < 1e-4 and dtypes(tmp_path / "wide") == {"F32"}
    with pytest.raises(ModelError, match="--dtype: 'int3'"):
        merge(adapter, tmp_path / "no", dtype="int3")


def dtypes(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}


FRESH = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
lm, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, output_loading_info=True)
assert not any(info.values()), info
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": "hello"}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
out = lm.generate(ids, max_new_tokens=8, do_sample=False)
print(json.dumps({"ids": out[0].tolist(), "eos": lm.generation_config.eos_token_id,
                  "modules": sorted(m for m in sys.modules if m.startswith(("tuner", "peft")))}))
"""


def test_a_fresh_process_needs_plain_transformers_only(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = trained(tiny_model_dir)
    merge(save(model, tiny_model_dir, tmp_path / "adapter"), tmp_path / "out")
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    (tmp_path / "moved").mkdir()
    (tmp_path / "out").rename(tmp_path / "moved" / "out")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, "moved/out"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["modules"] == []
    assert said["eos"] == [EOT, 1]
    template = AutoTokenizer.from_pretrained(tmp_path / "moved" / "out").chat_template
    assert template == TEMPLATES["llama3"].jinja
    prompt = len(said["ids"]) - 8
    new = generate(model, [said["ids"][:prompt]], stop_ids=[EOT, 1], pad_id=7, max_new_tokens=8)[0]
    assert said["ids"][prompt:] == new
    for path in (tmp_path / "moved" / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path


def test_ids_of_the_base_and_of_training_are_united(tiny_model_dir: Path, tmp_path: Path) -> None:
    shipped = GenerationConfig(eos_token_id=[1, 5], temperature=0.6, top_p=0.9)  # as Llama 2: no do_sample
    path = tiny_model_dir / "generation_config.json"
    path.write_text(json.dumps(shipped.to_diff_dict()))
    merge(save(trained(tiny_model_dir), tiny_model_dir, tmp_path / "adapter"), tmp_path / "out", prompts=PROMPTS)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [EOT, 1, 5] and written["temperature"] == 0.6 and written["do_sample"] is True
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == [EOT, 1, 5]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert config["pad_token_id"] == written["pad_token_id"] == tokenizer.pad_token_id == 7


# --- tied embeddings --------------------------------------------------------------------------------------------------


@pytest.fixture
def tied(make_model: Callable[..., LlamaForCausalLM], tiny_model_dir: Path) -> Path:
    make_model(tie_word_embeddings=True).save_pretrained(tiny_model_dir)
    return tiny_model_dir


def test_tied_embeddings_stay_tied(tied: Path, tmp_path: Path) -> None:
    model = trained(tied)
    expected = module.logits(model, PROMPTS)
    merge(save(model, tied, tmp_path / "adapter"), tmp_path / "out", prompts=PROMPTS)
    assert largest_difference(expected, fresh_logits(tmp_path / "out")) < 1e-4
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()


@pytest.mark.parametrize("target", [{"target_modules": ["embed_tokens"]}, {"target_modules": ["lm_head"]}])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_on_tied_embeddings_is_refused(tied: Path, tmp_path: Path, target: dict[str, Any]) -> None:
    lm = AutoModelForCausalLM.from_pretrained(tied)
    get_peft_model(lm, LoraConfig(r=2, **target)).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ModelError, match="ties together"):
        merge(tmp_path / "adapter", tmp_path / "out", base=str(tied), prompts=PROMPTS)


# --- run directories, other tools' adapters, refusals -----------------------------------------------------------------

RECIPE = """
version: 1
stage: sft
model: {{name_or_path: {base}}}
adapter: {{r: 4}}
data: {{train: {data}, {extra}}}
train: {{output_dir: {out}, learning_rate: 1.0e-3}}
eval: {{{eval}}}
"""


def make_run(tmp_path: Path, base: Path, extra: str = "", kind: Any = trained, questions: str = "") -> Path:
    text = RECIPE.format(base=base, data=base / "x.jsonl", out=tmp_path / "chat", extra=extra, eval=questions)
    with RunDir.create(tmp_path / "chat", text, {}, resume=False, overwrite=False) as run:
        run.write_result("adapter", lambda d: save(kind(base), base, d))
        run.finish({})
    return tmp_path / "chat"


def test_a_run_is_merged_beside_its_adapter_on_what_it_held_out(tiny_model_dir: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    row = {"messages": [{"role": "user", "content": "What is the capital?"}], "answer": "The answer is short."}
    questions.write_text(f"{json.dumps(row)}\n" * 20)
    run = make_run(tmp_path, tiny_model_dir, questions=f"questions: {questions}")
    report = merge(run)
    assert report.output == run / "merged" and report.prompts == "held out by the run" and report.tokens > 40
    assert (run / "merged" / "config.json").is_file() and not (run / "adapter" / "config.json").exists()
    with pytest.raises(RunDirError, match="--overwrite"):
        merge(run)
    questions.unlink()
    again = merge(run, overwrite=True)
    assert again.prompts == "built in" and again.max_difference < 1e-4
    assert merge(run / "adapter", tmp_path / "third").output == tmp_path / "third"
    assert merge(run / "adapter", overwrite=True).output == run / "merged"


def test_held_out_rows_serve_as_prompts(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "one"}]} for i in range(9)
    ]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = make_run(tmp_path, tiny_model_dir, extra=f"eval: {tmp_path / 'eval.jsonl'}, chat_template: llama3")
    assert merge(run).prompts == "held out by the run"


def test_a_corrupted_adapter_of_a_run_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, tiny_model_dir)
    weights = run / "adapter" / "adapter_model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    for path in (run, run / "adapter"):
        with pytest.raises(ModelError, match=re.escape("adapter_model.safetensors is not the file that the run wrote")):
            merge(path, tmp_path / "out")


def test_another_base_is_refused_and_a_moved_one_found(
    make_model: Callable[..., LlamaForCausalLM], tiny_model_dir: Path, tmp_path: Path
) -> None:
    adapter = save(trained(tiny_model_dir), tiny_model_dir, tmp_path / "adapter")
    moved = tiny_model_dir.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match="neither a directory nor a Hub id"):
        merge(adapter, tmp_path / "out")
    assert isinstance(merge(adapter, tmp_path / "out", base=str(moved), prompts=PROMPTS), MergeReport)
    make_model(seed=9).save_pretrained(moved)
    with pytest.raises(ModelError, match="trained on another base"):
        merge(adapter, tmp_path / "two", base=str(moved), prompts=PROMPTS)


def test_an_adapter_of_plain_peft_is_merged_with_a_warning(tiny_model_dir: Path, tmp_path: Path) -> None:
    lm = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    torch.manual_seed(0)
    model = get_peft_model(lm, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    expected = module.logits(model, PROMPTS)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    report = merge(tmp_path / "adapter", tmp_path / "out", prompts=PROMPTS)
    assert largest_difference(expected, fresh_logits(tmp_path / "out")) < 1e-4
    assert "no tuner.json" in report.warnings[0] and any("no tuner.json" in line for line in report.lines())


def test_what_cannot_be_merged_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither a run directory nor an adapter"):
        merge(tmp_path / "nothing")
    with pytest.raises(ModelError, match="full weights, so there is nothing to merge"):
        merge(tiny_model_dir)
    with RunDir.create(tmp_path / "full", "", {}, resume=False, overwrite=False) as run:
        with pytest.raises(ModelError, match="has not finished"):
            merge(run.path)
        run.write_result("model", lambda d: (d / "config.json").write_text("{}"))
        with pytest.raises(ModelError, match=r"nothing to merge; .*full/model is ready"):
            merge(run.path)
    (tmp_path / "ia3").mkdir()
    (tmp_path / "ia3" / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ModelError, match="is a IA3 adapter"):
        merge(tmp_path / "ia3")


def test_outputs_that_are_not_ours_are_left_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    adapter = save(trained(tiny_model_dir), tiny_model_dir, tmp_path / "adapter")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("miaow")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    with pytest.raises(RunDirError, match="not a merge of tuner's"):
        merge(adapter, tmp_path / "photos", overwrite=True)
    with pytest.raises(RunDirError, match="symbolic link"):
        merge(adapter, tmp_path / "link", overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "miaow"


def test_a_failed_replacement_keeps_the_old_merge(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save(trained(tiny_model_dir), tiny_model_dir, tmp_path / "adapter")
    merge(adapter, tmp_path / "out", prompts=PROMPTS)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def broken(directory: Path, is_reward: bool) -> Any:
        raise RunError("no")

    monkeypatch.setattr(module, "_fresh", broken)
    with pytest.raises(RunError):
        merge(adapter, tmp_path / "out", prompts=PROMPTS, overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "out", "tiny-model"]


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("adapter_model.safetensors", None, "holds no adapter_model.safetensors"),
        ("adapter_model.safetensors", b"", "adapter_model.safetensors cannot be read"),
        ("adapter_model.safetensors", b"\x40" + bytes(7) + b"{}", "adapter_model.safetensors cannot be read"),
        ("adapter_config.json", b"{", "adapter_config.json cannot be read"),
        ("adapter_config.json", b"[]", "adapter_config.json cannot be read"),
        ("adapter_config.json", b"{}", "is a None adapter"),
        ("tuner.json", b"{}", "tuner.json cannot be read"),
    ],
)
def test_a_damaged_adapter_is_named(
    tiny_model_dir: Path, tmp_path: Path, file: str, content: bytes | None, expected: str
) -> None:
    adapter = save(trained(tiny_model_dir), tiny_model_dir, tmp_path / "adapter")
    if content is None:
        (adapter / file).unlink()
    else:
        (adapter / file).write_bytes(content)
    with pytest.raises(ModelError, match=expected):
        merge(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_has_moved_is_asked_for(tiny_model_dir: Path, tmp_path: Path) -> None:
    adapter = save(trained(tiny_model_dir), tiny_model_dir, tmp_path / "adapter")
    tiny_model_dir.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match="cannot be used .*; say where it is with --base"):
        merge(adapter, tmp_path / "out")


def test_a_template_whose_answers_are_of_another_kind_is_no_obstacle(tiny_model_dir: Path, tmp_path: Path) -> None:
    adapter = save(trained(tiny_model_dir), tiny_model_dir, tmp_path / "adapter", chat_template="llama_guard")
    report = merge(adapter, tmp_path / "out")
    assert report.prompts == "built in" and report.tokens == len(module._BUILT_IN) * module.MAX_TOKENS
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATES["llama_guard"].saved()


# --- reward models ----------------------------------------------------------------------------------------------------


def judge(base_dir: Path, quantization: dict[str, Any] | None = None) -> Any:
    """A reward model whose adapter and score head have moved, as after training."""
    return trained(base_dir, quantization, reward=True)


def fresh_rewards(directory: Path, prompts: list[list[int]] = PROMPTS) -> list[torch.Tensor]:
    return module.logits(AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32), prompts)


def test_a_reward_model_becomes_a_plain_classifier(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = judge(tiny_model_dir)
    expected = module.logits(model, PROMPTS)
    assert torch.cat(expected).std() > 0.05
    report = merge(save(model, tiny_model_dir, tmp_path / "adapter"), tmp_path / "out", prompts=PROMPTS)
    assert largest_difference(expected, fresh_rewards(tmp_path / "out")) < 1e-5
    assert (report.scores, report.agreement, report.max_difference < 1e-5) == ("rewards", 1.0, True)
    assert any("largest difference of rewards" in line and "same order: 100.00%" in line for line in report.lines())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["pad_token_id"] not in (EOT, 1), "transformers reads the reward before its first padding"
    ends = [[*prompt, EOT] for prompt in PROMPTS]
    assert largest_difference(module.logits(model, ends), fresh_rewards(tmp_path / "out", ends)) < 1e-5
    assert load_base(ModelSection(name_or_path=str(tmp_path / "out")), "cpu", trainable=False, reward=True)


def test_mutant_a_score_head_that_is_left_behind(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save(judge(tiny_model_dir), tiny_model_dir, tmp_path / "adapter")
    merged = module._merged

    def without(*arguments: Any) -> Any:
        model, *rest = merged(*arguments)
        model.score.weight.data.zero_()
        return model, *rest

    monkeypatch.setattr(module, "_merged", without)
    with pytest.raises(RunError, match=r"does not score like the adapter \(rewards differ by up to"):
        merge(adapter, tmp_path / "out", prompts=PROMPTS)


def test_the_score_head_stays_in_fp32(
    make_model: Callable[..., LlamaForCausalLM], tiny_model_dir: Path, tmp_path: Path
) -> None:
    make_model().to(torch.bfloat16).save_pretrained(tiny_model_dir)
    model = judge(tiny_model_dir)
    report = merge(save(model, tiny_model_dir, tmp_path / "adapter"), tmp_path / "out", prompts=PROMPTS)
    assert report.dtype == "bfloat16" and "the score head as float32" in report.lines()[0]
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        found = {name: file.get_slice(name).get_dtype() for name in file.keys()}
        score = file.get_tensor("score.weight")
    assert {name for name, dtype in found.items() if dtype == "F32"} == {"score.weight"}
    assert torch.equal(score, model.get_base_model().score.modules_to_save["default"].weight)


@pytest.mark.parametrize("tied", [False, True])
def test_a_qlora_reward_adapter_merges_onto_the_dequantised_base(
    make_model: Callable[..., LlamaForCausalLM], tiny_model_dir: Path, tmp_path: Path, tied: bool
) -> None:
    """With embeddings trained beside it, which nothing is tied to where there is no language head."""
    make_model(tie_word_embeddings=tied).save_pretrained(tiny_model_dir)
    model = trained(tiny_model_dir, NF4, reward=True, modules_to_save=("embed_tokens",))
    adapter = save(model, tiny_model_dir, tmp_path / "adapter", NF4)
    expected = module.logits(model, PROMPTS)
    report = merge(adapter, tmp_path / "out", prompts=PROMPTS)
    assert largest_difference(expected, fresh_rewards(tmp_path / "out")) < 1e-5
    assert "dequantised from NF4" in report.base_weights
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_held_out_pairs_serve_as_prompts(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "chosen": "The answer is short.", "rejected": "one two"} for i in range(3)]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = make_run(tmp_path, tiny_model_dir, f"eval: {tmp_path / 'eval.jsonl'}, chat_template: llama3", judge)
    report = merge(run)
    assert report.prompts == "held out by the run" and report.scores == "rewards"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = TEMPLATES["llama3"].jinja
    lengths = [
        len(tokenizer.apply_chat_template(_turns(row, side), return_dict=False))
        for row in rows
        for side in ("chosen", "rejected")
    ]
    assert report.tokens == sum(lengths), "each answer after its prompt"


def _turns(row: dict[str, str], side: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
