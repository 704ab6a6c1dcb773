"""What a preference run reports: each number against plain transformers or a closed form, and how it is shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.conftest import SENTENCES
from tuner import recipe as recipes
from tuner.data.pack import pack
from tuner.errors import RecipeError
from tuner.losses import preference
from tuner.model.policy import Policy
from tuner.stages import dpo
from tuner.stages.pairs import DPO
from tuner.stages.report import preference_report
from tuner.train import answers as module
from tuner.train.answers import TOGETHER, Answers, Prompt, choose_prompts
from tuner.train.loop import Loop, Taken
from tuner.train.setup import Devices
from tuner.types import Tokens, span

CPU = torch.device("cpu")
PROMPTS = 5


def write_pairs(file: Path, count: int, seed: int) -> Path:
    rng, words = np.random.default_rng(seed), " ".join(SENTENCES).split()

    def say(number: int) -> str:
        return " ".join(rng.choice(words, number))

    rows = [{"prompt": say(2 + i), "chosen": say(1 + i % 5), "rejected": say(6 - i % 4)} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def pref(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A LoRA recipe that answers 5 of 7 held-out prompts and shows two: steps of 8 pairs, fp32, one thread."""
    train, held_out = write_pairs(tmp_path / "train.jsonl", 16, 0), write_pairs(tmp_path / "eval.jsonl", 7, 1)
    file = tmp_path / "pref.yaml"
    file.write_text(
        f"""
stage: dpo
model: {{name_or_path: {tiny_model_dir}, dtype: float32}}
adapter: {{r: 4, lora_alpha: 8}}
data: {{train: {train}, eval: {held_out}, chat_template: llama3, max_length: 256}}
train: {{output_dir: {tmp_path}/run, batch_size: 8, max_steps: 4, learning_rate: 2e-2, threads: 1}}
eval: {{prompts: {PROMPTS}, samples: 2}}
generate: {{max_new_tokens: 6}}
"""
    )
    return file


def run(pref: Path, output: Path, *overrides: str, resume: bool = False) -> dict[str, Any]:
    return dpo.run(recipes.load(pref, [f"train.output_dir={output}", *overrides], stage="dpo"), resume=resume)


