"""What a model of its own attention code does to its scores, found by running that part of the graph on numbers.

Between q @ k^T and softmax stand scales, masks and alibi, built by whatever means. Softmax does not see what is added to a whole
row of scores, so a model means the attention op when, for the score x of a query and a key that it sees,

    f(x) - f(0) = scale * x        and        f(0)[query, key] - f(0)[query, query] = slope * (key - query)

and f(0) of every other key lies far below. Both are checked for rows of several lengths.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from autodeploy.capture.masks import visible_in
from autodeploy.custom_ops.attention import Visible
from autodeploy.errors import UnsupportedModelError
from autodeploy.program import Program
from autodeploy.recipes import Initial
from autodeploy.transforms.interpret import widened
from autodeploy.transforms.prove_packing import Walk, source_of
from autodeploy.transforms.rewrite import aten, val

HIDDEN = -5000.0
"""A key this far below the query's own gets no weight: exp(-5000) is zero in every dtype."""
LENGTHS, MAX_SCORES, MAX_TABLE_SCORES = (1, 7, 40), 1 << 21, 1 << 25
"""Rows of tokens that are tried, beside one as long as this many scores allow; a table of a mask allows more."""
SHAPE_ONLY = {
    *(aten.sym_size.int, aten.ones_like.default, aten.zeros_like.default, aten.full_like.default, aten.new_ones.default),
    *(aten.new_zeros.default, aten.new_full.default, aten.new_empty.default),
}
"""Calls that read the shape of their first argument alone."""


@dataclass(frozen=True)
class ScoreRule:
    """All that the attention op needs to know of a model's scores. slopes: [H] of alibi, or None."""

    scale: float
    visible: Visible
    slopes: Tensor | None

    def bias(self, num_tokens: int) -> Tensor:
        """[H or 1, T, T]; what is hidden is -inf."""
        query, key = _positions(num_tokens)
        slopes = torch.zeros(1) if self.slopes is None else self.slopes
        bias = slopes[:, None, None] * (key - query)
        return bias.masked_fill(~self.visible.mask(query, key), -math.inf)


