"""Each recurrent op equals its recurrence written out token by token, wherever a row is cut and however it is packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy import custom_ops as ops
from autodeploy.custom_ops.recurrent import RecurrentOp
from autodeploy.custom_ops.scan import pairwise_decay

H, G, P, D, C = 4, 2, 6, 5, 10
"""Heads, groups or key heads, value size, state or key size, channels."""


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64) + 0.01


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for k in range(weight.shape[1]):
            if t - k >= 0:
                y[:, t] += weight[:, -1 - k] * x[:, t - k]
    y = y if bias is None else y + bias
    return y / (1 + (-y).exp()) if activation == "silu" else y


def token_shift(x: Tensor) -> Tensor:
    return torch.stack([x[:, t - 1] if t else 0 * x[:, 0] for t in range(x.shape[1])], dim=1)


def ssd(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    h, y = torch.zeros(x.shape[0], H, P, D, dtype=x.dtype), torch.zeros_like(x)
    for t in range(x.shape[1]):
        for head in range(H):
            group = head // (H // G)
            fading = (dt[:, t, head] * a[head]).exp()[:, None, None]
            taken = dt[:, t, head, None, None] * x[:, t, head, :, None] * b[:, t, group, None, :]
            h[:, head] = fading * h[:, head] + taken
            y[:, t, head] = (h[:, head] * c[:, t, group, None, :]).sum(-1)
    return y


def selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    h, y = torch.zeros(x.shape[0], C, D, dtype=x.dtype), torch.zeros_like(x)
    for t in range(x.shape[1]):
        h = (dt[:, t, :, None] * a).exp() * h + dt[:, t, :, None] * b[:, t, None] * x[:, t, :, None]
        y[:, t] = (h * c[:, t, None]).sum(-1)
    return y


def linear_scan(x: Tensor, decay: Tensor) -> Tensor:
    h, y = torch.zeros_like(x[:, 0]), torch.zeros_like(x)
    for t in range(x.shape[1]):
        y[:, t] = h = decay[:, t] * h + x[:, t]
    return y


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    memory, y = torch.zeros(v.shape[0], H, D, P, dtype=v.dtype), torch.zeros_like(v)
    for t in range(v.shape[1]):
        for head in range(H):
            source = head * q.shape[2] // H
            key, query = k[:, t, source], q[:, t, source]
            fading = decay[:, t, head].exp().reshape(len(v), -1, 1)
            faded = fading * memory[:, head]
            missing = v[:, t, head] - torch.einsum("nd,ndp->np", key, faded)
            memory[:, head] = faded + beta[:, t, head, None, None] * torch.einsum("nd,np->ndp", key, missing)
            y[:, t, head] = torch.einsum("nd,ndp->np", query, memory[:, head])
    return y


def wkv(k: Tensor, v: Tensor, decay: Tensor, first: Tensor) -> Tensor:
    y = torch.zeros_like(v)
    for t in range(v.shape[1]):
        age = torch.arange(t - 1, -1, -1, dtype=v.dtype)[None, :, None]
        exponents = torch.cat([k[:, :t] + age * decay, (k[:, t] + first)[:, None]], dim=1)
        y[:, t] = (exponents.softmax(dim=1) * v[:, : t + 1]).sum(1)
    return y


@dataclass(frozen=True)
class Case:
    op: RecurrentOp
    loop: Callable[..., Tensor]
    draw: Callable[[int, int], tuple[Any, ...]]


def unit(*shape: int) -> Tensor:
    return F.normalize(normal(*shape), dim=-1)


def keyed(n: int, s: int, heads: int) -> tuple[Tensor, ...]:
    return unit(n, s, heads, D), unit(n, s, heads, D), normal(n, s, H, P)


CASES = {
    "conv": Case(ops.causal_conv1d, causal_conv1d, lambda n, s: (normal(n, s, C), normal(C, 4), normal(C), "silu")),
    "conv_plain": Case(ops.causal_conv1d, causal_conv1d, lambda n, s: (normal(n, s, C), normal(C, 3), None, "none")),
    "conv_one_tap": Case(ops.causal_conv1d, causal_conv1d, lambda n, s: (normal(n, s, C), normal(C, 1), None, "none")),
    "token_shift": Case(ops.token_shift, token_shift, lambda n, s: (normal(n, s, C),)),
    "ssd": Case(
        ops.ssd,
        ssd,
        lambda n, s: (normal(n, s, H, P), positive(n, s, H), -3 * positive(H), normal(n, s, G, D), normal(n, s, G, D)),
    ),
    "selective_scan": Case(
        ops.selective_scan,
        selective_scan,
        lambda n, s: (normal(n, s, C), positive(n, s, C), -3 * positive(C, D), normal(n, s, D), normal(n, s, D)),
    ),
    "linear_scan": Case(ops.linear_scan, linear_scan, lambda n, s: (normal(n, s, C), positive(n, s, C))),
    "delta_by_head": Case(
        ops.gated_delta_rule,
        gated_delta_rule,
        lambda n, s: (*keyed(n, s, G), -positive(n, s, H), positive(n, s, H)),
    ),
    "delta_by_channel": Case(
        ops.gated_delta_rule,
        gated_delta_rule,
        lambda n, s: (*keyed(n, s, H), -5 * positive(n, s, H, D), positive(n, s, H)),
    ),
    "wkv": Case(ops.wkv, wkv, lambda n, s: (10 * normal(n, s, C), normal(n, s, C), -positive(C), normal(C))),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) else value


def is_by_token(value: Any, num_tokens: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 2 and value.shape[1] == num_tokens


def part(args: tuple[Any, ...], num_tokens: int, start: int, stop: int) -> tuple[Any, ...]:
    """The arguments of some of the tokens."""
    return tuple(arg[:, start:stop] if is_by_token(arg, num_tokens) else arg for arg in args)


def fresh_state(op: RecurrentOp, args: tuple[Any, ...]) -> Tensor:
    shape, dtype = op.state(*args)
    return torch.zeros(args[0].shape[0], *shape, dtype=dtype)


def assert_close(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    assert ours.shape == expected.shape
    assert ours.numel() == 0 or float((ours - expected).abs().max()) <= tolerance * float(expected.abs().max())


@every_case
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_its_recurrence(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    for length in (1, 2, 17, 70):
        args = case.draw(2, length)
        ours, state = case.op.run(*(cast(arg, dtype) for arg in args), fresh_state(case.op, tuple(cast(a, dtype) for a in args)))
        assert ours.dtype == dtype and ours.is_contiguous() and state.dtype == dtype
        assert_close(ours.double(), case.loop(*args), tolerance)


@every_case
@pytest.mark.parametrize(
    "cuts", [range(1, 80), (1, 2, 66, 67), (64,), (5, 40, 79)], ids=["each token", "uneven", "chunk", "three"]
)
def test_may_be_cut_anywhere(case: Case, cuts: Any) -> None:
    torch.manual_seed(1)
    args = case.draw(2, 80)
    whole, last = case.op.run(*args, fresh_state(case.op, args))
    state, outputs, bounds = fresh_state(case.op, args), [], [0, *cuts, 80]
    for start, stop in pairwise(bounds):
        y, state = case.op.run(*part(args, 80, start, stop), state)
        outputs.append(y)
    assert_close(torch.cat(outputs, dim=1), whole, 1e-12)
    assert_close(state, last, 1e-12)


@every_case
def test_requests_in_one_row_go_on_from_their_own_states(case: Case) -> None:
    """Two steps: a prefill of 7 beside one of 3; a fresh request of 5 beside decodes of both, in slots with leftovers."""
    torch.manual_seed(2)
    row = case.draw(1, 17)
    belongs = {"a": [*range(7), 15], "b": [*range(7, 10), 16], "c": [*range(10, 15)]}
    alone = {name: case.op(*(arg[:, rows] if is_by_token(arg, 17) else arg for arg in row)) for name, rows in belongs.items()}
    shape, dtype = case.op.state(*row)
    cache = torch.full((4, *shape), 7.0, dtype=dtype)
    first = case.op.cached(*part(row, 17, 0, 10), cache, *map(torch.tensor, ([2, 0], [0, 7, 10], [7, 3])))
    second = case.op.cached(*part(row, 17, 10, 17), cache, *map(torch.tensor, ([3, 2, 0], [0, 5, 6, 7], [5, 8, 4])))
    packed = torch.cat([first, second], dim=1)
    for name, rows in belongs.items():
        assert_close(packed[:, rows], alone[name], 1e-12)
    assert (cache[1] == 7).all()


@every_case
def test_shape_rule_is_what_comes_out(case: Case) -> None:
    args = tuple(cast(arg, torch.bfloat16) for arg in case.draw(1, 3))
    real, meta = case.op(*args), case.op(*(arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args))
    assert (real.shape, real.dtype, real.stride()) == (meta.shape, meta.dtype, meta.stride())


def test_wkv_neither_overflows_nor_divides_by_nothing() -> None:
    k, v = torch.tensor([[[-500.0], [900.0], [-900.0]]]), torch.tensor([[[2.0], [3.0], [4.0]]])
    y = ops.wkv(k, v, torch.tensor([-0.5]), torch.tensor([0.5]))
    assert torch.equal(y, torch.tensor([[[2.0], [3.0], [3.0]]]))


def test_pairwise_decay_is_exact_for_large_sums() -> None:
    """A difference of two sums of thousands, of which float32 would lose the fraction."""
    total = torch.tensor([[-30000.0, -30000.001]], dtype=torch.float64)[..., None]
    decay = pairwise_decay(total, torch.float32)
    assert torch.equal(decay[0, 0, :, 1], torch.tensor([0.0, 1.0]))
    assert abs(float(decay[0, 0, 1, 0]) - 0.9990005) < 1e-6
