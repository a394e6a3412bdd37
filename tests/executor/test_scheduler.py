"""Who runs, with how many tokens, and what is refused at the door."""

from typing import Any

import pytest

from autodeploy.config import SamplingParams
from autodeploy.errors import RequestError
from autodeploy.executor.kv_cache import KVCacheManager
from autodeploy.executor.request import FinishReason, Request, RequestStatus
from autodeploy.executor.scheduler import ScheduledBatch, Scheduler


def make(request_id: int, prompt: int, max_new_tokens: int = 8) -> Request:
    return Request(request_id, [0] * prompt, SamplingParams(max_tokens=max_new_tokens), frozenset(), max_new_tokens)


def scheduler(
    *requests: Request,
    num_pages: int = 100,
    page_size: int = 4,
    batch: int = 8,
    tokens: int = 16,
    length: int = 64,
    **options: Any,
) -> Scheduler:
    result = Scheduler(KVCacheManager(num_pages, page_size), batch, tokens, length, **options)
    for request in requests:
        result.add(request)
    return result


def step(s: Scheduler) -> ScheduledBatch:
    """One step in which every forward pass succeeds and every sample is token 7."""
    batch = s.schedule()
    s.check()
    s.finish_step(batch)
    for entry in batch.requests:
        if entry.samples:
            entry.request.append(7)
            if entry.request.finish_reason is not None:
                s.finish(entry.request, entry.request.finish_reason)
    s.check()
    return batch


def shape(batch: ScheduledBatch) -> list[tuple[int, int, int]]:
    return [(entry.request.request_id, entry.start, entry.stop) for entry in batch.requests]


def run(s: Scheduler, limit: int = 10_000) -> int:
    num_steps = 0
    while s.has_work:
        assert not step(s).empty
        num_steps += 1
        assert num_steps < limit
    assert s.kv.num_free_pages == s.kv.num_usable_pages
    return num_steps


def test_prefill_then_decode_then_done() -> None:
    request = make(1, prompt=5, max_new_tokens=3)
    s = scheduler(request)
    assert (s.num_waiting, s.num_running, s.has_work) == (1, 0, True)
    assert shape(step(s)) == [(1, 0, 5)]
    assert (s.num_waiting, s.num_running) == (0, 1)
    assert shape(step(s)) == [(1, 5, 6)]
    assert shape(step(s)) == [(1, 6, 7)]
    assert request.finish_reason is FinishReason.LENGTH and not s.has_work
    assert s.schedule().empty


def test_chunks_fill_the_step_after_decodes() -> None:
    s = scheduler(make(1, 3), make(2, 40), make(3, 2), tokens=16)
    assert shape(step(s)) == [(1, 0, 3), (2, 0, 13)]
    assert shape(step(s)) == [(1, 3, 4), (2, 13, 28)]
    third = step(s)
    assert shape(third) == [(1, 4, 5), (2, 28, 40), (3, 0, 2)]
    assert third.num_tokens == 15


def test_samples_is_known_when_scheduled_and_does_not_change() -> None:
    s = scheduler(make(1, 20), tokens=16)
    first, second = step(s), step(s)
    assert [entry.samples for entry in first.requests + second.requests] == [False, True]


def test_without_chunking_a_prompt_goes_whole_or_waits() -> None:
    s = scheduler(make(1, 10), make(2, 10), make(3, 2), tokens=16, enable_chunked_prefill=False)
    assert shape(step(s)) == [(1, 0, 10)]
    assert shape(step(s)) == [(1, 10, 11), (2, 0, 10), (3, 0, 2)]


def test_without_chunking_a_prompt_beyond_the_budget_runs_alone() -> None:
    s = scheduler(make(1, 10), make(2, 40), make(3, 2), tokens=16, enable_chunked_prefill=False)
    assert shape(step(s)) == [(1, 0, 10)]
    assert shape(step(s)) == [(2, 0, 40)]
    assert shape(step(s)) == [(1, 10, 11), (2, 40, 41), (3, 0, 2)]
    run(s)


def test_slots_limit_how_many_run() -> None:
    s = scheduler(*(make(i, 2) for i in range(5)), batch=2)
    step(s)
    assert (s.num_running, s.num_waiting) == (2, 3)
    run(s)


def test_pages_limit_how_many_start() -> None:
    s = scheduler(make(1, 8, 4), make(2, 8, 4), num_pages=4)
    step(s)
    assert (s.num_running, s.num_waiting) == (1, 1)
    run(s)


def test_a_large_request_is_not_overtaken() -> None:
    """First come, first served: the second needs more pages than are free, and the third waits behind it."""
    s = scheduler(make(1, 12), make(2, 12), make(3, 1), num_pages=6)
    step(s)
    assert s.num_running == 1 and s.num_waiting == 2
    run(s)


def test_the_request_that_started_last_gives_way() -> None:
    first, second = make(1, 4, 9), make(2, 4, 9)
    s = scheduler(first, second, num_pages=4)
    assert shape(step(s)) == [(1, 0, 4), (2, 0, 4)]
    batch = step(s)
    assert batch.preempted == [second] and shape(batch) == [(1, 4, 5)]
    assert second.status is RequestStatus.WAITING and second.num_computed_tokens == 0 and second.num_preemptions == 1
    assert second.output_token_ids == [7]
    run(s)
    assert len(first.output_token_ids) == len(second.output_token_ids) == 9


