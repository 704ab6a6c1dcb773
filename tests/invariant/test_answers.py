"""Invariants 3 to 6 for losses over single answers (KTO, BCO), and for ORPO, which has no reference."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.conftest import SENTENCES
from tests.invariant.test_preference import adapter, alone, assert_same, run
from tuner.data.pack import pack
from tuner.errors import RecipeError
from tuner.losses import preference
from tuner.losses.unpaired import mismatches
from tuner.model.policy import Policy
from tuner.model.reference import Reference
from tuner.stages.dpo import DPO, Judged, ProbingJudged
from tuner.train.loop import Loop, StepReport, inform
from tuner.train.setup import Devices
from tuner.types import Batch, Tokens, span

ALONE = Devices(torch.device("cpu"), 0, 1)
LABELS = [i % 3 != 1 for i in range(20)]


def said(seed: int = 0) -> Callable[[int], str]:
    rng, words = np.random.default_rng(seed), " ".join(SENTENCES).split()
    return lambda count: " ".join(rng.choice(words, count))


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """20 labelled answers of very different lengths; prompts recur."""
    say = said()
    prompts = [say(int(n)) for n in np.random.default_rng(1).integers(1, 20, 7)]
    rows = [{"prompt": prompts[i % 7], "completion": say(1 + i % 9), "label": label} for i, label in enumerate(LABELS)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def judged(tiny_model_dir: Path, rows_file: Path, tmp_path: Path) -> Path:
    """A LoRA recipe over the rows: steps of 8 rows (three an epoch), fp32, one thread, an evaluation at both ends."""
    file = tmp_path / "judged.yaml"
    file.write_text(
        f"""
