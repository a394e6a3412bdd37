"""Any order of events, one law: no page is lost, doubled or read by another, and every output is that of the request alone.

The model is a fake. In place of keys and values the cache keeps, for each slot, whose token it is, its position, the token,
and how many rope thresholds the length it was computed for exceeds (a history must agree on that).
Each step writes its tokens through the page table, then reads the whole history back through it; the next token is a hash of
what was read. A stale page, a lost token or a foreign read changes the output at once, and equality is exact.
"""

import hashlib
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from autodeploy.config import SamplingParams
from autodeploy.errors import RequestError
from autodeploy.executor.kv_cache import SCRATCH_PAGE, KVCacheManager
from autodeploy.executor.request import FinishReason, Request
from autodeploy.executor.scheduler import ScheduledBatch, ScheduledRequest, Scheduler

VOCAB = 50
EOS = 0


def next_token(history: list[int]) -> int:
    return int.from_bytes(hashlib.blake2b(bytes(history), digest_size=4).digest()) % VOCAB


def alone(prompt: list[int], max_new_tokens: int) -> list[int]:
    """What a request generates when nothing else happens."""
    history = list(prompt)
    while len(history) < len(prompt) + max_new_tokens:
        history.append(next_token(history))
        if history[-1] == EOS:
            break
    return history[len(prompt) :]


@dataclass
class FakeModel:
    """Paged memory of (request id, position, token, rope), written and read through page tables only."""

    kv: KVCacheManager
    rope_thresholds: tuple[int, ...] = ()
    slots: dict[tuple[int, int], tuple[int, int, int, int]] = field(default_factory=dict)

    def forward(self, batch: ScheduledBatch) -> list[int]:
        """The next token of each entry, all written before any is read, as a packed batch does."""
        for entry in batch.requests:
            self._write(entry)
        return [next_token(self._read(entry)) for entry in batch.requests]

    def _slot(self, request: Request, position: int) -> tuple[int, int]:
        page = self.kv.page_table(request.request_id)[position // self.kv.page_size]
        assert page != SCRATCH_PAGE
        return page, position % self.kv.page_size

    def _rope(self, request: Request, position: int) -> int:
        return sum(request.rope_len(position) > threshold for threshold in self.rope_thresholds)

    def _write(self, entry: ScheduledRequest) -> None:
        tokens = entry.request.token_ids(entry.start, entry.stop)
        for position, token in zip(range(entry.start, entry.stop), tokens, strict=True):
            rope = self._rope(entry.request, position)
            self.slots[self._slot(entry.request, position)] = (entry.request.request_id, position, token, rope)

    def _read(self, entry: ScheduledRequest) -> list[int]:
        found = [self.slots[self._slot(entry.request, position)] for position in range(entry.stop)]
        rope = self._rope(entry.request, entry.stop - 1)
        for position, (owner, written_at, _, written_rope) in enumerate(found):
            assert (owner, written_at) == (entry.request.request_id, position), f"{entry.request.request_id} read {owner}"
            assert written_rope == rope
        return [token for _, _, token, _ in found]


@dataclass
class Engine:
    """The plain loop: schedule, forward, append, finish."""

    scheduler: Scheduler
    model: FakeModel
    unfinished: dict[int, Request] = field(default_factory=dict)
    num_added: int = 0
    num_preemptions: int = 0

    def add(self, prompt: list[int], max_new_tokens: int) -> Request:
        self.num_added += 1
        params = SamplingParams(max_tokens=max_new_tokens)
        request = Request(self.num_added, prompt, params, frozenset({EOS}), max_new_tokens)
        self.scheduler.add(request)
        self.unfinished[request.request_id] = request
        return request

    def step(self) -> None:
        batch = self.scheduler.schedule()
        self.scheduler.check()
        self.num_preemptions += len(batch.preempted)
        self._check_limits(batch)
        tokens = self.model.forward(batch)
        self.scheduler.finish_step(batch)
        for entry, token in zip(batch.requests, tokens, strict=True):
            if entry.samples:
                entry.request.append(token)
            if entry.request.finish_reason is not None:
                self.scheduler.finish(entry.request, entry.request.finish_reason)
                self.settle(entry.request)

    def settle(self, request: Request) -> None:
        """Compare a request that ended, for whatever reason, with what it does alone."""
        del self.unfinished[request.request_id]
        expected = alone(request.prompt_token_ids, request.max_new_tokens)
        if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert request.output_token_ids == expected
        assert request.output_token_ids == expected[: len(request.output_token_ids)]

    def _check_limits(self, batch: ScheduledBatch) -> None:
        assert not batch.empty or not self.scheduler.has_work
        micro_batch = self.scheduler._micro_batch
        if micro_batch.enable_chunked_prefill or len(batch.requests) > 1:
            assert batch.num_tokens <= micro_batch.max_num_tokens
        assert all(entry.num_tokens > 0 for entry in batch.requests)
        assert len({entry.request.request_id for entry in batch.requests}) == len(batch.requests)


def make_engine(num_pages: int, page_size: int, batch: int, tokens: int, chunked: bool, rope: tuple[int, ...] = ()) -> Engine:
    kv = KVCacheManager(num_pages, page_size)
    return Engine(Scheduler(kv, batch, tokens, 64, chunked, rope), FakeModel(kv, rope))


PROMPT = st.lists(st.integers(1, VOCAB - 1), min_size=0, max_size=24)


class AnyOrderOfEvents(RuleBasedStateMachine):
    """Requests come, run, are aborted and fail, in a pool too small for all of them."""

    @initialize(
        num_pages=st.integers(2, 16),
        page_size=st.integers(1, 5),
        batch=st.integers(1, 6),
        more_tokens=st.integers(0, 10),
        chunked=st.booleans(),
        rope=st.sampled_from([(), (8,), (6, 20)]),
    )
    def start(self, num_pages: int, page_size: int, batch: int, more_tokens: int, chunked: bool, rope: tuple[int, ...]) -> None:
        self.engine = make_engine(num_pages, page_size, batch, batch + more_tokens, chunked, rope)

    @rule(prompt=PROMPT, max_new_tokens=st.integers(0, 24))
    def add(self, prompt: list[int], max_new_tokens: int) -> None:
        kv = self.engine.scheduler.kv
        possible = len(prompt) > 0 and kv.fits(len(prompt) + max(max_new_tokens - 1, 0))
        if possible:
            self.engine.add(prompt, max_new_tokens)
        else:
            with pytest.raises(RequestError):
                self.engine.add(prompt, max_new_tokens)

    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()
            self.engine.scheduler.check()

    @precondition(lambda self: self.engine.unfinished)
    @rule(data=st.data())
    def abort_known(self, data: st.DataObject) -> None:
        request = self._pick(data)
        assert self.engine.scheduler.abort(request.request_id)
        assert not self.engine.scheduler.abort(request.request_id)
        assert request.finish_reason is FinishReason.ABORT
        self.engine.settle(request)

    @rule(request_id=st.integers(10_000, 10_010))
    def abort_unknown(self, request_id: int) -> None:
        assert not self.engine.scheduler.abort(request_id)

    @precondition(lambda self: self.engine.unfinished)
    @rule(data=st.data())
    def fail_twice(self, data: st.DataObject) -> None:
        request = self._pick(data)
        self.engine.scheduler.finish(request, FinishReason.ERROR, error=RuntimeError("boom"))
        self.engine.scheduler.finish(request, FinishReason.STOP)
        assert request.finish_reason is FinishReason.ERROR
        self.engine.settle(request)

    @precondition(lambda self: self.engine.unfinished)
    @rule(data=st.data())
    def abort_during_a_forward_that_fails(self, data: st.DataObject) -> None:
        """The step is scheduled and written, then lost: nothing of it may count."""
        batch = self.engine.scheduler.schedule()
        self.engine.model.forward(batch)
        request = self._pick(data)
        self.engine.scheduler.abort(request.request_id)
        self.engine.settle(request)

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "engine"):
            scheduler = self.engine.scheduler
            scheduler.check()
            assert scheduler.num_waiting + scheduler.num_running == len(self.engine.unfinished)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(5_000):
            if not self.engine.scheduler.has_work:
                break
            self.engine.step()
        assert not self.engine.unfinished
        self.engine.scheduler.check()
        assert self.engine.scheduler.kv.num_free_pages == self.engine.scheduler.kv.num_usable_pages

    def _pick(self, data: st.DataObject) -> Request:
        return self.engine.unfinished[data.draw(st.sampled_from(sorted(self.engine.unfinished)))]


TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase
TestAnyOrderOfEvents.settings = settings(
    max_examples=300,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@pytest.mark.parametrize("chunked", [True, False])
def test_soak_in_a_pool_little_larger_than_one_request(chunked: bool) -> None:
    """Hundreds of requests, most of them preempted at some time; each equals its run alone."""
    engine = make_engine(num_pages=14, page_size=4, batch=6, tokens=12, chunked=chunked, rope=(32,))
    for i in range(300):
        prompt = [1 + (i * 7 + j * 3) % (VOCAB - 1) for j in range(1 + i * 5 % 23)]
        engine.add(prompt, 1 + i * 11 % 20)
    num_steps = 0
    while engine.scheduler.has_work:
        engine.step()
        num_steps += 1
        if num_steps % 10 == 0 and engine.unfinished:
            request = list(engine.unfinished.values())[num_steps % len(engine.unfinished)]
            assert engine.scheduler.abort(request.request_id)
            engine.settle(request)
    assert not engine.unfinished
    assert engine.num_preemptions > 50


def test_the_fake_model_notices_a_foreign_page() -> None:
    engine = make_engine(num_pages=20, page_size=2, batch=4, tokens=16, chunked=True)
    engine.add([1, 2, 3], 9)
    engine.add([4, 5, 6], 9)
    engine.step()
    kv = engine.scheduler.kv
    kv.tables[kv.row(1), 0] = kv.tables[kv.row(2), 0]
    with pytest.raises(AssertionError):
        engine.step()
