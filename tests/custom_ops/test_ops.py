"""References against plain formulas, and their shape rules against themselves."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from autodeploy import custom_ops as ops
from autodeploy.custom_ops.op import SEMANTIC_OPS, Provider, semantic_op
from autodeploy.specs import PagedKV

torch.manual_seed(0)


def naive(q, k, v, sinks, scale, window, softcap):
    """One query and one key at a time: q [H, T, Dk], k [Hkv, T, Dk], v [Hkv, T, Dv] -> [T, H, Dv]."""
    heads, tokens, _ = q.shape
    out = torch.zeros(tokens, heads, v.shape[2], dtype=q.dtype)
    for h, t in itertools.product(range(heads), range(tokens)):
        kv = h * k.shape[0] // heads
        first = max(0, t - window + 1) if window else 0
        scores = torch.stack([q[h, t] @ k[kv, s] * scale for s in range(first, t + 1)])
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        weights = torch.exp(scores - scores.max())
        total = weights.sum() + (torch.exp(sinks[h] - scores.max()) if sinks is not None else 0)
        out[t, h] = (weights / total) @ v[kv, first : t + 1]
    return out


VARIANTS = list(itertools.product((None, "sinks"), (0, 1, 5), (0.0, 3.0)))


@pytest.mark.parametrize(("sinks", "window", "softcap"), VARIANTS)
def test_attention_equals_the_formula(sinks, window, softcap) -> None:
    q, k, v = (torch.randn(1, h, 13, d, dtype=torch.float64) for h, d in ((4, 6), (2, 6), (2, 10)))
    sink = torch.randn(4, dtype=torch.float64) if sinks else None
    ours = ops.attention(q, k, v, sink, 0.3, window, softcap, -1)
    torch.testing.assert_close(ours[0], naive(q[0], k[0], v[0], sink, 0.3, window, softcap))


@pytest.mark.parametrize(("sinks", "window", "softcap"), VARIANTS)
@pytest.mark.parametrize("long", [False, True])
def test_paged_attention_over_scattered_pages_in_chunks_equals_attention_over_each_request(sinks, window, softcap, long) -> None:
    page, lengths = 4, (9, 1, 14) if not long else (150, 300)  # above 128 queries the score matrix is cut into blocks
    sink = torch.randn(4, dtype=torch.float64) if sinks else None
    whole = [[torch.randn(1, h, n, d, dtype=torch.float64) for h, d in ((4, 6), (2, 6), (2, 10))] for n in lengths]
    expected = [ops.attention(*qkv, sink, 0.3, window, softcap, -1)[0] for qkv in whole]
    pages = torch.randperm(sum(-(-n // page) for n in lengths)) + 1
    tables = torch.zeros(len(lengths), max(-(-n // page) for n in lengths), dtype=torch.int64)
    used = 0
    for i, n in enumerate(lengths):
        count = -(-n // page)
        tables[i, :count], used = pages[used : used + count], used + count
    cache = torch.full(PagedKV(2, 6, 10, "float64").shape(len(pages) + 1, page), float("nan"), dtype=torch.float64)
    done = [0] * len(lengths)
    outputs: list[list[torch.Tensor]] = [[] for _ in lengths]
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        parts = [
            (i, done[i], min(lengths[i], done[i] + (5 + i if not long else 140)))
            for i in range(len(lengths))
            if done[i] < lengths[i]
        ]
        q, k, v = (torch.cat([whole[i][j][:, :, a:b] for i, a, b in parts], dim=2) for j in range(3))
        rows = torch.tensor([i for i, _, _ in parts])
        slots = torch.cat([tables[i, torch.arange(a, b) // page] * page + torch.arange(a, b) % page for i, a, b in parts])
        cu = torch.tensor([0, *itertools.accumulate(b - a for _, a, b in parts)], dtype=torch.int32)
        seq_lens = torch.tensor([b for _, _, b in parts], dtype=torch.int32)
        ops.kv_append(k, v, cache, slots)
        out = ops.paged_attention(q, cache, tables[rows], cu, seq_lens, sink, 0.3, window, softcap)[0]
        for (i, _, b), first, last in zip(parts, cu[:-1], cu[1:], strict=True):
            outputs[i].append(out[first:last])
            done[i] = b
    for ours, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(torch.cat(ours), reference)


CALLS = {
    "rms_norm": lambda: (torch.randn(1, 5, 3, 8).transpose(1, 2), torch.randn(8), 1e-6, 1.0, True),
    "layer_norm": lambda: (torch.randn(1, 5, 8), torch.randn(8), None, 1e-6),
    "rope": lambda: (torch.randn(1, 5, 3, 8).transpose(1, 2), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8), True),
    "gated_activation": lambda: (torch.randn(1, 5, 8), torch.randn(1, 5, 8), "gelu_tanh"),
    "attention": lambda: (torch.randn(1, 4, 5, 6), torch.randn(1, 2, 5, 6), torch.randn(1, 2, 5, 3), None, 1.0, 0, 0.0, -1),
    "kv_append": lambda: (torch.randn(1, 2, 5, 6), torch.randn(1, 2, 5, 3), torch.zeros(4, 2, 2, 9), torch.arange(5)),
    "paged_attention": lambda: (
        torch.randn(1, 4, 5, 6),
        torch.zeros(4, 2, 2, 9),
        torch.tensor([[1, 2, 3]]),
        torch.tensor([0, 5]),
        torch.tensor([5]),
        None,
        1.0,
        0,
        0.0,
    ),
}


@pytest.mark.parametrize("name", sorted(op.name for op in SEMANTIC_OPS.values()))
def test_the_shape_rule_of_every_op_says_what_its_reference_does(name: str) -> None:
    op = next(op for op in SEMANTIC_OPS.values() if op.name == name)
    arguments = CALLS[name]()
    real = op(*arguments)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in arguments))
    if real is None:
        assert fake is None
    else:
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_norms_follow_the_order_of_casts_they_were_found_in() -> None:
    x, weight = torch.randn(7, 64).bfloat16(), (1 + torch.randn(64)).bfloat16()
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(ops.rms_norm(x, weight, 1e-6, 0.0, False), weight * normed.bfloat16())
    assert torch.equal(ops.rms_norm(x, weight, 1e-6, 0.0, True), (weight.float() * normed).bfloat16())
    assert torch.equal(ops.rms_norm(x, weight, 1e-6, 1.0, True), (normed * (1 + weight.float())).bfloat16())
    assert torch.equal(ops.rms_norm(x, None, 1e-6, 0.0, False), normed.bfloat16())


def test_the_newest_provider_without_reasons_against_it_is_chosen() -> None:
    @semantic_op()
    def double_for_test(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    double_for_test.register(Provider("adding", lambda x: x + x))
    double_for_test.register(Provider("never", lambda x: x, lambda target, x: ["it is wrong"]))
    chosen, against = double_for_test.choose(None, torch.ones(2))
    assert chosen.name == "adding" and against == {"never": ["it is wrong"]}
    del SEMANTIC_OPS[double_for_test.overload]
