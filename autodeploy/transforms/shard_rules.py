"""Sharding rules of calls that compute: which part of the result ranks have, given their parts of what is read; and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from autodeploy import custom_ops as ops
from autodeploy.recipes import Ranges
from autodeploy.transforms.layouts import TERM, WHOLE, Demand, Layout, Site, Unshardable
from autodeploy.transforms.ranges import is_once, is_partition
from autodeploy.transforms.rewrite import aten, named_op
from autodeploy.transforms.shard_layers import Channels, Embedding, Experts, Headed
from autodeploy.transforms.shard_moves import MOVES, Dims, Rule, positive


class Pointwise(Rule):
    """Each number of the result by itself; smaller tensors are repeated."""

    def forward(self, site: Site) -> Layout:
        rank, dims = site.out.dim(), dict[int, Ranges]()
        for node in site.tensors:
            offset = rank - len(site.shape(node))
            for dim, ranges in site.layout(node).dims.items():
                if dims.setdefault(dim + offset, ranges) != ranges:
                    raise Unshardable("what it reads is not shared in the same way", node)
        for node in site.tensors:
            self._check(site, node, dims)
        terms = [node for node in site.tensors if site.layout(node).is_term]
        if terms and not self._is_linear(site, terms):
            raise Unshardable("it is no sum of what it makes of the terms", terms[0])
        return Layout(dims, bool(terms))

    def _check(self, site: Site, node: fx.Node, dims: Dims) -> None:
        shape, layout = site.shape(node), site.layout(node)
        if layout.counted is not None:
            site.whole(node)
        for dim in dims:
            at = dim - (site.out.dim() - len(shape))
            if at >= 0 and shape[at] != 1 and at not in layout.dims:
                raise Unshardable(f"ranks share dim {dim}, but have all of {node.name}", node)

    def _is_linear(self, site: Site, terms: list[fx.Node]) -> bool:
        """Whether the sum of the results is the result of the sum."""
        if site.target in SUMS:
            return len(terms) == len(site.tensors) == 2
        if site.target in PRODUCTS:
            return len(terms) == 1 and site.first is terms[0] if site.target in QUOTIENTS else len(terms) == 1
        return site.target in COPIES

    def backward(self, site: Site, out: Dims) -> Iterator[Demand]:
        for node in site.tensors:
            shape = site.shape(node)
            offset = site.out.dim() - len(shape)
            for dim, ranges in out.items():
                if dim >= offset and shape[dim - offset] != 1:
                    yield Demand.all_of(node, dim - offset, ranges)


class Rotated(Pointwise):
    """rope: pointwise but along the last dim."""

    def forward(self, site: Site) -> Layout:
        found = super().forward(site)
        if site.out.dim() - 1 in found.dims:
            raise Unshardable("it turns numbers of a dim that ranks share", site.first)
        return found


class AlongDims(Rule):
    """softmax, sums, norms, ...: what lies along some dims is worked on together, the rest by itself."""

    def dims(self, site: Site) -> set[int]:
        dim, rank = site.args.get("dim"), len(site.shape(site.first))
        listed = range(rank) if dim is None or dim == [] else dim if isinstance(dim, list | tuple) else [dim]
        return {positive(each, rank) for each in listed}

    def _kept(self, site: Site) -> list[int]:
        """Which dim of the tensor each dim of the result is."""
        rank, dims = len(site.shape(site.first)), self.dims(site)
        value = site.out[0] if isinstance(site.out, list | tuple) else site.out
        return list(range(rank)) if value.dim() == rank else [dim for dim in range(rank) if dim not in dims]

    def forward(self, site: Site) -> Any:
        layout, dims = site.layout(site.first), self.dims(site)
        site.whole(*(node for node in site.tensors if node is not site.first))
        if layout.is_term or layout.counted is not None or dims & set(layout.dims):
            raise Unshardable(f"it needs all of dims {sorted(dims)}, and ranks have {layout}", site.first)
        found = Layout({at: layout.dims[dim] for at, dim in enumerate(self._kept(site)) if dim in layout.dims})
        return [found] * len(site.out) if isinstance(site.out, list | tuple) else found

    def backward(self, site: Site, out: Dims) -> Iterator[Demand]:
        kept, dims = self._kept(site), self.dims(site)
        for at, ranges in out.items():
            if kept[at] in dims:
                raise Unshardable(f"it needs all of dim {kept[at]}", site.first)
            yield Demand.all_of(site.first, kept[at], ranges)


class Sum(AlongDims):
    """sum: along dims that ranks share, each has a term."""

    def forward(self, site: Site) -> Any:
        layout, dims = site.layout(site.first), self.dims(site)
        shape, shared = site.shape(site.first), self.dims(site) & set(layout.dims)
        if not layout.is_term and not (shared and all(is_partition(layout.dims[dim], shape[dim]) for dim in shared)):
            return super().forward(site)
        kept = {at: layout.dims[dim] for at, dim in enumerate(self._kept(site)) if dim in layout.dims and dim not in dims}
        return Layout(kept, is_term=True)


class RMSNorm(Rule):
    """Along the last dim; where ranks share that, they add up their squares."""

    def forward(self, site: Site) -> Layout:
        x, weight, last = site.args["x"], site.args["weight"], site.out.dim() - 1
        layout = site.layout(x)
        if layout.is_term or layout.counted is not None:
            site.whole(x)
        held = layout.dims.get(last)
        if weight is not None and site.layout(weight).dims != ({} if held is None else {0: held}):
            raise Unshardable("ranks do not have the same parts of the weight", weight)
        if held is not None and not is_partition(held, site.out.shape[last]):
            raise Unshardable("ranks have some of the numbers twice", x)
        return layout

    def backward(self, site: Site, out: Dims) -> Iterator[Demand]:
        last, weight = site.out.dim() - 1, site.args["weight"]
        for dim, ranges in out.items():
            yield Demand.all_of(site.args["x"], dim, ranges)
            if dim == last and weight is not None:
                yield Demand.all_of(weight, 0, ranges)

    def target(self, site: Site) -> Any:
        is_shared = site.out.dim() - 1 in site.layout(site.args["x"]).dims
        return ops.sharded_rms_norm.overload if is_shared else site.target

    def local(self, site: Site, out: Layout) -> dict[str, Any]:
        last = site.out.dim() - 1
        return {"width": site.out.shape[last]} if last in out.dims else {}


class LayerNorm(AlongDims):
    """Along the last dim, with weight and bias that may differ by the others."""

    def dims(self, site: Site) -> set[int]:
        listed = site.args.get("normalized_shape", [0])
        return set(range(site.out.dim() - len(listed), site.out.dim()))

    def forward(self, site: Site) -> Layout:
        x = site.first
        layouts = {x: site.layout(x)}
        found = AlongDims.forward(self, Site(site.target, {"x": x}, site.out, layouts, site.value, site.num_ranks))
        for node in site.tensors[1:]:
            Pointwise()._check(site, node, found.dims)
        return found

    def backward(self, site: Site, out: Dims) -> Iterator[Demand]:
        yield from super().backward(site, out)
        for demand in Pointwise().backward(site, out):
            if demand.node is not site.first:
                yield demand


class Linear(Rule):
    """x [..., K], weight [N, K] (or [K, N]), bias [N]: N of the weight is dealt out with the result; of K, ranks have terms."""

    def __init__(self, x: str, weight: str, bias: str, *, transposed: bool = False) -> None:
        self.names = x, weight, bias
        self.outputs, self.inputs = (1, 0) if transposed else (0, 1)

    def parts(self, args: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """x, weight, bias of a call's arguments."""
        x, weight, bias = (args[name] for name in self.names)
        return x, weight, bias

    def forward(self, site: Site) -> Layout:
        x, weight, bias = self.parts(site.args)
        last, mine, rows = len(site.shape(x)) - 1, site.layout(x), site.layout(weight)
        of_bias = WHOLE if bias is None else site.layout(bias)
        if mine.is_term or mine.counted is not None or rows.is_term:
            site.whole(x, weight)
        columns, made = mine.dims.get(last), rows.dims.get(self.outputs)
        if columns != rows.dims.get(self.inputs):
            raise Unshardable("ranks have other columns of the weight than of what it is multiplied with", x)
        others = {dim: ranges for dim, ranges in mine.dims.items() if dim != last}
        if columns is None:
            if bias is not None and of_bias.dims != ({} if made is None else {0: made}):
                raise Unshardable("ranks have other rows of the bias than of the weight", bias)
            return Layout(others | ({} if made is None else {last: made}))
        if not is_partition(columns, site.shape(x)[last]) or made is not None or others:
            raise Unshardable("its sum would count some numbers twice", x)
        if bias is not None and not is_once(of_bias.dims.get(0), site.shape(bias)[0]):
            raise Unshardable("its bias must be added by one rank", bias)
        return TERM

    def backward(self, site: Site, out: Dims) -> Iterator[Demand]:
        x, weight, bias = self.parts(site.args)
        for dim, ranges in out.items():
            if dim != site.out.dim() - 1:
                yield Demand.all_of(x, dim, ranges)
                continue
            yield Demand.all_of(weight, self.outputs, ranges)
            if bias is not None:
                yield Demand.all_of(bias, 0, ranges)


