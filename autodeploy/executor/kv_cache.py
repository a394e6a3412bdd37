"""Which pages and state slots belong to which request. Numbers only; the tensors live with the model runner."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from autodeploy.executor.request import Request

SCRATCH_PAGE = SCRATCH_SLOT = 0  # takes the writes of padding; belongs to no request


class ResourceManager(Protocol):
    """Something that requests hold while they run."""

    def prepare(self, request: Request, num_tokens: int) -> bool:
        """Make room to compute the request's next `num_tokens` tokens. False when there is none; `free` undoes a part taken."""
        ...

    def update(self, request: Request) -> None:
        """Take note that `request.num_computed_tokens` has changed after a forward pass."""
        ...

    def free(self, request: Request) -> None:
        """Take back all that `request` holds; no harm when it holds nothing."""
        ...

    def fits(self, num_tokens: int) -> bool:
        """Whether a request of `num_tokens` tokens could ever have what it needs, were it alone."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens that all of it holds, or the scarcest part of it."""
        ...

    def audit(self, running: Iterable[Request]) -> None:
        """Only running requests hold anything, and enough for their computed tokens. Raises AssertionError with the numbers."""
        ...


@dataclass(slots=True)
class HeldPages:
    """What a request holds: row `row` of the page tables, its first `num_pages` entries less the `num_passed` ones given back."""

    row: int
    num_pages: int = 0
    num_passed: int = 0
    """Leading pages that lie behind the window."""


class KVCacheManager:
    """Hands out `num_pages` pages of `page_size` tokens each, of which page 0 is kept as scratch.

    With a `window` a request keeps only the pages that its next query can look back to: those behind come back as tokens are
    computed, and never more than `max_step` tokens ahead are prepared for (the most that one step computes).
    """

    def __init__(self, num_pages: int, page_size: int, window: int = 0, max_step: int = 0) -> None:
        assert num_pages >= 2 and page_size >= 1 and (max_step or not window), (num_pages, page_size, window, max_step)
        self.num_pages = num_pages
        self.page_size = page_size
        self.window, self.max_step = window, max_step
        self._free_pages = list(range(num_pages - 1, SCRATCH_PAGE, -1))
        self.tables = np.full((1, 1), SCRATCH_PAGE, dtype=np.int64)
        """[rows, pages]: the pages of the request of a row in order of position, scratch where there is none. It grows."""
        self._free_rows = [0]
        self._held: dict[int, HeldPages] = {}

    @property
    def num_free_pages(self) -> int:
        return len(self._free_pages)

    @property
    def num_usable_pages(self) -> int:
        """All pages but the scratch page."""
        return self.num_pages - 1

    @property
    def num_tokens(self) -> int:
        return self.num_usable_pages * self.page_size

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens of one request."""
        return -(-num_tokens // self.page_size)

    def num_pages_held(self, num_tokens: int) -> int:
        """The most pages that a request of `num_tokens` tokens holds at once."""
        whole = self.num_pages_for(num_tokens)
        return min(whole, self.num_pages_for(self.window + self.max_step) + 1) if self.window else whole

    def fits(self, num_tokens: int) -> bool:
        return self.num_pages_held(num_tokens) <= self.num_usable_pages

    def page_table(self, request_id: int) -> list[int]:
        """The request's pages in order of position, scratch for those given back."""
        held = self._held.get(request_id)
        return [] if held is None else self.tables[held.row, : held.num_pages].tolist()

    def row(self, request_id: int) -> int:
        """The row of `tables` with the pages of a request that has some."""
        return self._held[request_id].row

    def prepare(self, request: Request, num_tokens: int) -> bool:
        """Grow the page table to hold tokens [0, num_computed_tokens + num_tokens); all or nothing."""
        held = self._held.get(request.request_id)
        num_held = 0 if held is None else held.num_pages
        num_tokens = min(num_tokens, self.max_step) if self.window else num_tokens
        missing = self.num_pages_for(request.num_computed_tokens + num_tokens) - num_held
        if missing > len(self._free_pages):
            return False
        if held is None:
            held = self._held[request.request_id] = HeldPages(self._take_row())
        if missing > 0:
            held.num_pages += missing
            self._widen(held.num_pages)
            self.tables[held.row, num_held : held.num_pages] = [self._free_pages.pop() for _ in range(missing)]
        return True

    def _take_row(self) -> int:
        if not self._free_rows:
            num_rows = len(self.tables)
            self._free_rows = list(range(2 * num_rows - 1, num_rows - 1, -1))
            self.tables = np.concatenate([self.tables, np.full_like(self.tables, SCRATCH_PAGE)])
        return self._free_rows.pop()

    def _widen(self, num_pages: int) -> None:
        while self.tables.shape[1] < num_pages:
            self.tables = np.concatenate([self.tables, np.full_like(self.tables, SCRATCH_PAGE)], axis=1)

    def update(self, request: Request) -> None:
        """Give back the pages that no later query sees."""
        if not self.window or (held := self._held.get(request.request_id)) is None:
            return
        passed = max(0, request.num_computed_tokens - self.window + 1) // self.page_size
        self._give_back(held.row, held.num_passed, passed)
        held.num_passed = max(held.num_passed, passed)

    def free(self, request: Request) -> None:
        """Give the request's pages back; no harm when it has none."""
        if (held := self._held.pop(request.request_id, None)) is not None:
            self._give_back(held.row, held.num_passed, held.num_pages)
            self._free_rows.append(held.row)

    def _give_back(self, row: int, first: int, last: int) -> None:
        """Pages [first, last) of a row."""
        self._free_pages.extend(self.tables[row, first:last].tolist())
        self.tables[row, first:last] = SCRATCH_PAGE

    def check(self) -> None:
        """Audit every page: each usable one is free or owned by one request. Raises AssertionError with the numbers."""
        owned = [page for table in self._owned().values() for page in table]
        pages = owned + self._free_pages
        assert len(pages) == self.num_usable_pages, (
            f"{len(self._free_pages)} free + {len(owned)} owned pages, but {self.num_usable_pages} exist"
        )
        doubled = len(pages) - len(set(pages))
        assert doubled == 0, f"{doubled} pages are free or owned twice"
        assert SCRATCH_PAGE not in pages and max(pages) < self.num_pages, f"pages outside 1..{self.num_pages - 1} are in use"

    def audit(self, running: Iterable[Request]) -> None:
        held = {request.request_id: request.num_computed_tokens for request in running}
        strangers = [request_id for request_id, pages in self._owned().items() if pages and request_id not in held]
        assert not strangers, f"requests {strangers} do not run, but hold pages"
        for request_id, num_computed in held.items():
            num_tokens = len(self.page_table(request_id)) * self.page_size
            assert num_tokens >= num_computed, f"{num_computed} tokens in pages for {num_tokens}"
        self.check()

    def _owned(self) -> dict[int, list[int]]:
        return {request_id: self.page_table(request_id)[held.num_passed :] for request_id, held in self._held.items()}


