"""The command line as a user meets it: speed, exit codes, one sentence an error, and the recipes that ship."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tuner import cli, environment
from tuner.errors import Interrupted, NonFiniteError, RunDirError

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
Tuner = Callable[..., "subprocess.CompletedProcess[str]"]

GOOD = """\
model: {name_or_path: org/name}
data: {train: org/data}
train: {output_dir: runs/x, learning_rate: 1e-4}
"""


@pytest.fixture
def tuner(tmp_path: Path) -> Tuner:
    """Runs `tuner` with arguments in an empty directory."""

    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tuner", *arguments]
        environ = {**os.environ, "PYTHONPATH": str(ROOT), **env}
        return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)

    return run


def cost(run: Callable[[], object], tries: int = 3) -> float:
    """Processor seconds of the cheapest of a few runs: what the command takes when nothing else wants the processor."""
    seconds = []
    for _ in range(tries):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)


# --- speed ------------------------------------------------------------------------------------------------------------


def test_help_answers_within_half_a_second(tuner: Tuner) -> None:
    done = tuner("--help")
    assert done.returncode == 0 and "sft" in done.stdout and "merge" in done.stdout
    assert cost(lambda: tuner("--help")) < 0.5


def test_a_broken_recipe_is_refused_within_a_second(tuner: Tuner, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(GOOD.replace("learning_rate", "learning_rat"))
    done = tuner("sft", "r.yaml")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: r.yaml:3: unknown key 'train.learning_rat' (did you mean 'learning_rate'?)\n"
    assert cost(lambda: tuner("sft", "r.yaml")) < 1


@pytest.mark.parametrize(
    "arguments", [["--help"], ["sft", "r.yaml", "train.sed=1"], ["run", "r.yaml"], ["recipes", "list"], ["sft", "-h"]]
)
def test_light_commands_import_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "r.yaml").write_text(GOOD)
    code = (
        "import sys, atexit; from tuner.cli import main\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'peft', 'accelerate'}\n"
        "atexit.register(lambda: print('heavy:', sorted(heavy & set(sys.modules))))\n"
        f"sys.argv = ['tuner', *{arguments!r}]; main()"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.stdout.endswith("heavy: []\n"), done.stdout + done.stderr


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sft", "nope.yaml"], "there is no recipe at 'nope.yaml'"),
        (["sft", "r.yaml", "train.seed"], "an override has the form section.key=value"),
        (["sft", "r.yaml", "data.train=x.jsonl"], "'x.jsonl' is not there: "),
        (["sft", "r.yaml", "--resume", "--overwrite"], "give one of them"),
        (["sft", "r.yaml", "--allow-drift", "train.seed"], "--allow-drift has no effect without --resume"),
        (["run", "r.yaml"], "r.yaml: this is the recipe of one stage, not a pipeline; run it with `tuner sft`"),
        (["recipes", "show", "chatt"], "(did you mean 'chat'?)"),
        (["generate", "--prompt", "hi"], "give --model for a checkpoint, or --adapter"),
        (["generate", "--model", "x"], "give --prompt for one prompt, or --file"),
        (["generate", "--model", "x", "--prompt", "a", "--base", "y"], "--base has no effect without --adapter"),
        (["merge", "--adapter", "x"], "x"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_2(
    tuner: Tuner, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    (tmp_path / "r.yaml").write_text(GOOD)
    done = tuner(*arguments)
    assert done.returncode == 2, done
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and expected in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.yaml"]


@pytest.mark.parametrize("arguments", [["sft"], ["sft", "r.yaml", "--fast"], ["nope"], ["recipes", "nope"], ["merge"]])
def test_wrong_usage_is_exit_2_without_a_traceback(tuner: Tuner, arguments: list[str]) -> None:
    done = tuner(*arguments)
    assert done.returncode == 2
    assert "Usage: " in done.stderr and "Traceback" not in done.stderr


def call(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    """The exit code of `tuner env` where the function behind it raises."""

    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "set_environment", lambda: None)
    monkeypatch.setattr(environment, "describe", fail)
    monkeypatch.setattr(sys, "argv", ["tuner", "env"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (RunDirError("runs/x holds a run; --overwrite replaces it"), 2, "runs/x holds a run; --overwrite replaces it"),
        (NonFiniteError("the loss\nof step 3 is nan"), 1, "the loss of step 3 is nan"),
        (Interrupted(15, "stopped by SIGTERM"), 143, "stopped by SIGTERM"),
        (KeyboardInterrupt(), 130, ""),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 1, "out of memory; lower train.microbatch_tokens"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory; lower train.microbatch_tokens"),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
            1,
            "the rank that ended first says",
        ),
        (MemoryError(), 1, "out of memory; lower train.microbatch_tokens"),
        (OSError(28, "No space left on device", "runs/x"), 1, "No space left on device: runs/x"),
        (KeyError("x"), 1, "KeyError: 'x' (this is a defect of tuner; TUNER_TRACEBACK=1 shows where it happened)"),
    ],
)
def test_every_error_has_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, expected: str
) -> None:
    assert call(monkeypatch, error) == code
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") <= 2 and "Traceback" not in said


def test_a_traceback_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TUNER_TRACEBACK", "1")
    assert call(monkeypatch, RunDirError("no")) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and said.endswith("error: no\n")


def test_a_reader_that_has_gone_away_is_no_traceback(tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} -u -m tuner recipes schema | head -n 1"
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.stdout == "{\n" and done.stderr == ""


# --- env, --version, --print-recipe -----------------------------------------------------------------------------------


def test_version(tuner: Tuner) -> None:
    assert tuner("--version").stdout.startswith("tuner 0.")


def test_env_says_what_a_bug_report_needs_and_names_nobody(tuner: Tuner) -> None:
    text = tuner("env", "--json").stdout
    facts = json.loads(text)
    assert facts["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "transformers", "device", "instruction_set", "native_bfloat16", "threads"} <= set(facts)
    assert len(environment.lines(facts)) == len(facts)
    assert str(Path.home()) not in text and os.uname().nodename not in text


def test_print_recipe_is_the_resolved_recipe(tuner: Tuner, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(GOOD)
    done = tuner("sft", "r.yaml", "train.seed=7", "--print-recipe")
    assert done.returncode == 0 and "  seed: 7\n" in done.stdout and "  batch_size: 64\n" in done.stdout
    (tmp_path / "again.yaml").write_text(done.stdout)
    assert tuner("sft", "again.yaml", "--print-recipe").stdout == done.stdout


def test_telemetry_is_off_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    monkeypatch.setattr("warnings.simplefilter", lambda action: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    cli.set_environment()
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_recipes_list_names_every_file_with_its_headline(tuner: Tuner) -> None:
    lines = tuner("recipes", "list").stdout.splitlines()
    assert sorted(line.split()[0] for line in lines) == sorted(p.stem for p in (ROOT / "recipes").glob("*.yaml"))
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)


@pytest.mark.parametrize("name", ["chat", "chat.yaml", "recipes/chat.yaml"])
def test_recipes_show_prints_the_file(tuner: Tuner, name: str) -> None:
    assert tuner("recipes", "show", name).stdout == (ROOT / "recipes" / "chat.yaml").read_text()


def test_recipes_schema_is_json(tuner: Tuner) -> None:
    assert json.loads(tuner("recipes", "schema").stdout)["title"] == "tuner recipe"


def test_recipes_copy_brings_what_the_recipe_reads(tuner: Tuner, tmp_path: Path) -> None:
    done = tuner("recipes", "copy", "chat", "mine")
    assert done.returncode == 0, done.stderr
    copied = tmp_path / "mine" / "recipes" / "chat.yaml"
    assert copied.read_text() == (ROOT / "recipes" / "chat.yaml").read_text()
    assert (tmp_path / "mine" / "data" / "chat-train.jsonl").is_file()
    assert done.stdout.endswith("start with: tuner sft mine/recipes/chat.yaml\n")
    assert "nothing to write" in tuner("recipes", "copy", "chat", "mine").stdout


def test_recipes_copy_brings_the_recipes_of_a_pipeline_and_what_they_read(tuner: Tuner, tmp_path: Path) -> None:
    done = tuner("recipes", "copy", "align", "mine")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("start with: tuner run mine/recipes/align.yaml\n")
    for name in ("recipes/align.yaml", "recipes/chat.yaml", "recipes/pref.yaml", "data/pref-train.jsonl"):
        assert (tmp_path / "mine" / name).read_bytes() == (ROOT / name).read_bytes()
    checked = tuner("run", "mine/recipes/align.yaml", "--dry-run", "output_dir=x")
    assert checked.returncode == 0 and "mine/data/pref-train.jsonl" in checked.stdout, checked.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]


def test_recipes_copy_never_replaces_a_file_of_the_user(tuner: Tuner, tmp_path: Path) -> None:
    mine = tmp_path / "recipes" / "chat.yaml"
    mine.parent.mkdir()
    mine.write_text("# mine\n")
    done = tuner("recipes", "copy", "chat")
    assert done.returncode == 2 and "exists with another content" in done.stderr
    assert mine.read_text() == "# mine\n" and not (tmp_path / "data").exists()


# --- all of it --------------------------------------------------------------------------------------------------------


def test_train_merge_and_generate(tuner: Tuner, recipe_file: Path, tmp_path: Path) -> None:
    few = ["train.max_steps=2", "train.output_dir=run", "data.max_length=512"]
    done = tuner("sft", str(recipe_file), *few)
    assert done.returncode == 0, done.stderr
    again = tuner("sft", str(recipe_file), *few)
    assert again.returncode == 2 and again.stderr.startswith("error: ") and "--overwrite" in again.stderr
    merged = tuner("merge", "--adapter", "run")
    assert merged.returncode == 0, merged.stderr
    assert (tmp_path / "run" / "merged" / "model.safetensors").is_file()
    answers = [
        tuner("generate", *which, "--prompt", "What is the capital?", "--max-new-tokens", "5").stdout
        for which in (("--adapter", "run"), ("--model", "run/merged"))
    ]
    assert answers[0] == answers[1] != ""


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="knows by Linux's /proc that torch is imported")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_training_is_one_sentence(tmp_path: Path, signum: int, code: int) -> None:
    """While torch is imported, when no run listens yet."""
    (tmp_path / "chats.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "r.yaml").write_text(
        GOOD.replace("org/data", "chats.jsonl").replace("org/name", str(DATA / "tiny-llama"))
    )
    command = [sys.executable, "-m", "tuner", "sft", "r.yaml"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    heard = {signal.SIGINT: signal.default_int_handler}  # where the tests run in the background, SIGINT is ignored
    before = {number: signal.signal(number, handler) for number, handler in heard.items()}
    process = subprocess.Popen(command, cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True)
    for number, handler in before.items():
        signal.signal(number, handler)
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():
        assert process.poll() is None, process.communicate()[1]  # else this would wait for ever
        time.sleep(0.01)
    process.send_signal(signum)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert said == f"error: stopped by {signal.Signals(signum).name}; what existed before is intact\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chats.jsonl", "r.yaml"]


def test_an_ignored_signal_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `nohup tuner ... &` asks for."""
    seen: list[object] = []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        monkeypatch.setattr(cli, "app", lambda: seen.append(signal.getsignal(signal.SIGINT)))
        with pytest.raises(SystemExit):
            cli.main()
        assert seen == [signal.SIG_IGN] and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
