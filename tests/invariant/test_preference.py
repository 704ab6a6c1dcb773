"""Invariants 3 to 6 for preferences: each pair starts at ln 2, the reference never moves, sharing a prompt is exact."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.conftest import SENTENCES
from tuner import recipe as recipes
from tuner.data.pack import pack
from tuner.errors import DataError, ModelError, RecipeError
from tuner.losses import preference
from tuner.model.policy import Policy
from tuner.model.reference import Reference
from tuner.stages import dpo, sft
from tuner.stages import pairs as pairs_stage
from tuner.stages import reference as references
from tuner.stages.pairs import DPO
from tuner.stages.reference import KeptLogps
from tuner.train.loop import Loop, Taken
from tuner.types import Batch, Tokens, span

LN2 = math.log(2)


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """20 pairs of very different lengths, with margins."""
    rng, words = np.random.default_rng(0), " ".join(SENTENCES).split()

    def say(count: int) -> str:
        return " ".join(rng.choice(words, count))

    rows = [
        {"prompt": say(int(rng.integers(1, 20))), "chosen": say(1 + i % 9), "rejected": say(9 - i % 7), "margin": i % 3}
        for i in range(20)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def pref(tiny_model_dir: Path, pairs_file: Path, tmp_path: Path) -> Path:
    """A LoRA recipe over the pairs: steps of 8 pairs (three an epoch), fp32, one thread."""
    file = tmp_path / "pref.yaml"
    file.write_text(
        f"""
stage: dpo
model: {{name_or_path: {tiny_model_dir}, dtype: float32}}
adapter: {{r: 4, lora_alpha: 8}}
data: {{train: {pairs_file}, chat_template: llama3, max_length: 256}}
train: {{output_dir: {tmp_path}/pref, batch_size: 8, max_steps: 4, learning_rate: 5e-3, threads: 1}}
"""
    )
    return file


def run(pref: Path, output: Path, *overrides: str, resume: bool = False) -> list[dict[str, Any]]:
    """Trains, and gives the lines of metrics.jsonl."""
    dpo.run(recipes.load(pref, [f"train.output_dir={output}", *overrides], stage="dpo"), resume=resume)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def adapter(output: Path) -> dict[str, Tensor]:
    (file,) = [*output.glob("adapter/adapter_model.safetensors"), *output.glob("model/model.safetensors")]
    return load_file(file)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    assert max(float((a[name] - b[name]).abs().max()) for name in a) <= tolerance


# --- step 0 ---


@pytest.fixture
def first_pairs(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The log-ratios of each pair, as the first optimizer step sees them."""
    seen: list[Tensor] = []
    measure = pairs_stage.measure

    def noted(pairs: Any) -> dict[str, Tensor]:
        seen.append(torch.stack([pairs.chosen.ratio, pairs.rejected.ratio]).detach())
        return measure(pairs)

    monkeypatch.setattr(pairs_stage, "measure", noted)
    return seen


STARTS = {
    "lora": [],
    "full": ["adapter=null", "train.learning_rate=1e-4"],
    "dora": ["adapter.use_dora=true"],
    "pissa": ["adapter.init_lora_weights=pissa"],
    "qlora": ["model.load_in_4bit=true"],
    "cached": ["reference.cache=true"],
}


