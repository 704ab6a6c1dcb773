"""`tuner sft` from a recipe to a result: every way to train, what it leaves on disk, and how it ends early."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from tuner import cli
from tuner import recipe as recipes
from tuner.checkpoint import damage
from tuner.errors import DataError, ModelError, RecipeError, RunDirError
from tuner.losses import language
from tuner.model.policy import Policy
from tuner.stages import sft
from tuner.train import session
from tuner.train.loop import evaluate_loss
from tuner.train.setup import Devices
from tuner.types import Batch

REPOSITORY = Path(__file__).resolve().parents[2]


def run(recipe_file: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    return sft.run(recipes.load(recipe_file, overrides, stage="sft"), **options)


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in lines(output) if "loss" in line]


def manifest(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "manifest.json").read_text())
    return found


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "run"


# --- ways to train ---

KINDS: dict[str, list[str]] = {
    "lora": [],
    "rslora": ["adapter.use_rslora=true"],
    "dora": ["adapter.use_dora=true"],
    "pissa": ["adapter.init_lora_weights=pissa"],
    "qlora": ["model.load_in_4bit=true"],
    "qdora": ["model.load_in_4bit=true", "adapter.use_dora=true"],
    "fp4": ["model.load_in_4bit=true", "model.bnb_4bit_quant_type=fp4"],
    "saved modules": ["adapter.modules_to_save=[embed_tokens, lm_head]"],
    "attention only": ["adapter.target_modules=[q_proj, v_proj]"],
    "checkpointed": ["train.activation_checkpointing=true"],
    "selective": ["train.activation_checkpointing=selective", "adapter.lora_dropout=0.1"],
    "unpacked": ["data.packing=false"],
    "eager": ["model.attn_implementation=eager"],
    "bf16": ["model.dtype=bfloat16"],
    "bf16 saved modules": ["model.dtype=bfloat16", "adapter.modules_to_save=[embed_tokens, lm_head]"],
    "bf16 qlora": ["model.dtype=bfloat16", "model.load_in_4bit=true"],
    "bf16 dora": ["model.dtype=bfloat16", "adapter.use_dora=true"],
    "full": ["adapter=null"],
    "bf16 full": ["adapter=null", "model.dtype=bfloat16"],
    "bf16 masters": ["adapter=null", "model.dtype=bfloat16", "train.param_dtype=bfloat16"],
    "full checkpointed": ["adapter=null", "train.activation_checkpointing=true"],
}


@pytest.mark.parametrize("extra", KINDS.values(), ids=KINDS)
def test_every_way_learns_and_its_result_loads(
    recipe_file: Path, tiny_model_dir: Path, output: Path, extra: list[str]
) -> None:
    summary = run(recipe_file, "train.max_steps=6", "train.batch_size=22", "train.learning_rate=1e-2", *extra)
    found = losses(output)
    assert len(found) == 6 and found[-1] < found[0] - 0.5
    assert summary["steps"] == 6 and summary["result"] == ("model" if "adapter=null" in extra else "adapter")
    assert manifest(output)["status"] == "finished"
    result = output / summary["result"]
    if summary["result"] == "model":
        lm: Any = LlamaForCausalLM.from_pretrained(result)
        assert lm.dtype == torch.float32  # as the base is stored
        assert manifest(output)["trainable"]["dtypes"] == ["bfloat16" if "param_dtype" in extra[-1] else "float32"]
    else:
        lm = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_model_dir), str(result))
        assert {t.dtype for t in load_file(result / "adapter_model.safetensors").values()} == {torch.float32}
        assert json.loads((result / "tuner.json").read_text())["stop_ids"] == [4, 1]
    tokenizer = AutoTokenizer.from_pretrained(result)
    chat = [{"role": "user", "content": "hello"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.isfinite(lm(input_ids=ids).logits).all()


def test_tied_embeddings_in_bf16_are_saved_once(recipe_file: Path, make_model: Any, output: Path) -> None:
    base = recipes.load(recipe_file).model.name_or_path
    make_model(tie_word_embeddings=True).bfloat16().save_pretrained(base)
    run(recipe_file, "adapter=null", "train.max_steps=2")
    tensors = load_file(output / "model" / "model.safetensors")
    assert "lm_head.weight" not in tensors and {t.dtype for t in tensors.values()} == {torch.bfloat16}
    lm = LlamaForCausalLM.from_pretrained(output / "model")
    assert lm.dtype == torch.bfloat16 and lm.lm_head.weight is lm.model.embed_tokens.weight
    assert json.loads((output / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_base_and_the_fresh_adapter_are_only_where_they_should_be(
    recipe_file: Path, tiny_model_dir: Path, output: Path
) -> None:
    before = {p: p.read_bytes() for p in tiny_model_dir.iterdir()}
    run(recipe_file)
    assert {p: p.read_bytes() for p in tiny_model_dir.iterdir()} == before
    names = {p.name for p in output.iterdir() if not p.name.startswith(".")}
    assert names == {"recipe.yaml", "manifest.json", "metrics.jsonl", "checkpoints", "adapter"}
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["step-000003", "step-000004"]
    assert all(damage(p) is None for p in (output / "checkpoints").iterdir())
    files = {p.suffix for p in output.rglob("*") if p.is_file()}
    assert files <= {".json", ".jsonl", ".yaml", ".safetensors", ".jinja", ""}


def test_an_adapter_can_be_trained_on(recipe_file: Path, tmp_path: Path, output: Path) -> None:
    run(recipe_file)
    text = recipe_file.read_text().replace("adapter: {r: 4, lora_alpha: 8}", f"adapter: {{path: {output}/adapter}}")
    recipe_file.write_text(text)
    run(recipe_file, f"train.output_dir={tmp_path}/more")
    assert losses(tmp_path / "more")[0] < losses(output)[0] - 0.5


# --- text ---


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    words = "the cat sat on the mat and looked at the moon".split()
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": " ".join(rng.choice(words, 40))}) + "\n" for _ in range(12)))
    return file


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.load_in_4bit=true"], "trained on a base with quantization none"),
        (["model.name_or_path={other}"], "trained on another base"),
    ],
)
def test_an_adapter_goes_on_with_its_own_base_only(
    recipe_file: Path, tmp_path: Path, output: Path, make_model: Any, overrides: list[str], message: str
) -> None:
    run(recipe_file, "train.max_steps=1")
    other = shutil.copytree(recipes.load(recipe_file).model.name_or_path, tmp_path / "other")
    make_model(seed=5).save_pretrained(other)
    filled = [text.format(other=other) for text in overrides]
    going_on = recipe_file.read_text().replace("adapter: {r: 4, lora_alpha: 8}", f"adapter: {{path: {output}}}")
    recipe_file.write_text(going_on)
    with pytest.raises(ModelError, match=message):
        run(recipe_file, f"train.output_dir={tmp_path}/more", *filled)
    assert not (tmp_path / "more").exists()


def test_a_base_that_samples_without_saying_so_is_saved(recipe_file: Path, tiny_model_dir: Path, output: Path) -> None:
    """Llama 2 ships a temperature without `do_sample`, which transformers reads but refuses to write."""
    file = tiny_model_dir / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.6, "top_p": 0.9}))
    run(recipe_file, "adapter=null", "train.max_steps=1")
    saved = json.loads((output / "model" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [4, 1] and saved["do_sample"] is True


def test_a_row_longer_than_the_context_is_refused(recipe_file: Path, chats_file: Path, tiny_model_dir: Path) -> None:
    config = tiny_model_dir / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 40}))
    with pytest.raises(DataError, match=r"chats.jsonl line \d+: \d+ tokens, and the base was made for 40 positions"):
        run(recipe_file)


def test_samples_are_printed_as_they_are(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Square brackets in a question or an answer are text, not markup; and as many are shown as were asked for."""
    questions = tmp_path / "questions.jsonl"
    row = {"messages": [{"role": "user", "content": "[bold] what [/INST]"}], "answer": "[/x] never said"}
    questions.write_text((json.dumps(row) + "\n") * 7)
    run(recipe_file, f"eval.questions={questions}", "eval.samples=6", "generate.max_new_tokens=3", "train.max_steps=1")
    printed = capsys.readouterr().out
    assert printed.count("[bold] what [/INST]") == 6 and printed.count("[/x] never said") == 6