class StateManager:
    """Hands out slots of recurrent states, one per running request; slot 0 is kept as scratch."""

    def __init__(self, num_slots: int) -> None:
        assert num_slots >= 2, num_slots
        self.num_slots = num_slots
        self._free_slots = list(range(num_slots - 1, SCRATCH_SLOT, -1))
        self._slots: dict[int, int] = {}

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def slot(self, request_id: int) -> int:
        return self._slots.get(request_id, SCRATCH_SLOT)

    def prepare(self, request: Request, num_tokens: int) -> bool:
        if request.request_id not in self._slots:
            if not self._free_slots:
                return False
            self._slots[request.request_id] = self._free_slots.pop()
        return True

    def update(self, request: Request) -> None:
        """Nothing to do: the slot stays until the request ends or is preempted."""

    def free(self, request: Request) -> None:
        if request.request_id in self._slots:
            self._free_slots.append(self._slots.pop(request.request_id))

    num_tokens = 0  # a state takes any number

    def fits(self, num_tokens: int) -> bool:
        return True

    def audit(self, running: Iterable[Request]) -> None:
        expected = sorted(request.request_id for request in running)
        assert sorted(self._slots) == expected, f"requests {sorted(self._slots)} hold state slots, but {expected} run"
        slots = sorted([*self._slots.values(), *self._free_slots])
        assert slots == list(range(1, self.num_slots)), f"state slots {slots} of {self.num_slots} are known"


@dataclass(frozen=True)
class CacheManager:
    """Everything that a request holds: pages in each pool, and a state slot."""

    pools: Mapping[str, KVCacheManager]
    """Pool name (`CacheSpec.pool`) -> its pages."""
    states: StateManager | None = None

    @cached_property
    def _managers(self) -> tuple[ResourceManager, ...]:
        return (*self.pools.values(), *([] if self.states is None else [self.states]))

    def prepare(self, request: Request, num_tokens: int) -> bool:
        return all(manager.prepare(request, num_tokens) for manager in self._managers)

    def update(self, request: Request) -> None:
        for manager in self._managers:
            manager.update(request)

    def free(self, request: Request) -> None:
        for manager in self._managers:
            manager.free(request)

    @property
    def num_tokens(self) -> int:
        return min(pool.num_tokens for pool in self.pools.values())

    def fits(self, num_tokens: int) -> bool:
        return all(manager.fits(num_tokens) for manager in self._managers)

    def audit(self, running: Iterable[Request]) -> None:
        running = list(running)
        for manager in self._managers:
            manager.audit(running)
