"""The run directory: nothing is lost, torn, swapped or silently different, whatever is killed, full or flipped."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tuner import checkpoint
from tuner.checkpoint import Checkpoint, RunDir, flatten_state, rng_state, set_rng_state, unflatten_state
from tuner.checkpoint import files as files_module
from tuner.checkpoint import run as run_module
from tuner.checkpoint import step as step_module
from tuner.errors import DataError, Interrupted, NonFiniteError, RunDirError, SaveError

IDENTITY = {
    "train.learning_rate": 1e-4,
    "train.max_steps": 100,
    "train.microbatch_tokens": 512,
    "train.output_dir": "runs/chat",
    "log.save_steps": 10,
    "eval.samples": 0,
    "data.train": ["a.jsonl"],
    "data.hash": "aa",
    "template": "llama3",
    "base_sha256": "bb",
}


class Log(list[str]):
    def __call__(self, line: str) -> None:
        self.append(line)


def make(path: Path, log: Log | None = None, **changes: Any) -> RunDir:
    options = {"resume": False, "overwrite": False, "allow_drift": ()} | changes
    identity = options.pop("identity", IDENTITY)
    return RunDir.create(path, "version: 1\n", identity, log=Log() if log is None else log, **options)


def tensors_of(step: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    weights = {"a.weight": torch.randn(8, 16, generator=generator), "b": torch.randn(3, generator=generator)}
    return {"weights": weights, "optimizer": {"m": torch.randn(8, 16, generator=generator), "n": torch.tensor(step)}}


def publish(run: RunDir, step: int, **options: Any) -> Checkpoint:
    return run.publish(step, tensors_of(step), {"step": step, "lr": 1e-3 / 3}, **options)


def assert_is(found: Checkpoint | None, step: int) -> None:
    assert found is not None and found.step == step
    tensors, state = found.load()
    assert state == {"step": step, "lr": 1e-3 / 3}
    expected = tensors_of(step)
    assert tensors.keys() == expected.keys()
    for name, group in expected.items():
        assert tensors[name].keys() == group.keys()
        assert all(torch.equal(tensors[name][k], v) for k, v in group.items())


def steps(run: RunDir) -> list[str]:
    return sorted(p.name for p in (run.path / "checkpoints").iterdir())


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    with make(tmp_path / "chat") as run:
        yield run


# --- publishing -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was(run: RunDir) -> None:
    assert run.latest() is None
    assert_is(publish(run, 7), 7)
    assert_is(run.latest(), 7)


def test_every_byte_flip_in_every_file_is_seen(run: RunDir) -> None:
    published = publish(run, 7)
    files = sorted(published.path.iterdir())
    assert [f.name for f in files] == ["manifest.json", "optimizer.safetensors", "state.json", "weights.safetensors"]
    for file in files:
        original = file.read_bytes()
        for position in {0, len(original) // 3, len(original) // 2, len(original) - 1}:
            flipped = bytearray(original)
            flipped[position] ^= 1
            file.write_bytes(flipped)
            with pytest.raises(RunDirError, match=re.escape(str(file))):
                run.latest()
        file.write_bytes(original)
    assert_is(run.latest(), 7)


def test_byte_flips_would_pass_without_the_hashes(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: sizes alone do not see a flipped byte of a tensor."""
    file = publish(run, 7).path / "weights.safetensors"
    flipped = bytearray(file.read_bytes())
    flipped[-1] ^= 1
    file.write_bytes(flipped)
    listed = json.loads((file.parent / "manifest.json").read_text())["files"]
    monkeypatch.setattr(step_module, "file_entries", lambda directory: listed)
    with pytest.raises(AssertionError):
        assert_is(run.latest(), 7)


def test_a_torn_or_damaged_newest_is_skipped_with_a_word(tmp_path: Path) -> None:
    log = Log()
    with make(tmp_path / "chat", log) as run:
        publish(run, 5)
        for number, name in enumerate(("manifest.json", "optimizer.safetensors", "state.json", "weights.safetensors")):
            broken = publish(run, 10 + number).path
            (broken / name).unlink()
            assert_is(run.latest(), 5)
            assert str(broken / name) in log[-1] and "step 5" in log[-1]
            shutil.rmtree(broken)
        with (publish(run, 20).path / "weights.safetensors").open("ab") as file:
            file.truncate(100)
        assert_is(run.latest(), 5)
        assert "100 bytes" in log[-1]


