"""Pages are handed out once, all or nothing, and come back."""

import pytest

from autodeploy.config import SamplingParams
from autodeploy.errors import ConfigError
from autodeploy.executor.kv_cache import SCRATCH_PAGE, CacheManager, KVCacheManager, StateManager
from autodeploy.executor.pool_sizes import PoolSizes
from autodeploy.executor.request import Request
from autodeploy.specs import PagedKV, RecurrentState, SlidingWindowKV


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
            kv._held[1].num_pages -= 1
        elif damage == "doubled":
            kv.tables[kv.row(1), 0] = kv.tables[kv.row(1), 1]
        else:
            kv.tables[kv.row(1), 0] = SCRATCH_PAGE
        with pytest.raises(AssertionError, match="pages"):
            kv.check()


def test_a_window_keeps_only_what_the_next_query_sees() -> None:
    kv = KVCacheManager(num_pages=6, page_size=4, window=5, max_step=8)
    assert kv.fits(10_000) and kv.num_pages_held(10_000) == 5 and kv.num_pages_held(4) == 1
    request = make(1, 100)
    while request.num_computed_tokens < 100:
        assert kv.prepare(request, 100 - request.num_computed_tokens)
        table = kv.page_table(1)
        step = min(8, 100 - request.num_computed_tokens)
        first = max(0, request.num_computed_tokens - 5 + 1)  # what the first query of the step sees
        seen = range(first // 4, -(-(request.num_computed_tokens + step) // 4))
        assert all(table[i] != SCRATCH_PAGE for i in seen)
        assert 5 - kv.num_free_pages <= kv.num_pages_held(100)
        request.num_computed_tokens += step
        kv.update(request)
        kv.audit([request])
    assert kv.page_table(1)[:23] == [SCRATCH_PAGE] * 23 and kv.num_free_pages >= 3
    kv.free(request)
    assert kv.num_free_pages == 5
    kv.audit([])


def test_states_are_one_slot_each_and_what_is_taken_without_the_rest_comes_back() -> None:
    pages, states = KVCacheManager(3, 4), StateManager(3)
    manager = CacheManager({"pages": pages}, states)
    first, second, third = make(1), make(2), make(3)
    assert manager.prepare(first, 4) and manager.prepare(second, 4)
    assert {states.slot(1), states.slot(2)} == {1, 2}
    assert not manager.prepare(third, 4)
    manager.free(third)
    manager.audit([first, second])
    assert manager.prepare(first, 1) and states.num_free_slots == 0
    manager.free(first)
    assert states.num_free_slots == 1 and pages.num_free_pages == 1
    with pytest.raises(AssertionError, match="do not run"):
        manager.audit([])
    manager.free(second)
    manager.audit([])


KV, WINDOW, STATE = PagedKV(2, 8, 8, "float32"), SlidingWindowKV(2, 8, 8, "float32", window=16), RecurrentState((4, 8), "float32")


def test_pools_of_a_hybrid_model_are_sized_together() -> None:
    sizes = PoolSizes([KV, KV, WINDOW, STATE], max_batch_size=4, max_seq_len=1000, page_size=8, max_step=32)
    assert sizes.num_pages(None, 1 << 40) == 500
    assert sizes.units(500) == {"pages": 501, "states": 5, "window_16": 1 + 4 * 7}
    page = 8 * 2 * 16 * 4
    limit = sizes.num_bytes(100)
    assert limit == 2 * 101 * page + 29 * page + 5 * 4 * 8 * 4
    assert sizes.num_pages(None, limit) == 100 and sizes.num_pages(None, limit - 1) == 99
    assert sizes.num_pages(90, 1 << 40) == 12
    with pytest.raises(ConfigError, match="Raise max_bytes"):
        sizes.num_pages(None, sizes.num_bytes(1) - 1)


def test_a_model_of_states_alone_has_no_pages() -> None:
    sizes = PoolSizes([STATE], max_batch_size=4, max_seq_len=1000, page_size=8, max_step=32)
    assert sizes.units(500) == {"states": 5}
    manager = sizes.manager(sizes.units(500))
    assert not manager.pools and manager.fits(10**9)
