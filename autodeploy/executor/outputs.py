"""What callers get back: finished or partial results, and the handle of a request under way."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

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
        self._outputs: list[RequestOutput] = []
        self._listeners: list[Callable[[], None]] = []
        self._num_tokens = self._num_chars = 0

    @property
    def request_id(self) -> int:
        return self.request.request_id

    @property
    def finished(self) -> bool:
        return bool(self._outputs) and self._outputs[-1].finished

    def abort(self) -> None:
        """End the request; what was generated stays, with finish_reason abort. No harm when it has ended."""
        self._abort(self.request_id)

    def publish(self, context_logits: Any = None) -> None:
        """Called by the engine: record where the request stands. Only the last output is kept unless it streams."""
        with self._condition:
            if self.finished:
                return
            self._outputs.append(self._output(context_logits))
            self._condition.notify_all()
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def _output(self, context_logits: Any) -> RequestOutput:
        request = self.request
        text, token_ids = request.text, list(request.output_token_ids)
        completion = CompletionOutput(
            0,
            text,
            token_ids,
            request.finish_reason and request.finish_reason.value,
            request.stop_reason,
            text[self._num_chars :],
            token_ids[self._num_tokens :],
        )
        self._num_tokens, self._num_chars = len(token_ids), len(text)
        ids, done = request.prompt_token_ids, request.is_finished
        return RequestOutput(request.request_id, self.prompt, ids, [completion], done, request.error, context_logits)

    def output(self, timeout: float | None = None) -> RequestOutput:
        """The final output, its `error` set when the request failed; TimeoutError when it takes longer (seconds)."""
        with self._condition:
            if not self._condition.wait_for(lambda: self.finished, timeout):
                raise TimeoutError(f"request {self.request_id} has not finished after {timeout} s")
            return self._outputs[-1]

    def result(self, timeout: float | None = None) -> RequestOutput:
        """The final output; raises the request's error, or TimeoutError."""
        return _raised(self.output(timeout))

    def __iter__(self) -> Iterator[RequestOutput]:
        for i in itertools.count():
            with self._condition:
                self._condition.wait_for(functools.partial(self._has, i))
                item = self._outputs[i]
            yield _raised(item)
            if item.finished:
                return

    def _has(self, i: int) -> bool:
        return len(self._outputs) > i

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        loop, changed, seen = asyncio.get_running_loop(), asyncio.Event(), 0

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the event loop was closed with this iteration unfinished: nobody waits
                loop.call_soon_threadsafe(changed.set)

        with self._condition:
            self._listeners.append(wake)
        try:
            while True:
                while seen < len(self._outputs):
                    item = self._outputs[seen]
                    seen += 1
                    yield _raised(item)
                    if item.finished:
                        return
                await changed.wait()
                changed.clear()
        finally:
            self._listeners.remove(wake)

    async def aresult(self) -> RequestOutput:
        """As `result`, for `await`."""
        outputs = [output async for output in self]
        return outputs[-1]

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self.aresult().__await__()


def _raised(output: RequestOutput) -> RequestOutput:
    if output.error is not None:
        raise output.error
    return output
