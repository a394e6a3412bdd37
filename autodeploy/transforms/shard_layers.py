"""Sharding rules of the calls that layers are shared by: heads, channels, rows of tables and experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from autodeploy import custom_ops as ops
from autodeploy.recipes import Ranges
from autodeploy.transforms.layouts import TERM, WHOLE, Demand, Layout, Site, Unshardable
from autodeploy.transforms.ranges import (
    Unaligned,
    even,
    followed_by,
    is_partition,
    local_size,
    once,
    padded,
    ranges_of,
    scaled,
    shifted,
)
from autodeploy.transforms.shard_moves import Dims, Rule


class Headed(Rule):
    """Attention and recurrent ops: heads (or channels) by themselves. Some arguments have one head for several of the others."""

    def __init__(self, out: int, **dims: int) -> None:
        self.out, self.head_dims = out, dims

    def arguments(self, site: Site) -> Iterator[tuple[fx.Node, int, int]]:
        """(argument, its dim of heads, how many of the result's heads each of them serves)."""
        num_heads = site.out.shape[self.out]
        for name, dim in self.head_dims.items():
            node = site.args.get(name)
            if isinstance(node, fx.Node):
                yield node, dim, num_heads // site.shape(node)[dim]

    def forward(self, site: Site) -> Layout:
        known = list(self.arguments(site))
        heads = next((site.layout(node).dims.get(dim) for node, dim, each in known if each == 1), None)
        expected = {node: dim for node, dim, _ in known}
        for node in site.tensors:
            if set(site.layout(node).dims) - {expected.get(node)} or site.layout(node).is_term:
                site.whole(node)
        for node, dim, each in known:
            held = site.layout(node).dims.get(dim)
            if heads is not None and held is None and each > 1:
                held = (((0, site.shape(node)[dim]),),) * site.num_ranks
            if (held is None) != (heads is None) or (heads is not None and held is not None and not _serve(heads, held, each)):
                raise Unshardable(f"ranks have other heads of {node.name} than of the rest", node)
        return WHOLE if heads is None else Layout({self.out: heads})

    def backward(self, site: Site, out: Dims) -> Iterator[Demand]:
        if set(out) != {self.out}:
            raise Unshardable("ranks can share its heads only", site.first)
        group = max(each for _, _, each in self.arguments(site))
        heads, groups = self.parts(site, group)
        if out[self.out] != heads:
            raise Unaligned("ranks would have parts of heads")
        for node, dim, each in self.arguments(site):
            yield Demand.all_of(node, dim, groups if each > 1 else heads)

    def parts(self, site: Site, group: int) -> tuple[Ranges, Ranges]:
        """Heads of each rank, and what serves them where `group` heads share one."""
        return shared_heads(site.out.shape[self.out], group, site.num_ranks)

    def seed(self, site: Site) -> Layout:
        """How ranks share the result."""
        group = max([1, *(each for _, _, each in self.arguments(site))])
        return Layout({self.out: self.parts(site, group)[0]})


class Channels(Headed):
    """Convolutions: each channel by itself, however channels are shared."""

    def backward(self, site: Site, out: Dims) -> Iterator[Demand]:
        if set(out) != {self.out}:
            raise Unshardable("ranks can share its channels only", site.first)
        for node, dim, _ in self.arguments(site):
            yield Demand.all_of(node, dim, out[self.out])


def shared_heads(num_heads: int, group: int, num_ranks: int) -> tuple[Ranges, Ranges]:
    """Query heads and key/value heads of each rank, where `group` of the former share one of the latter.

    With fewer key/value heads than ranks, several ranks have the same one and share out its query heads.
    """
    num_groups = num_heads // group
    if num_groups >= num_ranks or num_ranks % num_groups:
        groups = even(num_groups, num_ranks)
        return scaled(groups, group), groups
    ranks = num_ranks // num_groups
    most = -(-group // ranks)
    heads, groups = list[list[tuple[int, int]]](), list[list[tuple[int, int]]]()
    for rank in range(num_ranks):
        owner, part = divmod(rank, ranks)
        first = owner * group
        heads.append(padded([(first + min(part * most, group), first + min((part + 1) * most, group))], most))
        groups.append([(owner, owner + 1)])
    return ranges_of(heads), ranges_of(groups)


def _serve(heads: Ranges, groups: Ranges, each: int) -> bool:
    """Whether on every rank the i-th head finds its own key/value head where kernels look for it."""
    if each == 1:
        return heads == groups
    many, few = local_size(heads), local_size(groups)
    if many % few:
        return False
    for own, theirs in zip(heads, groups, strict=True):
        held = [i if start >= 0 else -1 for start, stop in own for i in range(start, stop)]
        serving = [i for start, stop in theirs for i in range(start, stop)]
        if any(head >= 0 and head // each != serving[at // (many // few)] for at, head in enumerate(held)):
            return False
    return True


class Embedding(Rule):
    """A table's rows: ranks that have some of them give terms, zeros for the others'."""

    def forward(self, site: Site) -> Layout:
        weight, indices = site.args["weight"], site.args["indices"]
        dims = site.layout(weight).dims
        site.whole(indices)
        if 0 not in dims:
            return Layout({site.out.dim() - 1: dims[1]} if 1 in dims else {})
        if not is_partition(dims[0], site.shape(weight)[0]) or any(len(_kept(own)) > 1 for own in dims[0]):
            raise Unshardable("ranks do not have consecutive rows, each one once", weight)
        return TERM

    def backward(self, site: Site, out: Dims) -> Iterator[Demand]:
        for dim, ranges in out.items():
            if dim != site.out.dim() - 1:
                raise Unshardable("ranks share what it looks up")
            yield Demand.all_of(site.args["weight"], 1, ranges)

    def target(self, site: Site) -> Any:
        return ops.sharded_embedding.overload if 0 in site.layout(site.args["weight"]).dims else site.target


def _kept(own: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    return [pair for pair in own if pair[0] >= 0]


class Experts(Rule):
    """moe: ranks have some of the experts, some of their columns, or both, and give terms."""

    def forward(self, site: Site) -> Layout:
        args = site.args
        site.whole(args["x"], args["expert_weights"])
        inner = 1 if args["transposed"] else 2
        down = site.layout(args["down"]).dims
        experts, columns = down.get(0), down.get(inner)
        num_experts, width = site.shape(args["down"])[0], site.shape(args["down"])[inner]
        wanted = self.layouts(site, experts, columns)
        for name, layout in wanted.items():
            if isinstance(node := args[name], fx.Node) and name != "down_bias" and site.layout(node) != layout:
                raise Unshardable(f"ranks have {site.layout(node)} of its {name}; {layout} would go with the rest", node)
        if experts is None and columns is None:
            site.whole(args["down_bias"])
            return WHOLE
        if not _covers(experts, columns, num_experts, width, site.num_ranks):
            raise Unshardable("ranks do not have each column of each expert once", args["down"])
        if (bias := args["down_bias"]) is not None and not _adds_once(site, bias, experts):
            raise Unshardable("the bias of each expert must be added by one rank", bias)
        return TERM

    def layouts(self, site: Site, experts: Ranges | None, columns: Ranges | None) -> dict[str, Layout]:
        """What ranks have of the arguments, if they have these experts and these columns of each (None: all of them)."""
        args = site.args
        outer = {} if experts is None else {0: experts}
        inner = 1 if args["transposed"] else 2
        width = site.shape(args["down"])[inner]
        both = None if columns is None else _of_gate_and_up(columns, args["layout"], width)
        first = 2 if args["transposed"] else 1
        found = {
            "gate_up": Layout(outer | ({} if both is None else {first: both})),
            "down": Layout(outer | ({} if columns is None else {inner: columns})),
            "gate_up_bias": Layout(outer | ({} if both is None else {1: both})),
            "expert_index": Layout(counted=experts),
        }
        if args["down_bias"] is not None:
            size = site.shape(args["down_bias"])[1]
            holders = [rank for rank in range(site.num_ranks) if columns is None or columns[rank][0][0] == 0]
            found["down_bias"] = Layout(outer | ({} if columns is None else {1: once(size, site.num_ranks, tuple(holders))}))
        return found

    def parts(self, site: Site, num_groups: int, unit: int) -> tuple[Ranges | None, Ranges | None]:
        """Experts dealt out to groups of ranks, and columns to the ranks of each."""
        num_experts, inner = site.shape(site.args["down"])[0], 1 if site.args["transposed"] else 2
        members = site.num_ranks // num_groups
        experts = tuple(own for own in even(num_experts, num_groups) for _ in range(members))
        columns = even(site.shape(site.args["down"])[inner], members, unit) * num_groups
        return experts if num_groups > 1 else None, columns if members > 1 else None


def _of_gate_and_up(columns: Ranges, layout: str, width: int) -> Ranges:
    """Rows of the matrix that makes gate and up, for these columns of what they give."""
    match layout:
        case "halves":
            return followed_by(columns, shifted(columns, width))
        case "pairs":
            return scaled(columns, 2)
        case _:
            return columns


def _covers(experts: Ranges | None, columns: Ranges | None, num_experts: int, width: int, num_ranks: int) -> bool:
    """Whether each column of each expert belongs to exactly one rank."""
    mine = experts or ((((0, num_experts),),) * num_ranks)
    theirs = columns or ((((0, width),),) * num_ranks)
    groups = dict[Any, list[Any]]()
    for own, held in zip(mine, theirs, strict=True):
        groups.setdefault(own, []).append(held)
    return is_partition(tuple(groups), num_experts) and all(is_partition(tuple(group), width) for group in groups.values())


def _adds_once(site: Site, bias: fx.Node, experts: Ranges | None) -> bool:
    dims, (num_experts, width) = site.layout(bias).dims, site.shape(bias)
    adding = dims.get(1, (((0, width),),) * site.num_ranks)
    if dims.get(0) != experts or not all(own in (((0, width),), ((-width, 0),)) for own in adding):
        return False
    mine = experts or ((((0, num_experts),),) * site.num_ranks)
    return is_partition(tuple(own for own, part in zip(mine, adding, strict=True) if part[0][0] == 0), num_experts)
