"""Layers that are alike are traced once, and the graph is the one that tracing all of them gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from autodeploy.capture.export import Captured, capture
from autodeploy.capture.repeats import MARK, REPEATED, Repeats
from autodeploy.capture.skeleton import skeleton_of
from autodeploy.errors import UnsupportedModelError
from autodeploy.transforms.cleanup import is_identity
from tests.models.families import FAMILIES, make_model
from tests.transforms.helpers import WIDTH, Toy

NUM_LAYERS = 4
TRACED: list[int] = []
"""Numbers of the layers that ran."""


class Layer(nn.Module):
    """x + f(x @ W), with a number of its own that it may read."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.layer_idx = index
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Any:
        TRACED.append(vars(self)["layer_idx"])
        return self.body(x, *others, **named)

    def body(self, x: Tensor) -> Any:
        return x + self.inner(x).relu()


class ReadsItsNumber(Layer):
    def body(self, x: Tensor) -> Tensor:
        return x + self.inner(x) * (self.layer_idx % 2 + 1)


class HoldsANumberInside(Layer):
    """A nested module's float that tracing reads."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.inner.factor = (0.5, 2.0)[index >= 2]  # pyright: ignore

    def body(self, x: Tensor) -> Tensor:
        return x + self.inner(x) * self.inner.factor  # pyright: ignore


class HoldsALambda(Layer):
    """A closure over a number, which only the closure's cells tell apart."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        factor = float(index // 2)
        self.scaled = lambda x: x * factor

    def body(self, x: Tensor) -> Tensor:
        return x + self.scaled(self.inner(x))


class WritesIntoItsInput(Layer):
    def body(self, x: Tensor) -> Tensor:
        x += self.inner(x)
        return x * 2


