"""Paged attention in C++ against the reference, in float64 and in the dtype served."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from autodeploy.custom_ops import cpp_attention, cpp_pointwise, kv_append, paged_attention, rope_append
from autodeploy.custom_ops.attention import Visible, scaled_rows, unscaled
from autodeploy.custom_ops.cpp import KernelCalls, isas, kernels, record_kernels
from autodeploy.specs import SCALE_BYTES, Target

DTYPES = (torch.float32, torch.bfloat16)
BYTES = (torch.int8, torch.float8_e4m3fn)
MIXED = ((1, 1), (1, 300), (5, 5), (70, 200), (3, 100), (1, 16), (64, 64), (1, 513))
"""(new tokens, length with them) of each request of a step: decoding, whole prompts and later chunks."""


@dataclass(frozen=True)
class Shape:
    """Heads and sizes of a layer."""

    heads: int
    kv_heads: int
    head_dim_k: int
    head_dim_v: int
    page: int
    latent: bool = False


@dataclass(frozen=True)
class Extras:
    """Which extras of attention are on."""

    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False


SHAPES = {
    "plain": Shape(16, 8, 128, 128, 16),
    "small": Shape(3, 3, 6, 10, 4),
    "small latent": Shape(4, 2, 6, 4, 1, latent=True),
    "group of 3": Shape(6, 2, 80, 96, 5),
    "group of 7": Shape(14, 2, 64, 64, 16),
    "odd": Shape(24, 2, 33, 7, 3),
    "latent": Shape(128, 1, 72, 64, 64, latent=True),
}
EXTRAS = {
    "nothing": Extras(),
    "window, sinks": Extras(window=5, sinks=True),
    "window, softcap": Extras(window=70, softcap=30.0),
    "chunk, alibi": Extras(chunk=6, alibi=True),
    "everything": Extras(window=70, chunk=100, softcap=3.0, sinks=True, alibi=True),
}
CASES = [(shape, extras) for shape in SHAPES for extras in EXTRAS if shape == "small" or extras in ("nothing", "everything")]


class Step:
    """Arguments of `paged_attention` for requests over scattered pages.

    Slots that no query may read are not numbers, and pages that hold only such slots are absent (-1).
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, extras: Extras, requests: Sequence[tuple[int, int]] = MIXED) -> None:
        self.shape, self.requests = shape, requests
        counts = [-(-length // shape.page) for _, length in requests]
        pages = torch.randperm(sum(counts)) + 1
        width = shape.head_dim_k + (0 if shape.latent else shape.head_dim_v)
        self.cache = torch.full((len(pages) + 1, shape.page, shape.kv_heads, width), float("nan"), dtype=dtype)
        self.page_table = torch.full((len(requests), max(counts) + 1), -1)[:, :-1]
        visible = Visible(extras.window, extras.chunk)
        for row, own, (new, length) in zip(self.page_table, pages.split(counts), requests, strict=True):
            seen = torch.arange(visible.first_key(length - new), length)
            row[: len(own)] = own
            slots = row[seen // shape.page] * shape.page + seen % shape.page
            self.cache.flatten(0, 1)[slots] = torch.randn(len(seen), shape.kv_heads, width).to(dtype)
            row[: int(seen[0]) // shape.page] = -1
        tokens = sum(new for new, _ in requests)
        self.q = torch.randn(1, tokens, shape.heads, shape.head_dim_k).to(dtype).transpose(1, 2)
        self.cu_seqlens_q = torch.tensor([0, *itertools.accumulate(new for new, _ in requests)], dtype=torch.int32)
        self.seq_lens = torch.tensor([length for _, length in requests], dtype=torch.int32)
        self.sinks = torch.randn(shape.heads).to(dtype) if extras.sinks else None
        self.alibi = torch.rand(shape.heads) if extras.alibi else None
        self.extras = extras

    def arguments(self, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
        q, cache, sinks, alibi = (
            None if values is None else values.to(dtype or values.dtype)
            for values in (self.q, self.cache, self.sinks, self.alibi)
        )
        where = (self.page_table, self.cu_seqlens_q, self.seq_lens)
        scale, extras = self.shape.head_dim_k**-0.5, self.extras
        return q, cache, *where, sinks, scale, extras.window, extras.softcap, self.shape.head_dim_v, extras.chunk, alibi

    def alone(self, i: int) -> tuple[Any, ...]:
        """The arguments of request i, served by itself."""
        start, stop = self.cu_seqlens_q[i : i + 2].tolist()
        q, cache, page_table, _, seq_lens, *rest = self.arguments()
        cu_seqlens_q = torch.tensor([0, stop - start], dtype=torch.int32)
        return q[:, :, start:stop], cache, page_table[i : i + 1], cu_seqlens_q, seq_lens[i : i + 1], *rest


def run(*arguments: Any) -> Tensor:
    """By the provider that the op chooses, which must be ours."""
    provider, against = paged_attention.choose(Target("cpu"), *arguments)
    assert provider.name == "cpp", against
    return provider.function(*arguments)


def error(found: Tensor, expected: Tensor) -> float:
    """Root of the mean square of the difference over that of the expected."""
    return float((found.double() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


@pytest.mark.parametrize(("shape", "extras"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mixed_batch_is_as_near_to_float64_as_the_reference(dtype: torch.dtype, shape: str, extras: str) -> None:
    torch.manual_seed(0)
    step = Step(SHAPES[shape], dtype, EXTRAS[extras])
    expected = paged_attention.reference(*step.arguments(torch.float64))
    ours, reference = (error(attend(*step.arguments()), expected) for attend in (run, paged_attention.reference))
    assert ours <= (5e-7 if dtype is torch.float32 else 1.2 * reference)


@pytest.mark.parametrize("extras", [Extras(), Extras(window=301), Extras(window=5), Extras(chunk=700)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_a_row_do_not_depend_on_how_many_share_its_keys(dtype: torch.dtype, extras: Extras) -> None:
    torch.manual_seed(0)
    step = Step(Shape(6, 2, 64, 64, 16), dtype, extras, [(40, 1500), (100, 100), (431, 800), (2, 2), (60, 1000)])
    step.q *= 8  # weights of all sizes, whose sums tell in which order they are made
    expected = paged_attention.reference(*step.arguments(torch.float64))
    reference = error(paged_attention.reference(*step.arguments()), expected)
    whole = run(*step.arguments())
    assert error(whole, expected) <= 1.2 * reference
    starts, before = step.cu_seqlens_q.tolist(), torch.get_num_threads()
    try:
        for threads in (1, 3, 32):  # with more threads fewer rows do
            torch.set_num_threads(threads)
            assert torch.equal(run(*step.arguments()), whole)
            for i, (start, stop) in enumerate(itertools.pairwise(starts)):
                assert torch.equal(run(*step.alone(i)), whole[:, start:stop])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("shape", "extras"), [case for case in CASES if case[0] != "small latent"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", BYTES, ids=str)
def test_a_mixed_batch_over_a_cache_of_bytes_adds_no_error_to_what_the_bytes_stand_for(
    kept: torch.dtype, dtype: torch.dtype, shape: str, extras: str
) -> None:
    torch.manual_seed(0)
    step = Step(SHAPES[shape], dtype, EXTRAS[extras])
    sizes = (step.shape.head_dim_k, step.shape.head_dim_v)
    parts = [step.cache] if step.shape.latent else list(step.cache.split(sizes, -1))
    rows = scaled_rows(parts, kept)
    keys, values = unscaled(rows, *sizes)
    step.cache = keys if step.shape.latent else torch.cat([keys, values], -1)
    expected = paged_attention.reference(*step.arguments(torch.float64))
    step.cache = step.cache.to(dtype)
    rounded = error(paged_attention.reference(*step.arguments()), expected)
    q, _, *rest = step.arguments()
    ours, reference = (error(attend(q, rows, *rest), expected) for attend in (run, paged_attention.reference))
    assert ours <= (5e-7 if dtype is torch.float32 else 1.2 * rounded)
    assert reference <= (5e-7 if dtype is torch.float32 else 1.2 * rounded)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_float_of_8_bits_is_read_as_what_it_is(dtype: torch.dtype) -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    row = torch.cat([torch.zeros(8, dtype=torch.uint8), codes, torch.ones(2).view(torch.uint8)])
    where = (torch.tensor([[0]]), torch.tensor([0, 1], dtype=torch.int32), torch.tensor([1], dtype=torch.int32))
    cache = row.view(torch.float8_e4m3fn).expand(1, 1, 1, -1).contiguous()
    found = run(torch.ones(1, 1, 1, 8, dtype=dtype), cache, *where, None, 1.0, 0, 0.0, len(codes))
    assert torch.equal(found.flatten().float(), codes.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["plain", "latent"])
def test_a_request_gets_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype, shape: str, threads: int) -> None:
    torch.manual_seed(0)
    requests = ((1, 300), (1, 2500), (70, 150), (1, 40))
    step, before = Step(SHAPES[shape], dtype, Extras(), requests), torch.get_num_threads()
    torch.set_num_threads(threads)
    together = run(*step.arguments()).split([new for new, _ in requests], dim=1)
    torch.set_num_threads(before)
    for i, ours in enumerate(together):
        assert torch.equal(ours, run(*step.alone(i))), i


def test_a_query_of_strided_numbers_is_read_as_it_is() -> None:
    torch.manual_seed(0)
    step = Step(SHAPES["group of 3"], torch.bfloat16, Extras())
    expected = run(*step.arguments())
    step.q = step.q.transpose(2, 3).contiguous().transpose(2, 3)
    assert step.q.stride(3) != 1
    assert torch.equal(run(*step.arguments()), expected)


def test_a_call_made_again_reads_the_lengths_and_pages_of_its_own_step() -> None:
    torch.manual_seed(0)
    step, other = (
        Step(SHAPES["plain"], torch.float32, Extras(), requests) for requests in (((1, 600), (9, 9)), ((9, 600), (1, 9)))
    )
    with record_kernels() as calls:
        out = run(*step.arguments())
    for name in ("q", "cache", "page_table", "cu_seqlens_q", "seq_lens"):
        getattr(step, name).copy_(getattr(other, name))
    for kernel, arguments in calls:
        kernel(*arguments)
    assert torch.equal(out, run(*other.arguments()))


@pytest.mark.parametrize("kept", [torch.bfloat16, *BYTES], ids=str)
def test_a_team_makes_the_calls_of_all_libraries(kept: torch.dtype) -> None:
    torch.manual_seed(0)
    step = Step(SHAPES["plain"], torch.bfloat16, Extras(), [(1, 600)] * 3)
    sizes = (step.shape.head_dim_k, step.shape.head_dim_v)
    if kept in BYTES:
        step.cache = scaled_rows(list(step.cache.split(sizes, -1)), kept)
    with record_kernels() as calls:
        out, again = (run(*step.arguments()) for _ in range(2))
    expected = out.clone()
    out.zero_(), again.zero_()
    KernelCalls(calls)()
    assert torch.equal(out, expected) and torch.equal(again, expected)


@pytest.mark.parametrize("tokens", [1, 3, 200])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norm", [(), (1e-6, 0.0, False), (1e-5, 1.0, True)], ids=["plain", "normed", "offset"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [None, *BYTES], ids=str)
def test_turning_and_appending_at_once_gives_the_bits_of_one_after_the_other(
    kept: torch.dtype | None, dtype: torch.dtype, norm: tuple[Any, ...], interleaved: bool, tokens: int
) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, tokens, 16, 40).to(dtype).transpose(1, 2).split([8, 4, 4], 1)
    v = v[..., :36]
    cos, sin = (torch.randn(1, 1, tokens, 40).to(dtype) for _ in range(2))
    weights = [torch.randn(40).to(dtype), None] if norm else []
    ours, slots = empty_cache(76, 4, kept or dtype), torch.randperm(256)[:tokens]
    expected = ours.clone()
    arguments = (cos, sin, interleaved, *weights, *norm)
    provider, against = rope_append.choose(Target("cpu"), q, k, v, ours, slots, *arguments)
    assert provider.name == "cpp", against
    turned = provider.function(q, k, v, ours, slots, *arguments)
    if norm:
        q, k = (cpp_pointwise.rms_norm(x, weight, *norm) for x, weight in zip((q, k), weights, strict=True))
    cpp_attention.cpp_kv_append(cpp_pointwise.rope(k, cos, sin, interleaved), v, expected, slots)
    assert torch.equal(turned, cpp_pointwise.rope(q, cos, sin, interleaved))
    if kept is not None:
        ours, expected = ours.view(torch.int8), expected.view(torch.int8)
    assert torch.equal(ours.nan_to_num(99), expected.nan_to_num(99))


@pytest.mark.parametrize("tokens", [3, 200])
@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [None, *BYTES], ids=str)
def test_keys_and_values_are_written_where_the_reference_writes_them(
    kept: torch.dtype | None, dtype: torch.dtype, latent: bool, tokens: int
) -> None:
    torch.manual_seed(0)
    k = torch.randn(1, tokens, 8, 40).to(dtype).transpose(1, 2)
    v = None if latent else torch.randn(1, 8, 36, tokens).to(dtype).transpose(2, 3)
    k[..., ::3] *= 1e-4  # floats of 8 bits have few such small ones
    k[0, 1, 0], k[0, 2, 1, 7], k[0, 3, 2, 9] = 0, float("nan"), float("inf")
    ours, slots = empty_cache(40 if latent else 76, 8, kept or dtype), torch.randperm(256)[:tokens]
    expected = ours.clone()
    provider, against = kv_append.choose(Target("cpu"), k, v, ours, slots)
    assert provider.name == "cpp", against
    provider.function(k, v, ours, slots)
    kv_append.reference(k, v, expected, slots)
    if kept is not None:  # in a row that is not of numbers, only that is told
        ours, expected = (torch.cat(unscaled(cache, 40, 40 if latent else 36), -1) for cache in (ours, expected))
        assert ours.isnan().any() and not ours.isnan().all()
    assert torch.equal(ours.nan_to_num(99), expected.nan_to_num(99))


def empty_cache(numbers: int, heads: int, dtype: torch.dtype) -> Tensor:
    """[64, 4, heads, C], not numbers where that can be; of 8 bits with their scales."""
    if dtype in BYTES:
        return torch.zeros(64, 4, heads, numbers + SCALE_BYTES, dtype=dtype)
    return torch.full((64, 4, heads, numbers), float("nan"), dtype=dtype)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q": torch.float16, "cache": torch.float16}, "float16"),
        ({"q": torch.float32}, "the cache is of another dtype"),
        ({"page_table": torch.int32}, "page_table must be dense, of int64"),
        ({"seq_lens": torch.int64}, "seq_lens must be dense, of int32"),
        ({"sinks": torch.float64}, "sinks must be dense"),
    ],
    ids=str,
)
def test_what_it_cannot_serve_is_left_to_the_reference_with_the_reason(change: dict[str, torch.dtype], reason: str) -> None:
    step = Step(SHAPES["small"], torch.bfloat16, Extras(sinks=True), ((1, 5),))
    for name, dtype in change.items():
        setattr(step, name, getattr(step, name).to(dtype))
    provider, against = paged_attention.choose(Target("cpu"), *step.arguments())
    assert provider.name == "reference" and reason in str(against["cpp"])


@pytest.mark.parametrize("isa", isas()[1:])
def test_every_instruction_set_of_this_cpu_is_as_good(isa: str) -> None:
    chosen = "every_float or mixed_batch and (small or odd)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    environment = {**os.environ, "AUTODEPLOY_CPP_ISA": isa, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "48 passed" in done.stdout and done.returncode == 0, done.stdout


def test_without_cpp_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(SHAPES["small"], torch.float32, Extras(), ((1, 5),))
    monkeypatch.setenv("AUTODEPLOY_NO_CPP", "1")
    kernels.cache_clear()
    provider, against = paged_attention.choose(Target("cpu"), *step.arguments())
    monkeypatch.undo()
    kernels.cache_clear()
    assert provider.name == "reference" and against["cpp"] == ["AUTODEPLOY_NO_CPP is set"]