class MatMul(Rule):
    """a [..., M, K] and b [..., K, N]; the dims before are those of matrices, repeated where one of the two has none."""

    def forward(self, site: Site) -> Layout:
        (a, mine), (b, theirs) = self._aligned(site)
        rank = site.out.dim()
        dims = {dim: ranges for dim, ranges in mine.items() if dim < rank - 1}
        dims |= {dim: ranges for dim, ranges in theirs.items() if dim < rank - 2 or dim == rank - 1}
        for node, held in ((a, mine), (b, theirs)):
            shape = (1,) * (rank - len(site.shape(node))) + site.shape(node)
            if any(held.get(dim) != dims.get(dim) for dim in range(rank - 2) if shape[dim] != 1):
                raise Unshardable("ranks have other matrices of the one than of the other", node)
        if mine.get(rank - 1) != theirs.get(rank - 2):
            raise Unshardable("ranks have other columns of the one than rows of the other", a)
        if (summed := mine.get(rank - 1)) is None:
            return Layout(dims)
        if not is_partition(summed, site.shape(a)[-1]):
            raise Unshardable("its sum would count some numbers twice", a)
        return Layout(dims, is_term=True)

    def _aligned(self, site: Site) -> list[tuple[Any, Mapping[int, Ranges]]]:
        """Both, each with what ranks have of it by the dims of the result."""
        both, rank = list(site.args.values())[:2], site.out.dim()
        if any(len(site.shape(node)) < 2 for node in both):
            site.whole(*both)
        for node in both:
            if site.layout(node).is_term or site.layout(node).counted is not None:
                site.whole(node)
        offsets = {node: rank - len(site.shape(node)) for node in both}
        return [(node, {dim + offsets[node]: ranges for dim, ranges in site.layout(node).dims.items()}) for node in both]

    def backward(self, site: Site, out: Dims) -> Iterator[Demand]:
        rank = site.out.dim()
        for (node, _), own in zip(self._aligned(site), (rank - 2, rank - 1), strict=True):
            offset = rank - len(site.shape(node))
            for dim, ranges in out.items():
                if dim == own or (offset <= dim < rank - 2 and site.shape(node)[dim - offset] != 1):
                    yield Demand.all_of(node, dim - offset, ranges)