def test_text_in_batches_of_tokens(recipe_file: Path, text_file: Path, output: Path) -> None:
    summary = run(
        recipe_file,
        "adapter=null",
        f"data.train={text_file}",
        "data.format=text",
        "data.chat_template=auto",
        "data.train_on=all",
        "data.max_length=32",
        "data.overlong=split",
        "train.batch_unit=tokens",
        "train.batch_size=200",
        "train.num_train_epochs=2",
        "train.max_steps=null",
    )
    found = lines(output)
    assert all(row["tokens"] <= 200 for row in found)
    assert sum(row["tokens"] for row in found) == summary["tokens"]
    assert summary["trained_tokens"] < summary["tokens"]  # all but the BOS of each piece
    assert found[-1]["loss"] < found[0]["loss"]
    lm = LlamaForCausalLM.from_pretrained(output / "model")
    assert lm.generation_config.eos_token_id in (1, [1])


# --- evaluation ---


def test_held_out_loss_before_during_and_after(recipe_file: Path, output: Path) -> None:
    summary = run(recipe_file, "data.eval=0.2", "eval.steps=2", "train.max_steps=5")
    found = [(row["step"], row["eval_loss"]) for row in lines(output) if "eval_loss" in row]
    assert [step for step, _ in found] == [0, 2, 4, 5]
    assert summary["before"]["eval_loss"] == found[0][1] > found[-1][1] == summary["after"]["eval_loss"]


