"""check_provider: what it refuses, and that it lets a right provider through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from autodeploy import ConfigError, TransformError, check_provider, ops
from autodeploy.custom_ops import PROVIDED, SEMANTIC_OPS, SemanticOp


@ops.semantic_op(fake=lambda x: torch.empty_like(x))
def relu_squared_for_test(x: Tensor) -> Tensor:
    """relu(x) ** 2"""
    return torch.relu(x).square()


@ops.semantic_op(mutates=("total",), fake=lambda x, total: torch.empty_like(x))
def add_into_for_test(x: Tensor, total: Tensor) -> Tensor:
    """Adds x to total; returns 2 x."""
    total += x
    return 2 * x


@pytest.fixture(scope="module", autouse=True)
def forgotten() -> Iterator[None]:
    """No other test sees these ops."""
    yield
    for op in (relu_squared_for_test, add_into_for_test):
        del SEMANTIC_OPS[op.overload]
        for provider in op.providers:
            del PROVIDED[provider.function]


def check(
    op: SemanticOp, function: Callable[..., Any], *args: Tensor, supports: Any = lambda target, **_: [], **options: Any
) -> None:
    provider = ops.Provider("tried", function, supports)
    op.register(provider)
    try:
        check_provider(op, "tried", *args, **options)
    finally:
        op.providers.remove(provider)
        del PROVIDED[function]


X = torch.tensor([[-1.0, 0.5, 2.0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_right_provider_goes_through(dtype: torch.dtype) -> None:
    check(relu_squared_for_test, lambda x: x.clamp(min=0).square_(), X.to(dtype))
    check_provider(relu_squared_for_test, "reference", X.to(dtype))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda x: x * x,
            r"provider 'tried' of op relu_squared_for_test: result 0 differs from the reference in float64 by 2\.5e-01 \(limit 1",
        ),
        (lambda x: x.relu_().square(), "provider 'tried' of op relu_squared_for_test writes into its argument 'x'"),
        (lambda x: torch.relu(x).square().double(), r"gives float64\[1, 3\], but the reference gives float32\[1, 3\]"),
        (lambda x: torch.relu(x).square()[0], r"gives float32\[3\], but the reference gives float32\[1, 3\]"),
        (lambda x: None, "gives nothing, but the reference gives float32"),
    ],
    ids=["values", "writes", "dtype", "shape", "nothing"],
)
def test_a_wrong_provider_is_refused(function: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(relu_squared_for_test, function, X)


def test_what_supports_says_is_looked_at() -> None:
    def right(x: Tensor) -> Tensor:
        return torch.relu(x).square()

    with pytest.raises(AssertionError, match="has something against these arguments: too wide, too long"):
        check(relu_squared_for_test, right, X, supports=lambda target, x: ["too wide", "too long"])
    with pytest.raises(
        TransformError, match=r"provider 'tried' of op relu_squared_for_test: supports\(\) raised AttributeError: "
    ):
        check(relu_squared_for_test, right, X, supports=lambda target, x: target.no_such)
    with pytest.raises(TransformError, match=r"supports\(\) returned None; it must return the list of reasons"):
        check(relu_squared_for_test, right, X, supports=lambda target, x: None)


def test_what_an_op_mutates_is_compared() -> None:
    def wrong(x: Tensor, total: Tensor) -> Tensor:
        total -= x
        return 2 * x

    def right(x: Tensor, total: Tensor) -> Tensor:
        total += x
        return x + x

    check(add_into_for_test, right, X, torch.ones(1, 3))
    with pytest.raises(AssertionError, match="what is left in 'total' differs from the reference in float64"):
        check(add_into_for_test, wrong, X, torch.ones(1, 3))


def test_the_shape_rule_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relu_squared_for_test, "reference", lambda x: torch.relu(x).square().half())
    with pytest.raises(
        AssertionError, match=r"the shape rule of op relu_squared_for_test gives float32.*the reference gives float16"
    ):
        check_provider(relu_squared_for_test, "reference", X)


def test_the_limit_is_the_callers() -> None:
    def near(x: Tensor) -> Tensor:
        return torch.relu(x).square() * 1.001

    check(relu_squared_for_test, near, X, limit=1e-2)
    with pytest.raises(AssertionError, match="result 0 differs"):
        check(relu_squared_for_test, near, X)


def test_an_unknown_provider_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"no provider named 'referense'\. Did you mean 'reference'"):
        check_provider(relu_squared_for_test, "referense", X)
