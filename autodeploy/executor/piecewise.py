"""Steps with prompts on a GPU, in pieces: what does the same for each token is replayed, what depends on lengths runs in between.

T is padded to the next size of a ladder. Padding writes to the scratch page, and only replayed pieces see it: what runs between
them is given the step's own tokens. Values that go from one piece to another lie in places that all sizes share.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx

from autodeploy.executor.graph_device import GraphDevice, Replay, StepInputs, failure_text, padding_of
from autodeploy.specs import BatchMetadata, Piece, Pieces, TokenValue, input_spec

FINEST = 16
"""Tokens between sizes of the ladder; from 256 tokens on it is an eighth of the power of two below."""


@dataclass
class CapturedPieces:
    """Of one size: the inputs that have a row per token, and what replays each captured piece, by its number."""

    inputs: StepInputs
    replays: dict[int, Replay]


class PiecewiseRunner:
    """Runs the pieces of a program. module: all of it, with its weights. names: of its inputs. caches: by name, as they are now.

    plan: host work before each step, from its arrays.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        pieces: Pieces,
        names: Sequence[str],
        caches: Callable[[], Mapping[str, Tensor]],
        gpu: GraphDevice,
        max_num_tokens: int,
        plan: Callable[[BatchMetadata], None] = lambda batch: None,
    ) -> None:
        self.pieces, self.values, self.sizes = pieces.pieces, pieces.values, token_ladder(max_num_tokens)
        self.failure = ""
        """Why nothing is captured any more."""
        self._modules = [_module_of(module, piece) for piece in self.pieces]
        (self._output,) = (node.name for node in module.graph.output_node().all_input_nodes)
        self._per_token = [name for name in names if "T" in input_spec(name).shape]
        self._others = [name for name in names if name not in self._per_token]
        self._caches, self._gpu, self._plan = caches, gpu, plan
        self.clear()

    def clear(self) -> None:
        """Drop all graphs, whose caches are no more."""
        self.captured: dict[int, CapturedPieces] = {}
        self.num_replays, self.capture_seconds = 0, 0.0
        self._known: set[int] = set()
        self._places: dict[int, Tensor] = {}

    def forward(self, batch: BatchMetadata) -> Tensor | None:
        """The wanted logits [N, V] of a step; None where there are no graphs for it. Captured when its size comes again."""
        count = batch["input_ids"].shape[1]
        if not self.sizes or count > self.sizes[-1]:
            return None
        size = self.sizes[bisect_left(self.sizes, count)]
        if size in self._known:
            self.capture(size)
        self._known.add(size)
        return self._run(self.captured[size], batch, count, size) if size in self.captured else None

    def capture(self, size: int) -> None:
        """Have the graphs of that many tokens, unless a capture has failed."""
        if size in self.captured or self.failure:
            return
        started = time.perf_counter()
        try:
            self.captured[size] = self._capture(size)
        except Exception as error:
            self.failure = f"the capture for {size} tokens failed: {failure_text(error)}"
        self.capture_seconds += time.perf_counter() - started

    def summary(self) -> str:
        """One line for the report."""
        if not self.sizes:
            return "CUDA graphs of pieces: off"
        num_pieces = sum(piece.is_captured for piece in self.pieces)
        shapes = f"{len(self.captured)} sizes captured in {self.capture_seconds:.1f} s, {self.num_replays} steps replayed"
        text = f"CUDA graphs of pieces: steps with prompts of up to {self.sizes[-1]} tokens, {num_pieces} pieces, {shapes}"
        return f"{text}; no more are captured: {self.failure}" if self.failure else text

    def _capture(self, size: int) -> CapturedPieces:
        """On padding and zeros, and without what lies between: that would move the recurrent states."""
        inputs = StepInputs({name: _padded_shape(name, size) for name in self._per_token}, self._gpu)
        for name, array in inputs.arrays.items():
            array.fill(padding_of(name))
        known = {**self._caches(), **dict(zip(self._per_token, inputs.upload(), strict=True))}
        for place in self._places.values():
            place.zero_()
        for name in self.values:
            known[name] = self._tokens_of(name, size)
        replays = {}
        for i, (piece, module) in enumerate(zip(self.pieces, self._modules, strict=True)):
            if piece.is_captured:
                read, given = [known[name] for name in piece.reads], [known[name] for name in piece.gives]

                def step(module: fx.GraphModule = module, read: list[Tensor] = read, given: list[Tensor] = given) -> None:
                    for place, value in zip(given, module(*read), strict=True):
                        place.copy_(value)

                replays[i] = self._gpu.capture(step)
        return CapturedPieces(inputs, replays)

    def _run(self, captured: CapturedPieces, batch: BatchMetadata, count: int, size: int) -> Tensor:
        for name, array in captured.inputs.writable().items():
            array[..., :count] = batch[name]
            array[..., count:] = padding_of(name)
        others = StepInputs({name: batch[name].shape for name in self._others}, self._gpu)
        for name, array in others.arrays.items():
            array[...] = batch[name]
        self._plan(batch)
        known = {**self._caches(), **dict(zip(self._others, others.upload(), strict=True))}
        for name, tensor in zip(self._per_token, captured.inputs.upload(), strict=True):
            known[name] = tensor[..., :count]
        for i, piece in enumerate(self.pieces):
            if piece.is_captured:
                captured.replays[i]()
                known |= {name: self._tokens_of(name, count) for name in piece.gives}
            else:
                results = self._modules[i](*[known[name] for name in piece.reads])
                known |= dict(zip(piece.gives, results, strict=True))
                self._hand_on([name for name in piece.gives if name in self.values], known, count, size)
        self.num_replays += 1
        return known[self._output][0]

    def _hand_on(self, names: Sequence[str], known: Mapping[str, Tensor], count: int, size: int) -> None:
        """Put results where captured pieces read them. Padding gets zeros: what is left there of other values may be anything."""
        for name in names:
            self._tokens_of(name, count).copy_(known[name])
            if count < size:
                value, place = self.values[name], self._tokens_of(name, size)
                rows = value.shape[value.dim]
                place.narrow(value.dim, count * rows, (size - count) * rows).zero_()

    def _tokens_of(self, name: str, count: int) -> Tensor:
        """Where the value of the first tokens lies: rows of one token side by side, the tokens one after the other."""
        value = self.values[name]
        if value.place not in self._places:
            self._places[value.place] = self._new_place(value)
        rows, rest = value.shape[value.dim], (*value.shape[: value.dim], *value.shape[value.dim + 1 :])
        flat = self._places[value.place][: count * prod(value.shape)]
        return flat.view(count * rows, *rest).movedim(0, value.dim)

    def _new_place(self, value: TokenValue) -> Tensor:
        dtype: torch.dtype = getattr(torch, value.dtype)
        return self._gpu.device_bytes(self.sizes[-1] * prod(value.shape) * dtype.itemsize).view(dtype).zero_()