def logp(lm: torch.nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """log p(answer | prompt) by plain transformers, of one row without padding."""
    with torch.no_grad():
        logits = lm(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].double()
    logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return float(logps[torch.arange(len(answer)), torch.tensor(answer)].sum())


# --- KL and lengths of sampled answers ---


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of what was sampled last."""
    seen: list[tuple[list[int], list[int]]] = []
    original = module.generate

    def noted(lm: Any, prompts: Any, **options: Any) -> list[list[int]]:
        found = original(lm, prompts, **options)
        if options["temperature"] == 1.0:
            seen[:] = [(list(p), a) for p, a in zip(prompts, found, strict=True)]
        return found

    monkeypatch.setattr(module, "generate", noted)
    return seen


def check_kl(pref: Path, model: Path, output: Path, drawn: list[tuple[list[int], list[int]]]) -> None:
    summary = run(pref, output)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), str(output / "adapter")
    )
    ratios = [logp(tuned, *pair) - logp(base, *pair) for pair in drawn]
    lengths = [len(answer) for _, answer in drawn]
    before, after = summary["before"], summary["after"]
    assert len(ratios) == PROMPTS
    assert (before["eval_kl"], before["eval_kl_error"], before["eval_kl_per_token"]) == (0, 0, 0)
    assert abs(after["eval_kl"]) > 0.1
    assert after["eval_kl"] == pytest.approx(np.mean(ratios), abs=1e-4)
    assert after["eval_kl_error"] == pytest.approx(np.std(ratios, ddof=1) / math.sqrt(PROMPTS), abs=1e-4)
    assert after["eval_kl_per_token"] == pytest.approx(sum(ratios) / sum(lengths), abs=1e-4)
    assert after["eval_answer_tokens"] == pytest.approx(np.mean(lengths))


def test_kl_of_sampled_answers_is_that_of_plain_transformers(
    pref: Path, tiny_model_dir: Path, tmp_path: Path, drawn: list[tuple[list[int], list[int]]]
) -> None:
    check_kl(pref, tiny_model_dir, tmp_path / "run", drawn)


def test_mutant_kl_of_the_policy_to_itself(
    pref: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    drawn: list[tuple[list[int], list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ratios = Answers._ratios
    monkeypatch.setattr(Answers, "_ratios", lambda self, reference, rows: ratios(self, self.policy, rows))
    with pytest.raises(AssertionError):
        check_kl(pref, tiny_model_dir, tmp_path / "run", drawn)


@pytest.mark.parametrize(
    ("overrides", "unmeasured"),
    [
        (["reference.cache=true"], None),  # the pass without the adapter costs no memory
        (["reference.cache=true", "adapter=null", "train.learning_rate=1e-4"], "reference.cache let the reference"),
        (["adapter=null", "train.learning_rate=1e-4"], None),
        (["loss.type=simpo"], "no reference"),
    ],
)
def test_kl_is_there_where_the_reference_is(
    overrides: list[str], unmeasured: str | None, pref: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kl = unmeasured is None
    summary = run(pref, tmp_path / "run", *overrides, "train.max_steps=1")
    assert ("eval_kl" in summary["after"]) == ("eval_kl" in summary["before"]) == kl
    assert not kl or (summary["before"]["eval_kl"] == 0 and summary["after"]["eval_kl"] != 0)
    assert summary["after"]["eval_answer_tokens"] > 0
    assert ("eval_reference_loss" in summary["after"]) == ("loss.type=simpo" not in overrides)
    out = capsys.readouterr().out
    assert ("unmeasured" in out) is not kl and (unmeasured is None or f"-   unmeasured: {unmeasured}" in out)


class Shared(Devices):
    """One of two ranks in one process: `gather` hears the other one."""

    def gather(self, value: Any) -> list[Any]:
        others.setdefault(self.rank, []).append(value)
        calls = len(others[self.rank]) - 1
        heard = others.get(1 - self.rank, [])
        return [value, heard[calls]] if calls < len(heard) else [value]


others: dict[int, list[Any]] = {}


def test_answers_do_not_depend_on_the_number_of_ranks(
    make_model: Callable[..., LlamaForCausalLM], tiny_tokenizer: Any
) -> None:
    policy = Policy(make_model(), compute_dtype=torch.float32)
    rng = np.random.default_rng(0)
    prompts = [Prompt(tuple(rng.integers(24, 300, int(n)).tolist()), (30,)) for n in rng.integers(2, 9, TOGETHER + 8)]

    def answers(rank: int, world_size: int) -> Answers:
        devices = Shared(CPU, rank, world_size) if world_size > 1 else Devices(CPU, 0, 1)
        reference = Policy(make_model(seed=1), compute_dtype=torch.float32).eval()
        return Answers(policy, reference, prompts, (), tiny_tokenizer, (1,), 4, 100, 0, devices)

    alone = answers(0, 1)
    together = alone._generate(prompts, 1.0)
    others.clear()
    # the second rank's share first, alone; then the first rank hears it, and so has all
    with pytest.raises(KeyError):
        answers(1, 2)._generate(prompts, 1.0)
    assert answers(0, 2)._generate(prompts, 1.0) == together
    others.clear()
    assert alone.reference is not None
    with pytest.raises(KeyError):
        answers(1, 2)._ratios(alone.reference, together)
    shared = answers(0, 2)._ratios(alone.reference, together)
    assert torch.equal(shared, alone._ratios(alone.reference, together))


def test_prompts_are_different_ones_that_leave_room() -> None:
    def pair(*prompt: int) -> Tokens:
        return Tokens((span(prompt, False),), ((span([1], True),), (span([2, 3], True),)))

    samples = [pair(5), pair(6, 6), pair(5), pair(7, 7, 7), pair(8)]
    chosen, too_long = choose_prompts(samples, 10, longest=2, seed=0)
    assert sorted(prompt.ids for prompt in chosen) == [(5,), (6, 6), (8,)]
    assert too_long == 1 and all(prompt.preferred == (1,) for prompt in chosen)
    bad = Tokens((span([9], False),), ((span([1], True),),), scores=(0.0,))
    assert choose_prompts([bad], 1, longest=2, seed=0) == ([Prompt((9,), ())], 0), "a bad answer is not preferred"
    assert choose_prompts(samples, 2, longest=2, seed=0)[0] == chosen[:2]
    assert choose_prompts(samples, 0, longest=2, seed=0) == ([], 0)


def test_prompts_without_room_are_counted(pref: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(pref, tmp_path / "run", "train.max_steps=1", "generate.max_new_tokens=1010")
    assert "7 held-out prompts are passed over: with generate.max_new_tokens 1010" in capsys.readouterr().out


# --- log-probs, and what length has to do with them ---


def random_pairs(count: int) -> list[Tokens]:
    rng = np.random.default_rng(3)

    def part(trained: bool) -> tuple[Any, ...]:
        return (span(rng.integers(24, 300, int(rng.integers(1, 20))), trained),)

    return [Tokens(part(False), (part(True), part(True)), "pairs.jsonl", row) for row in range(count)]


@pytest.mark.parametrize("name", ["sigmoid", "ld", "simpo"])
def test_measures_are_those_of_plain_transformers(name: str, make_model: Callable[..., LlamaForCausalLM]) -> None:
    plain, start, samples = make_model(), make_model(seed=1), random_pairs(6)
    policy, reference = (Policy(make_model(seed=seed), compute_dtype=torch.float32) for seed in (0, 1))
    beta = 0.5
    loss = preference.resolve(*({"ld": ("sigmoid", {"beta": beta, "ld_alpha": 0.5})}.get(name) or (name, {})))
    stage = DPO(loss, None if name == "simpo" else lambda batch, samples: reference(batch))
    batch = pack(samples)
    with torch.no_grad():
        scores, constants = stage.scores(policy, batch, samples), stage.constants(batch, samples)
    found = stage.measures(scores, constants)

    ids = [[[int(i) for s in run for i in s.ids] for run in (sample.trunk, *sample.branches)] for sample in samples]
    logps = np.array([[logp(plain, row[0], answer) for answer in row[1:]] for row in ids])
    of_start = np.array([[logp(start, row[0], answer) for answer in row[1:]] for row in ids])
    lengths = np.array([[len(answer) for answer in row[1:]] for row in ids])
    rewards = logps / lengths if name == "simpo" else logps - of_start
    wanted = {
        "chosen_logp": logps[:, 0].mean(),
        "rejected_logp": logps[:, 1].mean(),
        "chosen_tokens": lengths[:, 0].mean(),
        "rejected_tokens": lengths[:, 1].mean(),
        "longer_is_better": ((lengths[:, 0] > lengths[:, 1]) + 0.5 * (lengths[:, 0] == lengths[:, 1])).mean(),
        "reward_length_correlation": np.corrcoef(rewards.flatten(), lengths.flatten())[0, 1],
        "preferred_length_correlation": np.corrcoef([1, 0] * 6, lengths.flatten())[0, 1],
    }
    if name != "simpo":
        wanted |= {
            "chosen_reference_logp": of_start[:, 0].mean(),
            "rejected_reference_logp": of_start[:, 1].mean(),
            "reference_loss": math.log(2),
        }
    assert found == pytest.approx(wanted, abs=1e-4)


# --- the run ---


def test_the_log_and_the_manifest_hold_the_same_numbers(pref: Path, tmp_path: Path) -> None:
    summary = run(pref, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if "eval_loss" in row]
    assert [{k: v for k, v in row.items() if k != "step"} for row in logged] == [summary["before"], summary["after"]]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())["summary"]
    assert manifest == summary
    assert "eval_reward_length_correlation" not in summary["before"], "log-ratios of 0 are correlated with nothing"
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    after = summary["after"]
    assert after["eval_chosen_reward"] == pytest.approx(
        after["eval_chosen_logp"] - after["eval_chosen_reference_logp"], abs=1e-4
    )
    assert after["eval_margin"] == pytest.approx(after["eval_chosen_reward"] - after["eval_rejected_reward"], abs=1e-4)
    assert [row["asked"] != "" and set(row) for row in summary["answers"]] == [
        {"asked", "preferred", "before", "after"}
    ] * 2


def without_place(text: str) -> str:
    """The lines from the report on, without the directory of the run."""
    lines = text[text.index("report   ") :].splitlines()
    return "\n".join(line for line in lines if not line.startswith(("saved", "next")))


def test_a_resumed_run_prints_the_same(
    pref: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["log.save_steps=1", "eval.steps=2"]
    whole = run(pref, tmp_path / "whole", *extra)
    printed = without_place(capsys.readouterr().out)
    step, stopped = Loop.step, []

    def stopping(loop: Loop, number: int) -> Taken:
        if number == 3 and not stopped:
            stopped.append(number)
            raise KeyboardInterrupt
        return step(loop, number)

    monkeypatch.setattr(Loop, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(pref, tmp_path / "cut", *extra)
    assert run(pref, tmp_path / "cut", *extra, resume=True) == whole
    assert without_place(capsys.readouterr().out) == printed
    assert printed.count("\n  preferred ") == printed.count("\n  before    ") == 2


def test_what_the_generation_draws_does_not_move_the_training(pref: Path, tmp_path: Path) -> None:
    with_answers = run(pref, tmp_path / "with")["after"]
    without = run(pref, tmp_path / "without", "eval.prompts=0", "eval.samples=0")["after"]
    assert without.items() <= with_answers.items()
    assert with_answers.keys() - without.keys() == {
        f"eval_{name}" for name in ("answer_tokens", "answers_stopped", "kl", "kl_error", "kl_per_token")
    }


# --- how it is shown ---

BEFORE = {
    "eval_loss": 0.6931,
    "eval_accuracy": 0.5,
    "eval_margin": 0.0,
    "eval_chosen_reward": 0.0,
    "eval_rejected_reward": 0.0,
    "eval_chosen_logp": -20.0,
    "eval_rejected_logp": -30.0,
    "eval_chosen_reference_logp": -20.0,
    "eval_rejected_reference_logp": -30.0,
    "eval_reference_loss": 0.6931,
    "eval_chosen_tokens": 11.0,
    "eval_rejected_tokens": 14.0,
    "eval_longer_is_better": 0.4,
    "eval_preferred_length_correlation": -0.2,
    "eval_kl": 0.0,
    "eval_kl_error": 0.0,
    "eval_answer_tokens": 9.5,
    "eval_answers_stopped": 1.0,
}
AFTER = BEFORE | {
    "eval_loss": 0.3,
    "eval_accuracy": 0.9,
    "eval_margin": 5.0,
    "eval_chosen_reward": -2.0,
    "eval_rejected_reward": -7.0,
    "eval_chosen_logp": -22.0,
    "eval_rejected_logp": -37.0,
    "eval_reward_length_correlation": -0.3,
    "eval_kl": 4.25,
    "eval_kl_error": 0.5,
}
TABLE = """\
report   400 held-out pairs, 64 of their prompts answered at temperature 1
                                                   before        after   baseline
         loss                                      0.6931       0.3000   0.6931 the reference
         accuracy, ties half                        50.0%        90.0%   50.0% chance; 60.0% the shorter answer
         margin (log-ratio)                         +0.00        +5.00   0 the reference
         chosen: log-ratio                          +0.00        -2.00   0 the reference
         rejected: log-ratio                        +0.00        -7.00   0 the reference
         chosen: log-prob                          -20.00       -22.00   -20.00 the reference
         rejected: log-prob                        -30.00       -37.00   -30.00 the reference
         correlation of reward and length               -        -0.30   -0.20 being chosen (1 or 0) and length
         KL to the reference, nats an answer  0.00 ± 0.00  4.25 ± 0.50   0 the reference
         tokens an answer                             9.5          9.5   11.0 the chosen answers
         answers that stop by themselves           100.0%       100.0%
  asked     'why?'
  after     "it's so"
"""


def test_the_table() -> None:
    summary = {"before": BEFORE, "after": AFTER, "answers": [{"asked": "why?", "after": "it's so"}]}
    assert preference_report(summary, "400 held-out pairs", 400, 64) == TABLE.splitlines()


def labelled(values: dict[str, float]) -> dict[str, float]:
    """The same numbers of labelled answers."""
    renamed = {k.replace("chosen", "desirable").replace("rejected", "undesirable"): v for k, v in values.items()}
    return renamed | {"eval_kl_estimate": abs(values["eval_margin"]) / 2}


def test_the_table_of_labelled_answers() -> None:
    summary = {"before": labelled(BEFORE), "after": labelled(AFTER)}
    found = preference_report(summary, "300 good and 500 bad held-out answers", 300, 64)
    assert found[0] == "report   300 good and 500 bad held-out answers, 64 of their prompts answered at temperature 1"
    assert [line.split() for line in found[5:9]] == [
        "good: log-ratio +0.00 -2.00 0 the reference".split(),
        "bad: log-ratio +0.00 -7.00 0 the reference".split(),
        "good: log-prob -20.00 -22.00 -20.00 the reference".split(),
        "bad: log-prob -30.00 -37.00 -30.00 the reference".split(),
    ]
    assert found[9].endswith("-0.20 being good (1 or 0) and length")
    assert found[10].split() == "KL that the loss estimates, nats an answer 0.00 2.50 0 the reference".split()
    assert found[12].endswith("11.0 the good answers") and len(found) == 14


def test_what_is_not_measured_is_left_out_of_the_table() -> None:
    """Of answers of one label nothing is compared."""
    gone = ("accuracy", "margin", "_desirable", "longer", "preferred")
    own = [{k: v for k, v in labelled(each).items() if not any(word in k for word in gone)} for each in (BEFORE, AFTER)]
    text = "\n".join(preference_report({"before": own[0], "after": own[1]}, "8 bad held-out answers", 0, 64))
    assert "accuracy" not in text and "margin" not in text and "good:" not in text and "bad: log-prob" in text
    assert "warning" not in text


def test_log_ratios_are_called_so_where_the_loss_of_the_reference_is_unknown() -> None:
    own = [{k: v for k, v in each.items() if k != "eval_reference_loss"} for each in (BEFORE, AFTER)]
    text = "\n".join(preference_report({"before": own[0], "after": own[1]}, "400 held-out pairs", 400, 64))
    assert "chosen: log-ratio" in text and "log-prob a token" not in text


def test_a_loss_without_a_reference_is_shown_without_one() -> None:
    about = ("reference", "kl", "answer")
    own = [{k: v for k, v in values.items() if not any(word in k for word in about)} for values in (BEFORE, AFTER)]
    text = "\n".join(preference_report({"before": own[0], "after": own[1]}, "400 held-out pairs", 400, 0))
    assert "reference" not in text and "ratio" not in text and "temperature" not in text
    assert "chosen: log-prob a token" in text


@pytest.mark.parametrize(("share", "longer", "rule"), [(1.0, 1.0, "longer"), (0.62, 0.4, "shorter"), (0.9, 0.4, None)])
def test_an_accuracy_of_length_alone_is_said_aloud(share: float, longer: float, rule: str | None) -> None:
    after = AFTER | {"eval_accuracy": share, "eval_longer_is_better": longer}
    warnings = [
        line
        for line in preference_report({"before": BEFORE, "after": after}, "400 held-out pairs", 400, 64)
        if line.startswith("warning")
    ]
    summary = {"before": labelled(BEFORE), "after": labelled(after)}
    of_labels = [line for line in preference_report(summary, "answers", 400, 64) if line.startswith("warning")]
    assert len(warnings) == len(of_labels) == (rule is not None)
    assert rule is None or f"a good answer is {rule} than a bad one in {max(longer, 1 - longer):.1%}" in of_labels[0]
    assert rule is None or f"the {rule} answer is the chosen one in {max(longer, 1 - longer):.1%}" in warnings[0]


def test_pairs_that_differ_by_length_alone_are_warned_of(
    pref: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trap: the policy learns nothing but to be longer, and its accuracy looks perfect."""
    for name in ("train", "eval"):
        rows = [{"prompt": f"say {i}", "chosen": "one two three four " * 2, "rejected": "one two"} for i in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    after = run(pref, tmp_path / "run")["after"]
    assert after["eval_longer_is_better"] == 1.0
    assert "warning  the longer answer is the chosen one in 100.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "stage", "message"),
    [
        ("eval.prompts=8", "sft", "only `tuner dpo` answers held-out prompts"),
        ("eval.prompts=8", "reward", "only `tuner dpo` answers held-out prompts"),
        ("eval.prompts=8", "dpo", "there is nothing to evaluate on"),
        ("eval.prompts=8", "dpo", "there are no held-out rows"),
        ("eval.samples=2", "dpo", "there is nothing to evaluate on"),
    ],
)
def test_keys_without_effect_are_refused(key: str, stage: str, message: str, pref: Path) -> None:
    file = pref.with_name("other.yaml")
    lines = pref.read_text().replace("stage: dpo", f"stage: {stage}").splitlines()
    file.write_text("\n".join(line for line in lines if not line.startswith(("eval:", "generate:"))) + "\n")
    questions = pref.with_name("questions.jsonl")
    questions.touch()
    others = {"nothing": ["data.eval=null"], "rows": ["data.eval=null", f"eval.questions={questions}"]}
    extra = next((values for word, values in others.items() if word in message), [])
    with pytest.raises(RecipeError, match=message):
        recipes.load(file, [*extra, key], stage=stage)