@dataclass
class Scores:
    """The calls from a product q @ k^T (None: a mask alone, read by an attention call) to what softmax reads."""

    program: Program
    initial: Mapping[str, Tensor]
    product: fx.Node | None
    result: fx.Node
    nodes: list[fx.Node] = field(init=False)
    """In graph order."""

    def __post_init__(self) -> None:
        found, waiting = set[fx.Node](), [self.result]
        while waiting:
            if (node := waiting.pop()) not in found:
                found.add(node)
                waiting += self._inputs(node)
        self.nodes = [node for node in self.program.graph.graph.nodes if node in found]

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        if node is self.product:
            return [node.args[0]] if node.target is aten.baddbmm.default else []  # pyright: ignore
        if node.op == "get_attr" and not isinstance(self.program.weights[str(node.target)], Initial):
            self.refuse(f"its attention scores depend on the weights '{node.target}'")
        if node.op == "placeholder" and node.name != "position_ids":
            self.refuse("its attention mask depends on the tokens")
        return [arg for arg in node.all_input_nodes if arg is not node.args[0] or node.target not in SHAPE_ONLY]

    def refuse(self, reason: str) -> NoReturn:
        raise UnsupportedModelError(reason, **source_of(self.result))

    def signature(self) -> tuple[Any, ...]:
        """Equal for layers that do the same to their scores."""
        number = {node: i for i, node in enumerate(self.nodes)}
        return tuple(self._entry(node, number) for node in self.nodes)

    def _entry(self, node: fx.Node, number: Mapping[fx.Node, int]) -> Any:
        if node.op == "get_attr":
            content = self.initial[str(node.target)].detach()
            as_bytes = content.flatten().contiguous().view(torch.uint8).numpy().tobytes()
            return str(content.dtype), tuple(content.shape), hashlib.sha256(as_bytes).digest()
        if node is self.product:
            kept = node.args[0] if node.target is aten.baddbmm.default else None
            return "product", str(val(node).shape), number.get(kept), repr(node.kwargs)  # pyright: ignore
        named = {arg: f"%{number[arg]}" if arg in number else str(val(arg).shape) for arg in node.all_input_nodes}
        return str(node.target), repr(fx.map_arg((node.args, node.kwargs), named.get))  # pyright: ignore

    def run(self, num_tokens: int, scores: Tensor | None, *, wide: bool) -> Tensor:
        """f(scores) as [H or 1, T, T]. wide: in float64, not in the model's dtypes."""
        known: dict[fx.Node, Any] = {}
        for node in self.nodes:
            known[node] = self._value(node, known, num_tokens, scores, wide)
        result = known[self.result]
        if result.dtype == torch.bool:
            result = torch.zeros(result.shape).masked_fill(~result, -math.inf)
        return result.reshape(-1, *result.shape[-2:]).expand(-1, num_tokens, num_tokens)

    def _value(self, node: fx.Node, known: Mapping[fx.Node, Any], num_tokens: int, scores: Tensor | None, wide: bool) -> Any:
        if node.op == "placeholder":
            return torch.arange(num_tokens)[None]
        if node.op == "get_attr":
            tensor = self.initial[str(node.target)].detach()
            return tensor.double() if wide and tensor.is_floating_point() else tensor
        call: Any = fx.map_arg((node.args, node.kwargs), lambda arg: known.get(arg))  # pyright: ignore
        args, kwargs = call
        if node is self.product:
            assert scores is not None
            scores = scores if wide else scores.to(val(node).dtype)
            added = kwargs.get("beta", 1) * args[0] if args[0] is not None else 0
            return added + kwargs.get("alpha", 1) * scores
        if node.target in SHAPE_ONLY:
            source: Any = val(node.args[0])
            args = (torch.empty(self._shape(source, num_tokens), dtype=source.dtype), *args[1:])
        if wide:
            args, kwargs = map_aggregate((args, kwargs), widened)  # pyright: ignore
        return node.target(*args, **kwargs)  # pyright: ignore

    def rule(self) -> ScoreRule:
        """What the scores mean to the attention op. Raises UnsupportedModelError."""
        bias = self._longest_bias()
        seen = bias > HIDDEN
        if not torch.equal(seen, seen[:1].expand(seen.shape)):
            self.refuse("its heads do not all see the same keys")
        visible = visible_in(seen[0], **source_of(self.result))
        before, after = self._gain(LENGTHS[-1], visible)
        scale = float(f"{float((before * after).sum() / before.square().sum()):.12g}")  # 0.25, not 0.25000000000000006
        rule = ScoreRule(scale, visible, _slopes(bias, seen[0]))
        self._check_bias(rule, bias)
        for num_tokens in LENGTHS:
            self._check_bias(rule, self._bias(num_tokens))
            self._check_gain(rule, num_tokens)
        return rule

    def _longest_bias(self) -> Tensor:
        """f(0) of as long a row as is affordable and the model allows."""
        shape = val(self.product if self.product is not None else self.result).shape
        num_heads = math.prod(size for size in shape[:-2] if isinstance(size, int))
        table = max((size for node in self.nodes if node.op == "get_attr" for size in val(node).shape), default=0)
        length = min(max(table, math.isqrt(MAX_SCORES // num_heads)), math.isqrt(MAX_TABLE_SCORES // num_heads))
        while length > max(LENGTHS):
            try:
                bias = self._bias(length)
            except (RuntimeError, IndexError):  # beyond the model's longest row
                length //= 2
                continue
            if limit := max(filter(lambda limit: limit >= length, self._limits()), default=0):
                self.refuse(f"its attention scores know a limit of {limit} tokens, and were tried up to {length}")
            return bias
        return self._bias(max(LENGTHS))

    def _limits(self) -> list[int]:
        """Whole numbers that positions may be compared with."""
        computing = [node for node in self.nodes if torch.Tag.pointwise in getattr(node.target, "tags", ())]
        return [abs(arg) for node in computing for arg in node.args if isinstance(arg, int)]

    def _draw(self, num_tokens: int) -> Tensor | None:
        """Scores for the product to have."""
        if self.product is None:
            return None
        shape = self._shape(val(self.product), num_tokens)
        return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(num_tokens))

    def _shape(self, value: Tensor, num_tokens: int) -> list[int]:
        symbol = Walk.over(self.program).symbol
        sizes: list[Any] = list(value.shape)
        return [size if isinstance(size, int) else int(size.node.expr.subs({symbol: num_tokens})) for size in sizes]

    def _bias(self, num_tokens: int) -> Tensor:
        """f(0) relative to that of the query's own key: [H or 1, T, T]."""
        drawn = self._draw(num_tokens)
        in_float32 = self.product is None or val(self.product).dtype == torch.float32
        bias = self.run(num_tokens, None if drawn is None else torch.zeros_like(drawn), wide=not in_float32)
        return bias - bias.diagonal(dim1=1, dim2=2)[..., None]

    def _gain(self, num_tokens: int, visible: Visible) -> tuple[Tensor, Tensor]:
        """Scores [n] of keys that are seen, and by how much they raise what softmax reads."""
        drawn = self._draw(num_tokens)
        if drawn is None:
            return torch.ones(1), torch.ones(1)
        change = self.run(num_tokens, drawn, wide=True) - self.run(num_tokens, torch.zeros_like(drawn), wide=True)
        seen = visible.mask(*_positions(num_tokens)).expand(change.shape)
        return drawn.reshape(change.shape)[seen], change[seen]

    def _check_bias(self, rule: ScoreRule, bias: Tensor) -> None:
        expected = rule.bias(bias.shape[1])
        seen = expected > HIDDEN
        if not torch.equal(bias > HIDDEN, seen.expand(bias.shape)):
            self.refuse(f"its attention mask of {len(seen[0])} tokens is not the one of a longer row")
        apart = (bias - expected).masked_fill(~seen, 0).abs().max()
        if apart > self._coarsest() * expected.masked_fill(~seen, 0).abs().max() + 1e-6:
            self.refuse("what it adds to its attention scores is neither a mask nor linear in the distance (alibi)")

    def _check_gain(self, rule: ScoreRule, num_tokens: int) -> None:
        before, after = self._gain(num_tokens, rule.visible)
        if (after - rule.scale * before).abs().max() > 1e-6 * (after.abs().max() + 1):
            self.refuse("its attention scores are not the product of queries and keys times one number")

    def _coarsest(self) -> float:
        """Rounding of the coarsest dtype that the bias passes through."""
        dtypes = {val(node).dtype for node in self.nodes if isinstance(val(node), Tensor) and node is not self.product}
        return 2 * max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=0.0)


def _slopes(bias: Tensor, seen: Tensor) -> Tensor | None:
    """[H]: how much a bias [H, T, T] falls per token of distance, where it is seen; None where it does not."""
    query, key = _positions(len(seen))
    distance = (key - query) * seen
    slopes = (bias.masked_fill(~seen, 0) * distance).sum((1, 2), dtype=torch.float64)
    slopes = slopes / distance.double().square().sum().clamp_min(1)
    return None if float(slopes.abs().max()) < 1e-9 else slopes.float()


def _positions(num_tokens: int) -> tuple[Tensor, Tensor]:
    return torch.arange(num_tokens)[:, None], torch.arange(num_tokens)[None]
