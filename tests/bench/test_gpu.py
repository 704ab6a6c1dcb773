"""`scripts/bench/h200` as a toy, in this process: every part runs, writes its result, and both layouts learn alike."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import gpu
import gpu_sides
import kernel_ops
import ops
import pytest
import synthetic
import torch
from models import SHAPES

CPU = torch.device("cpu")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sides run here instead of in processes of their own, whose start would take longer than the toy."""
    answers: list[dict[str, Any]] = []

    def child(script: str, side: str, *arguments: str, environment: str = "tuner", **changes: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [script, "--side", side, *arguments])
        gpu_sides.main()
        return answers.pop()

    monkeypatch.setattr(common, "child", child)
    monkeypatch.setattr(common, "answer", answers.append)


def arguments(output: Path) -> argparse.Namespace:
    return argparse.Namespace(tiny=True, repeats=1, output=output, started=time.monotonic())


def run(part: Callable[[argparse.Namespace], None], tmp_path: Path) -> list[dict[str, Any]]:
    part(arguments(tmp_path / "result.json"))
    cases: list[dict[str, Any]] = common.read(tmp_path / "result.json")["cases"]
    return cases


@pytest.mark.usefixtures("in_process")
def test_sft_gives_rates_activations_and_the_floor(tmp_path: Path) -> None:
    whole, short = run(gpu.sft, tmp_path)
    for case in (whole, short):
        for side in ("triton", "reference"):
            (measured,) = case["sides"][side]["runs"]
            assert measured["tokens_per_second"] > 0 and measured["activation_bytes_per_token"] > 0
            assert measured["mfu"] is None or measured["mfu"] < 1  # of a Hopper GPU only
    assert 0 < whole["floor"]["share"] < 1
    assert max(map(abs, whole["loss_differences"]["triton"])) < 1e-3


@pytest.mark.usefixtures("in_process")
def test_trajectories_are_laid_side_by_side(tmp_path: Path) -> None:
    cases = run(gpu.trajectory, tmp_path)
    assert [case["settings"]["dtype"] for case in cases] == ["bfloat16", "float32"]
    for case in cases:
        (measured,) = case["sides"]["triton"]["runs"]
        assert len(measured["losses"]) == 5 and case["settings"]["difference"]["largest"] < 1e-6  # one backend, twice


@pytest.mark.usefixtures("in_process")
def test_dpo_starts_at_ln_2_in_every_layout_and_says_what_sharing_brings(tmp_path: Path) -> None:
    (case,) = run(gpu.dpo, tmp_path)
    for side in case["sides"].values():
        assert side["parity_losses"] == pytest.approx([0.693147], abs=1e-5)
    sharing = case["settings"]["prefix_sharing"]
    assert 1.3 < sharing["ideal_gain"] < 1.7 and sharing["share_of_ideal"] > 0
    assert case["against"].startswith("plain-")


@pytest.mark.usefixtures("in_process")
def test_memory_finds_the_longest_context(tmp_path: Path) -> None:
    (case,) = run(gpu.memory, tmp_path)
    for side in case["sides"].values():
        assert [measured["longest_context_tokens"] for measured in side["runs"]] == [256]


def test_the_search_finds_what_fits_within_a_sixteenth() -> None:
    for most in (0, 1, 3, 17, 100, 255, 256, 1000):
        found = synthetic.most_that_fits(lambda n, most=most: n <= most, 1, 256, time.monotonic() + 60)
        assert min(most, 256) * 15 / 16 <= found <= min(most, 256)


def test_plain_transformers_and_ours_give_the_same_preference_losses() -> None:
    """Three steps over the same pairs, in fp32: shared, unshared, and padded by transformers and peft."""
    shape = SHAPES["tiny"]
    samples = synthetic.preference_pairs(4, shape.vocab, 40, 2.15)

    def ours(shared: bool) -> list[float]:
        policy = synthetic.make_policy(shape, synthetic.Method(), CPU, torch.float32, 256)
        stage = synthetic.PreferenceStage(synthetic.Reference(policy), shared=shared)
        found = synthetic.steps(
            policy, stage, stage.laid_out(samples), batch_size=4, microbatch_tokens=4096, count=3, warm_up=0
        )  # fmt: skip
        return list(found["first_losses"])

    plain = synthetic.plain_preference(shape, samples, CPU, torch.float32, 4, 3, 0)["first_losses"]
    assert plain[2] < plain[0]
    assert ours(True) == pytest.approx(plain, abs=2e-6)
    assert ours(False) == pytest.approx(plain, abs=2e-6)


