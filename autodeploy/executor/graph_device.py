"""What a GPU does for steps: memory that both sides see, copies that nobody waits for, captures. Tests put a CPU in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from itertools import accumulate
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from autodeploy.custom_ops import provider_at_work
from autodeploy.executor.kv_cache import SCRATCH_PAGE
from autodeploy.specs import DTYPE_BYTES, input_spec

PADDING = {"seq_lens": 1, "rope_len": 1}
"""What padding has in place of scratch page, slot, token and position 0."""
ALIGNMENT = 128
"""Bytes; where each input begins."""
WARM_UPS = 2
"""Runs before a capture: kernels are compiled and workspaces taken outside of it."""
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}
COPIES = {"aten::to", "aten::_to_copy", "aten::copy_", "aten::_copy_from"}
"""Names of ops that may go from one device to another; what others take from the host are single numbers."""

Replay = Callable[[], None]


def kind_of(name: str) -> str:
    """The name of an input without its window."""
    return name.partition("_window_")[0]


def padding_of(name: str) -> int:
    """What stands in an input for what is not there."""
    return PADDING.get(kind_of(name), SCRATCH_PAGE)


def failure_text(error: Exception) -> str:
    """Why a capture failed, on one line."""
    first = (str(error).strip().splitlines() or ["no reason given"])[0]
    return f"{provider_at_work(error)}{type(error).__name__}: {first}"


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

    def download(self, source: Tensor) -> Callable[[], np.ndarray]:
        """Start to copy from device to host; the result waits for the numbers, which stay as they are now."""
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

    def download(self, source: Tensor) -> Callable[[], np.ndarray]:
        host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        host.copy_(source, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def wait() -> np.ndarray:
            copied.synchronize()
            return host.numpy()

        return wait

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
