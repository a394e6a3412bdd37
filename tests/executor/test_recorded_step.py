"""A recorded step gives the bits that the graph gives, on values that share memory, for every kind of layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import autodeploy
from autodeploy import SamplingParams
from autodeploy.custom_ops import cpp_pointwise
from autodeploy.custom_ops.cpp import KernelCalls
from autodeploy.executor import model_runner
from autodeploy.executor.recorded_step import ARENA_BYTES, Arena, can_record, record
from tests.marks import needs_cpp_kernels
from tests.models.families import make_model

FAMILIES = ["qwen3", "gemma2", "mixtral", "gpt2", "bloom", "deepseek_v3", "qwen3_next", "mamba2"]
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.0)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [9] * 40]


@contextmanager
def checked_steps(runner: Any) -> Iterator[list[int]]:
    """Every recorded step is run by the graph too, on a copy of the caches. Yields the number of tokens of each."""
    names = list(runner.program.inputs)
    checked: list[int] = []
    recorded = runner._run_recorded

    def both(inputs: list[Any]) -> Tensor:
        before = [cache.clone() for cache in runner.caches]
        ours = recorded(inputs).clone()
        after = [cache.clone() for cache in runner.caches]
        for cache, old in zip(runner.caches, before, strict=True):
            cache.copy_(old)
        expected = runner.module(*map(torch.from_numpy, inputs), *runner.caches)[0]
        assert torch.equal(ours, expected)
        for cache, other in zip(runner.caches, after, strict=True):
            torch.testing.assert_close(cache, other, rtol=0, atol=0, equal_nan=True)  # memory that nobody has written to yet
        checked.append(inputs[names.index("input_ids")].shape[1])
        return ours

    runner._run_recorded = both
    yield checked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recorded_step_is_the_step(family: str, dtype: torch.dtype) -> None:
    compiled = autodeploy.compile(make_model(family).to(dtype))
    with checked_steps(compiled.runner) as checked:
        for turn in range(6):  # decode steps are recorded from the second one on, those with prompts from the fifth
            prompts = [[token + turn for token in prompt] for prompt in PROMPTS]
            outputs = compiled.generate(prompts, GREEDY)
            assert [len(output.outputs[0].token_ids) for output in outputs] == [12] * 3
    assert checked.count(50) == 2 and checked.count(3) >= 50
    assert len(compiled.runner.recorded) < 7  # pyright: ignore[reportAttributeAccessIssue]
    compiled.shutdown()


def test_chunks_of_prompts_beside_tokens_that_are_generated_are_recorded() -> None:
    compiled = autodeploy.compile(make_model("qwen3"), max_num_tokens=16, disable_overlap_scheduler=True)
    with checked_steps(compiled.runner) as checked:
        alone = [compiled.generate([7 + turn] * 40, GREEDY) for turn in range(6)]
        for turn in range(6):
            both = compiled.generate([[7 + turn] * 40, [3] * 20], GREEDY)
            assert both[0].outputs[0].token_ids == alone[turn].outputs[0].token_ids
    assert checked.count(16) >= 8
    compiled.shutdown()


def test_long_steps_are_not_recorded() -> None:
    compiled = autodeploy.compile(make_model("qwen3"))
    for _ in range(6):
        compiled(torch.ones(1, 129, dtype=torch.int64))
    assert not compiled.runner.recorded  # pyright: ignore[reportAttributeAccessIssue]
    compiled.shutdown()


def test_the_shape_that_came_last_longest_ago_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_runner, "MAX_RECORDED_STEPS", 2)
    compiled = autodeploy.compile(make_model("qwen3"))
    runner: Any = compiled.runner
    for length in (3, 4, 3, 5):
        for _ in range(6):
            compiled(torch.ones(1, length, dtype=torch.int64))
    assert [shapes[0] for shapes in runner.recorded] == [(1, 3), (1, 5)]
    compiled.shutdown()


def test_counts_of_shapes_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_runner, "MAX_COUNTED_SHAPES", 4)
    compiled = autodeploy.compile(make_model("qwen3"))
    runner: Any = compiled.runner
    for length in range(2, 12):
        compiled(torch.ones(1, length, dtype=torch.int64))
        assert len(runner.counts) <= 4
    compiled.shutdown()


def test_a_shape_is_recorded_when_it_comes_again() -> None:
    compiled = autodeploy.compile(make_model("qwen3"))
    recorded: dict[Any, Any] = compiled.runner.recorded  # pyright: ignore[reportAttributeAccessIssue]
    compiled.generate([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True))
    assert not recorded
    compiled.generate([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True))
    assert len(recorded) == 1
    compiled.shutdown()


def test_a_number_that_does_not_follow_from_shapes_is_not_recorded() -> None:
    def graph_of(target: Any) -> fx.Graph:
        graph = fx.Graph()
        graph.output(
            graph.call_function(target, (graph.placeholder("x"), *([0] if target is torch.ops.aten.sym_size.int else [])))
        )
        return graph

    assert can_record(graph_of(torch.ops.aten.sym_size.int)) and can_record(graph_of(torch.ops.aten.relu.default))
    assert not can_record(graph_of(torch.ops.aten.item.default))


def test_values_share_memory_as_soon_as_nobody_needs_them() -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    for _ in range(100):
        node = graph.call_function(torch.ops.aten.relu.default, (graph.call_function(torch.ops.aten.neg.default, (node,)),))
    graph.output(node)
    arena = Arena(ARENA_BYTES)
    x = torch.randn(1, 1000)
    step = record(fx.GraphModule({}, graph), [x.numpy()], [], arena)
    assert torch.equal(step.output, torch.zeros(1, 1000))
    places = {function.keywords["out"].data_ptr() for function, _ in step.calls}
    assert len(step.calls) == 200 and len(places) <= 3
    assert torch.equal(step.run([(-x).numpy()]), torch.zeros(1, 1000))


def test_what_does_not_change_is_computed_once() -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("weight")
    doubled = graph.call_function(torch.ops.aten.mul.Tensor, (weight, 2))
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (x, doubled)))
    step = record(fx.GraphModule({"weight": torch.full((4,), 3.0)}, graph), [torch.ones(4).numpy()], [], Arena())
    assert len(step.calls) == 1
    assert step.run([torch.full((4,), 5.0).numpy()]).tolist() == [11.0] * 4


@needs_cpp_kernels
def test_what_torch_writes_in_place_keeps_its_order() -> None:
    aten, graph = torch.ops.aten, fx.Graph()
    x = graph.placeholder("x")
    squares = graph.call_function(cpp_pointwise.gated_activation, (x, x, "relu"))
    more = graph.call_function(aten.add.Tensor, (x, 1))
    written = graph.call_function(aten.add_.Tensor, (graph.call_function(aten.view.default, (more, [1, 4])), squares))
    graph.output(graph.call_function(aten.add.Tensor, (graph.call_function(aten.mul.Tensor, (more, 2)), written)))
    step = record(fx.GraphModule({}, graph), [torch.ones(1, 4).numpy()], [], Arena())
    assert step.output.tolist() == [[9.0] * 4] and step.run([torch.full((1, 4), 2.0).numpy()]).tolist() == [[21.0] * 4]


@needs_cpp_kernels
def test_all_kernels_of_a_decode_step_are_one_call_behind_those_of_torch() -> None:
    compiled = autodeploy.compile(make_model("qwen3").bfloat16())
    compiled.generate(PROMPTS, GREEDY)
    step = next(iter(compiled.runner.recorded.values()))  # pyright: ignore[reportAttributeAccessIssue]
    assert [isinstance(function, KernelCalls) for function, _ in step.calls] == [False] * (len(step.calls) - 1) + [True]
    assert 4 <= len(step.calls) <= 12
    compiled.shutdown()


def test_an_arena_takes_back_and_joins_places() -> None:
    arena = Arena(1 << 12)
    first, second = arena.place(torch.empty(3, 4)), arena.place(torch.empty(2, 8).T)
    assert second.stride() == (1, 8) and first.data_ptr() != second.data_ptr()
    for value in (first, second):
        arena.hold(value)
    view = first[1:]
    arena.hold(view)
    arena.release(first)
    assert arena.place(torch.empty(4)).data_ptr() != first.data_ptr()  # the view still needs it
    arena.release(view)
    arena.release(second)
    arena.free_unheld(arena.unheld)
    assert arena.place(torch.empty(1 << 9, dtype=torch.float64)).data_ptr() == first.data_ptr()  # the whole arena, in one piece
    with pytest.raises(AssertionError, match="arena"):
        arena.place(torch.empty(1))
