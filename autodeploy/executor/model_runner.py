"""Runs a program: real weights, real caches, one forward per step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx

from autodeploy import huge_pages
from autodeploy.cores import available_cores
from autodeploy.custom_ops import PROVIDED
from autodeploy.custom_ops.attention_backend import backend_named
from autodeploy.executor.batch import WantedRows
from autodeploy.executor.cuda_graphs import CudaGraphRunner, GraphOptions
from autodeploy.executor.graph_device import CudaDevice, GraphDevice
from autodeploy.executor.packing import bytes_of, parameter_uses, read_packed, release_freed_memory
from autodeploy.executor.piecewise import PiecewiseRunner
from autodeploy.executor.recorded_step import Arena, RecordedStep, can_record, record
from autodeploy.executor.request import Request
from autodeploy.formats import Integers
from autodeploy.program import Program
from autodeploy.specs import BatchMetadata
from autodeploy.weights import Made, TensorSource, materialize


class Runner(Protocol):
    """What serving needs of a model."""

    rope_thresholds: tuple[int, ...]
    """Lengths at which a request is computed anew."""
    can_chunk: bool
    """Whether a prompt may be computed in several steps."""
    reads_entries: bool
    """Whether a step needs more than its arrays."""

    def allocate(self, num_units: Mapping[str, int], page_size: int) -> None:
        """Make the caches: pages (or slots) of each pool, by its name."""
        ...

    def forward(self, batch: BatchMetadata, rows: list[WantedRows]) -> Tensor:
        """The wanted logits of one step, [N, V]."""
        ...

    def forget(self, request: Request) -> None:
        """Drop what is kept of a request that has ended."""
        ...


def limit_threads(device: str) -> None:
    """Let torch use no more threads than there are cores for this process: it counts those of the machine."""
    if device == "cpu" and torch.get_num_threads() > (cores := available_cores()):
        torch.set_num_threads(cores)


MAX_RECORDED_TOKENS, MAX_RECORDED_STEPS = 128, 256
RECORDED_AT, PROMPTS_RECORDED_AT = 2, 5
"""Which step of a shape is recorded: that takes as long as 5 to 10 later ones save; prompts of one shape may be fewer."""
MAX_COUNTED_SHAPES = 4096


class ModelRunner:
    """A lowered program with its weights; `allocate` gives it its KV pool."""

    can_chunk, reads_entries = True, False

    def __init__(
        self,
        program: Program,
        source: TensorSource,
        device: str,
        on_parameter: Callable[[str], None] = lambda name: None,
        graphs: GraphOptions | None = None,
    ) -> None:
        self.program, self.device, self.rope_thresholds = program, device, program.rope_thresholds
        limit_threads(device)
        tensors: dict[str, Tensor] = {}
        uses = parameter_uses(program)
        packed = {name for name, use in uses.items() if not use.dense}
        as_integers = {name for name, use in uses.items() if use.as_integers}
        in_parts = {name for name, use in uses.items() if use.in_parts}
        for name, made in materialize(program.weights, source, device, packed, as_integers, in_parts):
            shape, dtype = _kind(made)
            planned = program.parameter(name)
            is_right = shape == planned.shape and dtype in (planned.dtype, None)
            assert is_right, f"{name}: {program.weights[name]} gives {dtype}{list(shape)}"
            uses[name].store(tensors, name, made)
            on_parameter(name)
        release_freed_memory()
        self.source, self.weight_bytes = source, sum(map(bytes_of, tensors.values()))
        self.module = _executable(program, tensors, device)
        self.plans = plans_of(program)
        self.caches: list[Tensor] = []
        self.graphs: CudaGraphRunner | None = None
        if device.startswith("cuda"):
            self.use_graphs(CudaDevice(device), graphs or GraphOptions())
        self.records_steps = device == "cpu" and can_record(self.module.graph)
        self.recorded: dict[Any, RecordedStep] = {}
        self.counts: Counter[Any] = Counter()
        self.arena = Arena()

    def use_graphs(self, gpu: GraphDevice, options: GraphOptions) -> None:
        """From now on steps run as they do on a GPU."""
        names, pieces = list(self.program.inputs), options.pieces
        if pieces is not None:
            pieces = PiecewiseRunner(self.module, pieces, names, self._caches, gpu, options.max_num_tokens, self._plan)
        self.graphs = CudaGraphRunner(self._compute, names, gpu, options, self._plan, pieces)

    @property
    def stored_bytes(self) -> int:
        """Of the tensors that the weights are made of."""
        leaves = {leaf for recipe in self.program.weights.recipes.values() for leaf in recipe.leaves()}
        return sum(self.source.fetch(leaf).nbytes for leaf in leaves)

    def allocate(self, num_units: Mapping[str, int], page_size: int) -> None:
        """The caches. Their memory becomes resident as pages are first written."""
        with self.graphs.use() if self.graphs is not None else nullcontext():
            self.caches = [
                self._empty(spec.shape(num_units[spec.pool], page_size), getattr(torch, spec.dtype))
                for spec in self.program.caches.values()
            ]
        self.recorded.clear()
        if self.graphs is not None:
            self.graphs.clear()

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self.device == "cpu":
            return huge_pages.empty(shape, dtype, grows=True)
        return torch.empty(shape, dtype=dtype, device=self.device)

    @torch.inference_mode()
    def forward(self, batch: BatchMetadata, rows: list[WantedRows]) -> Tensor:
        if self.graphs is not None:
            return self.graphs.forward(batch)
        self._plan(batch)
        inputs = [batch[name] for name in self.program.inputs]
        if self.records_steps and (num_tokens := batch["input_ids"].shape[1]) <= MAX_RECORDED_TOKENS:
            recorded_at = RECORDED_AT if num_tokens == len(batch["seq_lens"]) else PROMPTS_RECORDED_AT
            if self._count(inputs) >= recorded_at:
                return self._run_recorded(inputs)
        return self._compute([torch.from_numpy(array) for array in inputs])

    def _plan(self, batch: BatchMetadata) -> None:
        for plan in self.plans:
            plan(batch)

    def _caches(self) -> dict[str, Tensor]:
        return dict(zip(self.program.caches, self.caches, strict=True))

    def _compute(self, inputs: Sequence[Tensor]) -> Tensor:
        """The program's inputs, on its device -> logits [N, V]."""
        return self.module(*inputs, *self.caches)[0]

    def _count(self, inputs: list[np.ndarray]) -> int:
        """How many steps of these shapes there have been, this one included."""
        shapes = _shapes(inputs)
        if len(self.counts) == MAX_COUNTED_SHAPES:
            self.counts.clear()
        self.counts[shapes] += 1
        return self.counts[shapes]

    def _run_recorded(self, inputs: list[np.ndarray]) -> Tensor:
        """A step, recorded when the first of its shapes comes here; the one that has not come for longest makes room."""
        shapes = _shapes(inputs)
        if (step := self.recorded.pop(shapes, None)) is not None:
            self.recorded[shapes] = step
            return step.run(inputs)[0]
        if len(self.recorded) == MAX_RECORDED_STEPS:
            del self.recorded[next(iter(self.recorded))]
        self.recorded[shapes] = step = record(self.module, inputs, self.caches, self.arena)
        return step.output[0]

    def forget(self, request: Request) -> None:
        """Nothing is kept per request: its pages are the KV manager's."""


