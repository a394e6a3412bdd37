"""A step's batch in parts of whole requests, which go through the stages of a pipeline one behind the other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from autodeploy.specs import BatchMetadata, input_spec

MIN_TOKENS = 32
"""Of a part: one of fewer tokens takes a stage as long as the whole batch would, since every weight is read for each part."""


def parts_of(batch: BatchMetadata, num_parts: int, min_tokens: int = MIN_TOKENS) -> list[BatchMetadata]:
    """Up to that many batches of about equally many tokens; together they have the batch's requests, and logits, in order."""
    ends = batch["cu_seqlens_q"][1:]
    num_parts = max(1, min(num_parts, int(ends[-1]) // min_tokens))
    wanted = ends[-1] * np.arange(1, num_parts) / num_parts  # where parts would end if requests could be cut
    stops = 1 + np.abs(ends[:, None] - wanted).argmin(axis=0)  # the request that ends next to each
    bounds = np.unique([0, *stops, len(ends)]).tolist()
    return [batch] if len(bounds) == 2 else [_part(batch, first, stop) for first, stop in pairwise(bounds)]


def _part(batch: BatchMetadata, first: int, stop: int) -> BatchMetadata:
    """Requests [first, stop) of a batch."""
    begin, end = batch["cu_seqlens_q"][[first, stop]]
    slices: dict[Any, slice] = {"T": slice(begin, end), "B": slice(first, stop), "B+1": slice(first, stop + 1)}
    part = {name: array[tuple(slices.get(dim, slice(None)) for dim in input_spec(name).shape)] for name, array in batch.items()}
    rows = batch["logits_indices"]
    return {
        **part,
        "cu_seqlens_q": part["cu_seqlens_q"] - begin,
        "logits_indices": rows[(rows >= begin) & (rows < end)] - begin,
    }
