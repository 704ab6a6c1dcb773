"""`tuner run`: stages in order, each fed by those before it; what is done is skipped, what changed is done anew, and a
pipeline that was killed ends with the bytes of one that was not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import SENTENCES
from tuner import pipeline as module
from tuner.checkpoint import file_entries, lock, read_manifest
from tuner.errors import RecipeError, RunDirError, UserError
from tuner.export import merge
from tuner.recipe import pipeline as pipelines
from tuner.stages import standing as standings
from tuner.train.loop import Loop

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def align(recipe_file: Path, tmp_path: Path) -> Path:
    """sft -> dpo -> merge on the tiny model, four steps each."""
    rng, words = np.random.default_rng(0), " ".join(SENTENCES).split()

    def say(count: int) -> str:
        return " ".join(rng.choice(words, count))

    rows = [{"prompt": say(1 + i % 7), "chosen": say(1 + i % 9), "rejected": say(9 - i % 7)} for i in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "pref.yaml").write_text(
        f"""
stage: dpo
model: {{name_or_path: {tmp_path}/tiny-model, dtype: float32}}
adapter: {{r: 4, lora_alpha: 8}}
data: {{train: {tmp_path}/pairs.jsonl, chat_template: llama3, max_length: 256}}
train: {{output_dir: {tmp_path}/pref, batch_size: 8, max_steps: 4, learning_rate: 5e-3, threads: 1}}
log: {{save_steps: 2}}
"""
    )
    file = tmp_path / "align.yaml"
    file.write_text(
        f"""version: 1
output_dir: {tmp_path}/runs
stages:
  - name: first
    run: sft
    recipe: {recipe_file}
    log: {{save_steps: 2}}
  - run: dpo
    recipe: {tmp_path}/pref.yaml
    adapter: {{path: $first}}
  - run: merge
    adapter: $dpo