def test_held_out_tokens_and_entropy_are_reported_and_cost_training_nothing(
    recipe_file: Path, output: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[tuple[bool, tuple[str, ...]]] = set()
    forward = Policy.forward

    def noted(policy: Policy, batch: Batch, *, measures: Sequence[str] = ()) -> Tensor:
        asked.add((policy.training, tuple(measures)))
        return forward(policy, batch, measures=measures)

    monkeypatch.setattr(Policy, "forward", noted)
    summary = run(recipe_file, "data.eval=0.2", "train.max_steps=2")
    assert asked == {(True, ()), (False, ("top1", "entropy"))}
    out = capsys.readouterr().out
    first, last = (row for row in lines(output) if "eval_loss" in row)
    for row, when in ((first, "before"), (last, "after")):
        assert {"step": row["step"], **summary[when]} == row
        assert 0 <= row["eval_token_accuracy"] <= 1 and 0 < row["eval_entropy"] < math.log(320)
        loss, right = f"{row['eval_loss']:.4f}", f"{row['eval_token_accuracy']:.1%}"
        assert f"{when:<9}held-out loss {loss}; {right} of tokens right" in out


def test_held_out_measures_go_by_the_weights_of_the_loss(make_model: Any, random_samples: Any) -> None:
    """Against the logits of plain transformers, each row alone; untrained and weightless tokens do not count."""
    lm, samples = make_model(), random_samples(5)
    samples = [
        replace(s, trunk=tuple(replace(part, weight=(0.0, 0.5, 2.0)[i % 3]) for i, part in enumerate(s.trunk)))
        for s in samples
    ]
    total = {"nll": 0.0, "token_accuracy": 0.0, "entropy": 0.0}
    weights = 0.0
    with torch.no_grad():
        for sample in samples:
            ids = torch.as_tensor(sample.ids())
            logps = lm(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)
            weight = torch.cat([torch.full((len(p.ids),), p.weight * p.trained) for p in sample.trunk])[1:].double()
            weights += float(weight.sum())
            total["nll"] -= float(weight @ logps.gather(1, ids[1:, None])[:, 0])
            total["token_accuracy"] += float(weight @ (logps.argmax(-1) == ids[1:]).double())
            total["entropy"] -= float(weight @ (logps.exp() * logps).sum(-1))
    policy, stage = Policy(lm, compute_dtype=torch.float32), sft.SFT(language.resolve("nll", {}))
    devices = Devices(torch.device("cpu"), 0, 1)
    found = evaluate_loss(policy, stage, samples, [[0, 3], [1, 2, 4]], devices)
    assert found == pytest.approx({name: value / weights for name, value in total.items()}, rel=1e-5)
    assert list(stage.denominators(samples)) == ["nll"]


def test_the_held_out_loss_does_not_depend_on_the_microbatch(recipe_file: Path, tmp_path: Path) -> None:
    values = []
    for tokens in (600, 100_000):
        summary = run(
            recipe_file,
            "data.eval=0.5",
            f"train.microbatch_tokens={tokens}",
            "train.max_steps=1",
            f"train.output_dir={tmp_path}/{tokens}",
        )
        values.append(summary["before"]["eval_loss"])
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_questions_are_answered_before_and_after(recipe_file: Path, tmp_path: Path, output: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    row = {"messages": [{"role": "user", "content": "cat"}], "answer": "mat"}
    questions.write_text((json.dumps(row) + "\n") * 3)
    chats = tmp_path / "chats.jsonl"
    chat = {"messages": [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "mat"}]}
    chats.write_text((json.dumps(chat) + "\n") * 8)
    extra = ["train.learning_rate=3e-2", "train.max_steps=20", "generate.max_new_tokens=8", "adapter.r=8"]
    summary = run(recipe_file, f"eval.questions={questions}", *extra)
    assert summary["before"] == {"exact_match": 0.0, "stopped": pytest.approx(summary["before"]["stopped"])}
    assert summary["after"] == {"exact_match": 1.0, "stopped": 1.0}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Evaluations return these losses, in order; the last one again and again."""
    script = [9.0]

    def evaluate(*_: Any) -> dict[str, float]:
        return {"nll": script.pop(0) if len(script) > 1 else script[0]}

    monkeypatch.setattr(session, "evaluate_loss", evaluate)
    return script


EARLY = ["data.eval=0.2", "eval.steps=1", "train.max_steps=6", "log.save_steps=100"]


def test_early_stopping(
    recipe_file: Path, output: Path, scripted: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    scripted[:] = [9.0, 5.0, 4.0, 4.5, 4.0, 3.0]
    summary = run(recipe_file, *EARLY, "eval.early_stopping_patience=2")
    assert summary["steps"] == 4 and summary["best_step"] == 4  # the evaluation at the end is the best after all
    assert capsys.readouterr().out.count("stopped  2 evaluations without a better loss") == 1
    assert manifest(output)["status"] == "finished"


def test_an_interrupted_early_stop_stays_stopped(
    recipe_file: Path, output: Path, scripted: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted[:] = [9.0, 5.0, 6.0, 7.0]
    finish = session.Session._finish

    def killed(self: session.Session) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(session.Session, "_finish", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run(recipe_file, *EARLY, "eval.early_stopping_patience=2")
    monkeypatch.setattr(session.Session, "_finish", finish)
    summary = run(recipe_file, *EARLY, "eval.early_stopping_patience=2", resume=True)
    assert summary["steps"] == 3


@pytest.mark.parametrize("script", [[9.0, 5.0, 4.0, 6.0, 7.0, 8.0], [9.0, 5.0, 4.0, float("nan"), float("nan")]])
def test_the_best_checkpoint_is_the_result(
    recipe_file: Path, tmp_path: Path, output: Path, scripted: list[float], script: list[float]
) -> None:
    scripted[:] = script
    summary = run(recipe_file, *EARLY, "eval.load_best=true", "log.save_total_limit=1")
    assert (summary["steps"], summary["best_step"]) == (6, 2)
    kept = sorted(p.name for p in (output / "checkpoints").iterdir())
    assert kept == ["step-000002", "step-000006"]
    best = load_file(output / "checkpoints" / "step-000002" / "weights.safetensors")
    result = load_file(output / "adapter" / "adapter_model.safetensors")
    for name, tensor in best.items():
        assert torch.equal(tensor, result[name.removeprefix("lm.").replace(".default", "")]), name


def test_the_best_of_weights_only_checkpoints_is_the_result(
    recipe_file: Path, output: Path, scripted: list[float]
) -> None:
    scripted[:] = [9.0, 5.0, 4.0, 6.0, 7.0, 8.0]
    summary = run(recipe_file, *EARLY, "eval.load_best=true", "log.save_weights_only=true")
    assert summary["best_step"] == 2 and (output / "adapter").is_dir()


# --- how runs begin and end ---


def test_a_dry_run_refuses_an_optimizer_that_needs_a_gpu(recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match="train.optim: 'adamw_8bit' needs a GPU"):
        run(recipe_file, "train.optim=adamw_8bit", dry_run=True)


def test_a_dry_run_writes_nothing(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert run(recipe_file, dry_run=True)["steps"] == 4
    assert sorted(tmp_path.rglob("*")) == before
    said = capsys.readouterr().out
    assert "22 rows read" in said and "plan     4 steps of 8 examples" in said and "nothing was trained" in said


def test_a_mistake_leaves_no_run_behind(recipe_file: Path, output: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'nll'"):
        run(recipe_file, "loss.type=nl")
    with pytest.raises(RecipeError, match="has no parameter 'beta'"):
        run(recipe_file, "loss.beta=0.1")
    with pytest.raises(ModelError):
        run(recipe_file, f"model.name_or_path={recipe_file.parent}")
    assert not output.exists()
    with pytest.raises(RecipeError, match="did you mean 'q_proj'"):
        run(recipe_file, "adapter.target_modules=[q_prj]")
    run(recipe_file, overwrite=output.exists())


def test_bf16_masters_are_never_said_to_compute_in_fp32(recipe_file: Path, output: Path) -> None:
    with pytest.raises(RecipeError, match="train.param_dtype: .* cannot be computed with in float32; set model.dtype"):
        run(recipe_file, "adapter=null", "train.param_dtype=bfloat16")
    assert not output.exists()


def test_ranks_end_for_the_same_reason(recipe_file: Path, output: Path) -> None:
    """A mistake that only the main rank sees is what every rank says; none blames a lost connection."""
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tuner"]
    done = subprocess.run(
        [*command, "sft", str(recipe_file)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert 1 <= len(said) <= 2 and all("holds files but no readable manifest.json" in line for line in said)
    assert [p.name for p in output.iterdir()] == ["thesis.txt"]


def test_a_run_is_not_overwritten_unless_asked(recipe_file: Path, output: Path) -> None:
    run(recipe_file)
    before = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(RunDirError, match="holds a run already; pass --resume to continue it, or --overwrite"):
        run(recipe_file)
    assert (output / "adapter" / "adapter_model.safetensors").read_bytes() == before
    run(recipe_file, "train.seed=1", overwrite=True)
    assert (output / "adapter" / "adapter_model.safetensors").read_bytes() != before


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["tuner", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_resume_starts_continues_lengthens_and_stops_at_the_end(
    recipe_file: Path, output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sft_command = ("sft", str(recipe_file), "--resume")
    assert command(monkeypatch, *sft_command) == 0  # nothing there yet: it starts
    first = losses(output)
    assert len(first) == 4
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert command(monkeypatch, *sft_command) == 0
    assert f"{output} has finished already" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before
    assert command(monkeypatch, *sft_command, "train.max_steps=6") == 0
    assert "resumed  from step 4 of 6" in capsys.readouterr().out
    assert losses(output)[:4] == first and len(losses(output)) == 6
    assert manifest(output)["summary"]["steps"] == 6
    assert command(monkeypatch, *sft_command, "train.max_steps=6", "train.learning_rate=1.0") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "train.learning_rate was 0.005 and is now 1.0" in said


def test_sigterm_publishes_and_exits_143(
    recipe_file: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["sft", str(recipe_file), "train.max_steps=3000", "log.save_steps=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tuner", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    (last,) = err.splitlines()[-1:]
    (checkpoint,) = (output / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert last == (
        f"error: stopped by a signal; step {step} of 3000 is saved in {output}; continue with --resume"
    )  # fmt: skip
    assert damage(checkpoint) is None and 0 < step < 3000
    assert [row["step"] for row in lines(output)] == list(range(1, step + 1))
    assert manifest(output)["status"] == "interrupted" and not (output / "adapter").exists()

    class Enough(Exception):
        pass

    def two_more(self: session.Session, progress: Any, report: Any) -> bool:
        if progress.step == step + 2:
            raise Enough
        return True

    monkeypatch.setattr(session.Session, "_after_step", two_more)
    with pytest.raises(Enough):
        run(recipe_file, *arguments[2:], resume=True)


def test_metrics_are_complete(recipe_file: Path, output: Path) -> None:
    run(recipe_file, "log.logging_steps=3")
    found = lines(output)
    assert [row["step"] for row in found] == [3, 4]
    assert sum(row["trained_tokens"] for row in found) == manifest(output)["summary"]["trained_tokens"]
    keys: Sequence[str] = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds", "memory_bytes")
    assert all(row[key] > 0 for row in found for key in keys)
    groups = manifest(output)["parameter_groups"]
    assert groups == {"decay": 0, "no_decay": 28} and manifest(output)["trainable"]["parameters"] == 8192
