"""What the parameters of one rank take in memory, group by group."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from autodeploy.executor.packing import parameter_uses
from autodeploy.formats import Format
from autodeploy.plan.calls import op_name
from autodeploy.program import Program
from autodeploy.recipes import Recipe, Shard


@dataclass(frozen=True)
class Group:
    """Parameters whose names differ in numbers alone, such as those of all layers, and that are stored and cut alike."""

    name: str
    """With * where the numbers differ."""
    count: int
    shape: tuple[int, ...]
    """Of each, on one rank."""
    stored: str
    """As it lies in memory: a format where the kernels take it, else a dtype, and the format it was made of."""
    readers: str
    """Ops that read it."""
    cut: str
    """Which dim is divided into how many parts; empty where every rank has all of it."""
    num_bytes: int
    """Of all of them, on one rank."""


def stored_bytes(program: Program) -> dict[str, int]:
    """Parameter -> its bytes once it is loaded: packed for those that pack it, and dense for those that read it so."""
    uses, found = parameter_uses(program), dict[str, int]()
    for name in program.weights:
        tensor, use, form = program.parameter(name), uses[name], program.weights.format_of(name)
        packed = tensor.nbytes if form is None or not use.as_integers else _packed_bytes(tuple(tensor.shape), form)
        found[name] = len(use.packers) * packed + use.dense * tensor.nbytes
    return found


def _packed_bytes(shape: tuple[int, ...], form: Format) -> int:
    """Of `Integers` as the kernels of few bits lay them out; scales of 4 bits are bfloat16, unless they are products."""
    groups = -(-shape[-1] // form.block[1]) if form.block[1] else 1
    is_short = form.bits == 4 and not {"factor", "divisor"} & {*form.parts}
    scales = prod(shape[:-1]) * groups * (1 + ("zeros" in form.parts)) * (2 if is_short else 4)
    return -(-prod(shape) * form.bits // 8) + scales


def groups(program: Program) -> list[Group]:
    """The largest first."""
    found, sizes, readers = defaultdict[tuple[Any, ...], list[str]](list), stored_bytes(program), _readers(program)
    uses = parameter_uses(program)
    for name in program.weights:
        tensor, recipe = program.parameter(name), program.weights[name]
        stored = _stored(tensor.dtype, program.weights.format_of(name), uses[name].as_integers)
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        found[pattern, tuple(tensor.shape), stored, readers[name], _cut(recipe, tensor.dim())].append(name)
    made = [
        Group(pattern, len(names), shape, stored, read_by, cut, sum(sizes[name] for name in names))
        for (pattern, shape, stored, read_by, cut), names in found.items()
    ]
    return sorted(made, key=lambda group: -group.num_bytes)


def _stored(dtype: torch.dtype, form: Format | None, is_packed: bool) -> str:
    dense = str(dtype).removeprefix("torch.")
    if form is None:
        return dense
    return form.name if is_packed else f"{dense}, of {form.name}"


def _readers(program: Program) -> dict[str, str]:
    nodes = [node for node in program.graph.graph.nodes if node.op == "get_attr"]
    return {str(node.target): ", ".join(sorted({op_name(user) for user in node.users})) for node in nodes}


DIMS = {-1: "columns", -2: "rows", -3: "matrices"}


def _cut(recipe: Recipe, num_dims: int) -> str:
    """In words: what each rank has a part of."""
    parts = defaultdict[str, set[int]](set)
    for each in _shards(recipe):
        parts["numbers" if num_dims <= 1 else DIMS.get(each.dim, f"dim {each.dim}")].add(len(set(each.ranges)))
    return ", ".join(
        f"{what} / {' and '.join(map(str, sorted(counts - {1})))}" for what, counts in sorted(parts.items()) if counts != {1}
    )


def _shards(recipe: Recipe) -> Iterator[Shard]:
    if isinstance(recipe, Shard):
        yield recipe
    for source in recipe.sources:
        yield from _shards(source)