def test_without_optimizer_state_nothing_is_resumed(run: RunDir) -> None:
    run.publish(3, {"weights": tensors_of(3)["weights"]}, {})
    with pytest.raises(RunDirError, match="optimizer.safetensors was never saved"):
        run.latest()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_saved(run: RunDir, bad: float) -> None:
    publish(run, 1)
    tensors = tensors_of(2)
    tensors["optimizer"]["m"][3, 3] = bad
    with pytest.raises(NonFiniteError, match="'m'"):
        run.publish(2, tensors, {})
    assert steps(run) == ["step-000001"]


def test_mutant_publish_without_the_finite_check(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "refuse_nonfinite", lambda what, tensors: None)
    with pytest.raises(pytest.fail.Exception):
        test_what_is_not_finite_is_not_saved(run, float("nan"))


def test_results_are_checked_too(run: RunDir) -> None:
    def save(value: float) -> Any:
        return lambda d: save_file({"x": torch.tensor([value])}, d / "adapter_model.safetensors")

    run.write_result("adapter", save(1.0))
    with pytest.raises(NonFiniteError, match="'x'"):
        run.write_result("adapter", save(float("nan")))
    run.write_result("adapter", save(2.0))
    assert sorted(p.name for p in (run.path / "adapter").iterdir()) == ["adapter_model.safetensors"]
    entry = run.manifest["results"]["adapter"]["adapter_model.safetensors"]
    assert entry == checkpoint.file_entries(run.path / "adapter")["adapter_model.safetensors"]
    assert not [p for p in run.path.iterdir() if p.name.startswith((".tmp", ".tuner-old"))]


def test_shared_and_strided_tensors_are_saved_whole(run: RunDir) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    found = run.publish(1, {"optimizer": {"a": base, "b": base.t(), "c": base[1]}}, {})
    loaded = found.load()[0]["optimizer"]
    assert torch.equal(loaded["a"], base) and torch.equal(loaded["b"], base.t()) and torch.equal(loaded["c"], base[1])