@pytest.mark.parametrize("start", STARTS)
def test_every_pair_starts_at_ln_2(start: str, pref: Path, tmp_path: Path, first_pairs: list[Tensor]) -> None:
    lines = run(pref, tmp_path / "run", *STARTS[start])
    assert float(first_pairs[0].abs().max()) <= 1e-6
    assert lines[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert lines[0]["accuracy"] == 0.5  # ties count half
    assert abs(lines[1]["margin"]) > 1e-4, "the policy has moved away from its reference"


def test_a_continued_adapter_is_its_own_reference(
    pref: Path, recipe_file: Path, tmp_path: Path, first_pairs: list[Tensor]
) -> None:
    dropout = ["adapter.lora_dropout=0.3", f"train.output_dir={tmp_path}/sft", "train.learning_rate=5e-2"]
    sft.run(recipes.load(recipe_file, dropout))
    lines = run(pref, tmp_path / "run", "adapter={path: " + f"{tmp_path}/sft" + "}")
    assert float(first_pairs[0].abs().max()) <= 1e-6
    assert lines[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.0


def test_dropout_of_the_checkpoint_is_off(
    pref: Path, tiny_model_dir: Path, tmp_path: Path, first_pairs: list[Tensor]
) -> None:
    config = json.loads((tiny_model_dir / "config.json").read_text())
    (tiny_model_dir / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.3}))
    run(pref, tmp_path / "run")
    assert float(first_pairs[0].abs().max()) <= 1e-6
    with pytest.raises(RecipeError, match=r"adapter.lora_dropout.*set it to 0"):
        recipes.load(pref, ["adapter.lora_dropout=0.1"], stage="dpo")