stage: dpo
model: {{name_or_path: {tiny_model_dir}, dtype: float32}}
adapter: {{r: 4, lora_alpha: 8}}
data: {{train: {rows_file}, eval: {rows_file}, chat_template: llama3, max_length: 256}}
loss: {{type: kto, beta: 0.2, desirable_weight: 1.5}}
train: {{output_dir: {tmp_path}/judged, batch_size: 8, max_steps: 6, learning_rate: 5e-3, threads: 1}}
"""
    )
    return file


@pytest.fixture
def as_pairs(tmp_path: Path) -> str:
    """The override for pairs instead of labelled rows."""
    say = said(2)
    rows = [{"prompt": say(1 + i % 5), "chosen": say(2 + i % 6), "rejected": say(9 - i % 6)} for i in range(10)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.train={file}"


# --- the start ---


def check_start(lines: Sequence[dict[str, Any]], loss: float) -> None:
    """Nothing has been learned: every reward and the KL are 0, and so the loss is that of r = z = 0."""
    before = lines[0]
    assert before["eval_loss"] == pytest.approx(loss, abs=1e-6)
    rewards = ("eval_desirable_reward", "eval_undesirable_reward", "eval_kl")
    assert max(abs(before[name]) for name in rewards if name in before) <= 1e-6
    assert before["eval_accuracy"] == 0.5 and before["eval_margin"] == pytest.approx(0, abs=1e-6)


KTO_START = sum(1.5 if label else 1.0 for label in LABELS) / len(LABELS) / 2  # λ (1 - σ(0))


@pytest.mark.parametrize(
    "start", [[], ["adapter=null", "train.learning_rate=1e-4"], ["adapter.init_lora_weights=pissa"]]
)
def test_kto_starts_at_half_the_weights_and_moves(start: list[str], judged: Path, tmp_path: Path) -> None:
    lines = run(judged, tmp_path / "run", *start)
    check_start(lines, KTO_START)
    assert lines[1]["desirable_reward"] == lines[1]["undesirable_reward"] == lines[1]["kl"] == 0
    assert abs(lines[2]["desirable_reward"]) > 1e-4, "the policy has moved away from its reference"
    assert lines[-1]["eval_accuracy"] > 0.5 and lines[-1]["eval_loss"] < KTO_START


def test_bco_starts_at_ln_2(judged: Path, tmp_path: Path) -> None:
    for kept in ("false", "true"):
        lines = run(judged, tmp_path / kept, "loss={type: bco}", f"reference.cache={kept}")
        check_start(lines, float(np.log(2)))
        assert "kl" not in lines[1] and lines[-1]["eval_accuracy"] > 0.5
    assert_same(adapter(tmp_path / "false"), adapter(tmp_path / "true"), 1e-6)


def test_mutant_a_reference_that_is_off(judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Reference.__call__
    monkeypatch.setattr(Reference, "__call__", lambda self, batch: original(self, batch) + 1e-3)
    lines = run(judged, tmp_path / "run", "train.max_steps=1")
    with pytest.raises(AssertionError):
        check_start(lines, KTO_START)


def test_the_reference_never_moves_and_is_plain_transformers(
    judged: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every row and of every probe, in every step."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    seen: list[tuple[Sequence[Tokens], Tensor]] = []
    constants = Judged.constants

    def noted(self: Judged, batch: Batch, samples: Sequence[Tokens]) -> Tensor:
        found = constants(self, batch, samples)
        seen.append((samples, found[:, 2:4]))
        return found

    monkeypatch.setattr(Judged, "constants", noted)
    run(judged, tmp_path / "run", "data.eval=null")
    assert len(seen) >= 12
    for samples, found in seen:
        for sample, values in zip(samples, found.tolist(), strict=True):
            wanted = alone(plain, sample)
            assert values[: len(wanted)] == pytest.approx(wanted, abs=1e-4)


# --- exactness ---

SPLITS = (("one", "train.microbatch_tokens=100000"), ("alone", "data.packing=false"))


@pytest.mark.parametrize("kind", ["kto", "bco", "{type: bco, reward_shift: false}"])
@pytest.mark.parametrize("paired", [False, True], ids=["rows", "pairs"])
def test_microbatches_do_not_matter(kind: str, paired: bool, judged: Path, as_pairs: str, tmp_path: Path) -> None:
    loss = f"loss={kind}" if kind.startswith("{") else f"loss={{type: {kind}}}"
    for name, split in SPLITS:
        given = [loss, split, "train.learning_rate=1e-4", "train.max_steps=12", *([as_pairs] if paired else [])]
        lines = run(judged, tmp_path / name, *given)
    assert_same(adapter(tmp_path / "one"), adapter(tmp_path / "alone"), 1e-6)
    if kind == "kto" and not paired:
        assert max(line.get("kl", 0) for line in lines) > 0, "an estimate at its bound does not tell the two apart"


def test_mutant_an_estimate_of_each_microbatch(judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_itself(self: ProbingJudged, policy: Any, batch: Batch, samples: Sequence[Tokens]) -> dict[str, Tensor]:
        stage = inform(self, policy, samples, 1000, ALONE)
        return Judged.losses(stage, policy, batch, samples)  # type: ignore[arg-type]

    monkeypatch.setattr(ProbingJudged, "losses", by_itself)
    for name, split in SPLITS:
        run(judged, tmp_path / name, split, "loss.beta=1.0", "train.learning_rate=1e-2", "train.max_steps=12")
    with pytest.raises(AssertionError):
        assert_same(adapter(tmp_path / "one"), adapter(tmp_path / "alone"), 1e-6)


def random_rows(count: int) -> list[Tokens]:
    """Labelled answers and pairs; every second prompt is that of the row before."""
    rng = np.random.default_rng(3)

    def part(trained: bool) -> tuple[Any, ...]:
        return (span(rng.integers(24, 300, int(rng.integers(1, 30))), trained),)

    samples: list[Tokens] = []
    for row in range(count):
        trunk = samples[-1].trunk if row % 2 else part(False)
        if row % 3:
            samples.append(Tokens(trunk, (part(True),), "rows.jsonl", row, (float(row % 4 == 1),)))
        else:
            samples.append(Tokens(trunk, (part(True), part(True)), "rows.jsonl", row))
    return samples


def summed(lm: LlamaForCausalLM, trunk: Any, branch: Any) -> Tensor:
    """log π(y|x) of one answer, a document of its own."""
    prompt, answer = ([int(i) for s in part for i in s.ids] for part in (trunk, branch))
    logps = lm(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    return logps[torch.arange(len(answer)), torch.tensor(answer)].sum()


def kto_of_documents(lm: LlamaForCausalLM, base: LlamaForCausalLM, samples: Sequence[Tokens], shift: int) -> Tensor:
    """The closed form, from plain transformers, row by row; `shift` moves the answers on."""
    rows = [
        (s, b, (n == 0 if len(s.branches) == 2 else s.scores[0] > 0)) for s in samples for n, b in enumerate(s.branches)
    ]
    prompts = [tuple(s.trunk[0].ids.tolist()) for s, _, _ in rows]
    with torch.no_grad():
        dealt = [(i, (i - shift) % len(rows)) for i in range(len(rows))] if shift else mismatches(prompts)
        ratios = [
            summed(lm, rows[i][0].trunk, rows[j][1]) - summed(base, rows[i][0].trunk, rows[j][1]) for i, j in dealt
        ]
        z = torch.stack(ratios).mean().clamp(min=0)
    total = torch.zeros(())
    for sample, branch, good in rows:
        with torch.no_grad():
            reference = summed(base, sample.trunk, branch)
        surplus = 0.2 * (summed(lm, sample.trunk, branch) - reference - z)
        total = total + (1 - torch.sigmoid(surplus if good else -surplus))
    return total


def compare(make_model: Callable[..., LlamaForCausalLM], shift: int = 0) -> None:
    """Loss and gradients of rows packed into one, against each answer as a document of its own."""
    samples, plain, base = random_rows(9), make_model(), make_model()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=g))
    policy, frozen = (Policy(lm, compute_dtype=torch.float32) for lm in (make_model(), copy.deepcopy(base)))

    def reference(batch: Batch, _: Sequence[Tokens]) -> Tensor:
        with torch.no_grad():
            return frozen(batch)

    stage = inform(ProbingJudged(preference.resolve("kto", {"beta": 0.2}), reference), policy, samples, 200, ALONE)
    sums = stage.losses(policy, pack(samples), samples)
    assert float(sums["kl"]) > 0, "an estimate at its bound does not show how it was made"
    mine = sums["kto"]
    theirs = kto_of_documents(plain, base, samples, shift)
    mine.backward()
    theirs.backward()
    assert float(mine.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    found = {name.removeprefix("lm."): p.grad for name, p in policy.named_parameters()}
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None and found[name] is not None
        assert float((found[name] - parameter.grad).abs().max()) <= 1e-5, name


def test_shared_prompts_and_probes_give_the_gradients_of_separate_rows(
    make_model: Callable[..., LlamaForCausalLM],
) -> None:
    compare(make_model)


def test_mutant_answers_dealt_otherwise(make_model: Callable[..., LlamaForCausalLM]) -> None:
    with pytest.raises(AssertionError):
        compare(make_model, shift=1)


def test_probes_are_cut_to_the_room_that_a_document_has() -> None:
    samples = random_rows(9)
    whole = ProbingJudged(preference.resolve("kto", {}), None, max_length=1000).probes(samples)
    cut = ProbingJudged(preference.resolve("kto", {}), None, max_length=30).probes(samples)
    rows = [branch for sample in samples for branch in sample.branches]
    assert sum(len(p.branches) for p in whole) == sum(len(p.branches) for p in cut) == len(rows)
    shorter = False
    for one, other in zip(whole, cut, strict=True):
        for full, head in zip(one.branches, other.branches, strict=True):
            room = 30 - sum(len(s.ids) for s in one.trunk)
            (a,), (b,) = full, head
            assert b.ids.tolist() == a.ids[:room].tolist()
            shorter |= len(b.ids) < len(a.ids)
    assert shorter


def test_two_ranks_learn_the_same_of_a_step(make_model: Callable[..., LlamaForCausalLM]) -> None:
    """Each scores its share of the probes, and both get all of them."""
    samples, policy = random_rows(9), Policy(make_model(), compute_dtype=torch.float32)
    off = Policy(make_model(seed=1), compute_dtype=torch.float32)
    stage = ProbingJudged(preference.resolve("kto", {}), lambda batch, _: off(batch).detach())
    shares: list[Any] = []

    class Rank(Devices):
        def gather(self, value: Any) -> list[Any]:
            shares.append(value)
            return shares if self.rank else [value]

    for rank in (0, 1):
        found = inform(stage, policy, samples, 100, Rank(torch.device("cpu"), rank, 2))
    both, one = found, inform(stage, policy, samples, 100, ALONE)
    assert all(shares)
    assert isinstance(both, Judged) and isinstance(one, Judged) and both.mismatched and one.mismatched
    torch.testing.assert_close(both.mismatched.ratio, one.mismatched.ratio)


@pytest.mark.parametrize("kind", ["kto", "bco", "orpo"])
def test_a_resumed_run_is_the_uninterrupted_one(
    kind: str, judged: Path, as_pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = [f"loss={{type: {kind}}}", "log.save_steps=1", *([as_pairs, "data.eval=null"] if kind == "orpo" else [])]
    run(judged, tmp_path / "whole", *extra)
    step, count = Loop.step, [0]

    def stopping(loop: Loop, number: int) -> StepReport:
        if number == 3 and not count[0]:
            count[0] += 1
            raise KeyboardInterrupt
        return step(loop, number)

    monkeypatch.setattr(Loop, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(judged, tmp_path / "cut", *extra)
    run(judged, tmp_path / "cut", *extra, resume=True)
    assert_same(adapter(tmp_path / "whole"), adapter(tmp_path / "cut"))


# --- ORPO ---


def orpo(samples: Sequence[Tokens], lm: LlamaForCausalLM, weight: float = 0.2) -> Tensor:
    """ORPO's odds term in its closed form, from plain transformers, each answer a document of its own."""
    total = torch.zeros(())
    for sample in samples:
        odds = []
        for branch in sample.branches:
            mean = summed(lm, sample.trunk, branch) / sum(len(s.ids) for s in branch)
            odds.append(mean - torch.log1p(-mean.exp()))
        total = total - weight * torch.nn.functional.logsigmoid(odds[0] - odds[1])
    return total


