"""Which pages of the paged KV pool belong to which request. Numbers only; the tensors live with the model runner."""

from typing import Protocol

from autodeploy.executor.request import Request

SCRATCH_PAGE = 0  # takes the writes of padding; belongs to no request


class ResourceManager(Protocol):
    """Something that requests hold while they run."""

    def prepare(self, request: Request, num_tokens: int) -> bool:
        """Make room to compute the next `num_tokens` tokens of `request`; False, with nothing taken, when there is none."""
        ...

    def update(self, request: Request) -> None:
        """Take note that `request.num_computed_tokens` has changed after a forward pass."""
        ...

    def free(self, request: Request) -> None:
        """Take back all that `request` holds; no harm when it holds nothing."""
        ...


class KVCacheManager:
    """Hands out `num_pages` pages of `page_size` tokens each, of which page 0 is kept as scratch."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        assert num_pages >= 2 and page_size >= 1, (num_pages, page_size)
        self.num_pages = num_pages
        self.page_size = page_size
        self._free_pages = list(range(num_pages - 1, SCRATCH_PAGE, -1))
        self._page_tables: dict[int, list[int]] = {}

    @property
    def num_free_pages(self) -> int:
        return len(self._free_pages)

    @property
    def num_usable_pages(self) -> int:
        """All pages but the scratch page."""
        return self.num_pages - 1

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens of one request."""
        return -(-num_tokens // self.page_size)

    def fits(self, num_tokens: int) -> bool:
        """Whether a request of `num_tokens` tokens could ever have its pages, were it alone."""
        return self.num_pages_for(num_tokens) <= self.num_usable_pages

    def page_table(self, request_id: int) -> list[int]:
        """The request's pages in order of position. The list is live: do not change or keep it."""
        return self._page_tables.get(request_id, [])

    def prepare(self, request: Request, num_tokens: int) -> bool:
        """Grow the page table to hold tokens [0, num_computed_tokens + num_tokens); all or nothing."""
        table = self._page_tables.get(request.request_id, [])
        missing = self.num_pages_for(request.num_computed_tokens + num_tokens) - len(table)
        if missing > len(self._free_pages):
            return False
        for _ in range(missing):
            table.append(self._free_pages.pop())
        self._page_tables[request.request_id] = table
        return True

    def update(self, request: Request) -> None:
        """Nothing to do: pages stay until the request ends or is preempted."""

    def free(self, request: Request) -> None:
        """Give the request's pages back; no harm when it has none."""
        self._free_pages.extend(self._page_tables.pop(request.request_id, []))

    def check(self) -> None:
        """Audit every page: each usable one is free or owned by one request. Raises AssertionError with the numbers."""
        owned = [page for table in self._page_tables.values() for page in table]
        pages = owned + self._free_pages
        assert len(pages) == self.num_usable_pages, (
            f"{len(self._free_pages)} free + {len(owned)} owned pages, but {self.num_usable_pages} exist"
        )
        doubled = len(pages) - len(set(pages))
        assert doubled == 0, f"{doubled} pages are free or owned twice"
        assert SCRATCH_PAGE not in pages and max(pages) < self.num_pages, f"pages outside 1..{self.num_pages - 1} are in use"
