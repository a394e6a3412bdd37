"""A rank's part of a parameter, narrowed down to what is stored, is that part of the whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autodeploy.capture.quantized import dense_view
from autodeploy.formats import SCHEMES, Format
from autodeploy.recipes import (
    Cast,
    Cat,
    Dequantize,
    Leaf,
    Pad,
    Part,
    Permute,
    Quantize,
    Recipe,
    Reshape,
    Shard,
    Slice,
    Stack,
    Take,
    evaluate,
    integers,
)
from autodeploy.shards import narrowed, of_rank
from tests.capture.test_quantized import BY_NAME

STORED = {
    "a": torch.randn(8, 64, dtype=torch.float64),
    "b": torch.randn(4, 64, dtype=torch.float64),
    "c": torch.randn(8, 64, dtype=torch.float64),
}
A, B, C = (Take(name) for name in STORED)
RECIPES: dict[str, Recipe] = {
    "as stored": A,
    "cast": Cast(A, torch.float32),
    "joined rows": Cat((A, B, C), 0),
    "joined columns": Cat((A, C), 1),
    "stacked": Stack((A, C), 0),
    "turned": Permute(A, (1, 0)),
    "part of a part": Slice(A, 0, 2, 8),
    "other shape": Reshape(A, (2, 4, 64)),
    "rounded": Quantize(A, SCHEMES["int8"]),
    "rounded by groups": Quantize(A, SCHEMES["int4"]),
}


class Reader:
    """Answers for leaves, and notes how much of each was asked for."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.asked = tensors, dict[Leaf, int]()

    def fetch(self, leaf: Leaf) -> Tensor:
        found = leaf.of(self.tensors[leaf.name]) if isinstance(leaf, Part) else self.tensors[leaf.name]
        self.asked[leaf] = found.nbytes
        return found

    def describe(self, leaf: Leaf) -> Tensor:
        whole = self.tensors[leaf.name]
        return torch.empty_like(leaf.of(whole) if isinstance(leaf, Part) else whole, device="meta")


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", RECIPES)
def test_a_part_is_that_part_of_the_whole(name: str, dim: int) -> None:
    reader, recipe = Reader(STORED), RECIPES[name]
    whole = evaluate(recipe, reader.fetch)
    size = whole.shape[dim]
    for start, stop in ((0, size // 2), (size // 2, size), (1, max(size - 1, 2))):
        part = narrowed(recipe, dim, start, stop, reader.describe)
        assert torch.equal(evaluate(part, reader.fetch), whole.narrow(dim, start, stop - start))


def test_ranges_of_a_rank_one_after_the_other_and_zeros() -> None:
    reader = Reader(STORED)
    shard = Shard(A, -2, (((4, 6), (0, 1)), ((7, 8), (-2, 0)), ((-3, 0),)))
    first, second, third = (evaluate(of_rank(shard, rank, reader.describe), reader.fetch) for rank in range(3))
    assert torch.equal(first, STORED["a"][[4, 5, 0]])
    assert torch.equal(second, torch.cat([STORED["a"][7:], torch.zeros(2, 64)]))
    assert torch.equal(third, torch.zeros(3, 64))


FORMATS: dict[str, Format] = {
    **SCHEMES,
    "fp8 blocks": replace(SCHEMES["fp8"], block=(32, 32)),
    "one scale": replace(SCHEMES["fp8"], block=(0, 0)),
}


def stored_in(form: Format) -> tuple[Dequantize, Reader]:
    dense = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    if form.block[0] == 1:
        parts = form.quantize(dense)
    else:
        counts = [1 if block == 0 else size // block for size, block in zip(dense.shape, form.block, strict=True)]
        parts = dense.to(torch.float8_e4m3fn), torch.rand(counts) + 0.5
    names = [f"w.{part}" for part in form.parts]
    return Dequantize(tuple(map(Take, names)), form, (64, 128)), Reader(dict(zip(names, parts, strict=True)))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", FORMATS)
def test_a_part_of_a_quantized_matrix_is_read_in_part(name: str, dim: int) -> None:
    recipe, reader = stored_in(FORMATS[name])
    whole = evaluate(recipe, reader.fetch)
    size = whole.shape[dim]
    reader.asked.clear()
    part: Any = narrowed(recipe, dim, size // 2, size, reader.describe)
    assert torch.equal(evaluate(part, reader.fetch), whole.narrow(dim, size // 2, size // 2))
    codes = part.parts[0]
    assert isinstance(part, Dequantize) and isinstance(codes, Part)
    assert reader.asked[codes] == reader.tensors["w.codes"].nbytes / 2
    if FORMATS[name].is_integers:
        mine, theirs = integers(part, reader.fetch), integers(recipe, reader.fetch).narrow(dim, size // 2, size)
        assert torch.equal(mine.numbers, theirs.numbers) and torch.equal(mine.scales, theirs.scales)


def test_a_part_between_borders_is_cut_from_the_blocks_around_it() -> None:
    recipe, reader = stored_in(replace(SCHEMES["fp8"], block=(16, 32)))
    part = narrowed(recipe, 0, 20, 40, reader.describe)
    assert torch.equal(evaluate(part, reader.fetch), evaluate(recipe, reader.fetch)[20:40])
    codes = next(leaf for leaf in part.leaves() if leaf.name == "w.codes")
    assert isinstance(codes, Part) and codes.bounds == ((0, 16, 48),)


def opened(name: str, rows: int, columns: int) -> tuple[Dequantize, Reader]:
    """A matrix as a producer's checkpoint holds it."""
    torch.manual_seed(0)
    stored, _ = BY_NAME[name].make(rows, columns)
    reader = Reader({f"m.{suffix}": part for suffix, part in stored.items()})
    view = dense_view({"quantization_config": BY_NAME[name].settings}, FakeFolder(reader))  # pyright: ignore[reportArgumentType]
    (recipe,) = view.recipes.values()
    assert isinstance(recipe, Dequantize)
    return recipe, reader


class FakeFolder:
    """Tensors in memory, asked as those of a folder are."""

    folder = Path("nowhere")

    def __init__(self, reader: Reader) -> None:
        self.reader, self.fetch, self.describe_leaf = reader, reader.fetch, reader.describe

    def names(self) -> list[str]:
        return list(self.reader.tensors)

    def where(self, name: str) -> str:
        return f"nowhere/{name}"

    def describe(self, name: str) -> Tensor:
        return self.reader.describe(Take(name))


WHOLE_COLUMNS = ("bitsandbytes nf4", "bitsandbytes nf4 nested")
"""Rows lie one behind the other in blocks, so that columns cannot be read alone."""


def is_shared(recipe: Dequantize, role: str, count: int, dim: int) -> bool:
    """Whether each row (dim 0), or each column, needs all of a stored part."""
    if role.endswith("map") or count == 1 or role in ("order", "columns"):
        return dim == 0 or role.endswith("map") or count == 1
    is_by_row = recipe.format.block[1] in (0, recipe.shape[1]) or "order" in recipe.format.parts
    return dim == 1 and role in ("scales", "zeros") and is_by_row


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", BY_NAME)
def test_a_rank_reads_its_part_of_what_producers_store(name: str, dim: int) -> None:
    recipe, reader = opened(name, 256, 512)
    whole = evaluate(recipe, reader.fetch)
    size = whole.shape[dim]
    for start, stop in ((0, size // 2), (size // 2, size), (size // 4 + 1, size // 4 + 3)):
        part = narrowed(recipe, dim, start, stop, reader.describe)
        reader.asked.clear()
        assert torch.equal(evaluate(part, reader.fetch), whole.narrow(dim, start, stop - start))
        if name in WHOLE_COLUMNS and dim == 1:
            assert isinstance(part, Slice) and part.source is recipe
            continue
        for role, leaf in zip(recipe.format.parts, recipe.leaves(), strict=True):
            stored = reader.tensors[leaf.name]
            asked = sum(num_bytes for each, num_bytes in reader.asked.items() if each.name == leaf.name)
            assert asked <= stored.nbytes * (1 if is_shared(recipe, role, stored.numel(), dim) else 0.5), (role, start, stop)


def test_zeros_go_behind() -> None:
    assert torch.equal(Pad(A, 0, 10).apply(STORED["a"])[8:], torch.zeros(2, 64))