def test_a_preempted_request_is_the_first_to_start_again() -> None:
    first, second = make(1, 4, 9), make(2, 4, 9)
    s = scheduler(first, second, num_pages=4)
    step(s)
    s.add(make(3, 1))
    assert step(s).preempted == [second]
    while first.finish_reason is None:
        batch = step(s)
        assert all(entry.request is first for entry in batch.requests)
    assert shape(step(s))[0][0] == 2


def test_two_requests_that_cannot_both_fit_finish() -> None:
    first, second = make(1, 4, 29), make(2, 4, 29)
    s = scheduler(first, second, num_pages=9)
    run(s)
    assert len(first.output_token_ids) == len(second.output_token_ids) == 29
    assert first.num_preemptions == 0 and 1 <= second.num_preemptions <= 20


def test_many_requests_in_a_tight_pool_finish_without_thrashing() -> None:
    requests = [make(i, 1 + 5 * i % 13, 1 + 7 * i % 20) for i in range(60)]
    s = scheduler(*requests, num_pages=10, batch=6, tokens=8)
    run(s)
    assert all(len(request.output_token_ids) == request.max_new_tokens for request in requests)
    assert sum(request.num_preemptions for request in requests) > 0
    assert max(request.num_preemptions for request in requests) <= 20


@pytest.mark.parametrize("chunked", [True, False])
def test_no_request_starves_under_a_stream_of_short_ones(chunked: bool) -> None:
    long = make(0, 24, 8)
    s = scheduler(make(100, 2), make(101, 2), long, num_pages=12, batch=4, tokens=8, enable_chunked_prefill=chunked)
    for i in range(200):
        s.add(make(200 + i, 1 + i % 4, 1 + i % 5))
        step(s)
        if long.is_finished:
            break
    assert long.is_finished


def test_impossible_requests_are_refused_at_the_door() -> None:
    s = scheduler(num_pages=5, length=32)
    for request, words in [
        (make(1, 0), ["empty", "at least one token"]),
        (make(2, 33, 0), ["33 tokens", "max_seq_len is 32", "Shorten"]),
        (make(3, 30, 3), ["30 tokens", "3 are to be generated", "lower max_tokens"]),
        (make(4, 10, 8), ["17 tokens", "holds 16", "kv_cache_config"]),
    ]:
        with pytest.raises(RequestError) as caught:
            s.add(request)
        assert all(word in str(caught.value) for word in words), caught.value
    assert not s.has_work
    s.add(make(5, 10, 7))  # the last token needs no page
    s.add(make(6, 16, 0))
    run(s)


def test_abort_and_finish_do_no_harm_when_repeated() -> None:
    waiting, running = make(1, 4), make(2, 4)
    s = scheduler(running)
    step(s)
    s.add(waiting)
    assert not s.abort(77)
    assert s.abort(1) and not s.abort(1)
    assert s.abort(2) and not s.abort(2)
    s.finish(running, FinishReason.ERROR)
    assert running.finish_reason is waiting.finish_reason is FinishReason.ABORT
    assert not s.has_work and s.kv.num_free_pages == s.kv.num_usable_pages
    s.check()


def test_a_request_aborted_during_the_forward_pass_is_passed_over() -> None:
    request = make(1, 4)
    s = scheduler(request)
    batch = s.schedule()
    s.abort(1)
    s.finish_step(batch)
    assert request.num_computed_tokens == 0
    s.check()


def test_finish_keeps_the_error() -> None:
    request = make(1, 4)
    s = scheduler(request)
    step(s)
    error = RuntimeError("bad row")
    s.finish(request, FinishReason.ERROR, error=error)
    assert request.error is error and not s.has_work


def test_a_failed_step_can_be_tried_again() -> None:
    s = scheduler(make(1, 4), make(2, 4))
    assert shape(s.schedule()) == shape(s.schedule()) == [(1, 0, 4), (2, 0, 4)]


def test_crossing_a_rope_threshold_computes_everything_again() -> None:
    request = make(1, 6, 6)
    s = scheduler(request, rope_thresholds=(8,))
    assert [shape(step(s)) for _ in range(3)] == [[(1, 0, 6)], [(1, 6, 7)], [(1, 7, 8)]]
    assert shape(step(s)) == [(1, 0, 9)]
    assert request.rope_base == 9 and request.num_preemptions == 0
    assert shape(step(s)) == [(1, 9, 10)]
    run(s)


def test_a_prompt_beyond_the_rope_threshold_is_computed_once() -> None:
    s = scheduler(make(1, 9, 3), rope_thresholds=(8,))
    assert [shape(step(s)) for _ in range(3)] == [[(1, 0, 9)], [(1, 9, 10)], [(1, 10, 11)]]


def test_check_finds_a_wrong_state() -> None:
    request = make(1, 4)
    s = scheduler(request)
    s.schedule()
    request.num_computed_tokens = 50
    with pytest.raises(AssertionError, match="50 tokens in pages for 4"):
        s.check()