def plans_of(program: Program) -> list[Callable[[BatchMetadata], None]]:
    """The host work before each step: of attention backends, and of providers that it calls."""
    plans = [backend_named(choice.provider).plan for choice in program.providers.get("attention", ())]
    providers = [PROVIDED[node.target][1] for node in program.graph.graph.nodes if node.target in PROVIDED]
    return [*dict.fromkeys([*plans, *(provider.plan for provider in providers if provider.plan is not None)])]


def _shapes(inputs: list[np.ndarray]) -> tuple[tuple[int, ...], ...]:
    return tuple(array.shape for array in inputs)


def _kind(made: Made) -> tuple[Sequence[int], torch.dtype | None]:
    """Shape and dtype of what was made of a recipe; None: it has still to be made dense."""
    if isinstance(made, Integers):
        return made.numbers.shape, None
    if isinstance(made, Tensor):
        return made.shape, made.dtype
    return torch.Size([sum(map(len, made)), *made[0].shape[1:]]), made[0].dtype


def _executable(program: Program, tensors: dict[str, Tensor], device: str) -> fx.GraphModule:
    """The program's graph over real tensors, on their device; the program keeps its own (traced on the CPU)."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph.graph, {}))
    for node in graph.nodes:
        for index in [index for index, value in enumerate(node.args) if isinstance(value, torch.device)]:
            node.update_arg(index, torch.device(device))
        for name in [name for name, value in node.kwargs.items() if isinstance(value, torch.device)]:
            node.update_kwarg(name, torch.device(device))
    read_packed(graph)
    return fx.GraphModule(dict[str, Any](tensors), graph)


class EagerRunner:
    """`backend="pytorch"`: the Hugging Face model itself, one request after the other, each with Hugging Face's own cache."""

    can_chunk = False  # rope may depend on the length of what is computed at once
    reads_entries = True

    def __init__(self, model: Any, rope_thresholds: tuple[int, ...]) -> None:
        self.model, self.rope_thresholds = model, rope_thresholds
        self._caches: dict[int, Any] = {}

    def allocate(self, num_units: Mapping[str, int], page_size: int) -> None:
        """Nothing to make: the caches grow with the requests, and the pages are only counted."""

    @torch.inference_mode()
    def forward(self, batch: BatchMetadata, rows: list[WantedRows]) -> Tensor:
        """The wanted logits; a request that starts at its first token starts with a new cache."""
        logits = []
        for row in rows:
            entry = row.entry
            request = entry.request
            past = self._caches.pop(request.request_id, None) if entry.start else None
            ids = torch.tensor([request.token_ids(entry.start, entry.stop)], device=self.model.device)
            positions = torch.arange(entry.start, entry.stop, device=self.model.device)[None]
            output = self.model(input_ids=ids, position_ids=positions, past_key_values=past, use_cache=True)
            self._caches[request.request_id] = output.past_key_values
            logits.append(output.logits[0, -(row.stop - row.start) :])
        return torch.cat(logits)

    def forget(self, request: Request) -> None:
        self._caches.pop(request.request_id, None)
