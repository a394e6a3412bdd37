"""One step's scheduled requests -> the arrays that the graph reads. The only place where they are built."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autodeploy.executor.kv_cache import SCRATCH_PAGE, CacheManager
from autodeploy.executor.scheduler import ScheduledBatch, ScheduledRequest
from autodeploy.specs import BatchMetadata, input_of_pool

MIN_PAGES = 8
"""Columns of the narrowest page table; wider ones are powers of two."""


@dataclass(frozen=True, slots=True)
class WantedRows:
    """Rows [start, stop) of the step's logits belong to this entry; the last one is sampled from if the entry samples."""

    entry: ScheduledRequest
    start: int
    stop: int


class BatchBuilder:
    """Fills persistent arrays in place; what `build` returns are views of them, valid until the next call.

    Arrays grow when a step needs more room (a prompt computed whole, beyond max_num_tokens).
    """

    def __init__(self, kv: CacheManager, max_batch_size: int, max_num_tokens: int) -> None:
        self.kv, self.pools = kv, list(kv.pools.items())
        self._reserve(max_num_tokens, max_batch_size, 1)

    def _reserve(self, num_tokens: int, num_requests: int, num_pages: int) -> None:
        self.tokens = np.zeros((3, 1, num_tokens), dtype=np.int64)  # input_ids, position_ids, rope_len
        self.slot_mapping = np.zeros((len(self.pools), num_tokens), dtype=np.int64)
        self.page_table = np.full((len(self.pools), num_requests, num_pages), SCRATCH_PAGE, dtype=np.int64)
        self.cu_seqlens_q = np.zeros(num_requests + 1, dtype=np.int32)
        self.seq_lens = np.zeros(num_requests, dtype=np.int32)
        self.state_slots = np.zeros(num_requests, dtype=np.int64)
        self.logits_indices = np.zeros(num_tokens, dtype=np.int64)

    def build(self, batch: ScheduledBatch) -> tuple[BatchMetadata, list[WantedRows]]:
        """The step's arrays, and which rows of its logits belong to whom."""
        entries = batch.requests
        num_pages = max((pool.num_pages_for(entry.stop) for _, pool in self.pools for entry in entries), default=1)
        num_pages = max(MIN_PAGES, 1 << (num_pages - 1).bit_length())  # few different shapes
        self._ensure_room(batch.num_tokens, len(entries), num_pages)
        rows: list[WantedRows] = []
        first = 0
        for i, entry in enumerate(entries):
            last = first + entry.num_tokens
            self._fill(i, entry, slice(first, last))
            self.cu_seqlens_q[i + 1], self.seq_lens[i] = last, entry.stop
            self._want(entry, first, last, rows)
            first = last
        return self._views(first, len(entries), num_pages, rows[-1].stop if rows else 0), rows

    def _ensure_room(self, num_tokens: int, num_requests: int, num_pages: int) -> None:
        have = (self.tokens.shape[2], *self.page_table.shape[1:])
        need = (num_tokens, num_requests, num_pages)
        if any(n > h for n, h in zip(need, have, strict=True)):
            self._reserve(*(max(2 * n if n > h else h, h) for n, h in zip(need, have, strict=True)))

    def _fill(self, i: int, entry: ScheduledRequest, where: slice) -> None:
        request, (input_ids, positions, rope_len) = entry.request, self.tokens[:, 0, where]
        input_ids[:] = request.token_ids(entry.start, entry.stop)
        positions[:] = np.arange(entry.start, entry.stop)
        np.maximum(positions + 1, request.rope_base, out=rope_len)
        for (_, pool), table, slots in zip(self.pools, self.page_table, self.slot_mapping, strict=True):
            pages, row, slots = pool.page_table(request.request_id)[: pool.num_pages_for(entry.stop)], table[i], slots[where]
            row[: len(pages)] = pages
            row[len(pages) :] = SCRATCH_PAGE
            np.multiply(row[positions // pool.page_size], pool.page_size, out=slots)
            slots += positions % pool.page_size
        if self.kv.states is not None:
            self.state_slots[i] = self.kv.states.slot(request.request_id)

    def _want(self, entry: ScheduledRequest, first: int, last: int, rows: list[WantedRows]) -> None:
        wanted = range(first if entry.request.return_context_logits else last - 1, last)
        if entry.samples or entry.request.return_context_logits:
            start = rows[-1].stop if rows else 0
            rows.append(WantedRows(entry, start, start + len(wanted)))
            self.logits_indices[start : start + len(wanted)] = wanted

    def _views(self, num_tokens: int, num_requests: int, num_pages: int, num_rows: int) -> BatchMetadata:
        input_ids, position_ids, rope_len = self.tokens[:, :, :num_tokens]
        paged = {
            input_of_pool(name, pool): array
            for (pool, _), table, slots in zip(self.pools, self.page_table, self.slot_mapping, strict=True)
            for name, array in (("page_table", table[:num_requests, :num_pages]), ("slot_mapping", slots[:num_tokens]))
        }
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "rope_len": rope_len,
            **paged,
            "cu_seqlens_q": self.cu_seqlens_q[: num_requests + 1],
            "seq_lens": self.seq_lens[:num_requests],
            "state_slots": self.state_slots[:num_requests],
            "logits_indices": self.logits_indices[:num_rows],
        }
