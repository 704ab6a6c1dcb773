"""A preference run -> its held-out prompts to answer, and the table that a user reads at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from torch import Tensor

from tuner.losses.measures import length_explains
from tuner.model.policy import Policy
from tuner.recipe import Recipe
from tuner.stages.machine import Machine
from tuner.stages.prepare import Data, Model
from tuner.train.answers import Answers, choose_prompts
from tuner.types import Batch


def make_answers(
    recipe: Recipe,
    machine: Machine,
    data: Data,
    model: Model[Policy],
    reference: Callable[[Batch], Tensor] | None,
    console: Console,
) -> Answers | None:
    """The held-out prompts to answer, as many as eval.prompts and eval.samples ask for; None without any."""
    ev, new = recipe.eval, recipe.generate.max_new_tokens
    if not data.held_out or not (ev.prompts or ev.samples):
        return None
    room = model.policy.inner.config.max_position_embeddings - new
    prompts, too_long = choose_prompts(data.held_out.tokens, max(ev.prompts, ev.samples), room, recipe.train.seed)
    if too_long:
        console.print(
            f"prompts  {too_long:,} held-out prompts are passed over: with generate.max_new_tokens {new} they exceed "
            "the model's context"
        )
    capacity = recipe.train.microbatch_tokens
    assert isinstance(capacity, int)
    return Answers(
        policy=model.policy,
        reference=reference,
        measured=prompts[: ev.prompts],
        shown=prompts[: ev.samples],
        tokenizer=data.tokenizer,
        stop_ids=data.renderer.stop_ids,
        max_new_tokens=new,
        capacity=capacity,
        seed=recipe.train.seed,
        devices=machine.devices,
    )


# --- the table ---

Values = Mapping[str, float]
# The kinds of answers that a run compares: as the measures name them, and in words.
KINDS = {"chosen": "chosen", "rejected": "rejected", "desirable": "good", "undesirable": "bad"}


def preference_report(summary: Mapping[str, Any], held_out: str, compared: int, prompts: int) -> list[str]:
    """The lines at the end of a preference run: before, after and baseline of each measure, then sample answers.

    Args:
        summary: of `Session.train`, with held-out measures. held_out: what they are of, in words. compared: pairs of a
            better and a worse answer among that, no two of which share an answer. prompts: that were answered.
    """
    before, after = summary["before"], summary["after"]
    answered = f", {prompts} of their prompts answered at temperature 1" if "eval_answer_tokens" in after else ""
    lines = [f"report   {held_out}{answered}"]
    rows = [("", "before", "after", "baseline"), *_rows(before, after)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for name, *numbers, baseline in rows:
        cells = "  ".join(f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:], strict=True))
        lines.append(f"         {name:<{widths[0]}}  {cells}   {baseline}".rstrip())
    lines += _by_length_alone(after, compared)
    return lines + [line for sample in summary.get("answers", ()) for line in _sample(sample)]


def _by_length_alone(after: Values, compared: int) -> list[str]:
    """A warning, if the lengths of the answers may explain the accuracy."""
    share, longer = after.get("eval_accuracy"), after.get("eval_longer_is_better")
    if share is None or longer is None or not length_explains(share, longer, compared):
        return []
    rule, right = ("longer", longer) if longer > 0.5 else ("shorter", 1 - longer)
    if "eval_chosen_tokens" in after:
        found = f"the {rule} answer is the chosen one in {right:.1%} of the held-out pairs"
        remedy = (
            "balance the lengths of the pairs, or choose a loss that divides by length (loss.length_normalized: true, "
            "or simpo)"
        )
    else:
        found = f"a good answer is {rule} than a bad one in {right:.1%} of all held-out couples"
        remedy = "balance the lengths of good and bad answers"
    return [f"warning  {found}, so this accuracy may be one of length alone; {remedy}"]


def _rows(before: Values, after: Values) -> list[tuple[str, str, str, str]]:
    """`(name, before, after, baseline)` of each measure that there is."""
    kinds = {kind: word for kind, word in KINDS.items() if f"eval_{kind}_logp" in after}
    has_reference = any(f"eval_{kind}_reference_logp" in after for kind in kinds)
    reward = "log-ratio" if has_reference else "log-prob a token"
    zero = "0 the reference" if has_reference else ""

    def reference(key: str, form: str) -> str:
        return f"{form.format(after[key])} the reference" if key in after else ""

    measures = [
        ("loss", "loss", "{:.4f}", reference("eval_reference_loss", "{:.4f}")),
        ("accuracy, ties half", "accuracy", "{:.1%}", _chance(after)),
        ("accuracy within pairs, ties half", "pair_accuracy", "{:.1%}", "50.0% chance"),
        (f"margin ({reward})", "margin", "{:+.2f}", zero),
        *((f"{word}: {reward}", f"{kind}_reward", "{:+.2f}", zero) for kind, word in kinds.items()),
        *(
            (f"{word}: log-prob", f"{kind}_logp", "{:.2f}", reference(f"eval_{kind}_reference_logp", "{:.2f}"))
            for kind, word in kinds.items()
        ),
        ("correlation of reward and length", "reward_length_correlation", "{:+.2f}", _correlation(kinds, after)),
        ("KL that the loss estimates, nats an answer", "kl_estimate", "{:.2f}", zero),
        ("KL to the reference, nats an answer", "kl", "{:.2f}", _kl(has_reference, after)),
        ("tokens an answer", "answer_tokens", "{:.1f}", _tokens(kinds, after)),
        ("answers that stop by themselves", "answers_stopped", "{:.1%}", ""),
    ]
    shown = before.keys() | after.keys() | ({"eval_kl"} if "eval_answer_tokens" in after else set())
    return [
        (name, _cell(before, f"eval_{key}", form), _cell(after, f"eval_{key}", form), baseline)
        for name, key, form, baseline in measures
        if f"eval_{key}" in shown
    ]


# What stands in the last column:


def _chance(after: Values) -> str:
    longer = after.get("eval_longer_is_better")
    if longer is None:
        return "50.0% chance"
    return f"50.0% chance; {max(longer, 1 - longer):.1%} the {'longer' if longer >= 0.5 else 'shorter'} answer"


def _correlation(kinds: Mapping[str, str], after: Values) -> str:
    value = after.get("eval_preferred_length_correlation")
    return "" if value is None else f"{value:+.2f} being {next(iter(kinds.values()))} (1 or 0) and length"


def _kl(has_reference: bool, after: Values) -> str:
    if "eval_kl" in after:
        return "0 the reference"
    return "unmeasured: reference.cache let the reference leave memory" if has_reference else "unmeasured: no reference"


def _tokens(kinds: Mapping[str, str], after: Values) -> str:
    kind, word = next(iter(kinds.items()))
    return f"{after[f'eval_{kind}_tokens']:.1f} the {word} answers"


def _cell(values: Values, key: str, form: str) -> str:
    """A number and its standard error, if it has one; a dash where the measure is not defined."""
    if key not in values:
        return "-"
    error = values.get(f"{key}_error")
    return form.format(values[key]) + ("" if error is None else f" ± {form.format(error)}")


def _sample(sample: Mapping[str, str]) -> list[str]:
    """What was asked, what is preferred and what was answered, one line each."""
    return [f"  {name:<9} {text!r}" for name, text in sample.items()]
