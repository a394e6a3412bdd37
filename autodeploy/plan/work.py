"""What one forward pass of one rank reads, multiplies and sends, counted in its lowered program."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from torch import fx

from autodeploy.custom_ops import COLLECTIVES
from autodeploy.custom_ops.op import call_arguments
from autodeploy.plan.calls import dtype_of, is_view, mutates, op_name, op_of, provider_name
from autodeploy.plan.products import FLOP, Sizes
from autodeploy.plan.weights import stored_bytes
from autodeploy.program import Program, symbols
from autodeploy.specs import PagedKV, RecurrentState

LOOKUPS = {"embedding", "sharded_embedding", "aten.index_select.default", "aten.index.Tensor", "aten.gather.default"}
"""Calls that read as much of a table as they give."""
EXPERTS = {"moe": "down", "expert_linear": "weight"}
"""Calls that read the experts that are chosen -> the argument that holds them all."""


@dataclass(frozen=True)
class Step:
    """One forward pass: as many requests, each with its next tokens."""

    requests: int
    tokens: int
    """Of each request."""
    context: int
    """Tokens of each request when it is done, those of earlier steps included."""

    def seen(self, window: int) -> tuple[int, float]:
        """(keys that a request reads, pairs of its queries and the keys each of them sees); window: 0 is none."""
        first = self.context - self.tokens + 1
        keys = min(self.context, window + self.tokens - 1) if window else self.context
        long = self.tokens if not window else min(max(window - first + 1, 0), self.tokens)  # of them see all before them
        return keys, long * (first + first + long - 1) / 2 + (self.tokens - long) * window


@dataclass
class Work:
    """Of one rank."""

    weight_bytes: float = 0.0
    """Read; of experts, those that are expected to be chosen."""
    cache_bytes: float = 0.0
    """Read, and of states written too."""
    flop: Counter[str] = field(default_factory=Counter)
    """Element type that is multiplied -> operations of products of matrices and of attention; all else is left out."""
    collectives: Counter[tuple[str, int]] = field(default_factory=Counter)
    """(op, bytes of what every rank has when it is done) -> how many."""


class Counting:
    """Counts the work of steps of a program. num_shares: over how many groups of ranks experts are dealt out (ep)."""

    def __init__(self, program: Program, num_shares: int = 1) -> None:
        self.program, self.num_shares, self.stored = program, num_shares, stored_bytes(program)
        self._symbols = {name: size.node.expr for name, size in symbols(program).items()}

    def work(self, step: Step) -> Work:
        work, sizes = Work(), self.sizes(step.requests * step.tokens, step.requests)
        shares: dict[str, float] = {}
        for node in self._calls:
            self._count(node, step, sizes, work)
            for name, share in self._reads(node, sizes):
                shares[name] = min(1.0, max(shares.get(name, 0.0), share))
        work.weight_bytes = sum(self.stored[name] * share for name, share in shares.items())
        return work

    def sizes(self, tokens: int, requests: int) -> Sizes:
        """Of values in a step of that many tokens, with the logits of the last one of each request."""
        numbers = {"T": tokens, "B": requests, "N": requests, "B+1": requests + 1}
        return Sizes({symbol: numbers.get(name, 1) for name, symbol in self._symbols.items()})

    @cached_property
    def _calls(self) -> list[fx.Node]:
        return [node for node in self.program.graph.graph.nodes if node.op == "call_function"]

    def _count(self, node: fx.Node, step: Step, sizes: Sizes, work: Work) -> None:
        """Products, caches and collectives of one call."""
        for spec in self._caches(node):
            if isinstance(spec, RecurrentState):
                work.cache_bytes += 2 * step.requests * spec.bytes_per_unit(1)
            elif not mutates(node):
                self._count_attention(node, spec, step, work)
        if op_of(node) in COLLECTIVES:
            work.collectives[_sent(node, sizes)] += 1
        elif (count := FLOP.get(op_of(node))) is not None:
            dtype = "int8" if provider_name(node).endswith("a8") else dtype_of(node)
            work.flop[dtype] += round(count(node, sizes) / self._dealt(node))

    def _count_attention(self, node: fx.Node, spec: PagedKV, step: Step, work: Work) -> None:
        given = call_arguments(node.target, node.args, node.kwargs)
        windows = [size for size in (given.get("window"), given.get("chunk")) if size]
        keys, pairs = step.seen(min(windows, default=0))
        heads = given["q"].meta["val"].shape[1]
        work.cache_bytes += step.requests * keys * spec.bytes_per_unit(1)
        work.flop[dtype_of(node)] += round(2 * step.requests * pairs * heads * (spec.head_dim_k + spec.head_dim_v))

    def _reads(self, node: fx.Node, sizes: Sizes) -> list[tuple[str, float]]:
        """(parameter, how much of it the call reads), from 0 to 1."""
        names = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
        if op_name(node) in LOOKUPS:
            return [(name, sizes.num_bytes(node) / max(1, self.program.parameter(name).nbytes)) for name in names]
        share = self._chosen(node, sizes) if op_name(node) in EXPERTS else 1.0
        return [(name, share) for name in names]

    def _chosen(self, node: fx.Node, sizes: Sizes) -> float:
        """The share of the experts that is expected to be chosen by some token, were all of them as likely."""
        given = call_arguments(node.target, node.args, node.kwargs)
        tokens, *per_token = sizes.shape(given["expert_index"])
        num_experts = sizes.shape(given[EXPERTS[op_name(node)]])[0] * self._dealt(node)
        return 1 - (1 - min(1.0, prod(per_token) / num_experts)) ** tokens

    def _dealt(self, node: fx.Node) -> int:
        """Over how many groups of ranks the experts of a call are dealt out; 1 for other calls, and where every rank has all."""
        index = call_arguments(node.target, node.args, node.kwargs).get("expert_index") if op_name(node) in EXPERTS else None
        while isinstance(index, fx.Node) and index.op == "call_function":
            if op_name(index) == "local_index":
                return self.num_shares
            index = index.args[0] if is_view(index) else None
        return 1

    def _caches(self, node: fx.Node) -> list[Any]:
        return [self.program.caches[source.name] for source in node.all_input_nodes if source.name in self.program.caches]


def _sent(node: fx.Node, sizes: Sizes) -> tuple[str, int]:
    """(all_reduce or all_gather, bytes of what every rank has when it is done) of a collective."""
    if op_name(node) == "sharded_rms_norm":  # the sum of squares of each row, in float32
        return "all_reduce", 4 * prod(sizes.shape(node)[:-1])
    return op_name(node), sizes.num_bytes(node)
