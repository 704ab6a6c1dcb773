"""scripts/setup: installs once, and again when its inputs change; forgets no extra; names a Python that is too old."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("bash", "cat", "cksum", "dirname", "head", "paste", "rm", "sed", "sort", "tr", "env", "echo")


class Project:
    """A checkout whose `.venv/bin/python` only writes down what it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        (folder / "scripts").mkdir(parents=True)
        for name in ("pyproject.toml", "constraints.txt", "scripts/setup", "scripts/hatch_build.py"):
            shutil.copy(ROOT / name, folder / name)
        python = folder / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/usr/bin/env bash\necho "$@" >> "{self.calls}"\n')
        python.chmod(0o755)

    def setup(self, *extras: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "scripts/setup", *extras],
            cwd=self.folder,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
        )

    def installed(self) -> list[str]:
        """What pip was asked to install, one entry a call."""
        return [line.split(" -e ")[1] for line in self.calls.read_text().splitlines()] if self.calls.exists() else []


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "project with a space")


def test_the_second_call_does_nothing(project: Project) -> None:
    assert project.setup("dev").returncode == 0
    assert project.installed() == [".[dev]"]
    again = project.setup("dev")
    assert (again.returncode, again.stdout, project.installed()) == (0, "", [".[dev]"])
    assert "-c constraints.txt" in project.calls.read_text()


def test_fewer_extras_are_covered_and_more_are_added(project: Project) -> None:
    project.setup()
    project.setup("dev")
    project.setup()
    assert project.installed() == [".", ".[dev]"]
    project.setup("kernels")
    project.setup("dev", "kernels")
    assert project.installed() == [".", ".[dev]", ".[dev,kernels]"]


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_changed_inputs_install_again_with_the_extras_of_before(project: Project, changed: str) -> None:
    project.setup("dev")
    with (project.folder / changed).open("a") as stream:
        stream.write("# changed\n")
    project.setup()
    assert project.installed() == [".[dev]", ".[dev]"]


def test_a_failed_install_leaves_no_stamp(project: Project) -> None:
    project.setup()
    (project.folder / "constraints.txt").write_text("changed\n")
    python = project.folder / ".venv" / "bin" / "python"
    working = python.read_text()
    python.write_text("#!/usr/bin/env bash\nexit 1\n")
    assert project.setup().returncode != 0
    python.write_text(working)
    assert project.setup().returncode == 0
    assert project.installed() == [".", "."]


def test_an_unknown_extra_is_refused(project: Project) -> None:
    done = project.setup("devel")
    assert done.returncode == 2 and "unknown extra 'devel'; known: dev, kernels" in done.stderr
    assert project.installed() == []


def test_an_old_python_is_named(project: Project, tmp_path: Path) -> None:
    shutil.rmtree(project.folder / ".venv")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    (tools / "python3").write_text('#!/usr/bin/env bash\n[[ $1 == --version ]] && echo "Python 3.9.2" || exit 1\n')
    (tools / "python3").chmod(0o755)
    done = project.setup(PATH=str(tools))
    assert done.returncode == 1
    assert "tuner needs Python 3.11 or newer, found Python 3.9.2" in done.stderr
