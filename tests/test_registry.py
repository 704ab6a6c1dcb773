"""Name -> function, near misses, and parameters checked against a signature."""

from __future__ import annotations

import pytest

from tuner.errors import RecipeError
from tuner.registry import Registry, did_you_mean


def make() -> Registry:
    losses: Registry = Registry("loss")

    @losses.register("sigmoid")
    def sigmoid(pairs: list[float], *, beta: float = 0.1, label_smoothing: float = 0.0) -> float:
        return sum(pairs) * beta

    @losses.register("simpo")
    def simpo(pairs: list[float], *, gamma: float, steps: int = 1) -> float:
        return sum(pairs) + gamma

    return losses


def test_get_returns_the_function_and_iteration_the_names_in_order() -> None:
    losses = make()
    assert losses.get("sigmoid")([1.0], beta=2.0) == 2.0
    assert list(losses) == ["sigmoid", "simpo"]


def test_unknown_name_lists_the_nearest_and_all() -> None:
    with pytest.raises(RecipeError, match=r"unknown loss 'sigmod' \(did you mean 'sigmoid'\?\); known: sigmoid, simpo"):
        make().get("sigmod")


def test_unknown_name_far_from_all_has_no_suggestion() -> None:
    with pytest.raises(RecipeError, match=r"unknown loss 'xyzzy'; known: sigmoid, simpo"):
        make().get("xyzzy")


def test_second_registration_is_a_programming_error() -> None:
    losses = make()
    with pytest.raises(AssertionError, match="registered twice"):
        losses.register("simpo")(lambda: None)


def test_parameters_fill_in_defaults() -> None:
    assert make().parameters("sigmoid", {"beta": 0.3}) == {"beta": 0.3, "label_smoothing": 0.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"betta": 0.1},
            r"loss 'sigmoid' has no parameter 'betta' \(did you mean 'beta'\?\); its parameters: beta, label",
        ),
        ({"beta": "much"}, r"loss 'sigmoid': beta='much'"),
        ({"pairs": [1.0]}, r"has no parameter 'pairs'"),
    ],
)
def test_wrong_parameters_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make().parameters("sigmoid", values)


def test_missing_parameter_is_refused() -> None:
    with pytest.raises(RecipeError, match="gamma"):
        make().parameters("simpo", {})


def test_did_you_mean() -> None:
    assert did_you_mean("lerning_rate", ["learning_rate", "seed"]) == " (did you mean 'learning_rate'?)"
    assert did_you_mean("zzz", ["learning_rate", "seed"]) == ""
