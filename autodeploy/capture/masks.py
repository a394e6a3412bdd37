"""Proof that a captured mask is what the attention op says: causal, within a window or chunks or not, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from autodeploy.capture.mask_tags import MaskTag
from autodeploy.custom_ops.attention import Visible
from autodeploy.errors import UnsupportedModelError
from autodeploy.program import Program, is_semantic
from autodeploy.transforms.prove_packing import source_of
from autodeploy.transforms.rewrite import arguments

BEYOND = 9
"""Keys after the last query that a rule is asked about; they must stay hidden."""

Rows = Callable[[Tensor, int], Tensor]
"""(queries [n], number of keys) -> visible [n, keys]."""


def prove_masks(program: Program, masks: list[MaskTag], skeleton: nn.Module) -> None:
    """Evaluate the rule of every mask in use and write its window and chunk into the attention nodes; refuse any other rule."""
    longest = 2 * max(4096, getattr(skeleton.config, "max_position_embeddings", 0) or 0)  # pyright: ignore
    proved: dict[int, Visible] = {}
    for node in program.graph.graph.nodes:
        if is_semantic(node, "attention") and (index := arguments(node)["mask"]) >= 0:
            if index not in proved:
                proved[index] = visible_by_rule(masks[index].rule, longest, **source_of(node))
            replaced = {"window": proved[index].window, "mask": -1, "chunk": proved[index].chunk}
            node.args = tuple((arguments(node) | replaced).values())


def visible_by_rule(rule: Any, longest: int, **where: str) -> Visible:
    """What a mask rule (batch, head, query, key) -> visible lets a query see, probed up to query `longest`."""

    def rows(queries: Tensor, num_keys: int) -> Tensor:
        seen = rule(torch.tensor(0), torch.tensor(0), queries[:, None], torch.arange(num_keys)[None, :])
        return torch.as_tensor(seen).expand(len(queries), num_keys)

    try:
        return _prove(rows, longest, list(_probes(longest)), BEYOND)
    except (RuntimeError, TypeError, IndexError) as error:
        raise UnsupportedModelError(
            f"its attention mask depends on more than positions ({str(error).splitlines()[0]})", **where
        ) from error
    except _NotCausal as error:
        raise UnsupportedModelError(str(error), **where) from error


def visible_in(seen: Tensor, **where: str) -> Visible:
    """What a matrix [T, T] of visible keys per query lets a query see."""
    try:
        return _prove(lambda queries, num_keys: seen[queries, :num_keys], len(seen) - 1, [torch.arange(len(seen))], 0)
    except _NotCausal as error:
        raise UnsupportedModelError(str(error), **where) from error


class _NotCausal(Exception):
    """What is wrong with a mask."""


def _prove(rows: Rows, last: int, probes: list[Tensor], beyond: int) -> Visible:
    """The window or chunk suggested by the `last` query, when all probes agree with it."""
    for visible in _candidates(rows, last):
        if all(_agrees(rows, queries, visible, beyond) for queries in probes):
            return visible
    for queries in probes:
        _refuse_future(queries, rows(queries, int(queries.max()) + 1 + beyond))
    raise _NotCausal("its attention mask is neither causal nor a window or chunks of a causal one")


def _candidates(rows: Rows, last: int) -> Iterator[Visible]:
    """No limit, a window or chunks, by the first keys that two late queries see."""
    if (first := _first_key(rows, last)) == 0:
        yield Visible()
    else:
        yield Visible(window=last - first + 1)
        yield Visible(chunk=max(first - _first_key(rows, first - 1), 0))


def _first_key(rows: Rows, query: int) -> int:
    return int(rows(torch.tensor([query]), query + 1)[0].int().argmax())


def _probes(longest: int) -> Iterator[Tensor]:
    """Every early query, and late ones at and around powers of two."""
    yield torch.arange(256)
    late = [q for power in range(8, longest.bit_length()) for q in (2**power - 1, 2**power, 2**power + 1) if q <= longest]
    yield from (torch.tensor([q]) for q in late)


def _agrees(rows: Rows, queries: Tensor, visible: Visible, beyond: int) -> bool:
    num_keys = int(queries.max()) + 1 + beyond
    return torch.equal(rows(queries, num_keys), visible.mask(queries[:, None], torch.arange(num_keys)[None, :]))


def _refuse_future(queries: Tensor, seen: Tensor) -> None:
    """Name the first token that sees one after it."""
    ahead = (seen & (torch.arange(seen.shape[1])[None] > queries[:, None])).nonzero()
    if len(ahead) and bool(seen.all()):
        raise _NotCausal("its attention is bidirectional: every token sees all others")
    if len(ahead):
        query, key = int(queries[ahead[0, 0]]), int(ahead[0, 1])
        raise _NotCausal(f"its attention is not causal: token {query} sees token {key}, which comes after it")
