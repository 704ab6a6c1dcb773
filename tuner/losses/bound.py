"""A loss function and its recipe parameters -> a bound loss: named terms per item, and what a stage must bring for it.

A registry of losses holds one `bind` function for each name. Its keyword-only parameters are the recipe schema of the
loss: those of the formula and those of the options that go with it. Called with checked parameters it returns a
`Bound`, which is all that a stage needs to know.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import torch
from pydantic import Field
from torch import Tensor

from tuner.registry import Registry
from tuner.types import Pairs, Ranked, Scored, Unpaired

Items = Literal["pairs", "unpaired", "ranked"]
Scope = Literal["pair", "step"]
Per = Literal["items", "chosen_tokens"]
Need = Literal["reference", "margins", "shared", "collision", "mismatched"]
Binder = Callable[..., "Bound"]
Policy = TypeVar("Policy", Pairs, Unpaired)

# What recipe parameters may be; the registry refuses the rest.
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
FlipRate = Annotated[float, Field(ge=0, lt=0.5)]


@dataclass(frozen=True, eq=False)
class Bound:
    """A loss with its parameters.

    Calling it with `Pairs`, `Unpaired` or `Ranked` (as `items` says) gives {term: value of each item}, with gradient
    and already multiplied by the weight of the term. What is minimised is the sum over terms of (sum of values over
    the optimizer step / denominator of the step).

    Args:
        items: what it is called with.
        scope: `pair` if the value of an item depends on that item alone, so that a step may be computed in any
            microbatches; `step` if it must see all items of the optimizer step at once (see `slopes` and `replay`).
        needs: what the items must bring beside `policy` and `tokens`: the fields of the same name, or `reference`.
        terms: term -> what its denominator counts: items, or scored tokens of the chosen (or good) answers.
    """

    name: str
    items: Items
    scope: Scope
    needs: frozenset[Need]
    terms: Mapping[str, Per]
    compute: Callable[[Any], dict[str, Tensor]]

    def __call__(self, items: Pairs | Unpaired | Ranked) -> dict[str, Tensor]:
        return self.compute(items)

    def denominators(self, items: float, chosen_tokens: float) -> dict[str, float]:
        """Term -> its denominator, from the counts of a whole optimizer step."""
        counts: dict[Per, float] = {"items": items, "chosen_tokens": chosen_tokens}
        return {term: counts[per] for term, per in self.terms.items()}


class Losses:
    """The losses that one kind of stage may name in its recipe."""

    def __init__(self, kind: str) -> None:
        self.registry: Registry[Binder] = Registry(kind)
        self._scopes: dict[str, Scope] = {}

    def register(self, name: str, scope: Scope, bind: Binder) -> None:
        """Files `bind`, whose keyword-only parameters are the recipe schema."""
        self.registry.register(name)(bind)
        self._scopes[name] = scope

    def scope_of(self, name: str) -> Scope:
        """Whether loss `name` is computed pair by pair or must see the whole optimizer step."""
        self.registry.get(name)
        return self._scopes[name]

    def resolve(self, name: str, parameters: Mapping[str, Any]) -> Bound:
        """The loss `name` of a recipe with its parameters.

        Raises:
            RecipeError: no such loss, a parameter that it does not read, or a value out of its range.
        """
        bind = self.registry.get(name)
        return bind(**self.registry.parameters(name, parameters))


def show_parameters(bind: Binder, of: Sequence[Callable[..., Any]], **defaults: Any) -> None:
    """Gives `bind` the keyword-only parameters of the functions `of` as its signature, with other `defaults`."""
    shown: dict[str, inspect.Parameter] = {}
    for fn in of:
        hints = get_type_hints(fn, include_extras=True)
        for p in inspect.signature(fn).parameters.values():
            if p.kind is p.KEYWORD_ONLY:
                assert p.name not in shown, f"two parameters are called {p.name}"
                shown[p.name] = p.replace(annotation=hints[p.name], default=defaults.get(p.name, p.default))
    bind.__signature__ = inspect.Signature(list(shown.values()))  # type: ignore[attr-defined]
    bind.__annotations__ = {name: p.annotation for name, p in shown.items()}


def read_by(fn: Callable[..., Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `parameters` that `fn` has as keyword-only parameters."""
    own = inspect.signature(fn).parameters.values()
    return {p.name: parameters[p.name] for p in own if p.kind is p.KEYWORD_ONLY}


def scope_with(scope: Scope, parameters: Mapping[str, Any]) -> Scope:
    """The scope of a loss with its parameters: without its reward shift BCO reads nothing beyond the item."""
    return "pair" if parameters.get("reward_shift") is False else scope


# A loss of scope `step` is replayed: score all items of the step without gradient, take `slopes` of them once, then
# score microbatch by microbatch with gradient and minimise `replay`. By the chain rule the gradients of the weights are
# those of the loss of the whole step, however it is cut.


def _answers(items: Pairs | Unpaired) -> tuple[Scored, ...]:
    return (items.chosen, items.rejected) if isinstance(items, Pairs) else (items.answers,)


def _with_answers(items: Policy, answers: Sequence[Scored]) -> Policy:
    if isinstance(items, Pairs):
        return replace(items, chosen=answers[0], rejected=answers[1])
    return replace(items, answers=answers[0])


def slopes(loss: Bound, step: Policy, denominators: Mapping[str, float]) -> tuple[dict[str, Tensor], Policy]:
    """The terms of a whole optimizer step, and the slopes of the loss along each log-prob.

    Args:
        step: all items of the step, over all ranks; no gradient is needed or made behind them.
        denominators: of each term, for the whole step.

    Returns:
        {term: values of each item, without gradient}, and the items with dL/d(policy) and dL/d(shared) in place of
        `policy` and `shared`.
    """
    with torch.enable_grad():
        leaves = [
            replace(
                a,
                policy=a.policy.detach().requires_grad_(),
                shared=None if a.shared is None else a.shared.detach().requires_grad_(),
            )
            for a in _answers(step)
        ]
        values = loss(_with_answers(step, leaves))
        total = torch.stack([values[term].sum() / denominators[term] for term in loss.terms]).sum()
        wanted = [t for a in leaves for t in (a.policy, a.shared) if t is not None]
        grads = iter(torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True))
    sloped = [replace(a, policy=next(grads), shared=None if a.shared is None else next(grads)) for a in leaves]
    return {term: value.detach() for term, value in values.items()}, _with_answers(step, sloped)


def replay(slopes: Policy, items: Policy) -> Tensor:
    """Σ slope · log-prob over the items of one microbatch, a scalar whose gradient is that of the step's loss.

    Its value means nothing. `slopes` are those of the same items: `slopes.take(rows)`.
    """
    parts = []
    for slope, answer in zip(_answers(slopes), _answers(items), strict=True):
        parts.append((slope.policy * answer.policy).sum())
        if slope.shared is not None and answer.shared is not None:
            parts.append((slope.shared * answer.shared).sum())
    return torch.stack(parts).sum()
