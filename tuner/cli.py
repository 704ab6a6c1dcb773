"""Arguments -> one function call, and an error -> one sentence and an exit code.

Exit codes: 0 done; 1 the run failed; 2 the recipe, the data or the usage is wrong; 130 and 143 stopped by a signal.
Nothing heavy is imported at the top: `tuner --help` and a broken recipe answer before torch could be loaded.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from tuner import __version__
from tuner.errors import TunerError, UserError, printable

app = typer.Typer(
    name="tuner",
    help="Fine-tunes and aligns Llama-family models from YAML recipes: full weights, LoRA or 4-bit QLoRA.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(
    help="List, show and copy the recipes that ship with tuner.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(recipes_app, name="recipes")
data_app = typer.Typer(
    help="Look at the data of a recipe before you train on it.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="SECTION.KEY=VALUE", help="Overrides, e.g. train.batch_size=32.", show_default=False),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"tuner {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


DryRun = Annotated[bool, typer.Option("--dry-run", help="Check, tokenise and print the plan; train nothing.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in train.output_dir.")]
AllowDrift = Annotated[
    list[str] | None, typer.Option(metavar="KEY", help="With --resume: a key whose value may differ; repeatable.")
]
PrintRecipe = Annotated[bool, typer.Option("--print-recipe", help="Print the whole recipe and stop.")]


@app.command()
def sft(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    allow_drift: AllowDrift = None,
    print_recipe: PrintRecipe = False,
) -> None:
    """Fine-tune on the answers of chats, or on text."""
    _train("sft", recipe, overrides, dry_run, resume, overwrite, allow_drift, print_recipe)


@app.command()
def reward(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    allow_drift: AllowDrift = None,
    print_recipe: PrintRecipe = False,
) -> None:
    """Train a model that gives rewards to answers, on pairs or ranked lists of them."""
    _train("reward", recipe, overrides, dry_run, resume, overwrite, allow_drift, print_recipe)


@app.command()
def dpo(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    allow_drift: AllowDrift = None,
    print_recipe: PrintRecipe = False,
) -> None:
    """Train on pairs of a preferred and a rejected answer: DPO and its family."""
    _train("dpo", recipe, overrides, dry_run, resume, overwrite, allow_drift, print_recipe)


def _train(
    stage: str,
    recipe: Path,
    overrides: list[str] | None,
    dry_run: bool,
    resume: bool,
    overwrite: bool,
    allow_drift: list[str] | None,
    print_recipe: bool,
) -> None:
    """What all training stages do with their options."""
    from tuner import recipe as recipes

    if resume and overwrite:
        raise UserError("--resume continues a run and --overwrite replaces it; give one of them")
    if allow_drift and not resume:
        raise UserError("--allow-drift has no effect without --resume")
    loaded = recipes.load(recipe, overrides or (), stage=stage)
    if print_recipe:
        print(recipes.dump(loaded), end="")
        return
    _quiet_libraries()
    run = importlib.import_module(f"tuner.stages.{stage}").run
    run(loaded, resume=resume, overwrite=overwrite, allow_drift=tuple(allow_drift or ()), dry_run=dry_run)


@app.command("run")
def run_pipeline(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE", help="A pipeline file.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="STAGE.SECTION.KEY=VALUE", help="Overrides, e.g. dpo.train.batch_size=32.", show_default=False
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Run several stages in order, each fed by those before it.

    What has finished is skipped, unless something that it was made of has changed; what was interrupted goes on.
    """
    from tuner.recipe import pipeline as pipelines

    loaded = pipelines.load(pipeline, overrides or ())
    _quiet_libraries()
    from tuner import pipeline as runner

    runner.run(loaded, dry_run=dry_run)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Option(metavar="RUN_OR_ADAPTER", help="A run, or an adapter directory.")],
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where to write; default: merged, in the run.", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: that of the base.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where the base lies now, if it has moved.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a merged model that is there.")] = False,
) -> None:
    """Merge an adapter into its base.

    Writes a plain Hugging Face directory (of a reward model a classifier of one label, its head in float32), loads it
    afresh and compares it with the adapter.
    """
    _quiet_libraries()
    from tuner.export.merge import merge as merge_adapter

    for line in merge_adapter(adapter, output, dtype=dtype, overwrite=overwrite, base=base).lines():
        print(line)