class CountsItself(Layer):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.seen = 0

    def body(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x + self.inner(x)


class IsTold(Layer):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.told = 0.0

    def body(self, x: Tensor) -> Tensor:
        return x + self.inner(x) * self.told


class TiesIts(Layer):
    """Two names of one parameter in some layers, two parameters in others."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.other = nn.Linear(WIDTH, WIDTH)
        if index % 2:
            self.other.weight = self.inner.weight

    def body(self, x: Tensor) -> Tensor:
        return x + self.other(self.inner(x))


class ReturnsMore(Layer):
    def body(self, x: Tensor) -> Any:
        return x + self.inner(x), x


class ReturnsNone(Layer):
    def body(self, x: Tensor) -> Any:
        return self.inner(x), x + 1, None


class ReturnsAView(Layer):
    def body(self, x: Tensor) -> Any:
        y = self.inner(x)
        return y, y[..., :1]


class IsGivenMore(Layer):
    def body(self, x: Tensor, more: Tensor) -> Tensor:
        return x + self.inner(x)


class WritesInAPlaceOfItsOwn(Layer):
    """In-place ops that end within the layer."""

    def body(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        y += 1
        y /= 2
        return x + y


class KeepsInADict(Layer):
    def body(self, x: Tensor, kept: dict[int, Tensor]) -> Tensor:
        kept[len(kept)] = self.inner(x)
        return x + sum(kept.values())


class Keeper:
    """An object that nothing is known of."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []


class TellsAKeeper(Layer):
    def body(self, x: Tensor, keeper: Keeper) -> Tensor:
        keeper.kept.append(self.inner(x))
        return x + sum(keeper.kept)


class ReturnsWhatIsOutside(Layer):
    outside = Keeper()

    def body(self, x: Tensor) -> Any:
        return x + self.inner(x), self.outside.kept[0]


def one_after_another(toy: Toy, x: Tensor, positions: Tensor) -> Tensor:
    for layer in toy.extra["layers"]:  # pyright: ignore
        x = layer(x)
        x = x[0] + x[1] if isinstance(x, tuple) else x
    return x


def told_before(toy: Toy, x: Tensor, positions: Tensor) -> Tensor:
    for i, layer in enumerate(toy.extra["layers"]):  # pyright: ignore
        layer.told = float(i // 2)
        x = layer(x)
        layer.told = 0.0
    return x


def with_a_dict(toy: Toy, x: Tensor, positions: Tensor) -> Tensor:
    kept: dict[int, Tensor] = {}
    for layer in toy.extra["layers"]:  # pyright: ignore
        x = layer(x, kept)
    return x


def with_more(toy: Toy, x: Tensor, positions: Tensor) -> Tensor:
    more = x * 2
    for layer in toy.extra["layers"]:  # pyright: ignore
        x = layer(x, more)
    return x


def with_a_keeper(toy: Toy, x: Tensor, positions: Tensor) -> Tensor:
    keeper = Keeper()
    for layer in toy.extra["layers"]:  # pyright: ignore
        x = layer(x, keeper)
    return x


def with_one_outside(toy: Toy, x: Tensor, positions: Tensor) -> Tensor:
    ReturnsWhatIsOutside.outside.kept = [x * 2]
    return one_after_another(toy, x, positions)


def one_twice(toy: Toy, x: Tensor, positions: Tensor) -> Tensor:
    first, *others = toy.extra["layers"]  # pyright: ignore
    for layer in (first, *others, first):
        x = layer(x)
    return x


def with_other_arguments(toy: Toy, x: Tensor, positions: Tensor) -> Tensor:
    """The second half of the layers is given every other number of a wider tensor."""
    layers: Any = toy.extra["layers"]
    for layer in layers[:2]:
        x = layer(x)
    x = torch.cat([x, x], -1)[..., ::2]
    for layer in layers[2:]:
        x = layer(x)
    return x


CASES = {
    "alike": (Layer, one_after_another, [0]),
    "a number that is read": (ReadsItsNumber, one_after_another, [0, 1, 2, 3]),
    "a number of an inner module that is read": (HoldsANumberInside, one_after_another, [0, 2]),
    "a number in a closure": (HoldsALambda, one_after_another, [0, 2]),
    "writes into an argument": (WritesIntoItsInput, one_after_another, [0, 1, 2, 3]),
    "changes itself": (CountsItself, one_after_another, [0, 1, 2, 3]),
    "changes a container it is given": (KeepsInADict, with_a_dict, [0, 1, 2, 3]),
    "is told before each call": (IsTold, told_before, [0, 2]),
    "ties": (TiesIts, one_after_another, [0, 1]),
    "returns an argument": (ReturnsMore, one_after_another, [0, 1, 2, 3]),
    "returns what is no tensor": (ReturnsNone, one_after_another, [0]),
    "returns two names of one tensor": (ReturnsAView, one_after_another, [0, 1, 2, 3]),
    "changes an object it is given": (TellsAKeeper, with_a_keeper, [0, 1, 2, 3]),
    "returns what is outside": (ReturnsWhatIsOutside, with_one_outside, [0]),
    "is given what it does not need": (IsGivenMore, with_more, [0]),
    "writes into what it made": (WritesInAPlaceOfItsOwn, one_after_another, [0]),
    "the same layer again": (Layer, one_twice, [0]),
    "arguments of other strides": (Layer, with_other_arguments, [0, 2]),
}


def make_toy(kind: type[Layer], body: Any) -> Toy:
    torch.manual_seed(0)
    TRACED.clear()
    layers: Any = nn.ModuleList(kind(index) for index in range(NUM_LAYERS))
    return Toy(body, layers=layers).eval()


def captured(model: Any) -> Captured:
    return capture(skeleton_of(model), dict(model.named_buffers()))


@contextmanager
def everything_traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    @contextmanager
    def watched(self: Repeats, model: nn.Module) -> Iterator[None]:
        yield

    with monkeypatch.context() as patch:
        patch.setattr(Repeats, "watched", watched)
        yield


def as_text(found: Captured) -> list[str]:
    """Every call with its arguments, value, module and line of code; nodes by their place, constants by their values.

    A call that gives its argument as it is counts as that, and one that nothing reads does not count.
    """
    found.program.graph.graph.eliminate_dead_code()
    places: dict[fx.Node, str] = {}
    lines = []
    for node in found.program.graph.graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), places.get)  # pyright: ignore
        if is_identity(node):
            places[node] = args[0]
        elif node.op == "get_attr":
            constant = str(node.target).startswith("constants.")
            places[node] = str(found.initial[str(node.target)] if constant else node.target)
        else:
            places[node] = f"%{len(lines)}"
            value, stack = node.meta.get("val"), node.meta.get("nn_module_stack") or {}
            sizes = [*map(str, (*value.shape, *value.stride()))] if isinstance(value, Tensor) else value
            paths = [path for path, _ in stack.values()]
            lines.append(f"{node.op} {node.target} {args} {kwargs} {sizes} {paths} {node.meta.get('stack_trace')}")
    return [*lines, *sorted(name for name in found.program.weights.recipes if not name.startswith("constants."))]


@pytest.mark.parametrize("case", CASES)
def test_a_layer_is_traced_where_it_does_something_else(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, body, firsts = CASES[case]
    toy = make_toy(kind, body)
    repeated = captured(toy)
    assert sorted(set(TRACED)) == firsts
    with everything_traced(monkeypatch):
        full = captured(toy)
    assert len(TRACED) >= len(firsts) + NUM_LAYERS
    assert as_text(repeated) == as_text(full)


@pytest.mark.parametrize("case", CASES)
def test_a_program_with_copies_is_right(case: str) -> None:
    kind, body, _ = CASES[case]
    toy = make_toy(kind, body)
    found = captured(toy)
    ids = torch.arange(7)[None] % 5
    values = dict(toy.named_parameters())
    graph = found.program.graph
    for name in found.program.weights.recipes:
        path, _, leaf = name.rpartition(".")
        setattr(graph.get_submodule(path), leaf, values[name])
    with torch.no_grad():
        assert torch.equal(graph(ids, ids), toy(ids, ids).logits)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "mixtral", "falcon", "llama4_text"])
def test_the_graph_of_a_family_is_that_of_tracing_all_its_layers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_family(family, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_of_every_family_is_that_of_tracing_all_its_layers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_family(family, monkeypatch)


def check_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(family)
    try:
        repeated = captured(model)
    except UnsupportedModelError:
        return
    assert not [node for node in repeated.program.graph.graph.nodes if node.target in (MARK, REPEATED)]
    with everything_traced(monkeypatch):
        assert as_text(repeated) == as_text(captured(model))
