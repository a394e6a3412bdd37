"""What callers get back: finished or partial results, and the handle of a request under way."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from autodeploy.errors import EngineDeadError
from autodeploy.executor.request import Request


@dataclass(frozen=True)
class CompletionOutput:
    """One generated sequence. The `_diff` fields hold what came since the output before this one."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    """stop, length, abort or error; None while generating."""
    stop_reason: int | str | None = None
    """The stop token id or stop string that was met; None for end-of-sequence."""
    text_diff: str = ""
    token_ids_diff: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: None = None

    @property
    def length(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and what was generated for it."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    error: Exception | None = None
    """Why `finish_reason` is error."""
    context_logits: Any = None
    """Logits of the prompt [tokens, V], when asked for."""


class RequestHandle:
    """A request under way: wait with `result()`, `await` it, iterate it (`for` or `async for`) for partial outputs, or `abort()`.

    A failed request raises its error from all of them.
    """

    def __init__(self, request: Request, prompt: str | None, streaming: bool, abort: Callable[[int], None]) -> None:
        self.request, self.prompt, self.streaming = request, prompt, streaming
        self._abort = abort
        self._condition = threading.Condition()
        self._marks = [(0, 0)]
        """Tokens and characters at each output, from before the first. Whoever asks for an output has it built."""
        self._context_logits: Any = None
        self._listeners: list[Callable[[], None]] = []
        self.finished = False

    @property
    def request_id(self) -> int:
        return self.request.request_id

    def abort(self) -> None:
        """End the request; what was generated stays, with finish_reason abort. No harm when it has ended."""
        self._abort(self.request_id)

    def publish(self, context_logits: Any = None) -> None:
        """Called by the engine: note where the request stands. Takes the same time however long the output is."""
        request = self.request
        with self._condition:
            if self.finished:
                return
            self._marks.append((len(request.output_token_ids), len(request.text)))
            self._context_logits, self.finished = context_logits, request.is_finished
            self._condition.notify_all()
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def _output(self, i: int) -> RequestOutput:
        """Output `i` of those published."""
        request, (tokens_before, chars_before), (num_tokens, num_chars) = self.request, *self._marks[i : i + 2]
        done = self.finished and i + 2 == len(self._marks)
        text, token_ids = request.text[:num_chars], request.output_token_ids[:num_tokens]
        reason = request.finish_reason.value if done and request.finish_reason else None
        stop_reason = request.stop_reason if done else None
        diffs = text[chars_before:], token_ids[tokens_before:]
        completion = CompletionOutput(0, text, token_ids, reason, stop_reason, *diffs)
        error, logits = (request.error, self._context_logits) if done else (None, None)
        return RequestOutput(request.request_id, self.prompt, request.prompt_token_ids, [completion], done, error, logits)

    def output(self, timeout: float | None = None) -> RequestOutput:
        """The final output, its `error` set when the request failed; TimeoutError when it takes longer (seconds)."""
        with self._condition:
            if not self._condition.wait_for(lambda: self.finished, timeout):
                raise TimeoutError(f"request {self.request_id} has not finished after {timeout} s")
            return self._output(len(self._marks) - 2)

    def result(self, timeout: float | None = None) -> RequestOutput:
        """The final output; raises the request's error, or TimeoutError."""
        return raised(self.output(timeout))

    def __iter__(self) -> Iterator[RequestOutput]:
        for i in itertools.count():
            with self._condition:
                self._condition.wait_for(functools.partial(self._has, i))
                item = self._output(i)
            yield raised(item)
            if item.finished:
                return

    def _has(self, i: int) -> bool:
        return len(self._marks) > i + 1

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the event loop was closed with this iteration unfinished: nobody waits
                loop.call_soon_threadsafe(changed.set)

        with self._condition:
            self._listeners.append(wake)
        try:
            for i in itertools.count():
                while not self._has(i):
                    await changed.wait()
                    changed.clear()
                with self._condition:
                    item = self._output(i)
                yield raised(item)
                if item.finished:
                    return
        finally:
            self._listeners.remove(wake)

    async def aresult(self) -> RequestOutput:
        """As `result`, for `await`."""
        outputs = [output async for output in self]
        return outputs[-1]

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self.aresult().__await__()


def raised(output: RequestOutput) -> RequestOutput:
    """The output of a request that did not fail; raises the error of one that did."""
    if output.error is not None:
        raise output.error
    return output


def outputs_of(
    handles: Sequence[RequestHandle], waiting: Callable[[Iterable[RequestHandle]], Iterable[RequestHandle]] = iter
) -> list[RequestOutput]:
    """The final outputs, those that failed included. Raises EngineDeadError when it is not requests that failed.

    waiting: goes through the handles, to show how far they are. Whoever stops waiting (Ctrl-C) wants none of them any more.
    """
    try:
        outputs = [handle.output() for handle in waiting(handles)]
    except BaseException:
        for handle in handles:
            handle.abort()
        raise
    for output in outputs:
        if isinstance(output.error, EngineDeadError):
            raise output.error
    return outputs