@app.command()
def generate(
    model: Annotated[
        str | None, typer.Option(metavar="DIR", help="A run, a checkpoint directory or a Hub id.", show_default=False)
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(metavar="RUN_OR_ADAPTER", help="A run, or an adapter directory.", show_default=False)
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Where the adapter's base lies now, if it has moved.", show_default=False),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What the user says.", show_default=False)] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Prompts: .txt, one a line; or .jsonl rows of `messages` or `prompt`.", show_default=False),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message before the prompt.", show_default=False)] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as text, without a chat template.")] = False,
    chat_template: Annotated[
        str | None,
        typer.Option(help="A template, e.g. llama3.1; default: the model's own.", show_default=False),
    ] = None,
    ghost_attention: Annotated[
        bool, typer.Option("--ghost-attention", help="Say the system message in every user turn.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 is greedy; default: the run's, or 0.", show_default=False)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Sample among the k likeliest tokens.", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=1e-6, max=1.0, help="Sample among the likeliest tokens of this sum.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer; default: the run's, or 256.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the samples.")] = 0,
    output: Annotated[
        Path | None, typer.Option(metavar="JSONL", help="Write the answers here too.", show_default=False)
    ] = None,
) -> None:
    """Answer one prompt, or a file of them."""
    if (model is None) == (adapter is None):
        raise UserError("give --model for a checkpoint, or --adapter for an adapter on its base; one of them")
    if base is not None and adapter is None:
        raise UserError("--base has no effect without --adapter")
    if (prompt is None) == (file is None):
        raise UserError("give --prompt for one prompt, or --file for many; one of them")
    _quiet_libraries()
    from tuner.stages import sample

    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_new_tokens": max_new_tokens}
    sample.run(
        model=model,
        adapter=adapter,
        base=base,
        prompt=prompt,
        file=file,
        system=system,
        raw=raw,
        chat_template=chat_template,
        ghost_attention=ghost_attention,
        settings={key: value for key, value in given.items() if value is not None},
        seed=seed,
        output=output,
    )


@app.command()
def score(
    file: Annotated[
        Path, typer.Option(help="Rows with answers, in any format of training data: chats, pairs, ranked lists.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SECTION.KEY=VALUE",
            help="model.dtype, data.format, .columns, .max_length, .overlong or .on_bad_row; default: the run's dtype "
            "and max_length, and those of a recipe.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="DIR", help="A run, a checkpoint directory or a Hub id.", show_default=False)
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(metavar="RUN_OR_ADAPTER", help="A run, or an adapter directory.", show_default=False)
    ] = None,
    safety: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="A second reward model, of safety (a run, an adapter or a checkpoint); the first is that of "
            "helpfulness.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Where the base of the adapters lies now, if moved.", show_default=False),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="A template, e.g. llama3.1; default: the one that trained.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="JSONL", help="Write here, and not to stdout; must not exist.", show_default=False),
    ] = None,
) -> None:
    """Give rewards to answers with a reward model.

    Writes one JSON object a row: `row` (its line, from 1), `rewards` (in the order of the row's answers), and where the
    data says which answer is the best, `preferred_highest` (whether its reward is the highest). A summary goes to
    stderr.

    With --safety, in place of `rewards`: `helpfulness` and `safety` (the rewards of the two models), `combined` (Llama
    2: the safety reward where the row says `unsafe: true` of its prompt, or where its sigmoid is below 0.15; else the
    helpfulness reward), and `whitened` (combined with mean 0 and standard deviation 1 over the file).
    """
    if (model is None) == (adapter is None):
        raise UserError("give --model for a checkpoint, or --adapter for an adapter on its base; one of them")
    _quiet_libraries()
    from tuner.stages import score as scoring

    scoring.run(
        model=model,
        adapter=adapter,
        file=file,
        safety=safety,
        base=base,
        chat_template=chat_template,
        overrides=tuple(overrides or ()),
        output=output,
    )


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False) -> None:
    """Print versions, devices and threads."""
    set_environment()
    from tuner import environment

    facts = environment.describe()
    print(json.dumps(facts, indent=2) if as_json else "\n".join(environment.lines(facts)))


@data_app.command("show")
def data_show(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    row: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Line or row of the source; default: the first that is used.", show_default=False
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, metavar="K", help="How many rows, from there on.")] = 1,
    split: Annotated[str, typer.Option(help="train or eval.")] = "train",
    source: Annotated[
        int, typer.Option(min=1, metavar="I", help="Which source of data.train or data.eval, by its place.")
    ] = 1,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write an HTML page instead.", show_default=False)
    ] = None,
    color: Annotated[
        bool | None,
        typer.Option("--color/--no-color", help="Colours; default: if this is a terminal.", show_default=False),
    ] = None,
) -> None:
    """Show the tokens of a row: trained, not trained, control."""
    from tuner import recipe as recipes

    loaded = recipes.load(recipe, overrides or ())
    if html is not None and color is not None:
        raise UserError("--color and --no-color have no effect with --html; leave one of them out")
    _quiet_libraries()
    from tuner.data import show
    from tuner.data.show import page, terminal
    from tuner.model.load import load_tokenizer

    if html is not None:
        page.check(html)
    tokenizer = load_tokenizer(loaded.model.name_or_path, loaded.model.revision)
    look = show.look(loaded.data, tokenizer, split=split, source=source, row=row, samples=samples)
    if html is None:
        terminal.write(look, sys.stdout, terminal.wants_color(sys.stdout) if color is None else color)
        return
    page.write(look, html)
    print(f"wrote {printable(str(html))}")


