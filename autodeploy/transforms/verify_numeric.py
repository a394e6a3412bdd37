"""Numbers before and after a pass: float64 on drawn data, each side through its own recipes, so that a wrong recipe shows too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from autodeploy import custom_ops as ops
from autodeploy.custom_ops import symbolic
from autodeploy.custom_ops.recurrent import RECURRENT_OPS
from autodeploy.program import Program
from autodeploy.recipes import Shard
from autodeploy.shards import plan_of_rank
from autodeploy.specs import SCALED_DTYPES
from autodeploy.transforms.base import Effect
from autodeploy.transforms.interpret import Interpreter, draw, parameters
from autodeploy.transforms.rewrite import aten, calls, val
from autodeploy.transforms.shard import num_ranks
from autodeploy.transforms.threads import run_ranks
from autodeploy.transforms.verify import VerificationError

EXACT = 1e-9
"""Largest relative difference in float64 between a graph and its rewrite."""
ROUNDING = {"float64": 2.0, "float32": 2.0, "bfloat16": 3.0, "float16": 3.0}
"""How much larger than before the error of a fusion in its working dtype may be."""
MAX_BYTES = 2 << 30
LENGTHS, CHUNK, PAGE_SIZE = (9, 1, 14), 5, 4
"""Requests that are run, tokens of each per step once the graph is paged, and tokens per page."""

LeafTypes = Mapping[str, tuple[str, tuple[int, ...]]]


def float64_bytes(program: Program) -> int:
    """What the program's parameters take in float64."""
    return 8 * sum(program.parameter(name).numel() for name in program.weights)


def leaf_types(program: Program) -> LeafTypes:
    """dtype and shape of every leaf, from a program in which every parameter still is one."""
    tensors = {name: program.parameter(name) for name in program.weights}
    return {name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class NumericVerifier:
    """Compares programs over the same checkpoint tensors. Raises VerificationError."""

    leaves: LeafTypes

    def __post_init__(self) -> None:
        if (num_bytes := 8 * sum(prod(shape) for _, shape in self.leaves.values())) > MAX_BYTES:
            raise ValueError(
                f"numeric verification would need {num_bytes / 2**30:.1f} GiB of float64 weights, and stops at "
                f"{MAX_BYTES / 2**30:.0f}; verify a config with fewer layers, or use verify='structure'"
            )

    @cached_property
    def data(self) -> dict[str, Tensor]:
        return {name: draw(name, dtype, shape) for name, (dtype, shape) in self.leaves.items()}

    @torch.no_grad()
    def compare(self, before: Program, after: Program, effect: Effect) -> None:
        """The same logits in float64; a pass that rounds elsewhere may not be much worse in the working dtype either."""
        exact, result = self._run(before, wide=True), self._run(after, wide=True)
        if (error := difference(result, exact)) > EXACT and effect is not Effect.NUMERICS:
            raise VerificationError(f"in float64 its logits differ by {error:.1e} from those before the pass (limit {EXACT:.0e})")
        if effect in (Effect.FUSION, Effect.PARAMETERS, Effect.SHARDING, Effect.NUMERICS):
            working, mine = _working_dtype(after), result if effect is Effect.NUMERICS else exact
            was = difference(self._run(before, wide=False), exact)
            now = difference(self._run(after, wide=False), mine)
            if now > ROUNDING[working] * was + torch.finfo(getattr(torch, working)).eps:
                raise VerificationError(f"in {working} its error grew from {was:.1e} to {now:.1e}")

    def _run(self, program: Program, *, wide: bool) -> list[Tensor]:
        """The logits of each request; of a program that ranks share, those of the first rank, which all others must have too."""
        if (ranks := num_ranks(program)) == 1:
            return self._run_rank(program, parameters(program, self.data), wide)
        plans = [plan_of_rank(program.weights, rank, lambda leaf: self.data[leaf.name]) for rank in range(ranks)]
        tensors = [parameters(replace(program, weights=plan), self.data) for plan in plans]
        first, *others = run_ranks(ranks, lambda rank: self._run_rank(program, tensors[rank], wide))
        if worst := max(difference(other, first) for other in others):
            raise VerificationError(f"ranks do not compute the same: their logits differ by {worst:.1e}")
        return first

    @torch.no_grad()
    def _run_rank(self, program: Program, tensors: dict[str, Tensor], wide: bool) -> list[Tensor]:
        interpreter = Interpreter(program, tensors, wide=wide)
        requests = _requests(program)
        if not program.caches:
            return _run_alone(program, interpreter, requests)
        if calls(program, *RECURRENT_OPS):  # attention is paged, states are not in yet: one request in one piece
            return [_run_paged(program, interpreter, [ids], max(LENGTHS))[0] for ids in requests]
        return _run_paged(program, interpreter, requests, CHUNK)


def _working_dtype(program: Program) -> str:
    return str(_lookups(program)[0].meta["val"].dtype).removeprefix("torch.")


def _lookups(program: Program) -> list[fx.Node]:
    """Calls of an embedding table, whoever provides them."""
    return [node for node in program.graph.graph.nodes if symbolic(node.target) in LOOKUPS]


LOOKUPS = (aten.embedding.default, ops.sharded_embedding.overload)


def difference(results: list[Tensor], references: list[Tensor]) -> float:
    """Largest of max|a - b| / max|b|; infinite where shapes or non-finite places differ."""
    worst = 0.0
    for a, b in zip(results, references, strict=True):
        if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
            return float("inf")
        finite = b.isfinite()
        if finite.any():
            a, b = a[finite].double(), b[finite].double()
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-300)))
    return worst


