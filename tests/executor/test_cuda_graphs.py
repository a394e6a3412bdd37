"""Padded and replayed decode steps give what plain ones give, with a CPU in the place of the GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import autodeploy
from autodeploy import CompiledModel, SamplingParams
from autodeploy.executor.cuda_graphs import CudaGraphRunner, GraphOptions, LaunchedStep, StepShape, ladder
from autodeploy.executor.graph_device import OnDeviceOnly, StepInputs
from tests.models.families import make_model

FAMILIES = ["qwen3", "gemma2", "mixtral", "llama_dynamic", "qwen3_next", "mamba2"]
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [9] * 26, [17], [3, 1] * 20]
LENGTHS = [30, 3, 12, 20, 8]
"""Tokens of each prompt: the batch shrinks from 5 to 1 while page tables of 4 tokens a page grow past 8 columns."""


class CpuDevice:
    """Captures by remembering the step. Its memory starts out as rubbish, and it notices what is overwritten too early."""

    def __init__(self, fails_at: int = 1 << 30) -> None:
        self.num_captures, self.num_uploads, self.fails_at = 0, 0, fails_at
        self._unread: list[Tensor] = []

    def use(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def host_bytes(self, num_bytes: int) -> Tensor:
        return torch.full((num_bytes,), 0x5A, dtype=torch.uint8)

    device_bytes = host_bytes

    def upload(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        assert all(source is not other for other in self._unread), "written to before it was read"
        self.num_uploads += 1
        target.copy_(source)
        self._unread = [source]
        return self._unread.clear

    def download(self, source: Tensor) -> Callable[[], np.ndarray]:
        """The numbers are those of now, and nobody has them before waiting."""
        found = source.clone()
        return found.numpy

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        self.num_captures += 1
        step()
        if self.num_captures == self.fails_at:
            raise RuntimeError("operation not permitted when stream is capturing\nwith a second line")
        step()
        return step


def with_graphs(family: str, gpu: CpuDevice, options: GraphOptions | None = None, pool: int = 512, **given: Any) -> CompiledModel:
    """A model whose runner believes in that GPU. pool: tokens."""
    compiled = autodeploy.compile(make_model(family), kv_cache_config={"page_size": 4, "max_tokens": pool}, **given)
    runner: Any = compiled.runner
    runner.graphs = CudaGraphRunner(runner._compute, runner.program.inputs, gpu, options or GraphOptions(32), runner._plan)
    return compiled


def graphs_of(compiled: CompiledModel) -> CudaGraphRunner:
    graphs = compiled.runner.graphs  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(graphs, CudaGraphRunner)
    return graphs


def generate(compiled: CompiledModel) -> list[list[int]]:
    """The tokens of the prompts, all at once and then each alone."""
    params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in LENGTHS]
    found = compiled.generate(PROMPTS, params)
    assert isinstance(found, list) and all(output.error is None for output in found), found
    alone = [compiled.generate([prompt], [item])[0] for prompt, item in zip(PROMPTS, params, strict=True)]
    return [list(output.outputs[0].token_ids) for output in (*found, *alone)]


def check_steps(compiled: CompiledModel) -> list[int]:
    """Every step is run by the graph alone too, on a copy of the caches. The number of requests of each replayed one."""
    runner: Any = compiled.runner
    graphs, replayed = graphs_of(compiled), list[int]()
    forward, launch = graphs.forward, graphs.launch

    def checked(batch: Any, run: Callable[[], Tensor], expect: Callable[[Tensor], Tensor]) -> Tensor:
        before, num_replays = [cache.clone() for cache in runner.caches], graphs.num_replays
        ours = run().clone()
        after = [cache.clone() for cache in runner.caches]
        for cache, old in zip(runner.caches, before, strict=True):
            cache.copy_(old)
        expected = runner._compute([torch.from_numpy(batch[name]) for name in graphs.names])
        torch.testing.assert_close(ours, expect(expected), rtol=1e-3, atol=1e-4)
        for mine, plain in zip(after, runner.caches, strict=True):  # all but scratch, and that never written to
            torch.testing.assert_close(mine[1:], plain[1:], rtol=1e-3, atol=1e-4, equal_nan=True)
        replayed.extend([len(batch["seq_lens"])] * (graphs.num_replays - num_replays))
        return ours

    @torch.inference_mode()
    def launch_checked(batch: Any, after: LaunchedStep | None) -> LaunchedStep:
        steps, greedy = list[LaunchedStep](), graphs.greedy
        assert greedy is not None
        real = batch if after is None else {**batch, "input_ids": after.found[None, :, 1].astype(np.int64)}

        def run() -> Tensor:
            steps.append(launch(batch, after))
            return steps[0].chosen

        checked(real, run, greedy)
        return steps[0]

    graphs.forward = lambda batch: checked(batch, lambda: forward(batch), lambda logits: logits)  # pyright: ignore
    graphs.launch = launch_checked  # pyright: ignore[reportAttributeAccessIssue]
    return replayed


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_steps_are_the_steps(family: str) -> None:
    plain = autodeploy.compile(make_model(family))
    expected = generate(plain)
    plain.shutdown()
    gpu = CpuDevice()
    compiled = with_graphs(family, gpu)
    replayed = check_steps(compiled)
    assert generate(compiled) == expected
    assert {1, 3} <= set(replayed) and len(replayed) >= 30
    assert {shape.size for shape in graphs_of(compiled).captured} >= {1, 4}
    assert gpu.num_captures == len(graphs_of(compiled).captured)
    compiled.shutdown()


def test_page_tables_come_in_powers_of_two() -> None:
    compiled = with_graphs("qwen3", CpuDevice())
    generate(compiled)
    generate(compiled)
    shapes = set(graphs_of(compiled).captured)
    assert {StepShape(1, 8), StepShape(1, 16)} <= shapes
    assert {shape.size for shape in shapes} <= {1, 2, 4, 8} and {shape.num_pages for shape in shapes} == {8, 16}
    compiled.shutdown()


def test_a_shape_is_captured_when_it_comes_again_and_copied_once_per_step() -> None:
    gpu = CpuDevice()
    compiled = with_graphs("qwen3", gpu)
    graphs = graphs_of(compiled)
    compiled.generate([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True))
    assert not graphs.captured and gpu.num_uploads == 2
    compiled.generate([1, 2, 3], SamplingParams(max_tokens=3, ignore_eos=True))
    assert list(graphs.captured) == [StepShape(1, 8)] and graphs.num_replays == 2
    assert gpu.num_uploads == 2 + 3 + 1  # one more for the capture
    compiled.shutdown()


def test_larger_batches_and_prompts_run_without_a_graph() -> None:
    compiled = with_graphs("qwen3", CpuDevice(), GraphOptions(2))
    replayed = check_steps(compiled)
    generate(compiled)
    assert set(replayed) == {1, 2}
    compiled(torch.ones(2, 30, dtype=torch.int64))
    compiled.shutdown()


def test_all_shapes_ahead() -> None:
    gpu = CpuDevice()
    options = {"cuda_graph_config": {"ahead": True}, "max_batch_size": 4, "max_seq_len": 50}
    compiled = with_graphs("gemma2", gpu, GraphOptions(4, ahead=True), **options)
    assert compiled.executor is not None
    sizes = [(4, 16), (4, 8), (2, 16), (2, 8), (1, 16), (1, 8)]  # 50 tokens are 13 pages
    assert list(graphs_of(compiled).captured) == sizes
    assert "capture CUDA graphs" in compiled.timeline.seconds
    generate(compiled)
    assert gpu.num_captures == len(sizes)
    compiled.shutdown()


def test_a_program_without_pages_has_no_widths() -> None:
    compiled = with_graphs("mamba2", CpuDevice(), GraphOptions(2))
    assert graphs_of(compiled).shapes(99) == [StepShape(2, 0), StepShape(1, 0)]
    compiled.shutdown()


def test_a_capture_that_fails_is_the_last_and_its_reason_is_told() -> None:
    plain = autodeploy.compile(make_model("qwen3"))
    expected = generate(plain)
    plain.shutdown()
    gpu = CpuDevice(fails_at=2)
    compiled = with_graphs("qwen3", gpu)
    assert "up to 32 requests, 0 shapes" in compiled.report()
    assert generate(compiled) == expected
    graphs = graphs_of(compiled)
    assert gpu.num_captures == 2 and len(graphs.captured) == 1
    assert "RuntimeError: operation not permitted when stream is capturing" in compiled.report()
    assert "second line" not in graphs.failure
    compiled.shutdown()


def test_no_graphs() -> None:
    gpu = CpuDevice()
    compiled = with_graphs("qwen3", gpu, GraphOptions())
    generate(compiled)
    assert gpu.num_captures == 0 and "CUDA graphs: off" in compiled.report()
    compiled.shutdown()


def test_cpus_have_no_graphs() -> None:
    compiled = autodeploy.compile(make_model("qwen3"))
    assert compiled.runner.graphs is None  # pyright: ignore[reportAttributeAccessIssue]
    assert "CUDA graphs" not in compiled.report()
    compiled.shutdown()


def test_sizes_of_the_ladder() -> None:
    assert ladder(0) == () and ladder(1) == (1,) and ladder(5) == (1, 2, 4, 5) and ladder(8) == (1, 2, 4, 8)
    assert ladder(33) == (1, 2, 4, 8, 16, 24, 32, 33)


def test_inputs_are_one_piece_of_memory() -> None:
    gpu = CpuDevice()
    inputs = StepInputs({"input_ids": (1, 3), "seq_lens": (3,), "page_table_window_8": (3, 2)}, gpu)
    given = {"input_ids": [[7, 8, 9]], "seq_lens": [1, 2, 3], "page_table_window_8": [[1, 2], [3, 4], [5, 6]]}
    for name, array in inputs.writable().items():
        array[...] = np.array(given[name])
    tensors = inputs.upload()
    assert [tensor.tolist() for tensor in tensors] == list(given.values()) and gpu.num_uploads == 1
    assert [tensor.dtype for tensor in tensors] == [torch.int64, torch.int32, torch.int64]
    places = [tensor.data_ptr() - tensors[0].data_ptr() for tensor in tensors]
    assert places == [0, 128, 256]


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.to("meta"),
        lambda x: x[0].to("meta"),
        lambda x: torch.empty(3, device="meta").copy_(x),
    ],
)
def test_what_no_graph_can_hold_is_found_before_the_capture(step: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3)
    with torch.inference_mode(), OnDeviceOnly():
        y = x[torch.tensor([0, 2])].add(1).mul_(2.0)
        x.index_copy_(0, torch.tensor([1]), y[:1])
        with pytest.raises(RuntimeError, match="aten"):
            step(x)