"""
    )
    return file


def run(file: Path, *overrides: str) -> list[str]:
    """The names of the stages that had something to do."""
    return [done.stage.name for done in module.run(pipelines.load(file, overrides)) if done.seconds is not None]


def results(folder: Path) -> dict[str, bytes]:
    """Every file of every result."""
    found = {}
    for name in ("first/adapter", "dpo/adapter", "merge"):
        found |= {f"{name}/{p.name}": p.read_bytes() for p in (folder / name).iterdir()}
    return found


# --- order, feeding, skipping ---


def test_stages_run_in_order_and_feed_each_other(
    align: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(align) == ["first", "dpo", "merge"]
    said, runs = capsys.readouterr().out, tmp_path / "runs"
    headlines = [line for line in said.splitlines() if line.startswith("stage ")]
    assert headlines == [
        f"stage    1 of 3: first (sft {tmp_path}/recipe.yaml)",
        f"stage    2 of 3: dpo ({tmp_path}/pref.yaml)",
        "stage    3 of 3: merge",
    ]
    sft, dpo = (file_entries(runs / name / "adapter") for name in ("first", "dpo"))
    manifest = read_manifest(runs / "dpo")
    assert manifest is not None
    assert manifest["identity"]["adapter.path (files)"] == {name: entry["sha256"] for name, entry in sft.items()}
    assert json.loads((runs / "merge" / merge.MARK).read_text())["adapter"] == dpo != sft
    table = said.splitlines()[-3:]
    assert table[0].split() == ["done", "first", f"{runs}/first/adapter", *table[0].split()[3:]]
    assert re.fullmatch(rf" +merge +{re.escape(str(runs))}/merge +\d+ s", table[2])
    assert not (tmp_path / "run").exists() and not (tmp_path / "pref").exists()


def test_what_is_done_is_skipped_and_untouched(align: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(align)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*") if p.name != ".lock"}
    capsys.readouterr()
    assert run(align) == []
    said = capsys.readouterr().out
    assert said.count("has finished, and nothing that it was made of has changed") == 3
    assert said.count("unchanged\n") == 3 and "data " not in said
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*") if p.name != ".lock"}


def test_rows_that_the_loss_leaves_out_are_no_change(align: Path, tmp_path: Path) -> None:
    good = json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])
    rows = [good | {"prompt": f"{good['prompt']} {i}", "margin": 1} for i in range(8)]
    rows.append(good)  # no margin
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["dpo.loss={type: sigmoid, margin_weight: 1.0}", "dpo.data.on_bad_row=skip"]
    assert run(align, *given) == ["first", "dpo", "merge"]
    manifest = read_manifest(tmp_path / "runs" / "dpo")
    assert manifest is not None and manifest["data"]["train"]["samples"] == 8
    assert run(align, *given) == []


def more_pairs(folder: Path) -> None:
    with (folder / "pairs.jsonl").open("a") as file:
        file.write('{"prompt": "What?", "chosen": "The moon.", "rejected": "The cat sat."}\n')


def other_base(folder: Path) -> None:
    file = folder / "tiny-model" / "model.safetensors"
    save_file({name: 1.01 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


# What is done to the folder -> overrides, which stages run for it, and what is said; each on top of those above.
CHANGES: dict[str, tuple[Callable[[Path], object], list[str], list[str], str]] = {
    "a key of the second": (
        lambda _: None,
        ["dpo.train.max_steps=5"],
        ["dpo", "merge"],
        "anew     train.max_steps was 4 and is now 5\n",
    ),
    "a key without effect": (lambda _: None, ["dpo.log.logging_steps=3"], [], "unchanged"),
    "data of the second": (more_pairs, [], ["dpo", "merge"], "anew     data.train (content) has changed\n"),
    "dtype of the merge": (lambda _: None, ["merge.dtype=float16"], ["merge"], "anew     dtype has changed\n"),
    "a merged file": (
        lambda folder: (folder / "runs/merge/config.json").write_text("{}"),
        [],
        ["merge"],
        "the merged files are not what was written",
    ),
    # trained again, it is what it was: nothing that reads it has anything to do
    "a result is lost": (
        lambda folder: shutil.rmtree(folder / "runs/first/adapter"),
        [],
        ["first"],
        "first/adapter/adapter_model.safetensors is gone",
    ),
    "a key of the first": (
        lambda _: None,
        ["first.train.seed=1"],
        ["first", "dpo", "merge"],
        "anew     adapter.path (files) has changed: adapter_model.safetensors\n",
    ),
    "the base": (other_base, [], ["first", "dpo", "merge"], "anew     model (weights) has changed\n"),
}


def check_changes(align: Path, folder: Path, said: Callable[[], str]) -> None:
    run(align)
    given: list[str] = []
    for name, (change, overrides, expected, sentence) in CHANGES.items():
        change(folder)
        given += overrides
        said()
        assert run(align, *given) == expected, name
        assert sentence in said(), name
        assert not list((folder / "runs").glob(".*.previous-*")), "the old one goes once the new one has succeeded"


def test_a_change_reruns_what_depends_on_it_and_nothing_else(
    align: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_changes(align, tmp_path, lambda: capsys.readouterr().out)


@pytest.mark.parametrize("blind", ["to recipes and hashes", "to the merge", "to results"])
def test_mutants_that_skip_without_looking(
    align: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, blind: str
) -> None:
    if blind == "to recipes and hashes":
        monkeypatch.setattr(standings, "differences", lambda old, new: {})
    elif blind == "to the merge":
        monkeypatch.setattr(merge, "changes", lambda *_, **__: [])
    else:
        monkeypatch.setattr(standings, "_damaged", lambda *_: ())
    with pytest.raises((AssertionError, UserError)):  # or the next stage misses what is lost
        check_changes(align, tmp_path, lambda: capsys.readouterr().out)


# --- interrupted ---

KILL = """
import os, signal, sys
from tuner import cli
from tuner.export import merge
from tuner.train.loop import Loop

def killing(function, at, signum):
    calls = []
    def called(*arguments, **options):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signum)
        return function(*arguments, **options)
    return called

