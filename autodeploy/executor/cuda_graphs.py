"""Steps on a GPU: inputs in one copy, and decode steps as CUDA graphs, captured once per padded shape and then replayed.

A decode step (one token of each request) is padded to the next size of a ladder, its page tables to the next power of two of
pages. Padding is requests of one token that write to the scratch page and slot and read what they have just written there; their
logits are dropped. All other steps run without a graph, and so does everything once a capture has failed.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from autodeploy.custom_ops import provider_at_work
from autodeploy.executor.batch import MIN_PAGES
from autodeploy.executor.kv_cache import SCRATCH_PAGE
from autodeploy.specs import DTYPE_BYTES, BatchMetadata, input_spec

ALIGNMENT = 128
"""Bytes; where each input begins."""
WARM_UPS = 2
"""Runs before a capture: kernels are compiled and workspaces taken outside of it."""
SMALL_SIZES, STEP = (1, 2, 4), 8
PADDING = {"seq_lens": 1, "rope_len": 1}
"""What padding has in place of scratch page, slot, token and position 0."""
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}
COPIES = {"aten::to", "aten::_to_copy", "aten::copy_", "aten::_copy_from"}
"""Names of ops that may go from one device to another; what others take from the host are single numbers."""

Replay = Callable[[], None]


@dataclass(frozen=True)
class GraphOptions:
    """max_batch_size: requests of the largest step that is captured; 0 captures none. ahead: all shapes before the first step."""

    max_batch_size: int = 0
    ahead: bool = False


class StepShape(NamedTuple):
    """What a graph is captured for. num_pages: columns of the page tables; 0 where the program has none."""

    size: int
    num_pages: int


class GraphDevice(Protocol):
    """What a GPU does for steps. Tests put a CPU in its place."""

    def use(self) -> AbstractContextManager[Any]:
        """The calling thread works on this device."""
        ...

    def host_bytes(self, num_bytes: int) -> Tensor:
        """Memory of the host that the device can read by itself, uint8 [num_bytes]."""
        ...

    def device_bytes(self, num_bytes: int) -> Tensor:
        """Memory of the device, uint8 [num_bytes]."""
        ...

    def upload(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        """Start to copy from host to device; the result waits until `source` may be written to again."""
        ...

    def capture(self, step: Callable[[], None]) -> Replay:
        """Run a step some times, then capture it. It must neither wait for the device nor copy between it and the host."""
        ...


class CudaDevice:
    """A GPU, with one memory pool for all graphs: one of them runs at a time."""

    def __init__(self, name: str) -> None:
        given = torch.device(name)
        self._device = torch.device("cuda", torch.cuda.current_device() if given.index is None else given.index)
        self._stream: Any = None
        self._pool: Any = None

    def use(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._device)

    def host_bytes(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def device_bytes(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def upload(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        target.copy_(source, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return copied.synchronize

    def capture(self, step: Callable[[], None]) -> Replay:
        if self._pool is None:
            self._stream, self._pool = torch.cuda.Stream(self._device), torch.cuda.graph_pool_handle()
        self._warm_up(step)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            step()
        return graph.replay

    def _warm_up(self, step: Callable[[], None]) -> None:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                step()
            with OnDeviceOnly():  # a capture that fails half-way leaves torch's allocator in disorder: find out before
                step()
        current.wait_stream(self._stream)


class OnDeviceOnly(TorchDispatchMode):
    """Raises RuntimeError at the first op that no graph can hold: one that gives numbers to the host, or copies to or from it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would import dynamo, only to be told to stay away

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _waits(func, args):
            raise RuntimeError(f"{func} waits for the device")
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_iter((args, kwargs, result)) if isinstance(x, Tensor)]
        devices = {x.device.type for x in tensors if func._schema.name in COPIES or x.dim() or x.device.type != "cpu"}
        if len(devices) > 1:
            raise RuntimeError(f"{func} works on {' and '.join(sorted(devices))}")
        return result


def _waits(func: Any, args: Any) -> bool:
    """Whether a shape or a number that the host sees depends on numbers of the device."""
    if func in INDEXING:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