SUMS = {aten.add.Tensor, aten.sub.Tensor}
QUOTIENTS = {aten.div.Tensor, aten.div.Scalar}
PRODUCTS = {aten.mul.Tensor, aten.mul.Scalar, *QUOTIENTS}
COPIES = {aten.clone.default, aten.contiguous.default, aten.alias.default, aten.neg.default, aten.detach.default}
_NAMES: dict[type[Rule], str] = {
    AlongDims: """
        softmax.int log_softmax.int mean mean.dim amax amin max.dim min.dim argmax argmin topk sort cumsum logsumexp
        var.correction norm.ScalarOpt_dim linalg_vector_norm any.dim all.dim""",
    Sum: "sum.dim_IntList",
    MatMul: "matmul bmm",
    Pointwise: """
        to.dtype to.device to.dtype_layout _to_copy type_as alias detach clone contiguous copy lift_fresh_copy
        multiply.Tensor divide.Tensor subtract.Tensor where.ScalarOther where.ScalarSelf where.Scalar
        zeros_like ones_like full_like masked_fill.Scalar masked_fill.Tensor""",
    LayerNorm: "layer_norm rms_norm",
}
RULES: dict[Any, Rule] = MOVES | {named_op(name): kind() for kind, names in _NAMES.items() for name in names.split()}
RULES |= {
    aten.linear.default: Linear("input", "weight", "bias"),
    aten.addmm.default: Linear("mat1", "mat2", "self", transposed=True),
    aten.embedding.default: Embedding(),
    ops.rms_norm.overload: RMSNorm(),
    ops.layer_norm.overload: LayerNorm(),
    ops.rope.overload: Rotated(),
    ops.gated_activation.overload: Pointwise(),
    ops.moe.overload: Experts(),
    ops.attention.overload: Headed(2, q=1, k=1, v=1, sinks=0, alibi=0),
    ops.ssd.whole.overload: Headed(2, x=2, dt=2, a=0, b=2, c=2),
    ops.gated_delta_rule.whole.overload: Headed(2, v=2, q=2, k=2, decay=2, beta=2),
    ops.selective_scan.whole.overload: Headed(2, x=2, dt=2, a=0),
    ops.linear_scan.whole.overload: Headed(2, x=2, decay=2),
    ops.causal_conv1d.whole.overload: Channels(2, x=2, weight=0, bias=0),
    ops.token_shift.whole.overload: Channels(2, x=2),
}
POINTWISE, UNKNOWN = Pointwise(), Rule()


def rule_of(target: Any) -> Rule:
    """The rule of a call; one for calls that nothing is known of, if there is none."""
    if (rule := RULES.get(target)) is not None:
        return rule
    is_pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    return POINTWISE if is_pointwise else UNKNOWN


def is_core(target: Any) -> bool:
    """Whether how ranks share a call's heads is decided there; convolutions follow what they are part of."""
    return type(RULES.get(target)) is Headed