@pytest.mark.parametrize("weight", [0.2, 0.21], ids=["the same", "a mutant"])
def test_orpo_of_packed_pairs_is_that_of_separate_rows(
    weight: float, make_model: Callable[..., LlamaForCausalLM]
) -> None:
    samples = [s for s in random_rows(12) if len(s.branches) == 2]
    plain, policy = make_model(), Policy(make_model(), compute_dtype=torch.float32)
    stage = DPO(preference.resolve("orpo", {"beta": 0.2, "nll_weight": 0.0}), None)
    stage.losses(policy, pack(samples), samples)["orpo"].backward()
    orpo(samples, plain, weight).backward()
    worst = max(
        float((mine.grad - theirs.grad).abs().max())
        for mine, theirs in zip(policy.parameters(), plain.parameters(), strict=True)
        if mine.grad is not None and theirs.grad is not None
    )
    assert (worst <= 1e-5) is (weight == 0.2)


def test_orpo_starts_at_the_odds_of_the_base_and_its_margin_grows(
    judged: Path, as_pairs: str, tmp_path: Path, tiny_model_dir: Path
) -> None:
    lines = run(judged, tmp_path / "run", as_pairs, f"data.eval={as_pairs.partition('=')[2]}", "loss={type: orpo}")
    assert lines[-1]["eval_margin"] > lines[0]["eval_margin"]
    assert not list((tmp_path / "run").glob("**/reference*"))


