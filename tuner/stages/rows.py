"""A recipe -> the rows that its stage can use: kinds of data, and what its loss reads of each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from tuner.data.fit import Fit
from tuner.data.formats import Kind
from tuner.losses import preference, reward
from tuner.losses.bound import Bound
from tuner.recipe import PREFERENCE, Recipe

ACCEPTS: Mapping[str, Sequence[Kind]] = {"sft": ("chat", "text"), **dict.fromkeys(PREFERENCE, ("preference",))}


def accepted(recipe: Recipe) -> tuple[Sequence[Kind], Fit | None]:
    """The kinds of rows that the stage of a recipe can use, and what its loss reads; of no stage, all and nothing.

    Raises:
        RecipeError: no such loss or parameter.
    """
    if recipe.stage not in PREFERENCE:
        return (ACCEPTS[recipe.stage] if recipe.stage else get_args(Kind)), None
    losses = preference if recipe.stage == "dpo" else reward
    return ACCEPTS[recipe.stage], fit_of(losses.resolve(str(recipe.loss.type), recipe.loss.parameters))


def fit_of(loss: Bound) -> Fit:
    """What a loss over answers reads of every row."""
    margins = (
        f"the row says no margin, which loss '{loss.name}' with these parameters reads from every row; add a column "
        "'margin', or leave the parameter out"
        if "margins" in loss.needs
        else ""
    )
    pairs = "this loss compares pairs; give rows with chosen and rejected"
    if loss.items == "unpaired":
        return Fit((1, 2), "this loss judges single answers; give rows with a label, or pairs")
    if loss.items == "pairs":
        return Fit((2,), pairs, margins=margins)
    if margins:
        of_pairs = "loss.margin_weight reads the margin of a pair; give rows with chosen and rejected, or leave the "
        return Fit((2,), f"{of_pairs}parameter out", margins=margins, positive=True)
    return Fit((2,), "this loss compares answers; give pairs or ranked lists", or_more=True)
