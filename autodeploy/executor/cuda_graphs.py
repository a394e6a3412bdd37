"""Steps on a GPU: inputs in one copy, and decode steps as CUDA graphs, captured once per padded shape and then replayed.

A decode step (one token of each request) is padded to the next size of a ladder, its page tables to the next power of two of
pages. Padding is requests of one token that write to the scratch page and slot and read what they have just written there; their
logits are dropped. Other steps run piece by piece (`piecewise.py`) or without a graph, and so does everything once a capture has
failed.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from autodeploy.executor.batch import MIN_PAGES
from autodeploy.executor.graph_device import GraphDevice, Replay, StepInputs, failure_text, kind_of, padding_of
from autodeploy.executor.piecewise import PiecewiseRunner
from autodeploy.specs import BatchMetadata, Pieces, input_spec

SMALL_SIZES, STEP = (1, 2, 4), 8


@dataclass(frozen=True)
class GraphOptions:
    """max_batch_size: requests of the largest step that is captured; 0 captures none. ahead: all shapes before the first step.

    pieces: of the program, for steps with prompts, of at most `max_num_tokens`; None: these run without graphs.
    """

    max_batch_size: int = 0
    ahead: bool = False
    max_num_tokens: int = 0
    pieces: Pieces | None = None


class StepShape(NamedTuple):
    """What a graph is captured for. num_pages: columns of the page tables; 0 where the program has none."""

    size: int
    num_pages: int


@dataclass
class CapturedStep:
    """A graph, and what it reads and writes. logits [size, V], chosen [size, 2] (of `greedy`): valid until another step."""

    inputs: StepInputs
    replay: Replay
    logits: Tensor
    chosen: Tensor | None


class LaunchedStep:
    """A decode step that the device may still be at. chosen [N, 2]: the largest logit and its token, per request."""

    def __init__(self, chosen: Tensor, wait: Callable[[], np.ndarray]) -> None:
        self.chosen, self._wait = chosen, wait

    @cached_property
    def found(self) -> np.ndarray:
        """`chosen`, once it is there; on the host."""
        return self._wait()


class CudaGraphRunner:
    """Runs steps on a GPU.

    compute: the program, from its inputs (in the order of `names`) to logits [N, V]. plan: host work before each step, from its
    arrays; it gets the padded ones of a graph. piecewise: runs steps with prompts, where it can.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Tensor]], Tensor],
        names: Iterable[str],
        gpu: GraphDevice,
        options: GraphOptions,
        plan: Callable[[BatchMetadata], None] = lambda batch: None,
        piecewise: PiecewiseRunner | None = None,
    ) -> None:
        self.names, self.options, self.sizes = list(names), options, ladder(options.max_batch_size)
        self.failure = ""
        """Why nothing is captured any more."""
        self.greedy: Callable[[Tensor], Tensor] | None = None
        """What graphs end with, set before the first step: logits [N, V] -> [N, 2], the largest of each row and its token."""
        self.piecewise = piecewise
        self._compute, self._gpu, self._plan = compute, gpu, plan
        self.clear()

    def clear(self) -> None:
        """Drop all graphs, whose caches are no more."""
        self.captured: dict[StepShape, CapturedStep] = {}
        self.num_replays, self.capture_seconds = 0, 0.0
        self._known: set[StepShape] = set()
        self._logits: Tensor | None = None
        self._chosen: Tensor | None = None
        if self.piecewise is not None:
            self.piecewise.clear()

    def use(self) -> AbstractContextManager[Any]:
        return self._gpu.use()

    def forward(self, batch: BatchMetadata) -> Tensor:
        """The wanted logits [N, V] of a step, valid until the next one."""
        with self._gpu.use():
            if not _decodes(batch):
                logits = None if self.piecewise is None else self.piecewise.forward(batch)
                return self._run_plain(batch) if logits is None else logits
            step = self._step_for(batch)
            return self._run_plain(batch) if step is None else self._run_captured(step, batch)

    @torch.inference_mode()
    def launch(self, batch: BatchMetadata, after: LaunchedStep | None) -> LaunchedStep:
        """Start a decode step without waiting for it. after: the step before, of the same requests, whose tokens it goes on with.

        Without one it goes on with those of the batch.
        """
        assert self.greedy is not None
        with self._gpu.use():
            tokens = None if after is None else after.chosen[:, 1].long()  # a copy: a capture writes to where `chosen` is
            step = self._step_for(batch)
            if step is None or step.chosen is None:
                chosen = self.greedy(self._run_plain(batch, tokens))
            else:
                chosen = step.chosen[: len(self._run_captured(step, batch, tokens))]
            return LaunchedStep(chosen, self._gpu.download(chosen))

    def shapes(self, num_pages: int) -> list[StepShape]:
        """All that steps with up to that many pages per request may have, the largest first: the others fit into its memory."""
        widths = [0]
        if any(kind_of(name) == "page_table" for name in self.names):
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
            for size in self._piece_sizes:
                assert self.piecewise is not None
                self.piecewise.capture(size)
                advance()

    def num_captures(self, num_pages: int) -> int:
        """How often `capture_all` calls `advance`."""
        return len(self.shapes(num_pages)) + len(self._piece_sizes)

    @property
    def _piece_sizes(self) -> tuple[int, ...]:
        """Numbers of tokens, the largest first."""
        return () if self.piecewise is None else self.piecewise.sizes[::-1]

    def summary(self) -> str:
        """For the report."""
        if not self.sizes:
            return "CUDA graphs: off"
        return self._summary() if self.piecewise is None else f"{self._summary()}\n{self.piecewise.summary()}"

    def _summary(self) -> str:
        shapes = f"{len(self.captured)} shapes captured in {self.capture_seconds:.1f} s, {self.num_replays} steps replayed"
        text = f"CUDA graphs: decode steps of up to {self.sizes[-1]} requests, {shapes}"
        return f"{text}; no more are captured: {self.failure}" if self.failure else text

    def _step_for(self, batch: BatchMetadata) -> CapturedStep | None:
        """The graph for a step; captured now if its shape comes a second time. None: there is none."""
        count = len(batch["seq_lens"])
        if not _decodes(batch) or not self.sizes or count > self.sizes[-1]:
            return None
        widest = max((batch[name].shape[1] for name in self.names if kind_of(name) == "page_table"), default=0)
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
            shown = f"{shape.size} requests of up to {shape.num_pages} pages"
            self.failure = f"the capture for {shown} failed: {failure_text(error)}"
        self.capture_seconds += time.perf_counter() - started

    def _capture(self, shape: StepShape) -> CapturedStep:
        """Nothing but padding is computed here: a step of real requests would move their recurrent states several times."""
        inputs = StepInputs({name: _padded_shape(name, shape) for name in self.names}, self._gpu)
        for name, array in inputs.arrays.items():
            array[...] = np.arange(len(array)) if kind_of(name) == "cu_seqlens_q" else padding_of(name)
        self._plan(inputs.arrays)
        tensors = inputs.upload()
        logits, chosen = self._places_for(self._compute(tensors), shape.size)

        def step() -> None:
            logits.copy_(self._compute(tensors))
            if chosen is not None and self.greedy is not None:
                chosen.copy_(self.greedy(logits))

        return CapturedStep(inputs, self._gpu.capture(step), logits, chosen)

    def _places_for(self, logits: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
        """Where all graphs leave what they find, for [largest size] rows: a graph's own memory is another one's too."""
        if self._logits is None:
            self._logits = logits.new_empty(self.sizes[-1], logits.shape[1])
            self._chosen = None if self.greedy is None else logits.new_empty(self.sizes[-1], 2, dtype=torch.float64)
        return self._logits[:size], None if self._chosen is None else self._chosen[:size]

    def _run_captured(self, step: CapturedStep, batch: BatchMetadata, tokens: Tensor | None = None) -> Tensor:
        arrays = step.inputs.writable()
        for name, array in arrays.items():
            if kind_of(name) != "cu_seqlens_q":  # it is always one token each
                given = batch[name]
                if array.shape != given.shape:
                    array.fill(padding_of(name))
                array[tuple(map(slice, given.shape))] = given
        self._plan({**batch, **arrays})
        self._replace_tokens(step.inputs.upload(), tokens)
        step.replay()
        self.num_replays += 1
        rows = "logits_indices" if "logits_indices" in self.names else "seq_lens"
        return step.logits[: len(batch[rows])]

    def _run_plain(self, batch: BatchMetadata, tokens: Tensor | None = None) -> Tensor:
        """Memory of the host is new for each step; torch gives it out again when the device has read it."""
        self._plan(batch)
        inputs = StepInputs({name: batch[name].shape for name in self.names}, self._gpu)
        for name, array in inputs.arrays.items():
            array[...] = batch[name]
        return self._compute(self._replace_tokens(inputs.upload(), tokens))

    def _replace_tokens(self, inputs: list[Tensor], tokens: Tensor | None) -> list[Tensor]:
        """Have the first ids of the inputs be those that the device has found itself."""
        if tokens is not None:
            inputs[self.names.index("input_ids")][0, : len(tokens)].copy_(tokens)
        return inputs


def _decodes(batch: BatchMetadata) -> bool:
    """Whether a step has one token of each request."""
    return len(batch["seq_lens"]) == batch["input_ids"].shape[1]


def ladder(max_batch_size: int) -> tuple[int, ...]:
    """Sizes that decode steps are padded to: 1, 2, 4, then multiples of 8, and the largest itself; none for 0."""
    sizes = {*SMALL_SIZES, *range(STEP, max_batch_size, STEP), max_batch_size}
    return tuple(sorted(size for size in sizes if 0 < size <= max_batch_size))


def _padded_shape(name: str, shape: StepShape) -> tuple[int, ...]:
    size, num_pages = shape
    symbols = {"T": size, "B": size, "N": size, "B+1": size + 1, "P": num_pages}
    return tuple(symbols[dim] if isinstance(dim, str) else dim for dim in input_spec(name).shape)
