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
from tuner.stages.judged import Judged, ProbingJudged
from tuner.stages.pairs import DPO
from tuner.train.loop import Loop, Taken, inform
from tuner.train.setup import Devices
from tuner.types import Batch, Tokens, Unpaired, span

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


# --- what is reported ---


def test_measures_are_those_of_plain_transformers(make_model: Callable[..., LlamaForCausalLM]) -> None:
    plain, start, samples = make_model(), make_model(seed=1), random_rows(9)
    policy, reference = (Policy(make_model(seed=seed), compute_dtype=torch.float32) for seed in (0, 1))
    loss = preference.resolve("kto", {"beta": 0.02, "nll_weight": 0.5})
    stage = inform(ProbingJudged(loss, lambda batch, _: reference(batch).detach()), policy, samples, 300, ALONE)
    assert isinstance(stage, Judged)
    batch = pack(samples)
    with torch.no_grad():
        found = stage.measures(stage.scores(policy, batch, samples), stage.constants(batch, samples))
        rows = [(s.trunk, b, label) for s in samples for b, label in zip(s.branches, s.labels, strict=True)]
        logps, of_start = (np.array([float(summed(lm, x, y)) for x, y, _ in rows]) for lm in (plain, start))
    good = np.array([label for _, _, label in rows])
    tokens = np.array([sum(len(s.ids) for s in y) for _, y, _ in rows])
    ratios = logps - of_start
    first = [n for n, (x, _, _) in enumerate(rows[:-1]) if good[n] and x is rows[n + 1][0]]
    assert len(first) == 3, "each third row is a pair"
    assert 3 <= good.sum() < len(good)
    assert found == pytest.approx(
        {
            "desirable_logp": logps[good].mean(),
            "undesirable_logp": logps[~good].mean(),
            "desirable_reference_logp": of_start[good].mean(),
            "undesirable_reference_logp": of_start[~good].mean(),
            "reference_loss": 0.5 - 0.5 * of_start[good].sum() / tokens[good].sum(),  # r = z = 0
            "accuracy": np.mean([a > b for a in ratios[good] for b in ratios[~good]]),
            "pair_accuracy": np.mean([ratios[n] > ratios[n + 1] for n in first]),
            "margin": ratios[good].mean() - ratios[~good].mean(),
            "desirable_tokens": tokens[good].mean(),
            "undesirable_tokens": tokens[~good].mean(),
            "longer_is_better": np.mean([(a > b) + 0.5 * (a == b) for a in tokens[good] for b in tokens[~good]]),
            "reward_length_correlation": np.corrcoef(ratios, tokens)[0, 1],
            "preferred_length_correlation": np.corrcoef(good, tokens)[0, 1],
        },
        abs=1e-4,
    )


