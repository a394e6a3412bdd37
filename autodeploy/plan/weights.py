"""What the parameters of one rank take in memory, group by group."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from autodeploy.executor.packing import parameter_uses
from autodeploy.formats import Format
from autodeploy.plan.calls import op_name
from autodeploy.plan.packed import packed_bytes
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
    """Parameter -> its bytes once it is loaded: as the providers that read it pack it, and dense for those that read it so."""
    uses, found, known = parameter_uses(program), dict[str, int](), dict[Any, int]()
    for name in program.weights:
        tensor, use = program.parameter(name), uses[name]
        form = program.weights.format_of(name) if use.as_integers else None
        found[name] = use.dense * tensor.nbytes
        for attribute, pack in use.packers.items():
            key = attribute.removesuffix(name.replace(".", "_")), tuple(tensor.shape), tensor.dtype, form
            if key not in known:
                known[key] = packed_bytes(pack, *key[1:])
            found[name] += known[key]
    return found


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
