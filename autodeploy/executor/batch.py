"""One step's scheduled requests -> the arrays that the graph reads. The only place where they are built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter

import numpy as np

from autodeploy.executor.kv_cache import SCRATCH_PAGE, CacheManager
from autodeploy.executor.request import Request
from autodeploy.executor.scheduler import ScheduledBatch, ScheduledRequest
from autodeploy.specs import BatchMetadata, input_of_pool

MIN_PAGES = 8
"""Columns of the narrowest page table; wider ones are powers of two."""


@dataclass(slots=True)
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
        num_requests, num_tokens = len(entries), batch.num_tokens
        starts, counts = (_column(entries, name) for name in ("start", "num_tokens"))
        longest = int((starts + counts).max())
        num_pages = max([MIN_PAGES, *(pool.num_pages_for(longest) for _, pool in self.pools)])
        num_pages = 1 << (num_pages - 1).bit_length()  # few different shapes
        self._ensure_room(num_tokens, num_requests, num_pages)
        np.cumsum(counts, out=self.cu_seqlens_q[1 : num_requests + 1])
        np.add(starts, counts, out=self.seq_lens[:num_requests])
        owners = np.repeat(np.arange(num_requests), counts)  # of each token, the number of its entry
        self._fill_tokens(entries, starts, owners)
        self._fill_pages(entries, num_pages, owners)
        rows = self._wanted(entries)
        self._built = self._views(num_tokens, num_requests, num_pages, rows[-1].stop if rows else 0)
        return self._built, rows

    def advance(self, tokens: np.ndarray, requests: Sequence[Request]) -> BatchMetadata | None:
        """The arrays of the step after the one built last, in which each of these requests goes on with one of `tokens`.

        That one was a decode of them, in this order. None, and nothing has changed, when one of them cannot have its next page.
        """
        count, positions = len(tokens), self.tokens[1, 0, : len(tokens)]
        if not all(self._turn_pages(i, positions + 1, requests) for i in range(len(self.pools))):
            return None
        self.tokens[0, 0, :count] = tokens
        self.tokens[1:, 0, :count] += 1
        self.seq_lens[:count] += 1
        self._fill_slots(np.arange(count))
        return self._built

    def _turn_pages(self, number: int, positions: np.ndarray, requests: Sequence[Request]) -> bool:
        """Have a page for each of these positions that is the first of one."""
        name, pool = self.pools[number]
        table = self._built[input_of_pool("page_table", name)]
        for i in np.flatnonzero(positions % pool.page_size == 0).tolist():
            request, position = requests[i], int(positions[i])
            request.num_computed_tokens = position
            pool.update(request)
            if position // pool.page_size >= table.shape[1] or not pool.prepare(request, 1):
                return False
            held = pool.tables[pool.row(request.request_id), : table.shape[1]]
            table[i, : len(held)] = held
        return True

    def _ensure_room(self, num_tokens: int, num_requests: int, num_pages: int) -> None:
        have = (self.tokens.shape[2], *self.page_table.shape[1:])
        need = (num_tokens, num_requests, num_pages)
        if any(n > h for n, h in zip(need, have, strict=True)):
            self._reserve(*(max(2 * n if n > h else h, h) for n, h in zip(need, have, strict=True)))

    def _fill_tokens(self, entries: Sequence[ScheduledRequest], starts: np.ndarray, owners: np.ndarray) -> None:
        input_ids, positions, rope_len = self.tokens[:, 0, : len(owners)]
        tokens = chain.from_iterable([entry.request.token_ids(entry.start, entry.stop) for entry in entries])
        input_ids[:] = np.fromiter(tokens, np.int64, len(owners))
        np.add(np.arange(len(owners)), (starts - self.cu_seqlens_q[: len(entries)])[owners], out=positions)
        bases = _column(entries, "request.rope_base")
        np.maximum(positions + 1, bases[owners], out=rope_len)

    def _fill_pages(self, entries: Sequence[ScheduledRequest], num_pages: int, owners: np.ndarray) -> None:
        ids = [entry.request.request_id for entry in entries]
        for (_, pool), table in zip(self.pools, self.page_table, strict=True):
            found = pool.tables[np.fromiter(map(pool.row, ids), np.int64, len(ids)), :num_pages]
            table[: len(ids), : found.shape[1]] = found
            table[: len(ids), found.shape[1] : num_pages] = SCRATCH_PAGE
        self._fill_slots(owners)
        if self.kv.states is not None:
            self.state_slots[: len(ids)] = np.fromiter(map(self.kv.states.slot, ids), np.int64, len(ids))

    def _fill_slots(self, owners: np.ndarray) -> None:
        """Where each token is written. owners: of each token, the number of its request."""
        positions = self.tokens[1, 0, : len(owners)]
        for (_, pool), table, slots in zip(self.pools, self.page_table, self.slot_mapping, strict=True):
            page, within = np.divmod(positions, pool.page_size)
            np.add(table[owners, page] * pool.page_size, within, out=slots[: len(owners)])

    def _wanted(self, entries: Sequence[ScheduledRequest]) -> list[WantedRows]:
        """Of each entry that samples its last token, or all of them; `logits_indices` says where they are."""
        rows: list[WantedRows] = []
        start = 0
        for entry, first, last in zip(entries, self.cu_seqlens_q.tolist(), self.cu_seqlens_q[1:].tolist(), strict=False):
            wants_all = entry.request.return_context_logits
            if wants_all or entry.samples:
                stop = start + (last - first if wants_all else 1)
                self.logits_indices[start:stop] = range(first, last) if wants_all else last - 1
                rows.append(WantedRows(entry, start, stop))
                start = stop
        return rows

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


def _column(entries: Sequence[ScheduledRequest], name: str) -> np.ndarray:
    """One attribute of all entries."""
    return np.fromiter(map(attrgetter(name), entries), np.int64, len(entries))