def _requests(program: Program) -> list[Tensor]:
    """Token ids that every embedding table has rows for."""
    rows = min((_num_rows(program, node.args[0]) for node in _lookups(program)), default=2)
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, rows, (length,), generator=generator) for length in LENGTHS]


def _num_rows(program: Program, table: Any) -> int:
    """Of the whole table, if ranks share it."""
    recipe = program.weights.recipes.get(str(table.target))
    if isinstance(recipe, Shard) and recipe.dim == -2:
        return max(stop for own in recipe.ranges for _, stop in own)
    return int(val(table).shape[0])


def _run_alone(program: Program, interpreter: Interpreter, requests: list[Tensor]) -> list[Tensor]:
    results = []
    for ids in requests:
        values = _row([(ids, 0, len(ids))])
        results.append(interpreter.run(*(values[name] for name in program.inputs))[0])
    return results


def _row(parts: list[tuple[Tensor, int, int]]) -> dict[str, Tensor]:
    """Inputs for tokens [start, stop) of several requests in one row."""
    return {
        "input_ids": torch.cat([ids[start:stop] for ids, start, stop in parts])[None],
        "position_ids": torch.cat([torch.arange(start, stop) for _, start, stop in parts])[None],
        "rope_len": torch.cat([torch.full((stop - start,), len(ids)) for ids, start, stop in parts])[None],
    }


def _run_paged(program: Program, interpreter: Interpreter, requests: list[Tensor], chunk: int) -> list[Tensor]:
    """All requests at once, `chunk` tokens of each per step, their pages interleaved."""
    num_pages = -(-max(LENGTHS) // PAGE_SIZE)
    table = 1 + torch.arange(num_pages)[None, :] * len(requests) + torch.arange(len(requests))[:, None]
    caches = _caches(program, interpreter, 1 + num_pages * len(requests))
    results: list[list[Tensor]] = [[] for _ in requests]
    for start in range(0, max(LENGTHS), chunk):
        active = [i for i, ids in enumerate(requests) if len(ids) > start]
        parts = [(requests[i], start, min(start + chunk, len(requests[i]))) for i in active]
        values = _row(parts) | _where(table[active], parts) | {"state_slots": 1 + torch.tensor(active)}
        inputs = (values[name.partition("_window_")[0]] for name in program.inputs)  # all pools use the same pages
        logits = interpreter.run(*inputs, *caches)[0]
        for i, part in zip(active, logits.split([stop - begin for _, begin, stop in parts]), strict=True):
            results[i].append(part)
    return [torch.cat(parts) for parts in results]


def _caches(program: Program, interpreter: Interpreter, num_pages: int) -> list[Tensor]:
    """Filled with large numbers: what is read without having been written shows. One of 8 bits does not round here."""
    specs = [
        replace(spec, dtype=_working_dtype(program)) if spec.dtype in SCALED_DTYPES else spec for spec in program.caches.values()
    ]
    dtypes = [torch.float64 if interpreter.wide else getattr(torch, spec.dtype) for spec in specs]
    shapes = [spec.shape(num_pages, PAGE_SIZE) for spec in specs]
    return [torch.full(shape, 1e4, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


def _where(table: Tensor, parts: list[tuple[Tensor, int, int]]) -> dict[str, Tensor]:
    sizes = torch.tensor([stop - start for _, start, stop in parts])
    positions = [torch.arange(start, stop) for _, start, stop in parts]
    slots = [row[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE for row, at in zip(table, positions, strict=True)]
    return {
        "slot_mapping": torch.cat(slots),
        "page_table": table,
        "cu_seqlens_q": torch.cat([torch.zeros(1), sizes.cumsum(0)]).int(),
        "seq_lens": torch.tensor([stop for _, _, stop in parts], dtype=torch.int32),
        "logits_indices": torch.arange(int(sizes.sum())),
    }
