"""Calls of semantic ops on drawn numbers, and how far a provider's results lie from those in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from autodeploy import custom_ops as ops
from autodeploy.custom_ops.op import Provider, call_arguments
from autodeploy.formats import SCHEMES, Format, Integers
from autodeploy.specs import SCALE_BYTES, SCALED_DTYPES, Target

ROUNDING = 2.0
"""A provider may be that much farther from float64 than the reference."""
LIMITS = {torch.bfloat16: 1e-3, torch.float16: 2e-4, torch.float32: 2e-6}
"""Relative errors that are always near enough."""
FLOATS = (torch.bfloat16, torch.float32)
STEP = ("page_table", "cu_seqlens_q", "seq_lens")
"""Arguments of paged attention that are planned with."""


@dataclass(frozen=True)
class Sizes:
    """Of the drawn calls: those of an 8B model, or tiny ones."""

    decode: int = 64
    prefill: int = 2048
    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    context: int = 1024
    page: int = 32
    experts: int = 64
    chosen: int = 8
    expert_inner: int = 768
    state: int = 64


TINY = Sizes(3, 9, 64, 96, 4, 2, 16, 21, 4, 4, 2, 32, 8)


@dataclass
class Draw:
    """Random numbers on a device. dtype: of what has no other."""

    device: str
    dtype: torch.dtype
    sizes: Sizes
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(shape, device=self.device, generator=self.generator) * scale
        return drawn.to(dtype or self.dtype)

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.rand(shape, device=self.device, generator=self.generator).to(dtype or self.dtype)

    def below(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, device=self.device, generator=self.generator)


Args = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """A call of an op. make: its arguments. stored: parameters by name, with the format in which they are quantized."""

    op: Any
    label: str
    make: Callable[[Draw], Args]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    stored: Mapping[str, Format | None] = field(default_factory=dict)
    limit: float = 0.0
    """Relative error that is near enough, where activations are rounded."""
    provider: str = ""
    """Which one, where it is not the one that the device would use."""

    @property
    def name(self) -> str:
        return f"{self.op.name} {self.label}"


@dataclass(frozen=True)
class Outcome:
    """What a call gave. Errors are relative, in the mean square, against float64."""

    provider: str
    against: dict[str, list[str]]
    error: float
    reference_error: float
    allowed: float
    run: Callable[[], Any]
    num_bytes: int

    @property
    def is_near(self) -> bool:
        return self.error <= self.allowed


def examine(case: Case, draw: Draw) -> Outcome:
    """Run the provider that the device would use, or that is named, and the reference in its dtype and in float64."""
    args = case.make(draw)
    provider, against = case.op.choose(Target(draw.device), *_dense(args), parameters=case.stored)
    if case.provider:
        provider, against = case.op.named(case.provider), {}
    if provider.plan is not None:
        call = call_arguments(case.op.overload, args, {})
        provider.plan({name: call[name].cpu().numpy() for name in STEP})
    ours = _results(case.op, provider.function, *_given(case.op, provider, args))
    plain = _results(case.op, case.op.reference, _dense(args))
    exact = _results(case.op, case.op.reference, tree_map_only(Tensor, _wide, _dense(args, torch.float64)))
    errors = [(_error(a, e), _error(b, e), LIMITS.get(a.dtype, 0.0)) for a, b, e in zip(ours, plain, exact, strict=True)]
    worst = max(errors, key=lambda each: each[0] - max(ROUNDING * each[1], each[2]))
    allowed = max(ROUNDING * worst[1], worst[2], case.limit)
    positional, _ = _given(case.op, provider, args)
    moved = sum(x.nbytes for x in tree_leaves((args, ours)) if isinstance(x, Tensor))
    return Outcome(provider.name, against, worst[0], worst[1], allowed, lambda: provider.function(*positional), moved)


def _dense(args: Args, dtype: torch.dtype | None = None) -> Args:
    """The arguments with matrices of whole numbers made dense."""
    first = next(arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point())
    return tuple(_matrix(arg).to(dtype or first.dtype) if isinstance(arg, Integers) else arg for arg in args)


def _matrix(stored: Integers) -> Tensor:
    width = stored.numbers.shape[-1] // stored.scales.shape[-1]
    zeros = 0 if stored.zeros is None else stored.zeros.double().repeat_interleave(width, -1)
    return (stored.numbers.double() - zeros) * stored.scales.double().repeat_interleave(width, -1)


def _given(op: Any, provider: Provider, args: Args) -> tuple[Args, Args]:
    """What the provider is given, packed where it packs; and its mutable arguments, copies of the case's own."""
    call, packed = call_arguments(op.overload, args if provider.against_format else _dense(args), {}), provider.packs
    copies = {name: value.clone() if name in op.mutates else value for name, value in call.items()}
    given = {name: packed[name](value, call) if name in packed else value for name, value in copies.items()}
    return tuple(given.values())[: len(args)], tuple(copies[name] for name in op.mutates)