def test_mutant_a_reference_that_is_the_base(
    pref: Path, recipe_file: Path, tmp_path: Path, first_pairs: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    sft.run(recipes.load(recipe_file, [f"train.output_dir={tmp_path}/sft", "train.learning_rate=5e-2"]))
    monkeypatch.setattr("tuner.model.reference._starts_at_zero", lambda policy: True)
    run(pref, tmp_path / "run", "adapter={path: " + f"{tmp_path}/sft" + "}")
    assert float(first_pairs[0].abs().max()) > 1e-3


# --- the reference ---


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_reference_never_moves_and_is_plain_transformers(
    kind: str, pref: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log-probs in every step are those of the checkpoint, row by row, without tuner's packing or attention."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    seen: list[tuple[Sequence[Tokens], Tensor]] = []
    constants = DPO.constants

    def noted(self: DPO, batch: Batch, samples: Sequence[Tokens]) -> Tensor:
        table = constants(self, batch, samples)
        seen.append((samples, table[:, 2:4]))  # after the counts of tokens
        return table

    monkeypatch.setattr(DPO, "constants", noted)
    run(pref, tmp_path / "run", *STARTS[kind])
    assert len(seen) >= 4
    for samples, found in seen:
        assert torch.allclose(found, torch.tensor([alone(plain, sample) for sample in samples]), atol=1e-4)


def alone(lm: LlamaForCausalLM, sample: Tokens) -> list[float]:
    """The log-prob of each answer after its prompt, by plain transformers."""
    sums = []
    for branch in sample.branches:
        prompt = [int(i) for s in sample.trunk for i in s.ids]
        answer = [int(i) for s in branch for i in s.ids]
        with torch.no_grad():
            logits = lm(input_ids=torch.tensor([prompt + answer])).logits[0].float()
        logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        sums.append(float(logps[torch.arange(len(answer)), torch.tensor(answer)].sum()))
    return sums


def test_a_reference_by_path_is_that_model(
    pref: Path, make_model: Callable[..., LlamaForCausalLM], tiny_model_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    make_model(seed=5).save_pretrained(other)
    for file in tiny_model_dir.glob("token*"):
        (other / file.name).write_bytes(file.read_bytes())
    lines = run(pref, tmp_path / "run", f"reference.model={other}")
    assert abs(lines[0]["loss"] - LN2) > 1e-3
    same = run(pref, tmp_path / "same", f"reference.model={tiny_model_dir}")
    assert same[0]["loss"] == pytest.approx(LN2, abs=1e-6)


def test_kept_log_probs_change_nothing(pref: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(pref, tmp_path / "online")
    run(pref, tmp_path / "cached", "reference.cache=true")
    assert_same(adapter(tmp_path / "online"), adapter(tmp_path / "cached"), 1e-6)
    calls: list[Batch] = []
    original = Reference.__call__
    monkeypatch.setattr(Reference, "__call__", lambda self, batch: calls.append(batch) or original(self, batch))
    run(pref, tmp_path / "again", "reference.cache=true", "train.seed=1", "adapter.init_lora_weights=gaussian")
    assert calls, "other starting weights are scored anew"
    calls.clear()
    run(pref, tmp_path / "third", "reference.cache=true", "train.batch_size=4")
    assert not calls, "the same weights and rows are not scored twice, in whatever order and batches"


def test_ranks_save_kept_log_probs_in_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One object and two process ids: ranks do the same things, so that their objects lie at the same addresses."""
    kept = KeptLogps(tmp_path, "weights", torch.device("cpu"))
    monkeypatch.setattr(kept, "_new", 1)
    kept.logps = {"row": np.zeros(3, np.float32)}
    written: list[Path] = []

    def save(tensors: dict[str, Any], path: Path) -> None:
        written.append(path)
        save_file(tensors, path)

    monkeypatch.setattr(references, "save_file", save)
    for process in (11, 12):
        monkeypatch.setattr("os.getpid", lambda process=process: process)
        kept.save()
    assert len(set(written)) == 2 and list(tmp_path.iterdir()) == [kept.file]


# --- exactness ---


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "orpo", "aot", "ld"])
def test_microbatches_do_not_matter(kind: str, pref: Path, tmp_path: Path) -> None:
    loss = {"ld": "loss={type: sigmoid, ld_alpha: 0.5}"}.get(kind, f"loss.type={kind}")
    for name, split in (("one", "train.microbatch_tokens=100000"), ("alone", "data.packing=false")):
        run(pref, tmp_path / name, loss, split, "train.learning_rate=1e-4", "train.max_steps=12")
    assert_same(adapter(tmp_path / "one"), adapter(tmp_path / "alone"), 1e-6)


def test_mutant_aot_sorted_within_microbatches(pref: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DPO, "whole_step", False)
    for name, split in (("one", "train.microbatch_tokens=100000"), ("alone", "data.packing=false")):
        run(
            pref,
            tmp_path / name,
            "loss.type=aot",
            split,
            "train.learning_rate=2e-2",
            "loss.beta=1.0",
            "train.max_steps=12",
        )
    with pytest.raises(AssertionError):
        assert_same(adapter(tmp_path / "one"), adapter(tmp_path / "alone"), 1e-3)


def random_pairs(count: int) -> list[Tokens]:
    rng = np.random.default_rng(3)

    def part(trained: bool) -> tuple[Any, ...]:
        return (span(rng.integers(24, 300, int(rng.integers(1, 30))), trained),)

    return [Tokens(part(False), (part(True), part(True)), "pairs.jsonl", row) for row in range(count)]


def gradients(policy: Policy, stage: DPO, groups: Sequence[Sequence[Tokens]]) -> tuple[float, dict[str, Tensor]]:
    policy.zero_grad()
    total = 0.0
    for samples in groups:
        loss = stage.losses(policy, pack(samples), samples)["simpo"]
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def test_a_shared_prompt_gives_the_gradients_of_separate_rows(make_model: Callable[..., LlamaForCausalLM]) -> None:
    """Policy log-probs and gradients of pairs in one row, against each answer as a document of its own."""
    plain, samples = make_model(), random_pairs(6)
    policy = Policy(make_model(), compute_dtype=torch.float32)
    beta, gamma = 1.5, 0.3
    loss, shared = gradients(policy, DPO(preference.resolve("simpo", {"beta": beta, "gamma": gamma}), None), [samples])
    separate = torch.zeros(())
    for sample in samples:
        means = []
        for branch in sample.branches:
            prompt, answer = ([int(i) for s in part for i in s.ids] for part in (sample.trunk, branch))
            logps = plain(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            means.append(logps[torch.arange(len(answer)), torch.tensor(answer)].mean())
        separate = separate - torch.nn.functional.logsigmoid(beta * (means[0] - means[1]) - gamma)
    separate.backward()
    assert loss == pytest.approx(float(separate.detach()), rel=1e-5)
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        assert float((shared[f"lm.{name}"] - parameter.grad).abs().max()) <= 1e-5, name


def test_a_resumed_run_is_the_uninterrupted_one(pref: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("lora", "pissa", "cached"):
        extra = [*STARTS[kind], "log.save_steps=1", "train.max_steps=6"]
        run(pref, tmp_path / f"whole-{kind}", *extra)
        step, count = Loop.step, [0]

        def stopping(loop: Loop, number: int, step: Any = step, count: list[int] = count) -> Taken:
            if number == 3 and not count[0]:
                count[0] += 1
                raise KeyboardInterrupt
            return step(loop, number)  # type: ignore[no-any-return]

        monkeypatch.setattr(Loop, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(pref, tmp_path / kind, *extra)
        run(pref, tmp_path / kind, *extra, resume=True)
        monkeypatch.setattr(Loop, "step", step)
        assert_same(adapter(tmp_path / f"whole-{kind}"), adapter(tmp_path / kind))


def test_the_result_loads_in_plain_peft(pref: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    run(pref, tmp_path / "run")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter"))
    assert any(p.any() for name, p in tuned.named_parameters() if "lora_B" in name)


# --- bad input ---


@pytest.mark.parametrize(
    ("row", "loss", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "sigmoid", "preference"),
        ({"prompt": "a", "completions": ["b", "c", "d"]}, "sigmoid", "has 3 answers, and this loss compares pairs"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "{type: sigmoid, margin_weight: 1.0}", "says no margin"),
    ],
)
def test_rows_of_another_kind_are_refused(
    row: dict[str, Any], loss: str, message: str, pref: Path, pairs_file: Path, tmp_path: Path
) -> None:
    pairs_file.write_text(json.dumps(row) + "\n")
    key = "loss" if loss.startswith("{") else "loss.type"
    with pytest.raises(DataError, match=message):
        run(pref, tmp_path / "run", f"{key}={loss}")


def test_a_reference_that_no_loss_reads_is_refused(pref: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'orpo' compares with no reference; take the section out"):
        run(pref, tmp_path / "run", "loss.type=orpo", "reference.cache=true")


def test_kept_log_probs_know_how_the_base_is_quantised(pref: Path, tmp_path: Path) -> None:
    """The parameters of a 4-bit base are the same bytes with and without double quantisation; what they mean is not."""
    for double in ("true", "false"):
        quantised = ["model.load_in_4bit=true", f"model.bnb_4bit_use_double_quant={double}", "reference.cache=true"]
        lines = run(pref, tmp_path / double, *quantised)
        assert lines[0]["loss"] == pytest.approx(LN2, abs=1e-6)


def test_a_dry_run_looks_at_the_reference(pref: Path, pairs_file: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    for model, message in ((pairs_file, "neither a directory nor a Hub id"), (tmp_path, "holds no config.json")):
        with pytest.raises(ModelError, match=f"^reference.model: .*{message}"):
            dpo.run(recipes.load(pref, [f"reference.model={model}"], stage="dpo"), dry_run=True)
    other = Path(shutil.copytree(tiny_model_dir, tmp_path / "other"))
    names = json.loads((other / "tokenizer.json").read_text())
    vocabulary = names["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(names))
    with pytest.raises(ModelError, match="^reference.model: .* reads other tokens than the policy"):
        dpo.run(recipes.load(pref, [f"reference.model={other}"], stage="dpo"), dry_run=True)


def test_one_answer_has_no_kl_estimate(pref: Path, pairs_file: Path, tmp_path: Path) -> None:
    pairs_file.write_text(json.dumps({"prompt": "a", "completion": "b", "label": True}) + "\n")
    with pytest.raises(DataError, match="one answer leaves loss 'kto' no other for its KL estimate"):
        run(pref, tmp_path / "run", "loss.type=kto")