def token_ladder(max_num_tokens: int) -> tuple[int, ...]:
    """Sizes that steps with prompts are padded to, and the largest itself; none for 0."""
    sizes, size = list[int](), FINEST
    while size < max_num_tokens:
        sizes.append(size)
        size += max(FINEST, (1 << size.bit_length() - 1) // 8)
    return (*sizes, max_num_tokens) if max_num_tokens else ()


def _padded_shape(name: str, size: int) -> tuple[int, ...]:
    return tuple(size if isinstance(dim, str) else dim for dim in input_spec(name).shape)


def _module_of(whole: fx.GraphModule, piece: Piece) -> fx.GraphModule:
    """The calls of a piece: what it reads -> a tuple of what it gives. The weights are those of the whole."""
    graph, new, calls, found = fx.Graph(), dict[fx.Node, fx.Node](), {*piece.calls}, dict[str, fx.Node]()
    nodes = {node.name: node for node in whole.graph.nodes}
    for name in piece.reads:
        new[nodes[name]] = graph.placeholder(name)
    for node in whole.graph.nodes:
        if node.op == "get_attr" and any(user.name in calls for user in node.users):
            new[node] = graph.node_copy(node)
        elif node.name in calls:
            new[node] = found[node.name] = graph.node_copy(node, new.__getitem__)
    graph.output(tuple(found[name] for name in piece.gives))
    return fx.GraphModule(whole, graph)
