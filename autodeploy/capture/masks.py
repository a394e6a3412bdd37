"""Proof that a captured mask is what the attention op says: causal, within a window or not, and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autodeploy.capture.patches import MaskTag, where_defined
from autodeploy.errors import UnsupportedModelError
from autodeploy.program import Program, is_semantic

WINDOW, MASK = 5, 7
"""Argument numbers of the attention op."""


def prove_masks(program: Program, masks: list[MaskTag], skeleton: nn.Module) -> None:
    """Evaluate the rule of every mask in use and write its window into the attention nodes; refuse any other rule."""
    longest = 2 * max(4096, getattr(skeleton.config, "max_position_embeddings", 0) or 0)  # pyright: ignore
    windows: dict[int, int] = {}
    for node in program.graph.graph.nodes:
        if is_semantic(node, "attention") and (index := node.args[MASK]) >= 0:
            if index not in windows:
                windows[index] = window_of(masks[index].rule, longest, where_defined(skeleton))
            args = list(node.args)
            args[WINDOW], args[MASK] = windows[index], -1
            node.args = tuple(args)


def window_of(rule: Any, longest: int, where: str) -> int:
    """Window of a mask rule (batch, head, query, key) -> visible, probed up to query `longest`; 0 when it is plainly causal."""
    try:
        keys_seen = int(_visible(rule, torch.tensor([longest]), longest + 1).sum())
        window = keys_seen if keys_seen <= longest else 0
        if all(_agrees(rule, queries, window) for queries in _probes(longest)):
            return window
    except (RuntimeError, TypeError, IndexError) as error:
        raise UnsupportedModelError(f"its attention mask depends on more than positions ({error})", source=where) from error
    raise UnsupportedModelError("its attention mask is neither causal nor a sliding window over a causal one", source=where)


def _probes(longest: int) -> list[torch.Tensor]:
    """Every early query, and late ones at and around powers of two."""
    late = [q for power in range(8, longest.bit_length()) for q in (2**power - 1, 2**power, 2**power + 1) if q <= longest]
    return [torch.arange(256), *(torch.tensor([q]) for q in late)]


def _visible(rule: Any, queries: torch.Tensor, num_keys: int) -> torch.Tensor:
    keys = torch.arange(num_keys)
    seen = rule(torch.tensor(0), torch.tensor(0), queries[:, None], keys[None, :])
    return torch.as_tensor(seen).expand(len(queries), num_keys)


def _agrees(rule: Any, queries: torch.Tensor, window: int) -> bool:
    num_keys = int(queries.max()) + 9  # keys after the query must stay hidden
    keys = torch.arange(num_keys)[None, :]
    expected = keys <= queries[:, None]
    if window:
        expected &= keys > queries[:, None] - window
    return torch.equal(_visible(rule, queries, num_keys), expected)
