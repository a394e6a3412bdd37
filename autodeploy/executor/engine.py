"""ADExecutor: the thread that owns the loop. Everyone else only sends it requests and aborts."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from autodeploy.cores import end_idle_threads
from autodeploy.custom_ops import provider_at_work
from autodeploy.errors import EngineDeadError, ExecutionError, RequestError
from autodeploy.executor.batch import BatchBuilder, WantedRows
from autodeploy.executor.cuda_graphs import CudaGraphRunner
from autodeploy.executor.decode_run import DecodeRun
from autodeploy.executor.model_runner import Runner
from autodeploy.executor.outputs import RequestHandle
from autodeploy.executor.request import FinishReason, Request, RequestStatus
from autodeploy.executor.sampler import Sampler, choice_of, tokens_of
from autodeploy.executor.scheduler import ScheduledBatch, ScheduledRequest, Scheduler
from autodeploy.specs import BatchMetadata

PATIENCE = 3.0
"""Seconds that the loop has to end by itself when the runner is dead."""


class ADExecutor:
    """Continuous batching: each step computes some tokens of many requests.

    Only the loop's thread touches scheduler, runner and sampler. Others append a command to a queue and wake it.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        batches: BatchBuilder,
        sampler: Sampler,
        launcher: CudaGraphRunner | None = None,
        overlaps: bool = True,
    ) -> None:
        """launcher: what starts decode steps without waiting. overlaps: whether before the tokens of the last one are known."""
        self.runner, self.scheduler, self.batches, self.sampler = runner, scheduler, batches, sampler
        self.launcher, self._num_ahead = launcher, int(overlaps)
        self.num_steps = self.num_preemptions = 0
        self._run: DecodeRun | None = None
        self._handles: dict[int, RequestHandle] = {}
        self._context_logits: dict[int, list[Tensor]] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._wakeup = threading.Condition()
        self._closing = False
        self._death: BaseException | None = None
        end_idle_threads()
        self._thread = threading.Thread(target=self._loop, name="ad-executor", daemon=True)
        self._thread.start()

    # Called from any thread

    def submit(self, handle: RequestHandle) -> None:
        """Queue a request. One that the scheduler refuses ends with its RequestError. Raises EngineDeadError after the end."""
        self._send(lambda: self._add(handle))

    def abort(self, request_id: int) -> None:
        """End a request; nothing happens when it is unknown or has ended."""
        with suppress(EngineDeadError):  # then it has ended
            self._send(lambda: self._abort(request_id))

    def preempt(self, request_id: int) -> None:
        """Have a running request give back all that it holds, to be computed again; nothing happens when it does not run."""
        self._send(lambda: self._preempt(request_id))

    def shutdown(self) -> None:
        """End the loop; requests under way end with finish_reason abort. No harm when called again."""
        with self._wakeup:
            self._closing = True
            self._wakeup.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(None if self._death is None else PATIENCE)

    def fail(self, error: EngineDeadError) -> None:
        """End all requests with this error: the runner cannot go on, and may never come back to the loop."""
        with self._wakeup:
            self._death = self._death or error
            self._closing = True
            self._wakeup.notify_all()
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self._run_commands()
            for handle in list(self._handles.values()):  # the loop's own tables stay as they are
                handle.request.finish(FinishReason.ERROR, error=error)
                handle.publish()

    def _send(self, command: Callable[[], None]) -> None:
        with self._wakeup:
            if self._closing or self._death is not None:
                raise EngineDeadError("the engine has ended; make a new LLM to go on") from self._death
            self._commands.append(command)
            self._wakeup.notify_all()

    # Called from the loop's thread

    def _loop(self) -> None:
        try:
            while self._wait_for_work():
                if self._commands:
                    self._end_run()
                self._run_commands()
                if self.scheduler.has_work:
                    self.step()
        except BaseException as error:  # a defect of ours: nobody may be left waiting
            self._death = self._death or error
        finally:
            self._end_all()

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _wait_for_work(self) -> bool:
        with self._wakeup:
            self._wakeup.wait_for(lambda: self._closing or self._commands or self.scheduler.has_work)
            return not self._closing

    def step(self) -> None:
        """schedule -> forward -> sample -> finish."""
        if self._run is not None and self._step_of_run(self._run):
            return
        batch = self.scheduler.schedule()
        self.num_steps += 1
        self.num_preemptions += len(batch.preempted)
        metadata, rows = self.batches.build(batch)
        try:
            logits = self.runner.forward(metadata, rows)
        except EngineDeadError:
            raise
        except Exception as error:
            self._isolate(batch, error)
            return
        self._finish_step(batch, rows, logits)

    def _finish_step(self, batch: ScheduledBatch, rows: list[WantedRows], logits: Tensor) -> None:
        self.scheduler.finish_step(batch)
        self._keep_context_logits(rows, logits)
        sampled = [row for row in rows if row.entry.samples]
        if not sampled:
            return
        if len(sampled) < len(logits):
            logits = logits[[row.stop - 1 for row in sampled]]
        requests = [row.entry.request for row in sampled]
        for request, token in zip(requests, self.sampler(logits, requests), strict=True):
            self._take(request, token)
        if self._may_run_on(batch):
            handles = [self._handles[request.request_id] for request in requests]
            streams = [handle for handle in handles if handle.streaming]
            self._run = DecodeRun(rows, self.batches, self.sampler.vocab_size, streams)

    def _may_run_on(self, batch: ScheduledBatch) -> bool:
        """Whether all that run have just decoded, and nothing but stop ids and lengths decides how they go on."""
        if self.runner.reads_entries or len(batch.requests) != self.scheduler.num_running or not self.scheduler.is_settled:
            return False
        requests = [entry.request for entry in batch.requests if entry.num_tokens == 1 and not entry.request.is_suspect]
        return len(requests) == len(batch.requests) and all(map(DecodeRun.suits, requests))

    def _step_of_run(self, run: DecodeRun) -> bool:
        """A step without a look at each request; False when it cannot be one, and the run has ended."""
        metadata = run.advance()
        if metadata is None:
            self._end_run()
            return False
        self.num_steps += 1
        if self.launcher is not None:
            self._launch(self.launcher, run, metadata)
            return True
        try:
            logits = self.runner.forward(metadata, run.rows)
        except EngineDeadError:
            raise
        except Exception as error:
            self._end_run()
            self._isolate(self.scheduler.schedule(), error)
            return True
        tokens = self.sampler.largest(logits)
        if tokens is None or not run.take(tokens):
            self._end_run()
            batch = self.scheduler.schedule()  # the same requests, but for those that failed: each has its page
            places = {request: i for i, request in enumerate(run.requests)}
            rows = [WantedRows(entry, i, i + 1) for entry in batch.requests for i in (places[entry.request],)]
            self._finish_step(batch, rows, logits)
        return True

    def _launch(self, launcher: CudaGraphRunner, run: DecodeRun, metadata: BatchMetadata) -> None:
        """Start a step, then take the tokens of the one before it, which the device has computed meanwhile."""
        try:
            run.under_way.append(launcher.launch(metadata, run.under_way[-1] if run.under_way else None))
            while len(run.under_way) > self._num_ahead:
                tokens = tokens_of(run.under_way[0].found)
                if tokens is None or not run.take(tokens):
                    self._end_run()
                    return
                del run.under_way[0]
        except Exception as error:
            self._end_run()
            self._isolate(_living(run), error)

    def _end_run(self) -> None:
        """Hand over all tokens, those of steps under way too: each goes on from there or has ended before."""
        run, self._run = self._run, None
        if run is None:
            return
        run.hand_over()
        for request in run.requests:
            if request.finish_reason is not None:  # its tokenizer has failed
                self._finish(request, request.finish_reason)
        try:
            for step in run.under_way:
                for request, found in zip(run.requests, step.found, strict=True):
                    if not request.is_finished:
                        request.num_computed_tokens = request.num_tokens
                        self.scheduler.kv.update(request)
                        self._take(request, choice_of(request, found))
        except Exception as error:
            self._isolate(_living(run), error)

    def _take(self, request: Request, token: int | ExecutionError) -> None:
        """One sampled token, or what went wrong instead."""
        if isinstance(token, ExecutionError):
            self._finish(request, FinishReason.ERROR, token)
            return
        request.append(token)
        if request.finish_reason is not None:
            self._finish(request, request.finish_reason)
        elif (handle := self._handles[request.request_id]).streaming:
            handle.publish()

    def _isolate(self, batch: ScheduledBatch, error: Exception) -> None:
        """A forward raised: its only request has failed, or each of its requests runs alone for a while."""
        if len(batch.requests) != 1:
            self.scheduler.suspect(batch)
            return
        request = batch.requests[0].request
        reason = f"{provider_at_work(error)}{type(error).__name__}: {error}"
        failed = ExecutionError(f"request {request.request_id}: its forward failed: {reason}")
        failed.__cause__ = error
        self._finish(request, FinishReason.ERROR, failed)

    def _keep_context_logits(self, rows: list[WantedRows], logits: Tensor) -> None:
        for row in rows:
            request = row.entry.request
            if request.return_context_logits:
                if row.entry.start == 0:  # the first time, or anew after a preemption
                    self._context_logits[request.request_id] = []
                self._context_logits[request.request_id].append(logits[row.start : row.stop].clone())

    def _add(self, handle: RequestHandle) -> None:
        request = handle.request
        self._handles[request.request_id] = handle
        try:
            _refuse_unknown_tokens(request, self.sampler.vocab_size)
            self.scheduler.add(request)
        except RequestError as error:
            self._finish(request, FinishReason.ERROR, error)

    def _preempt(self, request_id: int) -> None:
        self.num_preemptions += self.scheduler.preempt(request_id)

    def _abort(self, request_id: int) -> None:
        if (handle := self._handles.get(request_id)) is not None:
            self._finish(handle.request, FinishReason.ABORT)

    def _finish(self, request: Request, reason: FinishReason, error: Exception | None = None) -> None:
        """Take back all that a request holds and hand over its final output."""
        self.scheduler.finish(request, reason, error=error)
        self.runner.forget(request)
        self.sampler.forget(request)
        logits = self._context_logits.pop(request.request_id, None)
        if (handle := self._handles.pop(request.request_id, None)) is not None:
            handle.publish(None if logits is None else torch.cat(logits))

    def _end_all(self) -> None:
        """No handle waits for ever: requests under way and those still in the queue end now."""
        self._end_run()
        with self._wakeup:
            self._closing = True
            self._run_commands()
        error: Any = self._death
        if error is not None and not isinstance(error, EngineDeadError):
            error = EngineDeadError(f"the engine died: {type(self._death).__name__}: {self._death}")
            error.__cause__ = self._death
        for handle in list(self._handles.values()):
            self._finish(handle.request, FinishReason.ABORT if error is None else FinishReason.ERROR, error)


def _living(run: DecodeRun) -> ScheduledBatch:
    """What was to be computed of the requests of a run that go on, as far as up to two steps have come."""
    return ScheduledBatch([ScheduledRequest(request, 2) for request in run.requests if request.status is RequestStatus.RUNNING])


def _refuse_unknown_tokens(request: Request, vocab_size: int) -> None:
    ids = request.prompt_token_ids
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        at, bad = next((i, token) for i, token in enumerate(ids) if not 0 <= token < vocab_size)
        raise RequestError(
            f"Token {at} of the prompt is {bad}, but ids go from 0 to {vocab_size - 1}. Use the model's own tokenizer."
        )
