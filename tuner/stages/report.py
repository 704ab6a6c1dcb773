"""A preference run -> its held-out prompts to answer, and the table that a user reads at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from torch import Tensor

from tuner.losses.measures import length_explains
from tuner.model.policy import Policy
from tuner.recipe import Recipe
from tuner.stages.prepare import Data, Machine, Model
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


def preference_report(summary: Mapping[str, Any], pairs: int, prompts: int) -> list[str]:
    """The lines at the end of a preference run: before, after and baseline of each measure, then sample answers.

    Args:
        summary: of `Session.train`, with held-out measures. pairs: held-out pairs. prompts: that were answered.
    """
    before, after = summary["before"], summary["after"]
    answered = f", {prompts} of their prompts answered at temperature 1" if "eval_answer_tokens" in after else ""
    lines = [f"report   {pairs} held-out pairs{answered}"]
    rows = [("", "before", "after", "baseline"), *_rows(before, after)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for name, *numbers, baseline in rows:
        cells = "  ".join(f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:], strict=True))
        lines.append(f"         {name:<{widths[0]}}  {cells}   {baseline}".rstrip())
    share, longer = after["eval_accuracy"], after["eval_longer_is_better"]
    if length_explains(share, longer, pairs):
        rule, right = ("longer", longer) if longer > 0.5 else ("shorter", 1 - longer)
        lines.append(
            f"warning  the {rule} answer is the chosen one in {right:.1%} of the held-out pairs, so this accuracy may "
            "be one of length alone; balance the lengths of the pairs, or choose a loss that divides by length "
            "(loss.length_normalized: true, or simpo)"
        )
    return lines + [line for sample in summary.get("answers", ()) for line in _sample(sample)]


def _rows(before: Values, after: Values) -> list[tuple[str, str, str, str]]:
    """`(name, before, after, baseline)` of each measure that there is."""
    has_reference = "eval_reference_loss" in after
    longer = after["eval_longer_is_better"]
    by_length = f"{max(longer, 1 - longer):.1%} the {'longer' if longer >= 0.5 else 'shorter'} answer"
    reward = "log-ratio" if has_reference else "log-prob a token"
    zero = "0 the reference" if has_reference else ""

    def reference(key: str, form: str) -> str:
        return f"{form.format(after[key])} the reference" if key in after else ""

    def length(key: str) -> str:
        return f"{after[key]:+.2f} being chosen (1 or 0) and length" if key in after else ""

    table = [
        ("loss", "loss", "{:.4f}", reference("eval_reference_loss", "{:.4f}")),
        ("accuracy, ties half", "accuracy", "{:.1%}", f"50.0% chance; {by_length}"),
        (f"margin ({reward})", "margin", "{:+.2f}", zero),
        (f"chosen: {reward}", "chosen_reward", "{:+.2f}", zero),
        (f"rejected: {reward}", "rejected_reward", "{:+.2f}", zero),
        ("chosen: log-prob", "chosen_logp", "{:.2f}", reference("eval_chosen_reference_logp", "{:.2f}")),
        ("rejected: log-prob", "rejected_logp", "{:.2f}", reference("eval_rejected_reference_logp", "{:.2f}")),
        (
            "correlation of reward and length",
            "reward_length_correlation",
            "{:+.2f}",
            length("eval_preferred_length_correlation"),
        ),
        ("KL to the reference, nats an answer", "kl", "{:.2f}", zero),
        ("tokens an answer", "answer_tokens", "{:.1f}", f"{after['eval_chosen_tokens']:.1f} the chosen answers"),
        ("answers that stop by themselves", "answers_stopped", "{:.1%}", ""),
    ]
    return [
        (name, _cell(before, f"eval_{key}", form), _cell(after, f"eval_{key}", form), baseline)
        for name, key, form, baseline in table
        if f"eval_{key}" in before or f"eval_{key}" in after
    ]


def _cell(values: Values, key: str, form: str) -> str:
    """A number and its standard error, if it has one; a dash where the measure is not defined."""
    if key not in values:
        return "-"
    error = values.get(f"{key}_error")
    return form.format(values[key]) + ("" if error is None else f" ± {form.format(error)}")


def _sample(sample: Mapping[str, str]) -> list[str]:
    """What was asked, what is preferred and what was answered, one line each."""
    return [f"  {name:<9} {text!r}" for name, text in sample.items()]