def _results(op: Any, function: Callable[..., Any], args: Args, mutated: Args | None = None) -> list[Tensor]:
    """Tensors that a call returns or writes to; the arguments stay as they are."""
    if mutated is None:
        names = list(call_arguments(op.overload, args, {}))
        args = tuple(arg.clone() if name in op.mutates else arg for name, arg in zip(names, args, strict=False))
        mutated = tuple(arg for name, arg in zip(names, args, strict=False) if name in op.mutates)
    return [x for x in tree_leaves((function(*args), mutated)) if isinstance(x, Tensor)]


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.dtype in (torch.float16, torch.bfloat16, torch.float32) else x


def _error(found: Tensor, exact: Tensor) -> float:
    if str(found.dtype).removeprefix("torch.") in SCALED_DTYPES:  # of codes: what part of them differs
        return float((found.view(torch.uint8) != exact.view(torch.uint8)).float().mean())
    return float((found.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))


# Arguments


def _pages(draw: Draw, lengths: list[int], new: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(page_table, cu_seqlens_q, seq_lens, slots of the new tokens) of requests whose pages lie in no order."""
    page = draw.sizes.page
    counts = [-(-length // page) for length in lengths]
    order = (torch.randperm(sum(counts)) + 1).split(counts)
    table = torch.zeros(len(lengths), 1 << (max(counts) - 1).bit_length(), dtype=torch.int64)
    slots = []
    for row, pages, length, count in zip(table, order, lengths, new, strict=True):
        row[: len(pages)] = pages
        at = torch.arange(length - count, length)
        slots.append(pages[at // page] * page + at % page)
    bounds = torch.tensor([0, *new], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    parts = (table, bounds, torch.tensor(lengths, dtype=torch.int32), torch.cat(slots))
    return parts[0].to(draw.device), parts[1].to(draw.device), parts[2].to(draw.device), parts[3].to(draw.device)


def _kind(draw: Draw, kind: str) -> tuple[list[int], list[int]]:
    """(lengths, new tokens) of a decode, a prefill, or both in one row."""
    s = draw.sizes
    decode = [s.context - 3 * i % s.context for i in range(s.decode)]
    match kind:
        case "decode":
            return decode, [1] * len(decode)
        case "prefill":
            return [s.prefill], [s.prefill]
        case _:
            return [*decode[:3], s.context, s.prefill], [1, 1, 1, s.context // 2, s.prefill // 2]


def _cache(draw: Draw, table: Tensor, width: int, kv_heads: int | None = None) -> Tensor:
    return draw.normal(int(table.max()) + 1, draw.sizes.page, kv_heads or draw.sizes.kv_heads, width)


def _attention(kind: str, *, window: int = 0, softcap: float = 0.0, sinks: bool = False) -> Callable[[Draw], Args]:
    def make(draw: Draw) -> Args:
        s, (lengths, new) = draw.sizes, _kind(draw, kind)
        table, bounds, seq_lens, _ = _pages(draw, lengths, new)
        q = draw.normal(1, sum(new), s.heads, s.head_dim).transpose(1, 2)
        sink = draw.normal(s.heads) if sinks else None
        cache = _cache(draw, table, 2 * s.head_dim)
        return q, cache, table, bounds, seq_lens, sink, s.head_dim**-0.5, window, softcap, s.head_dim

    return make


def _latent(draw: Draw) -> Args:
    """One head of keys whose last part is the values."""
    s, (lengths, new) = draw.sizes, _kind(draw, "decode")
    table, bounds, seq_lens, _ = _pages(draw, lengths, new)
    q = draw.normal(1, sum(new), s.heads, 4 * s.head_dim + s.head_dim // 2).transpose(1, 2)
    cache = _cache(draw, table, q.shape[3], 1)
    return q, cache, table, bounds, seq_lens, None, s.head_dim**-0.5, 0, 0.0, 4 * s.head_dim


def _int8_attention(draw: Draw) -> Args:
    args = list(_attention("decode")(draw))
    rows = args[1]
    codes = torch.empty(*rows.shape[:-1], rows.shape[-1] + SCALE_BYTES, dtype=torch.int8, device=draw.device)
    k, v = rows.flatten(0, 1).transpose(0, 1)[None].chunk(2, -1)
    ops.kv_append.reference(k, v, codes, torch.arange(rows.shape[0] * rows.shape[1], device=draw.device))
    return (args[0], codes, *args[2:])


def _heads(draw: Draw, count: int, num_heads: int) -> Tensor:
    return draw.normal(1, count, num_heads, draw.sizes.head_dim).transpose(1, 2)


def _angles(draw: Draw, count: int) -> tuple[Tensor, Tensor]:
    angles = draw.normal(1, 1, count, draw.sizes.head_dim // 2, scale=3.0, dtype=torch.float32).repeat(1, 1, 1, 2)
    return angles.cos().to(draw.dtype), angles.sin().to(draw.dtype)


def _append(kind: str, with_rope: bool) -> Callable[[Draw], Args]:
    def make(draw: Draw) -> Args:
        s, (lengths, new) = draw.sizes, _kind(draw, kind)
        table, _, _, slots = _pages(draw, lengths, new)
        q, k, v = (_heads(draw, sum(new), heads) for heads in (s.heads, s.kv_heads, s.kv_heads))
        cache = _cache(draw, table, 2 * s.head_dim)
        if not with_rope:
            return k, v, cache, slots
        weights = draw.normal(s.head_dim), draw.normal(s.head_dim)
        return q, k, v, cache, slots, *_angles(draw, sum(new)), False, *weights, 1e-6, 0.0, False

    return make


def _moe(kind: str, transposed: bool = False, biased: bool = False, scheme: str | None = None) -> Callable[[Draw], Args]:
    def make(draw: Draw) -> Args:
        s, count = draw.sizes, draw.sizes.decode if kind == "decode" else draw.sizes.prefill
        shapes = (s.experts, 2 * s.expert_inner, s.hidden // 2), (s.experts, s.hidden // 2, s.expert_inner)
        gate_up, down = (_stored(draw, scheme, draw.normal(*shape, scale=shape[2] ** -0.5)) for shape in shapes)
        if transposed:
            gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        biases = [draw.normal(*shape[:2]) if biased else None for shape in shapes]
        index = torch.stack([torch.randperm(s.experts)[: s.chosen] for _ in range(count)]).to(draw.device)
        weights = draw.uniform(count, s.chosen)
        form = ("pairs", "swish", 1.702, 7.0, 1.0) if biased else ("halves", "silu", 1.0, 0.0, 0.0)
        return draw.normal(count, s.hidden // 2), index, weights, gate_up, down, *biases, transposed, *form

    return make


def _stored(draw: Draw, scheme: str | None, dense: Tensor) -> Any:
    """The matrices in a scheme's format, if there is one."""
    if scheme is None:
        return dense
    form = SCHEMES[scheme]
    return form.integers(tuple(dense.shape), *form.quantize(dense.float().cpu())).to(draw.device)


def _linear(scheme: str | None, count: str) -> Callable[[Draw], Args]:
    def make(draw: Draw) -> Args:
        s, rows = draw.sizes, getattr(draw.sizes, count)
        weight = _stored(draw, scheme, draw.normal(s.inner, s.hidden, scale=s.hidden**-0.5))
        return draw.normal(1, rows, s.hidden), weight, None

    return make


def _rows(make: Callable[[Draw, int], Args], count: str) -> Callable[[Draw], Args]:
    return lambda draw: make(draw, getattr(draw.sizes, count))


def _rms(draw: Draw, rows: int) -> Args:
    return draw.normal(1, rows, draw.sizes.hidden), draw.normal(draw.sizes.hidden), 1e-6, 0.0, False


def _add_rms(draw: Draw, rows: int) -> Args:
    return draw.normal(1, rows, draw.sizes.hidden), *_rms(draw, rows)


def _layer_norm(draw: Draw, rows: int) -> Args:
    width = draw.sizes.hidden
    return draw.normal(1, rows, width), draw.normal(width), draw.normal(width), 1e-5


def _gated(draw: Draw, rows: int) -> Args:
    return *draw.normal(1, rows, 2 * draw.sizes.inner).split(draw.sizes.inner, -1), "silu"


def _rope(draw: Draw, rows: int) -> Args:
    return _heads(draw, rows, draw.sizes.heads), *_angles(draw, rows), False


def _recurrent(name: str, kind: str) -> Callable[[Draw], Args]:
    """Arguments of `<name>_cached`: token arguments [1, T, ...], then the states of the requests and where they lie."""

    def make(draw: Draw) -> Args:
        lengths, new = _kind(draw, kind)
        args = RECURRENT[name](draw, sum(new))
        shape, dtype = getattr(ops, name).state(*args)
        states = draw.normal(len(new) + 1, *shape, dtype=torch.float32).to(dtype)
        slots = (torch.randperm(len(new)) + 1).to(draw.device)
        _, bounds, seq_lens, _ = _pages(draw, lengths, new)
        return *args, states, slots, bounds, seq_lens

    return make


def _ssd(draw: Draw, rows: int) -> Args:
    s, n = draw.sizes, draw.normal
    steps, decay = draw.uniform(1, rows, s.heads, dtype=torch.float32), -draw.uniform(s.heads, dtype=torch.float32)
    return n(1, rows, s.heads, s.state), steps, decay, n(1, rows, 2, s.state), n(1, rows, 2, s.state)


def _delta(draw: Draw, rows: int) -> Args:
    s, n = draw.sizes, draw.normal
    q, k = (torch.nn.functional.normalize(n(1, rows, s.kv_heads, s.head_dim), dim=-1) for _ in range(2))
    decay = -draw.uniform(1, rows, s.heads, dtype=torch.float32)
    return q, k, n(1, rows, s.heads, s.head_dim), decay, draw.uniform(1, rows, s.heads)


def _selective(draw: Draw, rows: int) -> Args:
    s, n = draw.sizes, draw.normal
    steps, decay = draw.uniform(1, rows, s.hidden), -draw.uniform(s.hidden, 16, dtype=torch.float32)
    return n(1, rows, s.hidden), steps, decay, n(1, rows, 16), n(1, rows, 16)


RECURRENT: dict[str, Callable[[Draw, int], Args]] = {
    "causal_conv1d": lambda draw, rows: (
        draw.normal(1, rows, draw.sizes.hidden),
        draw.normal(draw.sizes.hidden, 4),
        draw.normal(draw.sizes.hidden),
        "silu",
    ),
    "token_shift": lambda draw, rows: (draw.normal(1, rows, draw.sizes.hidden),),
    "ssd": _ssd,
    "gated_delta_rule": _delta,
    "selective_scan": _selective,
    "linear_scan": lambda draw, rows: (draw.normal(1, rows, draw.sizes.hidden), draw.uniform(1, rows, draw.sizes.hidden)),
    "wkv": lambda draw, rows: (
        *(draw.normal(1, rows, draw.sizes.hidden) for _ in range(2)),
        -draw.uniform(draw.sizes.hidden, dtype=torch.float32),
        draw.normal(draw.sizes.hidden),
    ),
}


def cases() -> Iterator[Case]:
    """All calls, those of the ops that every model has first."""
    for count in ("decode", "prefill"):
        yield Case(ops.rms_norm, count, _rows(_rms, count))
        yield Case(ops.add_rms_norm, count, _rows(_add_rms, count))
        yield Case(ops.layer_norm, count, _rows(_layer_norm, count))
        yield Case(ops.gated_activation, count, _rows(_gated, count))
        yield Case(ops.rope, count, _rows(_rope, count))
        yield Case(ops.kv_append, count, _append(count, with_rope=False))
        yield Case(ops.rope_append, count, _append(count, with_rope=True))
    for kind in ("decode", "prefill", "mixed"):
        yield Case(ops.paged_attention, kind, _attention(kind))
        yield Case(ops.paged_attention, f"{kind}, window", _attention(kind, window=13))
        yield Case(ops.paged_attention, f"{kind}, sinks and softcap", _attention(kind, sinks=True, softcap=20.0))
    if find_spec("flashinfer") is not None:
        for kind in ("decode", "prefill", "mixed"):
            for label, settings in {"": {}, ", window": {"window": 13}, ", sinks": {"sinks": True}}.items():
                case = Case(ops.paged_attention, f"flashinfer, {kind}{label}", _attention(kind, **settings), (torch.bfloat16,))
                yield replace(case, provider="flashinfer")
    yield Case(ops.paged_attention, "decode, latent", _latent)
    yield Case(ops.paged_attention, "decode, int8 cache", _int8_attention)
    for kind in ("decode", "prefill"):
        yield Case(ops.moe, kind, _moe(kind), stored={"gate_up": None, "down": None})
        yield Case(ops.moe, f"{kind}, transposed and biased", _moe(kind, transposed=True, biased=True))
    for scheme, limit in {"int8": 4e-3, "w8a8": 3e-2, "int4": 3e-2, "fp8": 4e-3, "mxfp4": 4e-3, "nvfp4": 6e-3}.items():
        for count in ("decode", "prefill"):
            stored = SCHEMES[scheme]
            label, in_16_bits = f"{scheme}, {count}", (torch.bfloat16,)
            yield Case(ops.linear_op, label, _linear(scheme, count), in_16_bits, {"weight": stored}, limit)
            yield Case(ops.moe, label, _moe(count, scheme=scheme), in_16_bits, {"gate_up": stored, "down": stored}, 2 * limit)
    for name in RECURRENT:
        for kind in ("decode", "mixed"):
            op, rounded = getattr(ops, name).cached, name == "ssd" and kind == "mixed"
            if rounded:  # prompts of 16-bit numbers: products of TF32
                yield Case(op, f"{kind}, by chunks", _recurrent(name, kind), (torch.bfloat16,), limit=3e-3)
            yield Case(op, kind, _recurrent(name, kind), (torch.float32,) if rounded else FLOATS)