@data_app.command("check")
def data_check(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="End with exit code 2 at any error or warning.")] = False,
) -> None:
    """Read every row, and report what is wrong with them and what training would make of them."""
    from tuner import recipe as recipes

    loaded = recipes.load(recipe, overrides or ())
    _quiet_libraries()
    from tuner.stages import prepare

    report = prepare.check_data(loaded)
    print(json.dumps(report.as_dict(), indent=2) if as_json else "\n".join(report.lines()))
    if strict and not report.clean:
        raise UserError(f"{recipe}: the data has {report.verdict()}, and --strict allows no error or warning")


@recipes_app.command("list")
def recipes_list() -> None:
    """Name the recipes that ship."""
    from tuner.recipe import shipped

    known = shipped.shipped_recipes()
    width = max(map(len, known), default=0) + 2
    for name, path in known.items():
        print(f"{name:{width}}{shipped.headline(path)}")


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(help="A name from the list.")]) -> None:
    """Print a recipe."""
    from tuner.recipe import shipped

    print(shipped.shipped_recipe(name).read_text(encoding="utf-8"), end="")


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="A name from the list.")],
    dest: Annotated[Path, typer.Argument(help="The folder to write to.")] = Path("."),
) -> None:
    """Write a recipe, and the bundled files that it reads, into a folder."""
    from tuner import recipe as recipes
    from tuner.recipe import pipeline as pipelines
    from tuner.recipe import shipped

    file = shipped.shipped_recipe(name)
    if pipelines.is_pipeline(file):
        command, reads = "run", pipelines.inputs(pipelines.load(file, find_inputs=False))
    else:
        recipe = recipes.load(file, find_inputs=False)
        command, reads = recipe.stage or "sft", shipped.inputs(recipe)
    try:
        target, written = shipped.copy_out(file, reads, dest)
    except OSError as error:
        raise UserError(f"cannot write to '{dest}': {error.strerror}; give another folder") from None
    for path in written:
        print(f"wrote {path}")
    print(f"{'start with' if written else 'nothing to write; start with'}: tuner {command} {target}")


@recipes_app.command("schema")
def recipes_schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from tuner import recipe as recipes

    print(json.dumps(recipes.json_schema(), indent=2))


def set_environment() -> None:
    """No telemetry, whatever the environment says, and no chatter of the libraries; before the first heavy import."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # set, so that a fork does not warn about it
    # Threads that wait for the next operation spin for a fraction of a millisecond, then sleep. Without a bound they
    # spin for milliseconds, and where another process wants the cores too both come to a crawl; with a tenth of this
    # one they sleep between operations, which costs a tenth of a training step.
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")  # kernels of as many sizes are kept, not of 1,024
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for library in ("bitsandbytes", "transformers", "accelerate", "datasets", "peft", "torch"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _quiet_libraries() -> None:
    """The same, and no progress bar while transformers reads weights, but one while the Hub sends them."""
    set_environment()
    if "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

        disable_progress_bars()
        importlib.import_module("transformers.utils.logging")  # looks at it once, now
        enable_progress_bars()


def _out_of_memory(error: BaseException) -> bool:
    """Whether torch, Python or the driver ran out of memory; torch is looked up only where it was loaded."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def _sentence(error: BaseException) -> tuple[str, int]:
    """What to say about an error that ended the command, and the exit code."""
    if isinstance(error, TunerError):
        return str(error), error.exit_code
    if _out_of_memory(error):
        remedy = "set train.activation_checkpointing: selective, or true, or lower data.max_length"
        return f"out of memory; lower train.microbatch_tokens; if that is not enough, {remedy}", 1
    if isinstance(error, RuntimeError) and any(name in str(error).lower() for name in ("gloo", "nccl")):
        return f"rank {os.environ.get('RANK', '?')} lost the others; the rank that ended first says why", 1
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror, 1
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return f"{what} (this is a defect of tuner; TUNER_TRACEBACK=1 shows where it happened)", 1


def _where(error: BaseException) -> str:
    """The stage of a pipeline that an error ended, as the beginning of a sentence."""
    return "".join(f"{note}: " for note in getattr(error, "__notes__", ()))


class _Stopped(BaseException):
    """A signal outside training (which has a handler of its own); no Exception, so nobody takes it for an error."""


def _stop(signum: int, _: FrameType | None) -> NoReturn:
    raise _Stopped(signum)


def main() -> NoReturn:
    """The command line: one line on stderr for any error, and the exit code that belongs to it."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    for signum, handler in before.items():
        if handler is not signal.SIG_IGN:  # as under nohup
            signal.signal(signum, _stop)
    if sys.stdout is None:  # closed by who started this (`>&-`)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        app()
    except (_Stopped, KeyboardInterrupt) as error:
        number = error.args[0] if isinstance(error, _Stopped) else signal.SIGINT
        stopped = f"stopped by {signal.Signals(number).name}; what existed before is intact"
        print(f"error: {_where(error)}{stopped}", file=sys.stderr)
        code = 128 + number
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit says nothing
        code = 1
    except Exception as error:
        if os.environ.get("TUNER_TRACEBACK"):
            traceback.print_exc()
        message, code = _sentence(error)
        print("error: " + printable(" ".join(f"{_where(error)}{message}".split())), file=sys.stderr)
    else:  # typer ends every command with SystemExit
        code = 0
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    sys.exit(code)
