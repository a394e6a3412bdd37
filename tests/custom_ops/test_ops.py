"""References against plain formulas, and their shape rules against themselves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from autodeploy import custom_ops as ops
from autodeploy.custom_ops.op import SEMANTIC_OPS, Provider, semantic_op
from autodeploy.custom_ops.recurrent import RECURRENT_OPS
from autodeploy.custom_ops.stages import set_link

torch.manual_seed(0)


def naive(q, k, v, sinks, scale, window, softcap, chunk, alibi):
    """One query and one key at a time: q [H, T, Dk], k [Hkv, T, Dk], v [Hkv, T, Dv] -> [T, H, Dv]."""
    heads, tokens, _ = q.shape
    out = torch.zeros(tokens, heads, v.shape[2], dtype=q.dtype)
    for h, t in itertools.product(range(heads), range(tokens)):
        kv = h * k.shape[0] // heads
        first = max(0, t - window + 1) if window else 0
        while chunk and first // chunk < t // chunk:
            first += 1
        scores = torch.stack([q[h, t] @ k[kv, s] * scale for s in range(first, t + 1)])
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        if alibi is not None:
            scores = torch.stack([score - alibi[h] * (t - s) for s, score in enumerate(scores, first)])
        weights = torch.exp(scores - scores.max())
        total = weights.sum() + (torch.exp(sinks[h] - scores.max()) if sinks is not None else 0)
        out[t, h] = (weights / total) @ v[kv, first : t + 1]
    return out


@dataclass(frozen=True)
class Variant:
    """Which extras of attention are on."""

    sinks: bool = False
    window: int = 0
    softcap: float = 0.0
    chunk: int = 0
    alibi: bool = False

    def arguments(self) -> tuple[Any, ...]:
        """Of `attention` from `sinks` on."""
        sinks, slopes = (torch.randn(4, dtype=torch.float64) if wanted else None for wanted in (self.sinks, self.alibi))
        return sinks, 0.3, self.window, self.softcap, -1, self.chunk, slopes


VARIANTS = [
    *(Variant(*values) for values in itertools.product((False, True), (0, 1, 5), (0.0, 3.0))),
    *(Variant(window=window, chunk=chunk) for window in (0, 3) for chunk in (1, 4, 6)),
    *(Variant(window=window, chunk=chunk, alibi=True) for window in (0, 5) for chunk in (0, 6)),
    Variant(True, 5, 3.0, 6, True),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_attention_equals_the_formula(variant) -> None:
    q, k, v = (torch.randn(1, h, 13, d, dtype=torch.float64) for h, d in ((4, 6), (2, 6), (2, 10)))
    sinks, scale, window, softcap, mask, chunk, slopes = variant.arguments()
    ours = ops.attention(q, k, v, sinks, scale, window, softcap, mask, chunk, slopes)
    torch.testing.assert_close(ours[0], naive(q[0], k[0], v[0], sinks, scale, window, softcap, chunk, slopes))


@dataclass
class PagedRequests:
    """Requests of some lengths over pages in no order; a step serves the next few tokens of each request that has any."""

    lengths: tuple[int, ...]
    page: int
    head_dim_k: int
    head_dim_v: int
    latent: bool = False

    def __post_init__(self) -> None:
        shapes = ((4, self.head_dim_k), (2, self.head_dim_k), (2, self.head_dim_v))
        self.whole = [[torch.randn(1, h, n, d, dtype=torch.float64) for h, d in shapes] for n in self.lengths]
        if self.latent:  # values are the last part of the keys, and not stored
            self.whole = [[q, k, k[..., -self.head_dim_v :]] for q, k, _ in self.whole]
        counts = [-(-n // self.page) for n in self.lengths]
        pages = torch.randperm(sum(counts)) + 1
        self.tables = torch.zeros(len(counts), max(counts), dtype=torch.int64)
        for row, own in zip(self.tables, pages.split(counts), strict=True):
            row[: len(own)] = own
        width = self.head_dim_k + (0 if self.latent else self.head_dim_v)
        self.cache = torch.full((len(pages) + 1, self.page, 2, width), float("nan"), dtype=torch.float64)

    def serve(self, step: Callable[[int], int], *arguments: Any) -> list[torch.Tensor]:
        """Outputs [T, H, Dv] per request. step: request -> its new tokens per step; arguments: those of paged_attention."""
        done, outputs = [0] * len(self.lengths), [[] for _ in self.lengths]
        while any(d < n for d, n in zip(done, self.lengths, strict=True)):
            parts = [(i, done[i], min(n, done[i] + step(i))) for i, n in enumerate(self.lengths) if done[i] < n]
            for (i, _, stop), out in zip(parts, self._run(parts, arguments), strict=True):
                outputs[i].append(out)
                done[i] = stop
        return [torch.cat(parts) for parts in outputs]

    def _run(self, parts: list[tuple[int, int, int]], arguments: tuple[Any, ...]) -> Sequence[torch.Tensor]:
        q, k, v = (torch.cat([self.whole[i][j][:, :, a:b] for i, a, b in parts], dim=2) for j in range(3))
        positions = [(i, torch.arange(a, b)) for i, a, b in parts]
        slots = torch.cat([self.tables[i, at // self.page] * self.page + at % self.page for i, at in positions])
        ops.kv_append(k, None if self.latent else v, self.cache, slots)
        rows, sizes = torch.tensor([i for i, _, _ in parts]), [b - a for _, a, b in parts]
        cu = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
        seq_lens = torch.tensor([b for _, _, b in parts], dtype=torch.int32)
        return ops.paged_attention(q, self.cache, self.tables[rows], cu, seq_lens, *arguments)[0].split(sizes)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", ["short", "long", "latent"])
def test_paged_attention_over_scattered_pages_in_chunks_equals_attention_over_each_request(variant, kind) -> None:
    if kind == "long":  # above 128 queries the score matrix is cut into blocks
        requests, step = PagedRequests((150, 300), 4, 6, 10), lambda i: 140
    else:
        requests, step = PagedRequests((9, 1, 14), 4, 6, 4, latent=kind == "latent"), lambda i: 5 + i
    sinks, scale, window, softcap, mask, chunk, slopes = variant.arguments()
    expected = [ops.attention(*qkv, sinks, scale, window, softcap, mask, chunk, slopes)[0] for qkv in requests.whole]
    outputs = requests.serve(step, sinks, scale, window, softcap, requests.head_dim_v, chunk, slopes)
    for ours, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("variant", [Variant(window=9), Variant(chunk=8), Variant(chunk=8, window=3)], ids=str)
def test_single_tokens_read_only_the_pages_they_see(variant) -> None:
    requests = PagedRequests((30,), 4, 6, 10)
    sinks, scale, window, softcap, mask, chunk, slopes = variant.arguments()
    expected = ops.attention(*requests.whole[0], sinks, scale, window, softcap, mask, chunk, slopes)[0]
    served = requests.serve(lambda i: 1, sinks, scale, window, softcap, 10, chunk, slopes)[0]
    torch.testing.assert_close(served, expected)
    first_page = (30 - window) // 4 if window and not chunk else (29 // 8 * 8) // 4
    requests.cache[requests.tables[0, :first_page]] = float("nan")
    q = requests.whole[0][0][:, :, 29:]
    where = (requests.tables, torch.tensor([0, 1]), torch.tensor([30]))
    last = ops.paged_attention(q, requests.cache, *where, sinks, scale, window, softcap, 10, chunk, slopes)
    torch.testing.assert_close(last[0], expected[29:])


CALLS = {
    "rms_norm": lambda: (torch.randn(1, 5, 3, 8).transpose(1, 2), torch.randn(8), 1e-6, 1.0, True),
    "add_rms_norm": lambda: (torch.randn(1, 5, 8), torch.randn(1, 5, 8), torch.randn(8), 1e-6, 1.0, True),
    "layer_norm": lambda: (torch.randn(1, 5, 8), torch.randn(8), None, 1e-6),
    "rope": lambda: (torch.randn(1, 5, 3, 8).transpose(1, 2), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8), True),
    "gated_activation": lambda: (torch.randn(1, 5, 8), torch.randn(1, 5, 8), "gelu_tanh"),
    "attention": lambda: (torch.randn(1, 4, 5, 6), torch.randn(1, 2, 5, 6), torch.randn(1, 2, 5, 3), None, 1.0, 0, 0.0, -1),
    "moe": lambda: (
        torch.randn(5, 8),
        torch.randint(0, 3, (5, 2)),
        torch.rand(5, 2),
        torch.randn(3, 12, 8),
        torch.randn(3, 8, 6),
        None,
        None,
        False,
        "halves",
        "silu",
        1.0,
        0.0,
        0.0,
    ),
    "local_index": lambda: (torch.randint(0, 9, (5, 2)), torch.tensor(3), 4),
    "sharded_embedding": lambda: (torch.randn(4, 6), torch.randint(0, 9, (1, 5)), torch.tensor(3)),
    "embedding": lambda: (torch.randn(9, 6), torch.randint(0, 9, (1, 5))),
    "linear": lambda: (torch.randn(1, 5, 8), torch.randn(6, 8), torch.randn(6)),
    "expert_linear": lambda: (torch.randn(5, 8), torch.randint(0, 3, (5,)), torch.randn(3, 6, 8)),
    "kv_append": lambda: (torch.randn(1, 2, 5, 6), torch.randn(1, 2, 5, 3), torch.zeros(4, 2, 2, 9), torch.arange(5)),
    "rope_append": lambda: (
        torch.randn(1, 5, 4, 6).transpose(1, 2),
        torch.randn(1, 2, 5, 6),
        torch.randn(1, 2, 5, 3),
        torch.zeros(4, 2, 2, 9),
        torch.arange(5),
        torch.randn(1, 1, 5, 6),
        torch.randn(1, 1, 5, 6),
        False,
        torch.randn(6),
        torch.randn(6),
        1e-6,
    ),
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
        3,
    ),
    "send": lambda: (torch.randn(1, 5, 6).transpose(1, 2), torch.randint(0, 9, (1, 5))),
    "receive": lambda: (torch.randint(0, 9, (1, 5)), [1, -1, 6], torch.float32),
}


class NoLink:
    """Takes anything, and gives zeros."""

    def send(self, x: torch.Tensor) -> None:
        assert x.is_contiguous()

    def receive(self, into: torch.Tensor) -> None:
        into.zero_()


@pytest.fixture
def link() -> Iterator[None]:
    set_link(NoLink())
    yield
    set_link(None)


RECURRENT = {op for known in RECURRENT_OPS.values() for op in (known.whole, known.cached)}
"""Their shape rules: test_recurrent_ops."""
EXCHANGES = {op for op in SEMANTIC_OPS.values() if op.overload in ops.COLLECTIVES}
"""They wait for other ranks: tests/distributed."""
OURS = [
    op for op in SEMANTIC_OPS.values() if op not in RECURRENT | EXCHANGES and op.reference.__module__.startswith("autodeploy.")
]


@pytest.mark.usefixtures("link")
@pytest.mark.parametrize("name", sorted(op.name for op in OURS))
def test_the_shape_rule_of_every_op_says_what_its_reference_does(name: str) -> None:
    op = next(op for op in SEMANTIC_OPS.values() if op.name == name)
    arguments = CALLS[name]()
    real = op(*arguments)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in arguments))
    assert kinds_of(fake) == kinds_of(real)


def kinds_of(results: Any) -> list[Any]:
    return [(x.shape, x.dtype, x.stride()) for x in tree_leaves(results) if isinstance(x, torch.Tensor)]


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
