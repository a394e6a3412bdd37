"""Paged attention in C++ beside `scaled_dot_product_attention` over keys and values that are contiguous already.

    python benchmarks/attention.py [--threads N] [--rounds N]

16 query heads over 8 of the cache, 128 numbers each, bfloat16. Both take turns, over several copies of the cache so that none is
still in the CPU's own; medians. Tensors are in huge pages and freed blocks are kept, as by a server, and ours is called as the
executor does: from a recorded step where it has few tokens, else as an op from Python; how long the op takes stands beside it.
SDPA is given query heads of a group as rows that share their keys ("folded"), or `enable_gqa` with `is_causal`, which is the
faster way for prompts. The floor of decoding is the bytes of the cache over the rate at which `torch.sum` reads.
The last column is our time over a cache of int8, as a share of that over one of bfloat16.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy import huge_pages
from autodeploy.custom_ops import paged_attention
from autodeploy.custom_ops.attention import scaled_rows
from autodeploy.custom_ops.cpp import KernelCalls, record_kernels
from autodeploy.custom_ops.cpp_attention import cpp_paged_attention
from autodeploy.executor.model_runner import MAX_RECORDED_TOKENS
from autodeploy.executor.packing import returning_blocks

HEADS, KV_HEADS, HEAD_DIM, PAGE = 16, 8, 128, 16
SCALE = HEAD_DIM**-0.5
MIN_BYTES = 1 << 28
"""Of all copies of the cache together."""

BLOCK = huge_pages.empty([1 << 26], torch.float32).fill_(1)
"""What `torch.sum` reads in turn with the others, for the rate of memory."""


@dataclass(frozen=True)
class Case:
    """Requests of one step, all alike."""

    name: str
    requests: int
    new_tokens: int
    seq_len: int

    @property
    def cache_bytes(self) -> int:
        return self.requests * self.seq_len * KV_HEADS * HEAD_DIM * 2 * 2


CASES = [
    Case("decode, 8 requests at 1,024", 8, 1, 1024),
    Case("decode, 1 request at 16,384", 1, 1, 16384),
    Case("causal prefill of 1,024", 1, 1024, 1024),
    Case("chunk of 64 at 1,024", 1, 64, 1024),
]


def random(*shape: int) -> Tensor:
    """In huge pages, as the executor's caches are."""
    return huge_pages.empty(shape, torch.bfloat16).normal_()


def paged(case: Case, attend: Callable[..., Tensor], in_bytes: bool = False) -> Callable[[], Tensor]:
    """One call over pages in no order."""
    pages = case.requests * case.seq_len // PAGE
    table = torch.randperm(pages).view(case.requests, -1) + 1
    cache = random(pages + 1, PAGE, KV_HEADS, 2 * HEAD_DIM)
    if in_bytes:
        cache = scaled_rows(list(cache.chunk(2, -1)), torch.int8)
    q = torch.randn(1, case.requests * case.new_tokens, HEADS, HEAD_DIM).bfloat16().transpose(1, 2)
    cu_seqlens_q = torch.arange(0, q.shape[2] + 1, case.new_tokens, dtype=torch.int32)
    seq_lens = torch.full((case.requests,), case.seq_len, dtype=torch.int32)
    return lambda: attend(q, cache, table, cu_seqlens_q, seq_lens, None, SCALE, 0, 0.0, HEAD_DIM)


def recorded(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same call, made again as in a decode step."""
    with record_kernels() as kernels:
        out = call()
    again = KernelCalls(kernels)

    def run() -> Tensor:
        again()
        return out

    return run


def contiguous(case: Case, folded: bool) -> Callable[[], Tensor]:
    """SDPA over [requests, heads, tokens, 128]; folded: the rows of a group of query heads share their keys."""
    k, v = (random(case.requests, KV_HEADS, case.seq_len, HEAD_DIM) for _ in range(2))
    group, new = HEADS // KV_HEADS, case.new_tokens
    q = torch.randn(case.requests, KV_HEADS, group * new, HEAD_DIM).bfloat16()
    if not folded:
        q = q.view(case.requests, HEADS, new, HEAD_DIM)
    is_causal = not folded and new == case.seq_len
    mask = None
    if new > 1 and not is_causal:
        mask = torch.ones(new, case.seq_len, dtype=torch.bool).tril(case.seq_len - new)
        mask = mask.repeat(group, 1) if folded else mask
    options = {"scale": SCALE, "attn_mask": mask, "is_causal": is_causal, "enable_gqa": not folded}
    return lambda: F.scaled_dot_product_attention(q, k, v, **options)


def measure(case: Case, rounds: int) -> str:
    """A line of the table."""
    copies = max(2, min(64, MIN_BYTES // case.cache_bytes))
    ops = [paged(case, cpp_paged_attention) for _ in range(copies)]
    is_recorded = case.requests * case.new_tokens <= MAX_RECORDED_TOKENS
    ops_on_bytes = [paged(case, cpp_paged_attention, in_bytes=True) for _ in range(2 * copies)]
    ways = {
        "ours": [recorded(op) for op in ops] if is_recorded else ops,
        "int8": [recorded(op) for op in ops_on_bytes] if is_recorded else ops_on_bytes,
        "folded": [contiguous(case, True) for _ in range(copies)],
        "gqa": [contiguous(case, False) for _ in range(copies)] if case.new_tokens > 1 else [],
        "reference": [paged(case, paged_attention.reference)],
        "read": [BLOCK.sum],
        "op": ops if is_recorded else [],
    }
    times: dict[str, list[float]] = {name: [] for name, calls in ways.items() if calls}
    for i, name in itertools.product(range(rounds + 1), times):
        call = ways[name][i % len(ways[name])]
        start = time.perf_counter()
        call()
        if i:  # the first call builds or allocates
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(taken) for name, taken in times.items()}
    ours = median["ours"]
    folded, gqa, reference = (f"{median[name] / ours:.2f}x" if name in median else "" for name in ("folded", "gqa", "reference"))
    op = median.get("op", ours) * 1e3
    floor = f"{ours / (median['read'] * case.cache_bytes / BLOCK.nbytes):.2f}" if case.new_tokens == 1 else ""
    ratios = f"{folded:>12} {gqa:>9} {reference:>10} {floor:>8} {median['int8'] / ours:8.2f}"
    return f"{case.name:30} {ours * 1e3:9.2f} {op:7.2f} {ratios}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with returning_blocks():
        pass  # afterwards they are kept
    print(f"threads {options.threads}")
    ratios = f"{'SDPA folded':>12} {'SDPA gqa':>9} {'reference':>10} {'x floor':>8} {'int8 KV':>8}"
    print(f"{'':30} {'ours, ms':>9} {'op, ms':>7} {ratios}")
    for case in CASES:
        print(measure(case, options.rounds), flush=True)


if __name__ == "__main__":
    main()
