"""Pages are handed out once, all or nothing, and come back."""

import pytest

from autodeploy.config import SamplingParams
from autodeploy.executor.kv_cache import SCRATCH_PAGE, KVCacheManager
from autodeploy.executor.request import Request


def make(request_id: int, prompt: int = 4) -> Request:
    return Request(request_id, [0] * prompt, SamplingParams(), frozenset(), 4)


def test_sizes() -> None:
    kv = KVCacheManager(num_pages=5, page_size=4)
    assert (kv.num_pages, kv.num_usable_pages, kv.num_free_pages) == (5, 4, 4)
    assert [kv.num_pages_for(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]
    assert kv.fits(16) and not kv.fits(17)


def test_prepare_grows_the_table_only_when_needed() -> None:
    kv = KVCacheManager(5, 4)
    request = make(1)
    assert kv.prepare(request, 4)
    first = list(kv.page_table(1))
    assert len(first) == 1 and SCRATCH_PAGE not in first
    request.num_computed_tokens = 3
    assert kv.prepare(request, 1)
    assert kv.page_table(1) == first
    request.num_computed_tokens = 4
    assert kv.prepare(request, 1)
    assert kv.page_table(1)[:1] == first and len(kv.page_table(1)) == 2
    kv.check()


def test_prepare_takes_nothing_when_pages_lack() -> None:
    kv = KVCacheManager(5, 4)
    assert kv.prepare(make(1), 12)
    other = make(2)
    assert not kv.prepare(other, 5)
    assert kv.page_table(2) == [] and kv.num_free_pages == 1
    assert kv.prepare(other, 4)
    assert kv.num_free_pages == 0
    kv.check()


def test_the_scratch_page_is_never_handed_out() -> None:
    kv = KVCacheManager(5, 4)
    assert kv.prepare(make(1), 16)
    assert sorted(kv.page_table(1)) == [1, 2, 3, 4]


def test_free_twice_or_unknown_does_no_harm() -> None:
    kv = KVCacheManager(5, 4)
    request = make(1)
    kv.free(request)
    assert kv.prepare(request, 9)
    kv.update(request)
    kv.free(request)
    kv.free(request)
    assert kv.num_free_pages == 4 and kv.page_table(1) == []
    kv.check()


def test_check_finds_a_page_lost_doubled_or_out_of_range() -> None:
    for damage in ("lost", "doubled", "scratch"):
        kv = KVCacheManager(5, 4)
        kv.prepare(make(1), 8)
        if damage == "lost":
            kv.page_table(1).pop()
        elif damage == "doubled":
            kv.page_table(1)[0] = kv.page_table(1)[1]
        else:
            kv.page_table(1)[0] = SCRATCH_PAGE
        with pytest.raises(AssertionError, match="pages"):
            kv.check()
