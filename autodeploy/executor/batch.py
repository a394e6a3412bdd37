"""One step's scheduled requests -> the arrays that the graph reads. The only place where they are built."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autodeploy.executor.kv_cache import SCRATCH_PAGE, KVCacheManager
from autodeploy.executor.scheduler import ScheduledBatch, ScheduledRequest
from autodeploy.specs import BatchMetadata


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

    def __init__(self, kv: KVCacheManager, max_batch_size: int, max_num_tokens: int) -> None:
        self.kv = kv
        self._reserve(max_num_tokens, max_batch_size, 1)

    def _reserve(self, num_tokens: int, num_requests: int, num_pages: int) -> None:
        self.tokens = np.zeros((4, 1, num_tokens), dtype=np.int64)  # input_ids, position_ids, rope_len, slot_mapping
        self.page_table = np.full((num_requests, num_pages), SCRATCH_PAGE, dtype=np.int64)
        self.cu_seqlens_q = np.zeros(num_requests + 1, dtype=np.int32)
        self.seq_lens = np.zeros(num_requests, dtype=np.int32)
        self.logits_indices = np.zeros(num_tokens, dtype=np.int64)

    def build(self, batch: ScheduledBatch) -> tuple[BatchMetadata, list[WantedRows]]:
        """The step's arrays, and which rows of its logits belong to whom."""
        entries = batch.requests
        num_pages = max(self.kv.num_pages_for(entry.stop) for entry in entries)
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
        have = (self.tokens.shape[2], *self.page_table.shape)
        need = (num_tokens, num_requests, num_pages)
        if any(n > h for n, h in zip(need, have, strict=True)):
            self._reserve(*(max(2 * n if n > h else h, h) for n, h in zip(need, have, strict=True)))

    def _fill(self, i: int, entry: ScheduledRequest, where: slice) -> None:
        request, (input_ids, positions, rope_len, slots) = entry.request, self.tokens[:, 0, where]
        input_ids[:] = request.token_ids(entry.start, entry.stop)
        positions[:] = np.arange(entry.start, entry.stop)
        np.maximum(positions + 1, request.rope_base, out=rope_len)
        pages = self.kv.page_table(request.request_id)[: self.kv.num_pages_for(entry.stop)]
        row = self.page_table[i]
        row[: len(pages)] = pages
        row[len(pages) :] = SCRATCH_PAGE
        np.multiply(row[positions // self.kv.page_size], self.kv.page_size, out=slots)
        slots += positions % self.kv.page_size

    def _want(self, entry: ScheduledRequest, first: int, last: int, rows: list[WantedRows]) -> None:
        wanted = range(first if entry.request.return_context_logits else last - 1, last)
        if entry.samples or entry.request.return_context_logits:
            start = rows[-1].stop if rows else 0
            rows.append(WantedRows(entry, start, start + len(wanted)))
            self.logits_indices[start : start + len(wanted)] = wanted

    def _views(self, num_tokens: int, num_requests: int, num_pages: int, num_rows: int) -> BatchMetadata:
        input_ids, position_ids, rope_len, slot_mapping = self.tokens[:, :, :num_tokens]
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "rope_len": rope_len,
            "slot_mapping": slot_mapping[0],
            "page_table": self.page_table[:num_requests, :num_pages],
            "cu_seqlens_q": self.cu_seqlens_q[: num_requests + 1],
            "seq_lens": self.seq_lens[:num_requests],
            "logits_indices": self.logits_indices[:num_rows],
        }