def test_a_failed_rename_publishes_nothing(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(run, 1)
    rename = os.rename

    def fail(source: Any, target: Any) -> None:
        if Path(target).name == "step-000002":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(SaveError, match="step-000002: could not write the checkpoint of step 2: Input/output error"):
        publish(run, 2)
    assert steps(run) == ["step-000001"]
    assert_is(run.latest(), 1)


def test_everything_is_synced_before_the_rename(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = files_module.fsync, os.rename
    for module in (files_module, step_module, run_module):
        monkeypatch.setattr(module, "fsync", lambda path: (events.append(path.name), fsync(path))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(f"rename {Path(b).name}"), rename(a, b))[1])
    publish(run, 1)
    renamed = events.index("rename step-000001")
    assert {"weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"} <= set(events[:renamed])
    assert any(e.startswith(".tmp-step-000001") for e in events[:renamed])  # the directory itself
    assert "checkpoints" in events[renamed:]  # its new name


def test_a_full_disk_is_one_sentence_and_loses_nothing(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(run, 1)

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(step_module, "save_file", full)
    with pytest.raises(SaveError, match=r"No space left on device \(.* free, .* needed\)"):
        publish(run, 2, save_total_limit=1)
    assert steps(run) == ["step-000001"]
    assert_is(run.latest(), 1)


FILE_LIMIT = """
import resource, sys
from pathlib import Path
import torch
from tuner.checkpoint import RunDir
from tuner.errors import SaveError
run = RunDir.create(Path(sys.argv[1]), "", {}, resume=False, overwrite=False)
run.publish(1, {"optimizer": {"x": torch.ones(10)}}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    run.publish(2, {"optimizer": {"x": torch.ones(100_000)}}, {})
except SaveError as error:
    print(error)
print(sorted(p.name for p in (run.path / "checkpoints").iterdir()), run.latest().step)
"""


def test_a_refused_write_of_the_real_file_system(tmp_path: Path) -> None:
    out = python(FILE_LIMIT, str(tmp_path / "chat"))
    assert "could not write the checkpoint of step 2: " in out and "400 kB needed" in out
    assert "['step-000001'] 1" in out


def test_space_is_checked_beforehand(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(run.path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    run.check_space(1000)
    with pytest.raises(SaveError, match="needs 5 MB and 1 kB are free"):
        run.check_space(5_000_000)
    with pytest.raises(SaveError, match="needs 1.04 kB"):
        publish(run, 1)


# One process, so that torch is imported once: it forks a writer, kills it at a random moment, looks, and goes on.
KILL_LOOP = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from tuner.checkpoint import RunDir
torch.set_num_threads(1)
path, rng = Path(sys.argv[1]), random.Random(0)

def content(step):
    return {k: {"x": torch.full((100_000,), float(step))} for k in ("weights", "optimizer", "rng")}

def write(start, tell):
    with RunDir.create(path, "", {"a": 1}, resume=True, overwrite=False) as run:
        for step in range(start + 1, start + 1000):
            run.append_metrics({"step": step, "loss": 1.0})
            run.publish(step, content(step), {"step": step}, save_total_limit=1)
            if step == start + 1:
                os.write(tell, b"1")

seen, cut = 0, 0
for _ in range(12):
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        write(seen, tell)
        os._exit(1)
    os.close(tell)
    assert os.read(told, 1)  # one checkpoint is out
    os.close(told)
    time.sleep(rng.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    cut += any(p.name.startswith(".tmp") for p in path.rglob("*"))
    with RunDir.create(path, "", {"a": 1}, resume=True, overwrite=False) as run:
        found = run.latest()
        assert found is not None and found.step > seen, (found, seen)
        seen = found.step
        tensors, state = found.load()
        assert state == {"step": seen}
        assert all(torch.equal(tensors[k]["x"], v["x"]) for k, v in content(seen).items())
        assert not [p for p in path.rglob(".tmp*")]
        run.rewind(seen)
        assert len((path / "metrics.jsonl").read_text().splitlines()) == seen
print("steps", seen, "cut", cut)
"""


def python(code: str, *arguments: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kill_9_at_random_moments_of_saving(tmp_path: Path) -> None:
    out = python(KILL_LOOP, str(tmp_path / "chat"))
    saved, cut = map(int, re.findall(r"\d+", out))
    assert saved >= 12 and cut > 0, out  # some kills fell inside a save


# --- rotation ---------------------------------------------------------------------------------------------------------


def test_rotation_keeps_the_newest_and_the_best(run: RunDir) -> None:
    for step in (1, 2, 3, 4, 5):
        publish(run, step, save_total_limit=2, keep=(2,))
    assert steps(run) == ["step-000002", "step-000004", "step-000005"]
    publish(run, 6, save_total_limit=1)
    assert steps(run) == ["step-000006"]
    publish(run, 1_000_000, save_total_limit=2)
    assert_is(run.latest(), 1_000_000)


def test_age_is_the_step_not_the_time(run: RunDir) -> None:
    first, second = publish(run, 1), publish(run, 2)
    os.utime(first.path, (2e9, 2e9))
    os.utime(second.path, (1e9, 1e9))
    assert_is(run.latest(), 2)
    publish(run, 3, save_total_limit=2)
    assert steps(run) == ["step-000002", "step-000003"]


def test_nothing_is_removed_before_the_new_one_is_published(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(run, 1)
    monkeypatch.setattr(run_module, "write_checkpoint", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        publish(run, 2, save_total_limit=1)
    assert steps(run) == ["step-000001"]


def test_a_damaged_newer_one_does_not_push_out_the_good(run: RunDir) -> None:
    """After a resume from 5 the damaged 9 must neither count as the newest nor stay."""
    publish(run, 5)
    (publish(run, 9).path / "state.json").write_text("{")
    assert_is(run.latest(), 5)
    publish(run, 6, save_total_limit=1)
    assert steps(run) == ["step-000006"]
    assert_is(run.latest(), 6)


def test_a_damaged_one_of_the_same_step_is_replaced_and_a_whole_one_kept(run: RunDir) -> None:
    (publish(run, 5).path / "state.json").write_text("{")
    assert_is(publish(run, 5), 5)
    before = (run.path / "checkpoints/step-000005/manifest.json").stat().st_ino
    assert_is(publish(run, 5, save_total_limit=1), 5)
    assert (run.path / "checkpoints/step-000005/manifest.json").stat().st_ino == before
    assert steps(run) == ["step-000005"]


# --- starting, resuming, replacing ------------------------------------------------------------------------------------


def test_an_existing_directory_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "chat"
    with make(path) as run:
        publish(run, 1)
    with pytest.raises(RunDirError, match="--resume.*--overwrite"):
        make(path)
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.jpg").write_text("miaow")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(RunDirError, match="no readable manifest.json"):
            make(foreign, **options)
    (foreign / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(RunDirError, match="no readable manifest.json"):
        make(foreign, overwrite=True)
    assert (foreign / "cat.jpg").read_text() == "miaow"


def test_links_files_and_contradictions_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "chat").close()
    (tmp_path / "link").symlink_to(tmp_path / "chat")
    with pytest.raises(RunDirError, match="symbolic link"):
        make(tmp_path / "link", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="is a file"):
        make(tmp_path / "file")
    with pytest.raises(RunDirError, match="cannot be made"):
        make(tmp_path / "file" / "chat")
    with pytest.raises(RunDirError, match="contradict"):
        make(tmp_path / "chat", resume=True, overwrite=True)
    with pytest.raises(RunDirError, match="together with --resume"):
        make(tmp_path / "new", allow_drift=["data.hash"])


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with make(tmp_path / "chat"):
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(RunDirError, match="another tuner process"):
                make(tmp_path / "chat", **options)
    make(tmp_path / "chat", resume=True).close()


def test_resume_starts_continues_or_says_it_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "chat"
    with make(path, resume=True) as run:  # nothing there: starts
        assert run.latest() is None and not run.finished
    path.joinpath("checkpoints/.tmp-step-000001-99").mkdir()
    path.joinpath(".tmp-manifest.json-99").write_text("{")
    path.joinpath("metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    with make(path, resume=True) as run:
        assert run.latest() is None
        assert not path.joinpath("metrics.jsonl").read_text()  # they begin anew
        assert not list(path.rglob(".tmp*"))
        publish(run, 3)
    with make(path, resume=True) as run:
        assert_is(run.latest(), 3)
        run.finish({"steps": 3})
    before = {p: p.read_bytes() for p in path.rglob("*.json")}
    with make(path, resume=True) as run:
        assert run.finished
    assert {p: p.read_bytes() for p in path.rglob("*.json")} == before
    with make(path, resume=True, identity=IDENTITY | {"train.max_steps": 200}) as run:
        assert not run.finished


def test_drift_is_refused_by_name_with_both_values(tmp_path: Path) -> None:
    make(tmp_path / "chat").close()
    changed = IDENTITY | {"train.learning_rate": 2e-4, "data.train": ("b.jsonl",)}
    with pytest.raises(RunDirError) as caught:
        make(tmp_path / "chat", resume=True, identity=changed)
    assert "train.learning_rate was 0.0001 and is now 0.0002" in str(caught.value)
    assert "data.train was ['a.jsonl'] and is now ['b.jsonl']" in str(caught.value)
    assert "--allow-drift data.train --allow-drift train.learning_rate" in str(caught.value)
    assert checkpoint.read_manifest(tmp_path / "chat")["identity"] == IDENTITY  # type: ignore[index]


@pytest.mark.parametrize(
    "key", sorted(IDENTITY.keys() - {"train.microbatch_tokens", "train.output_dir", "log.save_steps"})
)
def test_each_key_of_the_identity_counts(tmp_path: Path, key: str) -> None:
    make(tmp_path / "chat").close()
    for identity in (IDENTITY | {key: -1}, {k: v for k, v in IDENTITY.items() if k != key}):
        if key == "eval.samples":
            make(tmp_path / "chat", resume=True, identity=identity).close()
        else:
            with pytest.raises(RunDirError, match=re.escape(key)):
                make(tmp_path / "chat", resume=True, identity=identity)


def test_mutant_drift_that_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "drift", lambda old, new: {})
    with pytest.raises(pytest.fail.Exception):
        test_drift_is_refused_by_name_with_both_values(tmp_path)


def test_what_may_differ_and_what_was_allowed_is_recorded(tmp_path: Path) -> None:
    make(tmp_path / "chat").close()
    free = IDENTITY | {"log.save_steps": 5, "train.microbatch_tokens": 64, "eval.samples": 2, "train.max_steps": 101}
    with make(tmp_path / "chat", resume=True, identity=free) as run:
        assert run.manifest["drift"] == []
        assert run.manifest["identity"]["train.max_steps"] == 101
    with pytest.raises(RunDirError, match=r"train.max_steps was 101 and is now 100"):
        make(tmp_path / "chat", resume=True)
    changed = free | {"data.hash": "new"}
    with pytest.raises(RunDirError, match="did you mean 'data.hash'"):
        make(tmp_path / "chat", resume=True, identity=changed, allow_drift=["data.hsh"])
    with pytest.raises(RunDirError, match="--allow-drift 'data.train .content.'"):
        make(tmp_path / "chat", resume=True, identity=free | {"data.train (content)": "new"})
    with make(tmp_path / "chat", resume=True, identity=changed, allow_drift=["data.hash"]) as run:
        (drift,) = run.manifest["drift"]
        assert (drift["key"], drift["old"], drift["new"]) == ("data.hash", "aa", "new")
    with make(tmp_path / "chat", resume=True, identity=changed) as run:
        assert len(run.manifest["drift"]) == 1


def test_overwrite_keeps_the_old_run_until_the_new_one_has_finished(tmp_path: Path) -> None:
    path, aside, log = tmp_path / "chat", tmp_path / ".chat.previous-1", Log()
    with make(path) as run:
        publish(run, 1)
        run.finish({})
    with pytest.raises(ZeroDivisionError), make(path, log, overwrite=True) as run:
        assert run.latest() is None and not (path / "metrics.jsonl").exists()
        raise ZeroDivisionError
    assert (aside / "checkpoints/step-000001").is_dir()
    assert str(aside) in log[-1]
    assert json.loads((path / "manifest.json").read_text())["status"] == "failed"
    with make(path, overwrite=True):  # again: both are kept
        assert (tmp_path / ".chat.previous-2").is_dir() and aside.is_dir()
    with make(path, resume=True) as run:
        assert aside.is_dir()
        run.finish({})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chat"]


def test_an_overwrite_cut_short_before_it_began_is_undone(tmp_path: Path) -> None:
    path, log = tmp_path / "chat", Log()
    with make(path) as run:
        publish(run, 4)
    path.rename(tmp_path / ".chat.previous-1")  # killed between the two renames
    with make(path, log, resume=True) as run:
        assert_is(run.latest(), 4)
    assert "brought back" in log[0]


def test_a_failing_overwrite_restores_the_old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "chat"
    with make(path) as run:
        publish(run, 4)
    rename = os.rename

    def fail(source: Any, target: Any) -> None:
        if ".new-" in Path(source).name:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(RunDirError, match="Input/output error"):
        make(path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["chat"]
    with make(path, resume=True) as run:
        assert_is(run.latest(), 4)


def test_overwriting_what_the_recipe_reads_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chat"
    make(path).close()
    (path / "merged").mkdir()
    with pytest.raises(RunDirError, match="model.name_or_path: .* lies in"):
        make(path, overwrite=True, identity=IDENTITY | {"model.name_or_path": str(path / "merged")})
    assert [p.name for p in tmp_path.iterdir()] == ["chat"]
    make(path, overwrite=True).close()  # the refusal gave up the lock


def test_a_replaced_result_survives_a_crash_between_the_renames(tmp_path: Path) -> None:
    path = tmp_path / "chat"
    with make(path) as run:
        run.write_result("adapter", lambda d: (d / "a.json").write_text("1"))
    (path / "adapter").rename(path / ".tuner-old-adapter")
    with make(path, resume=True):
        assert (path / "adapter" / "a.json").read_text() == "1"


def test_a_mistake_of_the_user_takes_the_start_back(tmp_path: Path) -> None:
    """Exit 2 means that nothing has been changed: no directory that a corrected second try would stumble over."""
    path = tmp_path / "deep" / "chat"
    with pytest.raises(DataError), make(path) as run:
        run.append_metrics({"step": 0})
        raise DataError("row 3")
    assert not path.exists()
    with make(path) as run:
        publish(run, 4)
    with pytest.raises(DataError), make(path, overwrite=True):
        raise DataError("row 3")
    assert [p.name for p in path.parent.iterdir()] == ["chat"]
    with pytest.raises(DataError), make(path, resume=True) as run:
        raise DataError("row 3")
    with make(path, resume=True) as run:
        assert_is(run.latest(), 4)
    for save in (lambda run: publish(run, 1), lambda run: run.finish({})):  # nor is anything that was saved taken back
        with pytest.raises(DataError), make(path, overwrite=True) as run:
            save(run)
            raise DataError("late")
        assert path.is_dir()


def test_replacing_touches_no_neighbour(tmp_path: Path) -> None:
    for name in (".old-keys", ".tmp-mine", ".tuner-old-other"):
        (tmp_path / name).mkdir()
    for text in "12":
        checkpoint.publish_directory(
            tmp_path / "out", lambda d, text=text: (d / "a").write_text(text), what="it", replace=True
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == [".old-keys", ".tmp-mine", ".tuner-old-other", "out"]
    assert (tmp_path / "out" / "a").read_text() == "2"


def test_status_tells_an_interruption_from_a_failure(tmp_path: Path) -> None:
    with pytest.raises(Interrupted), make(tmp_path / "chat"):
        raise Interrupted(15, "stopped")
    assert checkpoint.read_manifest(tmp_path / "chat")["status"] == "interrupted"  # type: ignore[index]


# --- metrics, manifest, state -----------------------------------------------------------------------------------------


def test_metrics_of_a_resumed_run_equal_the_uninterrupted_ones(tmp_path: Path) -> None:
    def log_steps(run: RunDir, first: int, last: int) -> None:
        for step in range(first, last + 1):
            run.append_metrics({"step": step, "loss": 1 / step})
            if step % 2 == 0:
                run.append_metrics({"step": step, "eval_loss": float("nan")})

    with make(tmp_path / "whole") as run:
        log_steps(run, 1, 9)
    with make(tmp_path / "cut") as run:
        log_steps(run, 1, 4)
        publish(run, 4)
        log_steps(run, 5, 6)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # the line that the crash tore
    with make(tmp_path / "cut", resume=True) as run:
        run.rewind(4)
        log_steps(run, 5, 9)
    whole = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert (tmp_path / "cut" / "metrics.jsonl").read_text() == whole
    assert json.loads(whole.splitlines()[2]) == {"step": 2, "eval_loss": None}


def test_no_secret_environment_or_pickle_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_" + "abcdefghijklmnop1234"
    monkeypatch.setenv("HF_TOKEN", secret)
    recipe = f"data: https://user:passw0rd@example.org/x\ntoken: {secret}\n"
    identity = {"data.train": ["https://user:passw0rd@example.org/x"], "x": secret}
    with RunDir.create(tmp_path / "chat", recipe, identity, resume=False, overwrite=False, log=Log()) as run:
        publish(run, 1)
        run.record(note=f"used {secret}")
        run.finish({"note": secret})
    with RunDir.create(tmp_path / "chat", recipe, identity, resume=True, overwrite=False, log=Log()) as run:
        assert run.finished  # the blotted-out identity still equals itself
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    for path in files:
        content = path.read_bytes()
        assert secret.encode() not in content and b"passw0rd" not in content, path
        assert os.environ["HOME"].encode() not in content or os.environ["HOME"] == "/", path
        assert b"\x80\x04" != content[:2] and b"PK" != content[:2], path  # pickle, torch.save
    assert {p.suffix for p in files} == {".yaml", ".json", ".safetensors", ""}


def test_the_manifest_says_what_ran(run: RunDir) -> None:
    run.record(counts={"rows": 3})
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["identity"] == IDENTITY and manifest["counts"] == {"rows": 3}
    assert {"python", "torch", "transformers", "peft", "tuner"} <= manifest["versions"].keys()
    assert manifest["device"] and manifest["status"] == "running"
    assert (run.path / "recipe.yaml").read_text() == "version: 1\n"


def test_state_round_trip() -> None:
    parameter = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.sum().backward()
    optimizer.step()
    state = {
        "optimizer": optimizer.state_dict(),
        "mixed": [None, True, 2, 1 / 3, "text", (1, [2]), {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}],
        "best": float("inf"),
        "empty": {},
    }
    tensors, encoded = flatten_state(state)
    back = unflatten_state(tensors, json.loads(json.dumps(encoded, allow_nan=False)))
    assert repr(back) == repr({**state, "optimizer": optimizer.state_dict()})
    fresh = torch.optim.AdamW([parameter], lr=0.5)
    fresh.load_state_dict(back["optimizer"])
    assert repr(fresh.state_dict()) == repr(optimizer.state_dict())
    with pytest.raises(TypeError, match="hooks.0"):
        flatten_state({"hooks": [print]})


def test_rng_round_trip() -> None:
    def draw() -> list[float]:
        numbers = [random.random(), random.gauss(), np.random.rand(), np.random.randn()]
        return [*numbers, *torch.rand(3).tolist(), *torch.randn(3).tolist()]

    draw()
    tensors, encoded = rng_state()
    tensors = {k: v.clone() for k, v in tensors.items()}
    first = draw()
    assert draw() != first
    set_rng_state(tensors, json.loads(json.dumps(encoded)))
    assert draw() == first


def test_the_source_knows_no_pickle() -> None:
    sources = sorted(Path(checkpoint.__file__).parent.glob("*.py"))
    assert len(sources) == 6
    for source in sources:
        assert not re.search(r"import pickle|torch\.(save|load)\(|allow_pickle", source.read_text()), source


# --- a start that is refused or cut short ---------------------------------------------------------------------------


def test_a_name_that_no_directory_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="train.output_dir: .* cannot be used"):
        checkpoint.check_output(tmp_path / ("x" * 300), resume=False, overwrite=False, reads={})


def test_a_manifest_that_says_too_little_is_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "manifest.json").write_text('{"tuner_run": 1}')
    for changes in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(RunDirError, match="no readable manifest.json"):
            make(tmp_path / "chat", **changes)


def test_a_signal_before_training_takes_the_start_back(tmp_path: Path) -> None:
    path = tmp_path / "chat"
    with make(path) as run:
        run.publish(4, tensors_of(4), {"step": 4, "lr": 1e-3 / 3})
    with pytest.raises(KeyboardInterrupt), make(path, overwrite=True):
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["chat"]
    with pytest.raises(KeyboardInterrupt), make(path, resume=True) as run:
        raise KeyboardInterrupt
    assert checkpoint.read_manifest(path)["status"] == "interrupted"  # type: ignore[index]
    with make(path, resume=True) as run:
        assert_is(run.latest(), 4)


def test_a_disk_that_is_full_before_the_first_step_takes_the_start_back(tmp_path: Path) -> None:
    with pytest.raises(SaveError), make(tmp_path / "chat"):
        raise SaveError("no room for a checkpoint")
    assert not (tmp_path / "chat").exists()
    with pytest.raises(SaveError), make(tmp_path / "chat") as run:
        run.append_metrics({"step": 1, "loss": 2.0})
        raise SaveError("no room for a checkpoint")
    assert (tmp_path / "chat" / "metrics.jsonl").exists()