where, at, signum = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
owner, name = (Loop, "step") if where == "step" else (merge, "check_result")
setattr(owner, name, killing(getattr(owner, name), at, signum))
sys.argv = ["tuner", *sys.argv[4:]]
cli.main()
"""


def killed(where: str, at: int, signum: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`tuner run`, in a process that gets a signal before its `at`th optimizer step, or in the middle of a merge."""
    command = [sys.executable, "-c", KILL, where, str(at), str(signum), "run", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def test_killed_in_the_middle_and_started_again_it_ends_with_the_same_bytes(align: Path, tmp_path: Path) -> None:
    run(align)
    cut = tmp_path / "cut"
    arguments = (str(align), f"output_dir={cut}")
    done = killed("step", 3, 15, *arguments)  # SIGTERM in the first stage: after the step that had begun
    assert done.returncode == 143, done.stderr
    assert done.stderr.endswith(
        f"error: stage 1 of 3 (first): stopped by a signal; step 3 of 4 is saved in {cut}/first; "
        f"`tuner run {align}` again continues\n"
    )
    done = killed("step", 5, 9, *arguments)  # SIGKILL in the second: one step is left of the first, and four of its own
    assert done.returncode == -9 and "resumed  from step 3 of 4" in done.stdout, done.stderr
    assert (cut / "dpo/checkpoints/step-000002").is_dir() and not (cut / "dpo/adapter").exists()
    done = killed("merge", 1, 9, *arguments)
    assert done.returncode == -9 and "resumed  from step 2 of 4" in done.stdout, done.stderr
    assert list(cut.glob(".tmp-merge-*")) and not (cut / "merge").exists()
    assert run(align, f"output_dir={cut}") == ["merge"]
    assert not list(cut.glob(".tmp-*"))
    mine, whole = results(cut), results(tmp_path / "runs")
    assert mine.keys() == whole.keys() and "merge/model.safetensors" in mine
    assert [name for name in mine if mine[name] != whole[name]] == []


def test_a_signal_while_it_merges_says_how_to_go_on(align: Path) -> None:
    done = killed("merge", 1, 15, str(align))
    assert done.returncode == 143
    assert done.stdout.endswith(f"stopped  `tuner run {align}` again continues\n")
    assert done.stderr.endswith("error: stage 3 of 3 (merge): stopped by SIGTERM; what existed before is intact\n")


def test_a_failure_names_its_stage_and_keeps_what_it_would_replace(
    align: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(align)
    before, step = file_entries(tmp_path / "runs/dpo/adapter"), Loop.step

    def fail(loop: Loop, number: int) -> Any:
        if number == 2:
            raise RuntimeError("the power went")
        return step(loop, number)

    monkeypatch.setattr(Loop, "step", fail)
    with pytest.raises(RuntimeError) as caught:
        run(align, "dpo.train.seed=1")
    assert caught.value.__notes__ == ["stage 2 of 3 (dpo)"]
    assert file_entries(tmp_path / "runs/.dpo.previous-1/adapter") == before
    monkeypatch.setattr(Loop, "step", step)
    assert run(align, "dpo.train.seed=1") == ["dpo", "merge"]
    assert not (tmp_path / "runs/.dpo.previous-1").exists()


def test_an_unfinished_stage_whose_inputs_changed_begins_anew(
    align: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(align)
    capsys.readouterr()
    assert run(align, "first.train.seed=1") == ["first", "dpo", "merge"]
    said = capsys.readouterr().out
    assert "anew     train.seed was 0 and is now 1\n" in said and "resumed" not in said


@pytest.mark.parametrize("saves", ["weights", "all"])
def test_an_unfinished_stage_that_saved_weights_only_begins_anew(
    saves: str, align: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Loop.step
    given = ["first.log.save_weights_only=true"] if saves == "weights" else []

    def fail(loop: Loop, number: int) -> Any:
        return step(loop, number) if number < 3 else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "step", fail)
        with pytest.raises(ZeroDivisionError):
            run(align, *given)
    assert (tmp_path / "runs/first/checkpoints/step-000002").is_dir()
    capsys.readouterr()
    assert run(align, *given) == ["first", "dpo", "merge"]
    said = capsys.readouterr().out
    anew = f"anew     what {tmp_path}/runs/first has saved are weights only (log.save_weights_only), from which no run"
    assert (anew in said, "resumed  from step 2 of 4" in said) == (saves == "weights", saves == "all")
    assert run(align, *given) == []


# --- before anything runs ---


def test_a_dry_run_checks_every_stage_and_writes_nothing(
    align: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert module.run(pipelines.load(align), dry_run=True) == []
    said = capsys.readouterr().out
    assert said.count("dry run  nothing was trained or written") == 2 and "16 rows read" in said
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("dpo.loss.betta=0.2", "has no parameter 'betta' (did you mean 'beta'?)"),
        ("dpo.data.max_length=3", "3"),
        ("dpo.data.train={folder}/chats.jsonl", "is chat data, and this stage trains on preference data"),
        ("merge.output={folder}/tiny-model", "tiny-model is not a merge of tuner's, so it is not overwritten"),
        ("dpo.train.output_dir={folder}/tiny-model", "tiny-model holds files but no readable manifest.json"),
        ("output_dir={folder}/chats.jsonl/x", "chats.jsonl/x cannot be used: Not a directory"),
    ],
)
def test_a_mistake_in_a_late_stage_shows_before_the_first_one_starts(
    align: Path, tmp_path: Path, override: str, expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        run(align, override.format(folder=tmp_path))
    assert expected in str(caught.value)
    assert not (tmp_path / "runs" / "first").exists()


def test_a_second_process_is_refused(align: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    held = lock(tmp_path / "runs")
    try:
        with pytest.raises(RunDirError, match="another tuner process is at work there"):
            run(align)
    finally:
        os.close(held)


def test_a_run_of_one_stage_is_no_folder_for_a_pipeline(align: Path, tmp_path: Path) -> None:
    run(align)
    with pytest.raises(RunDirError, match="dpo is the run of one stage; choose another folder"):
        run(align, f"output_dir={tmp_path}/runs/dpo")


FULL = ["first.adapter=null", "first.train.learning_rate=1e-4"]


def test_full_weights_feed_the_model_of_a_later_stage(
    align: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = align.read_text().replace("adapter: {path: $first}", "model: {name_or_path: $first}")
    again = f"  - {{name: again, run: dpo, recipe: {tmp_path}/pref.yaml, model: {{name_or_path: $merge}}}}\n"
    align.write_text(text + again)
    template = ["dpo.data.chat_template=auto", "again.data.chat_template=auto"]  # what the first one saves
    loaded = pipelines.load(align, [*FULL, *template])
    module.run(loaded, dry_run=True)
    assert capsys.readouterr().out.count("template llama3") == 3
    assert [done.stage.name for done in module.run(loaded)] == ["first", "dpo", "merge", "again"]
    manifest = read_manifest(tmp_path / "runs" / "again")
    assert manifest is not None
    assert run(align, *FULL, *template) == []
    assert json.loads((tmp_path / "runs/merge" / merge.MARK).read_text())["base"] == "model"


def test_a_dry_run_on_a_model_of_the_hub_checks_every_stage(
    align: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether a stage names the model itself, or the base under an earlier one's adapter is to stand in."""
    monkeypatch.setattr("tuner.model.load.snapshot_download", lambda *_, **__: str(tmp_path / "tiny-model"))
    again = f"  - {{name: again, run: dpo, recipe: {tmp_path}/pref.yaml, model: {{name_or_path: $merge}}}}\n"
    align.write_text(align.read_text() + again)
    loaded = pipelines.load(align, [f"{name}.model.name_or_path=org/model" for name in ("first", "dpo")])
    module.run(loaded, dry_run=True)
    said = capsys.readouterr().out
    assert said.count("dry run  nothing was trained or written") == 3 and "later" not in said


def test_a_merge_of_an_adapter_of_elsewhere_is_waited_for(
    align: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(align)
    align.write_text(
        f"version: 1\noutput_dir: {tmp_path}/more\nstages:\n  - {{run: merge, adapter: {tmp_path}/runs/first}}\n"
        f"  - {{run: dpo, recipe: {tmp_path}/pref.yaml, model: {{name_or_path: $merge}}}}\n"
    )
    capsys.readouterr()
    module.run(pipelines.load(align), dry_run=True)
    assert f"later    checked once {tmp_path}/more/merge is there\n" in capsys.readouterr().out
    assert run(align) == ["merge", "dpo"]


def test_another_model_as_reference_is_known_by_its_weights(align: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "tiny-model", tmp_path / "other")
    given = [f"dpo.reference.model={tmp_path}/other"]
    run(align, *given)
    assert run(align, *given) == []
    other_base(tmp_path)
    shutil.copy(tmp_path / "tiny-model/model.safetensors", tmp_path / "moved.safetensors")
    os.replace(tmp_path / "moved.safetensors", tmp_path / "other/model.safetensors")
    assert "dpo" in run(align, *given)


# --- the file ---

HEAD = "output_dir: runs\nstages:\n"
SFT = "  - {run: sft, recipe: recipe.yaml}\n"
DPO = "  - {run: dpo, recipe: pref.yaml, adapter: {path: $sft}}\n"
BAD = {
    "unknown stage": (SFT + DPO.replace("$sft", "$stf"), "'$stf' names no earlier stage (did you mean 'sft'?)"),
    "a later stage": (DPO + SFT, "'$sft' names no earlier stage; earlier ones: none"),
    "itself": ("  - {run: dpo, recipe: pref.yaml, adapter: {path: $dpo}}\n", "names no earlier stage"),
    "an adapter as model": (
        SFT + "  - {run: dpo, recipe: pref.yaml, model: {name_or_path: $sft}}\n",
        "model.name_or_path: '$sft' gives an adapter, and full weights is needed; merge it in a stage between the two",
    ),
    "an adapter as reference": (
        SFT + "  - {run: dpo, recipe: pref.yaml, reference: {model: $sft}}\n",
        "reference.model: '$sft' gives an adapter, and full weights",
    ),
    "a result as data": (SFT + "  - {run: sft, name: b, recipe: recipe.yaml, data: {train: $sft}}\n", "nowhere else"),
    "another base": (
        SFT + DPO.replace("adapter", "model: {load_in_4bit: true}, adapter"),
        "stage 'dpo' goes on with the adapter of 'sft', whose model.load_in_4bit is false and not true; give both",
    ),
    "merge of a merge": (
        SFT + "  - {run: merge, adapter: $sft}\n  - {run: merge, name: m, adapter: $merge}\n",
        "merge",
    ),
    "merge of nothing": (SFT + "  - {run: merge}\n", "adapter is missing"),
    "key of another kind": (SFT + "  - {run: merge, adapter: $sft, train: {}}\n", "unknown key 'stages[1].train'"),
    "typo": (SFT.replace("recipe:", "recip:"), "p.yaml:3: unknown key 'stages[0].recip' (did you mean 'recipe'?)"),
    "typo in a section": (SFT + DPO.replace("path", "pat"), "stage 'dpo': p.yaml:4: unknown key 'adapter.pat'"),
    "typo of run": (SFT.replace("sft", "sfd"), "p.yaml:3: stages[0].run: expected 'sft', 'reward', 'dpo' or 'merge'"),
    "no run": ("  - {recipe: recipe.yaml}\n", "stages[0].run is missing"),
    "no mapping": ("  - sft\n", "stages[0]: expected a mapping"),
    "twice": (SFT + SFT, "two stages are called 'sft'; give one another name:"),
    "a name with a slash": (SFT.replace("run", "name: a/b, run"), "stages[0].name"),
    "one directory": (SFT + DPO.replace("adapter", "train: {output_dir: runs/sft/x}, adapter"), "of its own"),
    "around all": (SFT.replace("run:", "train: {output_dir: .}, run:"), "the pipeline's own output_dir runs lies"),
    "no recipe": (SFT.replace("recipe.yaml", "nope.yaml"), "p.yaml:3: recipe: 'nope.yaml' is not there"),
    "recipe of another stage": (SFT.replace("recipe.yaml", "pref.yaml"), "recipe for `tuner dpo`, and this stage runs"),
    "no sections": ("  - {run: sft}\n", "stage 'sft': p.yaml:3: model is missing and has no default"),
    "empty adapter": (SFT.replace("}", ", adapter: }"), "adapter is empty; write 'adapter: {}'"),
}


@pytest.fixture
def written(align: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline file `p.yaml` in the current directory, beside recipes."""
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text(HEAD + SFT + DPO)
    return Path("p.yaml")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_sentence(name: str, written: Path) -> None:
    stages, expected = BAD[name]
    written.write_text(HEAD + stages)
    with pytest.raises(RecipeError) as caught:
        pipelines.load(written)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("output_dir: x\n", "p.yaml: stages is missing or empty"),
        ("output_dir: x\nstages: []\n", "p.yaml:2: stages is missing or empty"),
        ("stages:\n" + SFT, "output_dir is missing"),
        ("version: 2\n" + HEAD + SFT, "p.yaml:1: version: expected 1, got 2"),
        ("outputdir: x\n" + HEAD + SFT, "p.yaml:1: unknown key 'outputdir' (did you mean 'output_dir'?)"),
        ("model: {}\ndata: {}\n", "this is the recipe of one stage, not a pipeline"),
    ],
)
def test_a_bad_top_is_one_sentence(text: str, expected: str, written: Path) -> None:
    written.write_text(text)
    with pytest.raises(RecipeError) as caught:
        pipelines.load(written)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("spo.train.seed=1", "'spo' is no stage of this pipeline (did you mean 'dpo'?)"),
        ("train.seed=1", "'train' is no stage of this pipeline; its stages: sft, dpo"),
        ("dpo.train.sed=1", "stage 'dpo': override 'dpo.train.sed=1': unknown key 'train.sed' (did you mean 'seed'?)"),
        ("dpo=1", "an override has the form stage.section.key=value"),
        (
            "sft.adapter=null",
            "'$sft' gives full weights, and an adapter is needed; there is nothing to merge or to go on",
        ),
    ],
)
def test_a_bad_override_is_one_sentence(override: str, expected: str, written: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        pipelines.load(written, [override])
    assert expected in str(caught.value)


def test_sections_go_over_the_recipe_key_by_key(written: Path, tmp_path: Path) -> None:
    more = "train: {seed: 5, max_steps: null}, data: {train: pairs.jsonl, packing: false}, adapter"
    written.write_text(HEAD + SFT + DPO.replace("adapter", more))
    sft, dpo = pipelines.load(written, ["dpo.train.batch_size=2"]).stages
    assert isinstance(sft, pipelines.TrainStage) and isinstance(dpo, pipelines.TrainStage)
    train, data = dpo.recipe.train, dpo.recipe.data
    assert (train.seed, train.batch_size, train.max_steps, train.learning_rate) == (5, 2, None, 5e-3)
    assert (data.packing, data.max_length, data.train[0].path) == (False, 256, str(tmp_path / "pairs.jsonl"))
    assert dpo.recipe.adapter is not None and dpo.recipe.adapter.path == str(tmp_path / "runs" / "sft")
    assert (sft.output_dir, dpo.output_dir) == (Path("runs/sft"), Path("runs/dpo"))
    assert dpo.feeds == {"adapter.path": "sft"} and sft.recipe.adapter is not None and sft.recipe.adapter.r == 4


def test_a_pipeline_given_to_a_stage_says_how_to_run_it(written: Path) -> None:
    with pytest.raises(RecipeError, match="p.yaml:2: this is a pipeline, of several stages; run it with `tuner run`"):
        pipelines.build(pipelines.read(written), "sft", None)


def test_a_reward_model_is_a_stage_and_no_adapter(align: Path, tmp_path: Path) -> None:
    reward = (
        f"  - run: reward\n    model: {{name_or_path: {tmp_path}/tiny-model, dtype: float32}}\n"
        f"    adapter: {{path: $first}}\n    data: {{train: {tmp_path}/pairs.jsonl, chat_template: llama3}}\n"
        "    train: {batch_size: 8, max_steps: 2, learning_rate: 1e-3, threads: 1}\n"
    )
    align.write_text(align.read_text() + reward)
    assert run(align) == ["first", "dpo", "merge", "reward"]
    assert run(align, "reward.train.seed=1", "dpo.train.seed=1") == ["dpo", "merge", "reward"]
    assert run(align, "reward.train.seed=1", "dpo.train.seed=1") == []
    align.write_text(align.read_text() + "  - {run: merge, name: again, adapter: $reward}\n")
    with pytest.raises(RecipeError, match=r"'\$reward' gives a reward model, and an adapter is needed"):
        pipelines.load(align)
