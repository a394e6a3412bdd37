"""Recurrent ops over requests by Triton, in its interpreter: as near to float64 as the references, and so are the states."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy import custom_ops as ops
from autodeploy.custom_ops import triton_recurrent
from autodeploy.custom_ops.recurrent import RecurrentOp
from tests.custom_ops.triton_ops import CUDA, error, provider_of

NUM_SLOTS, LEFTOVER = 6, 3.0
MIXED = (("fresh", 5), ("goes on", 1), ("goes on", 18), ("fresh", 1), ("goes on", 2))
DECODES = (("goes on", 1), ("fresh", 1), ("goes on", 1))


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def positive(*shape: int) -> Tensor:
    return torch.rand(*shape) + 0.01


def part_of_a_row(num_tokens: int, *sizes: int, dtype: torch.dtype) -> Tensor:
    """[1, T, *sizes], with other numbers of the token beside them."""
    width = torch.Size(sizes).numel()
    return normal(1, num_tokens, width + 7, dtype=dtype)[..., 3 : width + 3].unflatten(-1, sizes)


def conv(taps: int, activation: str, has_bias: bool, width: int = 70) -> Callable[..., tuple[Any, ...]]:
    def draw(n: int, dtype: torch.dtype) -> tuple[Any, ...]:
        bias = normal(width, dtype=dtype) if has_bias else None
        return part_of_a_row(n, width, dtype=dtype), normal(width, taps, dtype=dtype), bias, activation

    return draw


def ssd(n: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """4 heads, 2 groups, states of 6 x 5."""
    b, c = part_of_a_row(n, 2, 5, dtype=dtype), part_of_a_row(n, 2, 5, dtype=dtype)
    return part_of_a_row(n, 4, 6, dtype=dtype), positive(1, n, 4), -3 * positive(4), b, c


def lightning(n: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """As lightning attention calls it: time steps of one, that are no memory of their own, and heads before tokens."""
    x, b, c = (normal(1, 2, n, 8, dtype=dtype).transpose(1, 2) for _ in range(3))
    return x, torch.ones((), dtype=dtype).expand(1, n, 2), -positive(2), b, c


def selective_scan(n: int, dtype: torch.dtype) -> tuple[Any, ...]:
    b, c = part_of_a_row(n, 5, dtype=dtype), part_of_a_row(n, 5, dtype=dtype)
    return part_of_a_row(n, 70, dtype=dtype), positive(1, n, 70), -3 * positive(70, 5), b, c


def delta(by_channel: bool, key_heads: int, keys: int = 5, values: int = 6) -> Callable[..., tuple[Any, ...]]:
    def draw(n: int, dtype: torch.dtype) -> tuple[Any, ...]:
        """4 heads."""
        q, k = (F.normalize(normal(1, n, key_heads, keys), dim=-1) for _ in range(2))
        decay = -positive(1, n, 4, keys) if by_channel else -positive(1, n, 4)
        return q, k, part_of_a_row(n, 4, values, dtype=dtype), decay, positive(1, n, 4).to(dtype)

    return draw


@dataclass(frozen=True)
class Case:
    op: RecurrentOp
    draw: Callable[[int, torch.dtype], tuple[Any, ...]]
    dtype: torch.dtype = torch.bfloat16


CASES = {
    "conv": Case(ops.causal_conv1d, conv(4, "silu", True)),
    "conv in float32, without bias": Case(ops.causal_conv1d, conv(3, "none", False), torch.float32),
    "conv of one tap": Case(ops.causal_conv1d, conv(1, "none", True, 5)),
    "ssd": Case(ops.ssd, ssd),
    "ssd in float32": Case(ops.ssd, ssd, torch.float32),
    "ssd of lightning attention": Case(ops.ssd, lightning, torch.float16),
    "selective scan": Case(ops.selective_scan, selective_scan),
    "delta rule": Case(ops.gated_delta_rule, delta(by_channel=False, key_heads=2)),
    "delta rule of wide keys": Case(ops.gated_delta_rule, delta(by_channel=False, key_heads=1, keys=100, values=40)),
    "delta rule by channel, in float32": Case(ops.gated_delta_rule, delta(by_channel=True, key_heads=4), torch.float32),
}


def requests(kinds: tuple[tuple[str, int], ...]) -> tuple[Tensor, Tensor, Tensor]:
    """state_slots, cu_seqlens_q and seq_lens as the executor makes them, in slots from the last down."""
    sizes = torch.tensor([size for _, size in kinds])
    before = torch.tensor([0 if kind == "fresh" else 2 for kind, _ in kinds])
    bounds = F.pad(sizes.cumsum(0), (1, 0))
    return torch.arange(NUM_SLOTS - 1, NUM_SLOTS - 1 - len(kinds), -1), bounds.int(), (sizes + before).int()


def exact(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("kinds", [MIXED, DECODES], ids=["mixed", "decodes"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_requests_of_a_row(case: Case, kinds: tuple[tuple[str, int], ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSD_NUMBERS", "SCAN_NUMBERS", "DELTA_NUMBERS"):
        monkeypatch.setattr(triton_recurrent, name, 32)
    torch.manual_seed(0)
    args, where = case.draw(sum(size for _, size in kinds), case.dtype), requests(kinds)
    shape, dtype = case.op.state(*args)
    cache = LEFTOVER + normal(NUM_SLOTS, *shape, dtype=dtype)
    ours, theirs, right = cache.clone(), cache.clone(), cache.double()
    provider = provider_of(case.op.cached, *args, ours, *where)
    found = provider.function(*args, ours, *where)
    expected = case.op.cached.reference(*args, theirs, *where)
    true = case.op.cached.reference(*map(exact, args), right, *where)
    assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())
    limit = 1e-9 if found.dtype == torch.bfloat16 else 1e-6
    assert error(found, true) <= max(1.2 * error(expected, true), limit)
    assert cache.numel() == 0 or error(ours, right) <= max(1.2 * error(theirs, right), 1e-6)
    others = torch.tensor([slot for slot in range(NUM_SLOTS) if slot not in where[0]])
    assert torch.equal(ours[others], cache[others])


def test_long_prompts_are_convolved_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs per block of channels take turns, and only one of them touches the state."""
    monkeypatch.setattr(triton_recurrent, "CONV_PROGRAMS", 4)
    test_requests_of_a_row(CASES["conv"], (("goes on", 40), ("fresh", 3)), monkeypatch)