def test_activations_grow_with_the_tokens_and_shrink_with_checkpointing() -> None:
    shape = SHAPES["tiny"]

    def kept(tokens: int, **how: Any) -> float:
        policy = synthetic.make_policy(shape, synthetic.Method(**how), CPU, torch.float32, 512)
        return synthetic.activation_bytes(policy, synthetic.LanguageStage(), synthetic.documents([tokens], shape.vocab))

    bare = kept(256)
    assert 4 * shape.hidden < bare < 4 * 400 * shape.hidden  # a layer keeps a few states a token, not hundreds
    assert kept(256, checkpointing=True) < kept(256, checkpointing="selective") < bare


@pytest.mark.parametrize("name", kernel_ops.OPS)
def test_every_side_of_a_kernel_computes_the_same(name: str) -> None:
    op = kernel_ops.OPS[name](kernel_ops.Maker(SHAPES["tiny"], CPU, torch.bfloat16, 64))
    exact = kernel_ops.truth(op)
    assert {"reference", "eager"} <= op.sides.keys()
    for side, compute in op.sides.items():
        assert kernel_ops.error(op, compute, exact) < 2e-2, side
    assert op.flops > 0 or op.moved_bytes > 0


def test_kernels_are_timed_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "ops.py --shape tiny --ops rope --repeats 2 --calls 2 --without compile --output"
    monkeypatch.setattr(sys, "argv", [*shlex.split(said), str(tmp_path / "kernels.json")])
    ops.main()
    (case,) = common.read(tmp_path / "kernels.json")["cases"]
    assert case["better"] == "lower" and case["ratios"].keys() == {"reference"}
    assert all(measured["seconds"] > measured["forward_seconds"] * 0.1 for measured in case["sides"]["eager"]["runs"])


def test_the_tests_part_counts_what_pytest_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, "FAILED tests/kernels/x.py::y\n1 failed, 7 passed, 2 skipped in 3s\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(
        common, "facts", lambda: {"date": "", "commit": None, "dirty": None, "machine": {}, "versions": {}}
    )
    (case,) = run(gpu.tests, tmp_path)
    (measured,) = case["sides"]["tests"]["runs"]
    assert (measured["passed"], measured["failed"], measured["skipped"], measured["exit_code"]) == (7, 1, 2, 1)
    assert case["notes"][0] == "FAILED tests/kernels/x.py::y"


def test_wheels_are_unpacked_onto_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_for_the_gpu.py", "value = 7\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("BENCH_PATH", "")
    assert gpu.unpack(tmp_path / "wheels", tmp_path / "unpacked") == ["carried-1.0-py3-none-any.whl"]
    assert __import__("carried_for_the_gpu").value == 7
    assert str(tmp_path / "unpacked") in common.variables("default")["PYTHONPATH"]


LACKING = ("pydantic", "pydantic_core", "ruamel", "datasets", "trl", "bitsandbytes", "typer", "rich")


def lacking(code: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a process where these packages cannot be imported."""
    environment = common.variables("default") | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] += f":{Path(gpu.__file__).parent}"
    code = f"import sys\nsys.modules.update(dict.fromkeys({LACKING}))\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=common.ROOT, capture_output=True, text=True, check=False
    )


def test_it_runs_without_what_a_gpu_machine_may_lack() -> None:
    """A side of each part trains."""
    done = lacking("""
import gpu, gpu_sides, ops
assert "qlora" not in gpu.available(gpu.SFT) and "triton" in gpu.available(gpu.SFT)
rate = gpu_sides.sft("reference", True, "short")["tokens_per_second"]
print(rate > 0, gpu_sides.dpo("tuner", True)["first_losses"][0])
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True 0.6931471824645996"


def test_the_kernel_tests_are_found_without_it_too() -> None:
    """One module that cannot be imported would end the part before its first test."""
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-W", "default", "tests/kernels"]
    done = lacking(f"import pytest\nsys.exit(pytest.main({options}))")
    assert done.returncode == 0, done.stdout[-3000:]
