"""Steps with prompts, run in pieces that are replayed, give what plain ones give, with a CPU in the place of the GPU."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import autodeploy
from autodeploy import CompiledModel, SamplingParams
from autodeploy._compile import _with_pieces
from autodeploy.config import LLMArgs
from autodeploy.custom_ops import PROVIDED
from autodeploy.executor.cuda_graphs import CudaGraphRunner, GraphOptions
from autodeploy.executor.piecewise import PiecewiseRunner, token_ladder
from autodeploy.transforms.split import split_pieces
from tests.executor.test_cuda_graphs import CpuDevice
from tests.models.families import make_model

FAMILIES = ["qwen3", "mixtral", "qwen3_next"]
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [9] * 90, [17, 18], [3, 1] * 20]
LENGTHS = [12, 3, 6, 9, 5]
LENGTHS_DEPEND = {"paged_attention", "causal_conv1d_cached", "gated_delta_rule_cached"}


def in_pieces(family: str, gpu: CpuDevice, max_num_tokens: int = 48, **given: Any) -> tuple[CompiledModel, PiecewiseRunner]:
    """A model that computes at most 48 tokens a step, whose runner believes in that GPU."""
    options = {"kv_cache_config": {"page_size": 4, "max_tokens": 512}, "max_num_tokens": 48, "max_batch_size": 4}
    compiled = autodeploy.compile(make_model(family), **options, **given)
    runner: Any = compiled.runner
    runner.use_graphs(gpu, GraphOptions(4, False, max_num_tokens, split_pieces(compiled.program)))
    return compiled, runner.graphs.piecewise


def generate(compiled: CompiledModel) -> list[list[int]]:
    """Prompts come while others decode, and the long one is computed over several steps."""
    params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in LENGTHS]
    found = compiled.generate(PROMPTS, params)
    assert isinstance(found, list) and all(output.error is None for output in found), found
    return [list(output.outputs[0].token_ids) for output in found]


def check_steps(compiled: CompiledModel) -> list[int]:
    """Every step in pieces is run by the graph alone too, on a copy of the caches. The tokens of each."""
    runner: Any = compiled.runner
    graphs: CudaGraphRunner = runner.graphs
    pieces, replayed = graphs.piecewise, list[int]()
    assert pieces is not None
    forward = pieces.forward

    def checked(batch: Any) -> Tensor | None:
        before = [cache.clone() for cache in runner.caches]
        if (ours := forward(batch)) is None:
            return None
        replayed.append(batch["input_ids"].shape[1])
        after = [cache.clone() for cache in runner.caches]
        for cache, old in zip(runner.caches, before, strict=True):
            cache.copy_(old)
        expected = runner._compute([torch.from_numpy(batch[name]) for name in graphs.names])
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
        for mine, plain in zip(after, runner.caches, strict=True):  # all but scratch, and that never written to
            torch.testing.assert_close(mine[1:], plain[1:], rtol=1e-3, atol=1e-4, equal_nan=True)
        return ours

    pieces.forward = checked  # pyright: ignore[reportAttributeAccessIssue]
    return replayed


@functools.cache
def expected_of(family: str) -> list[list[int]]:
    plain = autodeploy.compile(make_model(family), max_num_tokens=48, max_batch_size=4)
    found = generate(plain)
    plain.shutdown()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_in_pieces_are_the_steps(family: str) -> None:
    compiled, pieces = in_pieces(family, CpuDevice())
    check_split(compiled)
    num_captured = sum(piece.is_captured for piece in pieces.pieces)
    replayed = check_steps(compiled)
    assert [generate(compiled) for _ in range(2)] == [expected_of(family)] * 2
    assert len(set(replayed)) >= 2 and len(replayed) == pieces.num_replays and max(replayed) <= 48
    assert any(count not in pieces.sizes for count in replayed)  # some were padded
    assert f"tokens, {num_captured} pieces, {len(pieces.captured)} sizes captured" in compiled.report()
    assert f"{pieces.num_replays} steps replayed" in compiled.report()
    compiled.shutdown()


def check_split(compiled: CompiledModel) -> None:
    """What depends on lengths lies between pieces, each call alone, and what follows the gather of logits behind the last."""
    targets = {node.name: node.target for node in compiled.program.graph.graph.nodes}
    split, num_between = split_pieces(compiled.program), 0
    assert [piece.is_captured for piece in split.pieces] == [i % 2 == 0 for i in range(len(split.pieces))]
    for piece in split.pieces[:-1]:
        names = [PROVIDED[targets[name]][0].name for name in piece.calls if targets[name] in PROVIDED]
        found = [name for name in names if name in LENGTHS_DEPEND]
        assert len(found) == (not piece.is_captured), names
        num_between += len(found)
    assert len(split.pieces) == 2 * num_between + 2 and "logits_indices" in split.pieces[-1].reads
    assert len({value.place for value in split.values.values()}) < len(split.values)


def test_padding_reads_nothing_that_other_steps_left() -> None:
    compiled, pieces = in_pieces("qwen3", CpuDevice())
    assert compiled.executor is not None
    runner: Any = compiled.runner
    batch = {
        "input_ids": np.arange(1, 11)[None],
        "position_ids": np.concatenate([np.arange(6), np.arange(4)])[None],
        "slot_mapping": np.concatenate([np.arange(4, 10), np.arange(12, 16)]),
        "page_table": np.array([[1, 2], [3, 0]]),
        "cu_seqlens_q": np.array([0, 6, 10], dtype=np.int32),
        "seq_lens": np.array([6, 4], dtype=np.int32),
        "logits_indices": np.array([5, 9]),
    }
    with torch.inference_mode():
        assert pieces.forward(batch) is None  # the first of its size
        first = pieces.forward(batch)
        assert first is not None and list(pieces.captured) == [16]
        first = first.clone()
        for place in pieces._places.values():
            place.fill_(torch.nan)
        again = pieces.forward(batch)
        assert again is not None and torch.equal(first, again)
        assert all(torch.isfinite(cache[0, 0]).all() for cache in runner.caches)  # where padding wrote
        assert all(torch.isfinite(pieces._tokens_of(name, 16)).all() for name in pieces.values)
    compiled.shutdown()


def test_a_piece_that_cannot_be_captured_is_told_and_its_steps_run_plainly() -> None:
    compiled, pieces = in_pieces("qwen3", CpuDevice(fails_at=2))
    assert generate(compiled) == generate(compiled) == expected_of("qwen3")
    assert not pieces.captured and pieces.num_replays == 0
    assert "tokens failed: RuntimeError: operation not permitted when stream is capturing" in compiled.report()
    assert "second line" not in pieces.failure
    graphs = compiled.runner.graphs  # pyright: ignore[reportAttributeAccessIssue]
    assert graphs.num_replays > 0 and not graphs.failure  # decode steps have theirs
    compiled.shutdown()


def test_all_sizes_ahead_and_larger_steps_run_plainly() -> None:
    gpu = CpuDevice()
    compiled, pieces = in_pieces("qwen3", gpu, 32, max_seq_len=100)
    runner: Any = compiled.runner
    assert compiled.executor is not None
    num_pieces, calls = sum(piece.is_captured for piece in pieces.pieces), list[None]()
    runner.graphs.capture_all(25, lambda: calls.append(None))
    assert list(pieces.captured) == [32, 16]
    assert len(calls) == runner.graphs.num_captures(25) == len(runner.graphs.shapes(25)) + 2
    assert gpu.num_captures == len(runner.graphs.shapes(25)) + 2 * num_pieces
    replayed = check_steps(compiled)
    assert generate(compiled) == expected_of("qwen3")
    assert replayed and max(replayed) <= 32
    check_options(compiled)
    runner.allocate(compiled.pool_units, 4)
    assert not pieces.captured  # they hold the caches that were
    compiled.shutdown()


def check_options(compiled: CompiledModel) -> None:
    program, graphs = compiled.program, GraphOptions(8)
    on_gpu = LLMArgs(model="x", device="cuda", max_num_tokens=300)
    options = _with_pieces(graphs, on_gpu, program)
    assert options.max_num_tokens == 300 and options.pieces == split_pieces(program) and options.max_batch_size == 8
    assert _with_pieces(graphs, LLMArgs(model="x", device="cuda"), program).max_num_tokens == 512
    without: Any = {"cuda_graph_config": {"max_num_tokens": 0}}
    assert _with_pieces(graphs, LLMArgs(model="x", device="cuda", **without), program) is graphs
    assert _with_pieces(graphs, LLMArgs(model="x", device="cpu"), program) is graphs
    assert _with_pieces(GraphOptions(), on_gpu, program) == GraphOptions()


def test_sizes_of_the_ladder() -> None:
    assert token_ladder(0) == () and token_ladder(5) == (5,) and token_ladder(40) == (16, 32, 40)
    assert token_ladder(512) == (16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256, *range(288, 513, 32))
