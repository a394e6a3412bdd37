"""Which requests run, and how many tokens of each the next step computes.

Two questions, two classes. `CapacityScheduler`: which requests hold a slot and pages. `MicroBatchScheduler`: how the tokens
of one step are divided among them. `Scheduler` is the door: it refuses what can never run and keeps the books.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from autodeploy.errors import RequestError
from autodeploy.executor.kv_cache import ResourceManager
from autodeploy.executor.request import FinishReason, Request, RequestStatus


@dataclass(slots=True)
class ScheduledRequest:
    """Tokens [start, stop) of one request, to be computed in one step."""

    request: Request
    num_tokens: int
    start: int = field(init=False)
    stop: int = field(init=False)
    samples: bool = field(init=False)
    """Whether these reach the newest token, so that the step yields the next one."""

    def __post_init__(self) -> None:
        self.start = self.request.num_computed_tokens
        self.stop = self.start + self.num_tokens
        self.samples = self.stop == self.request.num_tokens


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """What one step computes, decodes first, and which requests lost their pages to make room."""

    requests: list[ScheduledRequest]
    preempted: list[Request] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_tokens for entry in self.requests)

    @property
    def empty(self) -> bool:
        return not self.requests


class CapacityScheduler:
    """Gives slots and pages to requests: first come, first served, and the oldest always goes on.

    A waiting request starts when a slot is free and the pool has pages for all its tokens known so far. A running request
    that needs a page and finds none takes those of the request that started last, which is computed again later.
    """

    def __init__(self, kv: ResourceManager, max_batch_size: int, rope_thresholds: tuple[int, ...] = ()) -> None:
        self.kv = kv
        self.max_batch_size = max_batch_size
        self.rope_thresholds = rope_thresholds
        self.waiting: OrderedDict[int, Request] = OrderedDict()
        self.running: OrderedDict[int, Request] = OrderedDict()  # in the order in which they started

    def schedule(self) -> list[Request]:
        """Secure room for all known tokens of the running requests and start waiting ones. Returns who was preempted."""
        preempted: list[Request] = []
        for request in list(self.running.values()):
            if request.request_id not in self.running:
                break  # preempted for an older one, as are all that follow
            self._grow(request, preempted)
        self._admit()  # no request just preempted: it leads the queue, and part of its pages are taken
        return preempted

    def _grow(self, request: Request, preempted: list[Request]) -> None:
        self._restart_rope_if_crossed(request)
        while request.request_id in self.running and not self.kv.prepare(request, request.num_uncomputed):
            last = next(reversed(self.running.values()))
            self.preempt(last)
            preempted.append(last)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_batch_size:
            request = next(iter(self.waiting.values()))
            self._restart_rope_if_crossed(request)
            if not self.kv.prepare(request, request.num_uncomputed):
                self.kv.free(request)
                return
            del self.waiting[request.request_id]
            self.running[request.request_id] = request
            request.status = RequestStatus.RUNNING

    def preempt(self, request: Request) -> None:
        """Put a running request back to the front of the queue, to be computed again."""
        del self.running[request.request_id]
        self.kv.free(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        request.status = RequestStatus.WAITING
        self.waiting[request.request_id] = request
        self.waiting.move_to_end(request.request_id, last=False)

    def _restart_rope_if_crossed(self, request: Request) -> None:
        """Have the request computed anew when its length first exceeds a rope threshold."""
        if self.rope_thresholds and any(request.rope_base <= at < request.num_tokens for at in self.rope_thresholds):
            request.restart_rope()
            self.kv.free(request)


class MicroBatchScheduler:
    """Divides the tokens of one step: one for each decode, then prefills in order with what is left.

    Without chunked prefill a prompt is computed whole or waits; one that exceeds `max_num_tokens` gets a step of its own.
    """

    def __init__(self, max_num_tokens: int, enable_chunked_prefill: bool = True) -> None:
        self.max_num_tokens = max_num_tokens
        self.enable_chunked_prefill = enable_chunked_prefill

    def schedule(self, running: list[Request]) -> list[ScheduledRequest]:
        """Entries of the next step, decodes first."""
        prefills = [request for request in running if request.is_prefill]
        if prefills and not self.enable_chunked_prefill and prefills[0].num_uncomputed > self.max_num_tokens:
            return [ScheduledRequest(prefills[0], prefills[0].num_uncomputed)]
        entries = [ScheduledRequest(request, 1) for request in running if not request.is_prefill]
        budget = self.max_num_tokens - len(entries)
        for request in prefills:
            num_tokens = min(request.num_uncomputed, budget)
            if num_tokens == 0 or (num_tokens < request.num_uncomputed and not self.enable_chunked_prefill):
                break
            entries.append(ScheduledRequest(request, num_tokens))
            budget -= num_tokens
        return entries


class Scheduler:
    """Keeps every unfinished request, from `add` to `finish` or `abort`. The cost of a step does not depend on those gone.

    One step is `schedule()`, the forward pass, `finish_step(batch)`, then `finish` for each request that ended.
    """

    def __init__(
        self,
        kv: ResourceManager,
        max_batch_size: int,
        max_num_tokens: int,
        max_seq_len: int,
        enable_chunked_prefill: bool = True,
        rope_thresholds: tuple[int, ...] = (),
    ) -> None:
        assert 1 <= max_batch_size <= max_num_tokens, (max_batch_size, max_num_tokens)
        self.kv = kv
        self.max_seq_len = max_seq_len
        self._capacity = CapacityScheduler(kv, max_batch_size, rope_thresholds)
        self._micro_batch = MicroBatchScheduler(max_num_tokens, enable_chunked_prefill)

    @property
    def num_waiting(self) -> int:
        return len(self._capacity.waiting)

    @property
    def num_running(self) -> int:
        return len(self._capacity.running)

    @property
    def has_work(self) -> bool:
        return bool(self._capacity.waiting or self._capacity.running)

    @property
    def is_settled(self) -> bool:
        """Whether the same requests run until one of them ends or finds no page, as long as nothing is added or taken away."""
        full = len(self._capacity.running) == self._capacity.max_batch_size
        return not self._capacity.rope_thresholds and (full or not self._capacity.waiting)

    def add(self, request: Request) -> None:
        """Queue a request. Raises `RequestError` for one that can never be served."""
        assert self._find(request.request_id) is None, f"request {request.request_id} is here already"
        self._refuse_impossible(request)
        self._capacity.waiting[request.request_id] = request

    def schedule(self) -> ScheduledBatch:
        """Choose the next step. The batch is empty only when no request is left."""
        preempted = self._capacity.schedule()
        running = list(self._capacity.running.values())
        suspects = [request for request in running if request.is_suspect][:1]
        return ScheduledBatch(self._micro_batch.schedule(suspects or running), preempted)

    def preempt(self, request_id: int) -> bool:
        """Have a running request give back all that it holds, to be computed again; False when it does not run."""
        if (request := self._capacity.running.get(request_id)) is None:
            return False
        self._capacity.preempt(request)
        return True

    def suspect(self, batch: ScheduledBatch) -> None:
        """The forward pass of `batch` failed: until one of its requests is found guilty or has got past it, it runs alone.

        They start anew, since a recurrent state may have been written already.
        """
        stops = {entry.request.request_id: entry.stop for entry in batch.requests}
        for request in reversed(list(self._capacity.running.values())):
            if request.request_id in stops:
                request.suspect_until = stops[request.request_id]
                self._capacity.preempt(request)

    def finish_step(self, batch: ScheduledBatch) -> None:
        """Record that the forward pass of `batch` succeeded; requests that ended meanwhile are passed over."""
        for entry in batch.requests:
            if entry.request.status is RequestStatus.RUNNING:
                entry.request.num_computed_tokens = entry.stop
                if entry.stop >= entry.request.suspect_until:
                    entry.request.suspect_until = 0
                self.kv.update(entry.request)

    def finish(
        self,
        request: Request,
        reason: FinishReason,
        stop_reason: int | str | None = None,
        error: Exception | None = None,
    ) -> None:
        """End a request, unless a stop rule has done so, and take back what it holds. No harm when called twice."""
        request.finish(reason, stop_reason, error)
        self._capacity.running.pop(request.request_id, None)
        self._capacity.waiting.pop(request.request_id, None)
        self.kv.free(request)

    def abort(self, request_id: int) -> bool:
        """End a request at the caller's wish; False when there is none of this id (any more)."""
        request = self._find(request_id)
        if request is None:
            return False
        self.finish(request, FinishReason.ABORT)
        return True

    def check(self) -> None:
        """Audit slots, states and pages. Raises AssertionError with the numbers."""
        waiting, running = self._capacity.waiting, self._capacity.running
        assert not waiting.keys() & running.keys(), f"requests {waiting.keys() & running.keys()} wait and run"
        assert len(running) <= self._capacity.max_batch_size, f"{len(running)} run, {self._capacity.max_batch_size} may"
        assert all(request.status is RequestStatus.WAITING and request.num_computed_tokens == 0 for request in waiting.values())
        assert all(request.status is RequestStatus.RUNNING for request in running.values())
        self.kv.audit(running.values())

    def _find(self, request_id: int) -> Request | None:
        return self._capacity.running.get(request_id) or self._capacity.waiting.get(request_id)

    def _refuse_impossible(self, request: Request) -> None:
        num_prompt, num_new = request.num_prompt_tokens, request.max_new_tokens
        if num_prompt == 0:
            raise RequestError("The prompt is empty. Give at least one token.")
        if request.sampling_params.stop_strings and request.detokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this request has none; use stop_token_ids.")
        if num_prompt + num_new > self.max_seq_len:
            raise RequestError(
                f"The prompt has {num_prompt} tokens and up to {num_new} are to be generated, but max_seq_len is "
                f"{self.max_seq_len}. Shorten the prompt, lower max_tokens or raise max_seq_len."
            )
        num_cached = num_prompt + max(num_new - 1, 0)  # the last token generated is never computed
        if not self.kv.fits(num_cached):
            raise RequestError(
                f"The request needs KV pages for {num_cached} tokens ({num_prompt} of the prompt), but the whole pool holds "
                f"{self.kv.num_tokens}. Shorten the prompt, lower max_tokens or enlarge the pool with kv_cache_config."
            )