@pytest.mark.parametrize(
    ("kinds", "dtype", "width", "is_chunked"),
    [(MIXED, torch.bfloat16, 5, True), (DECODES, torch.bfloat16, 5, False), (MIXED, torch.float32, 5, False),
     (MIXED, torch.float16, 130, False)],
)  # fmt: skip
def test_ssd_goes_by_chunks_over_prompts(
    kinds: Any, dtype: torch.dtype, width: int, is_chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 16-bit numbers, with states that fit."""
    launched, kernel = [], triton_recurrent._ssd_chunks
    monkeypatch.setattr(triton_recurrent, "_ssd_chunks", defaultdict(lambda: lambda *given, **_: launched.append(kernel)))
    n = sum(size for _, size in kinds)
    b = normal(1, n, 2, width, dtype=dtype)
    args = normal(1, n, 4, 6, dtype=dtype), positive(1, n, 4), -positive(4), b, b
    triton_recurrent.ssd(*args, torch.zeros(NUM_SLOTS, 4, 6, width), *requests(kinds))
    assert launched == [kernel] * is_chunked


@pytest.mark.parametrize(
    ("case", "kinds", "is_chunked"),
    [("delta rule", MIXED, True), ("delta rule", DECODES, False), ("delta rule by channel, in float32", MIXED, False)],
)
def test_the_delta_rule_goes_by_chunks_over_prompts(case: str, kinds: Any, is_chunked: bool, monkeypatch: Any) -> None:
    """Of 16-bit numbers, whose memory fades as a whole; the numbers are those of `test_requests_of_a_row`."""
    launched, each = [], CASES[case]
    for name in ("_delta_within", "_delta_across"):
        monkeypatch.setattr(triton_recurrent, name, defaultdict(lambda name=name: lambda *given, **_: launched.append(name)))
    args = each.draw(sum(size for _, size in kinds), each.dtype)
    triton_recurrent.gated_delta_rule(*args, torch.zeros(NUM_SLOTS, *each.op.state(*args)[0]), *requests(kinds))
    assert launched == ["_delta_within", "_delta_across"] * is_chunked


def test_no_new_tokens_change_nothing() -> None:
    """As a row that is filled up for a recorded step: a request without tokens keeps its state."""
    for case in (CASES["conv"], CASES["ssd"], CASES["selective scan"], CASES["delta rule"]):
        args, kinds = case.draw(2, case.dtype), (("goes on", 0), ("goes on", 2))
        shape, dtype = case.op.state(*args)
        cache = normal(NUM_SLOTS, *shape, dtype=dtype)
        ours = cache.clone()
        provider_of(case.op.cached, *args, ours, *requests(kinds)).function(*args, ours, *requests(kinds))
        changed = (ours != cache).flatten(1).any(1)
        assert changed.tolist() == [slot == NUM_SLOTS - 2 for slot in range(NUM_SLOTS)]


def test_what_is_left_to_the_reference() -> None:
    args = ssd(2, torch.float32)
    cache, where = torch.zeros(2, 4, 6, 5), requests((("fresh", 2),))
    wide = (*args[:3], normal(1, 2, 2, 600), normal(1, 2, 2, 600)), torch.zeros(2, 4, 6, 600)
    for given, states, reason in (
        (tuple(map(exact, args)), cache.double(), "no float64"),
        (args, cache.transpose(0, 1).contiguous().transpose(0, 1), "not contiguous"),
        (*wide, "more than 512"),
    ):
        provider, against = ops.ssd.cached.choose(CUDA, *given, states, *where)
        assert provider.name == "reference" and reason in str(against["triton"])