def test_a_run_ends_with_a_report_of_good_and_bad_answers(
    judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run(judged, tmp_path / "run", "eval.prompts=3", "eval.samples=3", "generate.max_new_tokens=4")
    before, after = lines[0], lines[-1]
    assert before["eval_reference_loss"] == pytest.approx(before["eval_loss"], abs=1e-6)
    assert after["eval_kl"] != after["eval_kl_estimate"], "one is of sampled answers, the other of the data's"
    out = capsys.readouterr().out
    assert "report   13 good and 7 bad held-out answers, 3 of their prompts answered at temperature 1" in out
    rows = {line[9:].split("  ")[0]: line for line in out.splitlines() if line.startswith("         ")}
    names = {"loss", "accuracy, ties half", "good: log-ratio", "bad: log-ratio", "good: log-prob", "bad: log-prob"}
    assert names | {"KL that the loss estimates, nats an answer", "KL to the reference, nats an answer"} <= rows.keys()
    assert rows["bad: log-prob"].endswith(f"{after['eval_undesirable_reference_logp']:.2f} the reference")
    assert rows["tokens an answer"].endswith(f"{after['eval_desirable_tokens']:.1f} the good answers")
    assert "chosen" not in out and "rejected" not in out


# --- the start ---


def check_start(lines: Sequence[dict[str, Any]], loss: float) -> None:
    """Nothing has been learned: every reward and the KL are 0, and so the loss is that of r = z = 0."""
    before = lines[0]
    assert before["eval_loss"] == pytest.approx(loss, abs=1e-6)
    rewards = ("eval_desirable_reward", "eval_undesirable_reward", "eval_kl_estimate")
    assert max(abs(before[name]) for name in rewards if name in before) <= 1e-6
    assert before["eval_accuracy"] == 0.5 and before["eval_margin"] == pytest.approx(0, abs=1e-6)


KTO_START = sum(1.5 if label else 1.0 for label in LABELS) / len(LABELS) / 2  # λ (1 - σ(0))


@pytest.mark.parametrize(
    "start", [[], ["adapter=null", "train.learning_rate=1e-4"], ["adapter.init_lora_weights=pissa"]]
)
def test_kto_starts_at_half_the_weights_and_moves(start: list[str], judged: Path, tmp_path: Path) -> None:
    lines = run(judged, tmp_path / "run", *start)
    check_start(lines, KTO_START)
    assert lines[1]["desirable_reward"] == lines[1]["undesirable_reward"] == lines[1]["kl_estimate"] == 0
    assert abs(lines[2]["desirable_reward"]) > 1e-4, "the policy has moved away from its reference"
    assert lines[-1]["eval_accuracy"] > 0.5 and lines[-1]["eval_loss"] < KTO_START


def test_bco_starts_at_ln_2(judged: Path, tmp_path: Path) -> None:
    for kept in ("false", "true"):
        lines = run(judged, tmp_path / kept, "loss={type: bco}", f"reference.cache={kept}")
        check_start(lines, float(np.log(2)))
        assert "kl_estimate" not in lines[1] and lines[-1]["eval_accuracy"] > 0.5
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


@pytest.mark.parametrize("kind", ["kto, nll_weight: 0.5", "bco, nll_weight: 0.5", "bco, reward_shift: false"])
@pytest.mark.parametrize("paired", [False, True], ids=["rows", "pairs"])
def test_microbatches_do_not_matter(kind: str, paired: bool, judged: Path, as_pairs: str, tmp_path: Path) -> None:
    given = [
        f"loss={{type: {kind}}}",
        "train.learning_rate=1e-4",
        "train.max_steps=12",
        *([as_pairs] if paired else []),
    ]
    for name, split in SPLITS:
        lines = run(judged, tmp_path / name, *given, split)
    assert_same(adapter(tmp_path / "one"), adapter(tmp_path / "alone"), 1e-6)
    assert ("nll" in lines[-2]) is ("nll" in kind)
    if "kto" in kind and not paired:
        assert max(line.get("kl_estimate", 0) for line in lines) > 0, (
            "an estimate at its bound does not tell the two apart"
        )


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
    """The closed form, from plain transformers, row by row, times rows; `shift` moves the answers on."""
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
    total = nll = torch.zeros(())
    tokens = 0
    for sample, branch, good in rows:
        with torch.no_grad():
            reference = summed(base, sample.trunk, branch)
        logp = summed(lm, sample.trunk, branch)
        surplus = 0.2 * (logp - reference - z)
        total = total + (1 - torch.sigmoid(surplus if good else -surplus))
        if good:
            nll, tokens = nll - logp, tokens + sum(len(s.ids) for s in branch)
    return total + len(rows) * 0.5 * nll / tokens


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

    loss = preference.resolve("kto", {"beta": 0.2, "nll_weight": 0.5})
    stage = inform(ProbingJudged(loss, reference), policy, samples, 200, ALONE)
    sums, counts = stage.losses(policy, pack(samples), samples), stage.denominators(samples)
    assert float(sums["kl_estimate"]) > 0, "an estimate at its bound does not show how it was made"
    mine = sums["kto"] + sums["nll"] * counts["kto"] / counts["nll"]
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


def test_mutant_the_nll_of_bad_answers_too(
    make_model: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_all(rows: Unpaired, *, nll_weight: float = 0.0) -> Tensor:
        return -nll_weight * rows.answers.policy

    monkeypatch.setattr("tuner.losses.unpaired.desirable_nll", of_all)
    with pytest.raises(AssertionError):
        compare(make_model)


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

    class Waits(Exception):
        """The first rank, until the other has its share."""

    class Rank(Devices):
        def gather(self, value: Any) -> list[Any]:
            shares.append(value)
            if self.rank == 0:
                raise Waits
            return shares

    with pytest.raises(Waits):
        inform(stage, policy, samples, 100, Rank(torch.device("cpu"), 0, 2))
    both, one = (inform(stage, policy, samples, 100, d) for d in (Rank(torch.device("cpu"), 1, 2), ALONE))
    assert all(table and answers for table, answers in shares)
    assert isinstance(both, Judged) and isinstance(one, Judged) and both.mismatched and one.mismatched
    torch.testing.assert_close(both.mismatched.ratio, one.mismatched.ratio)


@pytest.mark.parametrize("kind", ["kto", "bco", "orpo"])
def test_a_resumed_run_is_the_uninterrupted_one(
    kind: str, judged: Path, as_pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = [f"loss={{type: {kind}}}", "log.save_steps=1", *([as_pairs, "data.eval=null"] if kind == "orpo" else [])]
    run(judged, tmp_path / "whole", *extra)
    step, count = Loop.step, [0]

    def stopping(loop: Loop, number: int) -> Taken:
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


@pytest.mark.parametrize(("label", "absent"), [(True, "undesirable"), (False, "desirable")])
def test_rows_of_one_label_are_trained_on_aloud(
    label: bool, absent: str, judged: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) | {"label": label} for line in rows_file.read_text().splitlines()]
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = run(judged, tmp_path / "run", "train.max_steps=2", "loss.nll_weight=0.5")
    out = capsys.readouterr().out
    assert f"all of 20 answers are labelled {str(label).lower()}, so nothing tells good from bad ones" in out
    assert f"{absent}_reward" not in lines[1] and "eval_accuracy" not in lines[0]
    assert (lines[1]["nll"] > 0) is label, "without good answers there is nothing to hold likely"
    word = {"undesirable": "bad", "desirable": "good"}[absent]
    assert f"0 {word}" in out and f"{word}: log-ratio" not in out and "accuracy, ties half" not in out