class StepInputs:
    """A step's inputs, in one piece on the host and in one on the device.

    arrays: by name, views of the first. tensors: of the second, in the order of `shapes`.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], gpu: GraphDevice) -> None:
        dtypes = [input_spec(name).dtype for name in shapes]
        sizes = [prod(shape) * DTYPE_BYTES[dtype] for shape, dtype in zip(shapes.values(), dtypes, strict=True)]
        starts = list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))
        self._gpu = gpu
        self._wait: Callable[[], None] | None = None
        self._host, self._device = gpu.host_bytes(starts[-1]), gpu.device_bytes(starts[-1])
        self.arrays: dict[str, np.ndarray] = {}
        self.tensors: list[Tensor] = []
        for (name, shape), dtype, start, size in zip(shapes.items(), dtypes, starts, sizes, strict=False):
            mine, theirs = (memory[start : start + size].view(getattr(torch, dtype)) for memory in (self._host, self._device))
            self.arrays[name] = mine.view(shape).numpy()
            self.tensors.append(theirs.view(shape))

    def writable(self) -> dict[str, np.ndarray]:
        """The arrays, once the device has read what was in them."""
        if self._wait is not None:
            self._wait()
        return self.arrays

    def upload(self) -> list[Tensor]:
        """Start to copy the arrays; the tensors that will have them."""
        self._wait = self._gpu.upload(self._device, self._host)
        return self.tensors


@dataclass
class CapturedStep:
    """A graph, and what it reads and writes. logits [size, V]: valid until another step."""

    inputs: StepInputs
    replay: Replay
    logits: Tensor


class CudaGraphRunner:
    """Runs steps on a GPU.

    compute: the program, from its inputs (in the order of `names`) to logits [N, V]. plan: host work before each step, from its
    arrays; it gets the padded ones of a graph.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Tensor]], Tensor],
        names: Iterable[str],
        gpu: GraphDevice,
        options: GraphOptions,
        plan: Callable[[BatchMetadata], None] = lambda batch: None,
    ) -> None:
        self.names, self.options, self.sizes = list(names), options, ladder(options.max_batch_size)
        self.failure = ""
        """Why nothing is captured any more."""
        self._compute, self._gpu, self._plan = compute, gpu, plan
        self.clear()

    def clear(self) -> None:
        """Drop all graphs, whose caches are no more."""
        self.captured: dict[StepShape, CapturedStep] = {}
        self.num_replays, self.capture_seconds = 0, 0.0
        self._known: set[StepShape] = set()
        self._logits: Tensor | None = None

    def use(self) -> AbstractContextManager[Any]:
        return self._gpu.use()

    def forward(self, batch: BatchMetadata) -> Tensor:
        """The wanted logits [N, V] of a step, valid until the next one."""
        with self._gpu.use():
            step = self._step_for(batch)
            return self._run_plain(batch) if step is None else self._run_captured(step, batch)

    def shapes(self, num_pages: int) -> list[StepShape]:
        """All that steps with up to that many pages per request may have, the largest first: the others fit into its memory."""
        widths = [0]
        if any(_kind(name) == "page_table" for name in self.names):
            widths = [MIN_PAGES << i for i in range((-(-num_pages // MIN_PAGES) - 1).bit_length() + 1)]
        return [StepShape(size, width) for size in reversed(self.sizes) for width in reversed(widths)]

    @torch.inference_mode()
    def capture_all(self, num_pages: int, advance: Callable[..., None] = lambda *_: None) -> None:
        """Capture every shape, until one fails. advance: called after each."""
        with self._gpu.use():
            for shape in self.shapes(num_pages):
                if not self.failure:
                    self._try_to_capture(shape)
                advance()

    def summary(self) -> str:
        """One line for the report."""
        if not self.sizes:
            return "CUDA graphs: off"
        shapes = f"{len(self.captured)} shapes captured in {self.capture_seconds:.1f} s, {self.num_replays} steps replayed"
        text = f"CUDA graphs: decode steps of up to {self.sizes[-1]} requests, {shapes}"
        return f"{text}; no more are captured: {self.failure}" if self.failure else text

    def _step_for(self, batch: BatchMetadata) -> CapturedStep | None:
        """The graph for a step; captured now if its shape comes a second time. None: there is none."""
        count = len(batch["seq_lens"])
        if count != batch["input_ids"].shape[1] or not self.sizes or count > self.sizes[-1]:
            return None
        widest = max((batch[name].shape[1] for name in self.names if _kind(name) == "page_table"), default=0)
        shape = StepShape(self.sizes[bisect_left(self.sizes, count)], 1 << (widest - 1).bit_length() if widest else 0)
        if shape not in self.captured and not self.failure and shape in self._known:
            self._try_to_capture(shape)
        self._known.add(shape)
        return self.captured.get(shape)

    def _try_to_capture(self, shape: StepShape) -> None:
        started = time.perf_counter()
        try:
            self.captured[shape] = self._capture(shape)
        except Exception as error:
            first = (str(error).strip().splitlines() or ["no reason given"])[0]
            what = f"{provider_at_work(error)}{type(error).__name__}: {first}"
            self.failure = f"the capture for {shape.size} requests of up to {shape.num_pages} pages failed: {what}"
        self.capture_seconds += time.perf_counter() - started

    def _capture(self, shape: StepShape) -> CapturedStep:
        """Nothing but padding is computed here: a step of real requests would move their recurrent states several times."""
        inputs = StepInputs({name: _padded_shape(name, shape) for name in self.names}, self._gpu)
        for name, array in inputs.arrays.items():
            array[...] = np.arange(len(array)) if _kind(name) == "cu_seqlens_q" else _padding(name)
        self._plan(inputs.arrays)
        tensors = inputs.upload()
        logits = self._place_for(self._compute(tensors))[: shape.size]

        def step() -> None:
            logits.copy_(self._compute(tensors))

        return CapturedStep(inputs, self._gpu.capture(step), logits)

    def _place_for(self, logits: Tensor) -> Tensor:
        """Where all graphs leave their logits, [largest size, V]: a graph's own memory is another one's too."""
        if self._logits is None:
            self._logits = logits.new_empty(self.sizes[-1], logits.shape[1])
        return self._logits

    def _run_captured(self, step: CapturedStep, batch: BatchMetadata) -> Tensor:
        arrays = step.inputs.writable()
        for name, array in arrays.items():
            if _kind(name) != "cu_seqlens_q":  # it is always one token each
                given = batch[name]
                if array.shape != given.shape:
                    array.fill(_padding(name))
                array[tuple(map(slice, given.shape))] = given
        self._plan({**batch, **arrays})
        step.inputs.upload()
        step.replay()
        self.num_replays += 1
        rows = "logits_indices" if "logits_indices" in self.names else "seq_lens"
        return step.logits[: len(batch[rows])]

    def _run_plain(self, batch: BatchMetadata) -> Tensor:
        """Memory of the host is new for each step; torch gives it out again when the device has read it."""
        self._plan(batch)
        inputs = StepInputs({name: batch[name].shape for name in self.names}, self._gpu)
        for name, array in inputs.arrays.items():
            array[...] = batch[name]
        return self._compute(inputs.upload())


def ladder(max_batch_size: int) -> tuple[int, ...]:
    """Sizes that decode steps are padded to: 1, 2, 4, then multiples of 8, and the largest itself; none for 0."""
    sizes = {*SMALL_SIZES, *range(STEP, max_batch_size, STEP), max_batch_size}
    return tuple(sorted(size for size in sizes if 0 < size <= max_batch_size))


def _kind(name: str) -> str:
    """The name of an input without its window."""
    return name.partition("_window_")[0]


def _padding(name: str) -> int:
    return PADDING.get(_kind(name), SCRATCH_PAGE)


def _padded_shape(name: str, shape: StepShape) -> tuple[int, ...]:
    size, num_pages = shape
    symbols = {"T": size, "B": size, "N": size, "B+1": size + 1, "P": num_pages}
    return tuple(symbols[dim] if isinstance(dim, str) else dim for dim in input_spec(name).shape)