# --- control tokens left out ---


def test_control_tokens_are_left_out_of_both_sides(judged: Path, as_pairs: str, tmp_path: Path) -> None:
    """Llama 3's change: what is compared is the text of the answers, though the model reads their terminators too."""
    given = [as_pairs, "data.eval=null", "loss={type: sigmoid, ld_alpha: 0.5, nll_weight: 0.2}", "train.max_steps=3"]
    for name, split in SPLITS:
        lines = run(judged, tmp_path / name, *given, "data.train_control_tokens=false", split)
    assert lines[0]["sigmoid"] == pytest.approx(float(np.log(2)), abs=1e-6)
    assert_same(adapter(tmp_path / "one"), adapter(tmp_path / "alone"), 2e-5)
    kept = [*given, "data.train_control_tokens=false", "reference.cache=true"]
    run(judged, tmp_path / "kept", *kept)
    assert_same(adapter(tmp_path / "one"), adapter(tmp_path / "kept"), 2e-5)
    run(judged, tmp_path / "all", *given)
    with pytest.raises(AssertionError):
        assert_same(adapter(tmp_path / "one"), adapter(tmp_path / "all"), 2e-5)


# --- bad input ---


def test_what_kto_cannot_have_is_refused(judged: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train.batch_size: 1 leaves loss 'kto' no other row"):
        run(judged, tmp_path / "run", "train.batch_size=1")
    with pytest.raises(
        RecipeError, match=r"reference.cache: loss 'kto' scores answers after the prompts of other rows"
    ):
        run(judged, tmp_path / "run", "reference.cache=true")


def test_rows_of_one_label_are_trained_on_aloud(
    judged: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) | {"label": True} for line in rows_file.read_text().splitlines()]
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = run(judged, tmp_path / "run", "train.max_steps=2")
    assert "all of 20 answers are labelled true, so nothing tells good from bad ones" in capsys.readouterr().out
    assert "undesirable_reward" not in lines[1] and "eval_accuracy" not in lines[0]
