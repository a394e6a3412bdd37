"""One request while it is being served: its tokens, its progress, and the rules by which it stops."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Protocol

from autodeploy.config import SamplingParams
from autodeploy.errors import ExecutionError


class FinishReason(StrEnum):
    """Why a request ended: a stop rule, its length limit, the caller, or a failure."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class RequestStatus(StrEnum):
    """WAITING holds no slot, RUNNING holds a slot and pages, FINISHED holds nothing."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Detokenizer(Protocol):
    """Turns output tokens into text piece by piece."""

    def append(self, token_ids: Sequence[int]) -> str:
        """Take further tokens; return the text that became certain."""
        ...

    def finish(self) -> str:
        """Return the text still held back; nothing is appended afterwards."""
        ...

    @property
    def text(self) -> str:
        """All text returned so far."""
        ...


@dataclass(eq=False, slots=True)
class Request:
    """A prompt, the tokens generated for it so far, and how many of all these are computed.

    `max_new_tokens` is the resolved limit; 0 asks for the prompt's forward pass only, and the token sampled from it is
    dropped. `text` grows only by characters that are final: the beginning of a possible stop string is held back. The token
    that stops a request stays in `output_token_ids`; what stopped it is left out of `text` unless the parameters ask for it.
    """

    request_id: int
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    eos_token_ids: frozenset[int]
    max_new_tokens: int
    detokenizer: Detokenizer | None = None
    return_context_logits: bool = False

    output_token_ids: list[int] = field(init=False, default_factory=list)
    text: str = field(init=False, default="")
    num_computed_tokens: int = field(init=False, default=0)
    num_preemptions: int = field(init=False, default=0)
    rope_base: int = field(init=False)
    stop_ids: frozenset[int] = field(init=False)
    """Token ids that end the request."""
    suspect_until: int = field(init=False, default=0)
    """After a failed forward pass of several requests: this one runs alone until so many of its tokens are computed."""
    status: RequestStatus = field(init=False, default=RequestStatus.WAITING)
    finish_reason: FinishReason | None = field(init=False, default=None)
    stop_reason: int | str | None = field(init=False, default=None)
    error: Exception | None = field(init=False, default=None)
    _held_text: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self.rope_base = len(self.prompt_token_ids)
        given = self.sampling_params.stop_ids
        self.stop_ids = given if self.sampling_params.ignore_eos else given | self.eos_token_ids

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known so far, prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_uncomputed(self) -> int:
        """Known tokens that no forward pass has seen; 1 while decoding."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_prefill(self) -> bool:
        """Whether more than the newest token is to be computed, or nothing is computed yet."""
        return self.num_computed_tokens == 0 or self.num_uncomputed > 1

    @property
    def is_suspect(self) -> bool:
        return self.suspect_until > 0

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    @property
    def may_stop(self) -> bool:
        """Whether `min_tokens` are there."""
        return len(self.output_token_ids) >= self.sampling_params.min_tokens

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of prompt and output together; copies only these. Needs 0 <= start <= stop."""
        output_start = len(self.prompt_token_ids)
        if start >= output_start:
            return self.output_token_ids[start - output_start : stop - output_start]
        if stop <= output_start:
            return self.prompt_token_ids[start:stop]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - output_start]

    def rope_len(self, position: int) -> int:
        """Length of the sequence that the rope of the token at `position` is computed for, where rope depends on length."""
        return max(self.rope_base, position + 1)

    def restart_rope(self) -> None:
        """Have all tokens computed again with the rope of the present length."""
        self.rope_base = self.num_tokens
        self.num_computed_tokens = 0

    def append(self, token_id: int) -> None:
        """Add a sampled token and finish the request if a stop rule says so. Rules in order: ids, strings, length."""
        assert not self.is_finished
        if self.max_new_tokens > 0:
            self.output_token_ids.append(token_id)
            if token_id in self.stop_ids and self.may_stop:
                self._stop_at(token_id)
            else:
                self._add_text(token_id)
        if len(self.output_token_ids) >= self.max_new_tokens:
            self.finish(FinishReason.LENGTH)

    def extend(self, token_ids: list[int]) -> None:
        """Add sampled tokens that meet no stop rule; the request has no stop strings."""
        self.output_token_ids += token_ids
        if self.detokenizer is not None:
            self.text += self._piece(partial(self.detokenizer.append, token_ids))

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None, error: Exception | None = None) -> None:
        """End the request and release the text held back; only the first call counts.

        The last text may still meet a stop string, which then replaces the reason LENGTH.
        """
        if self.is_finished:
            return
        if self.detokenizer is not None and not isinstance(stop_reason, str):  # the text ends at a stop string
            stop = self._release(self._piece(self.detokenizer.finish), is_last=True)
            if stop is not None and reason is FinishReason.LENGTH:
                reason, stop_reason = FinishReason.STOP, stop
        if self.is_finished:  # the tokenizer has failed
            return
        self.status = RequestStatus.FINISHED
        self.finish_reason, self.stop_reason, self.error = reason, stop_reason, error

    def _stop_at(self, token_id: int) -> None:
        """Finish at a stop token; its text is kept only on request."""
        if self.sampling_params.include_stop_str_in_output:
            self._add_text(token_id)
        is_eos = token_id not in self.sampling_params.stop_ids
        self.finish(FinishReason.STOP, None if is_eos else token_id)

    def _add_text(self, token_id: int) -> None:
        """Extend the text by one token and finish at a stop string."""
        if self.detokenizer is not None:
            stop = self._release(self._piece(partial(self.detokenizer.append, [token_id])))
            if stop is not None:
                self.finish(FinishReason.STOP, stop)

    def _piece(self, detokenize: Callable[[], str]) -> str:
        """Text of the detokenizer. One that fails, such as a tokenizer that does not know an id, ends this request alone."""
        try:
            return detokenize()
        except Exception as error:
            self.detokenizer = None
            failed = ExecutionError(
                f"request {self.request_id}: its tokenizer failed on {len(self.output_token_ids)} output tokens: "
                f"{type(error).__name__}: {error}. Use detokenize=False, or the model's own tokenizer."
            )
            failed.__cause__ = error
            self.finish(FinishReason.ERROR, error=failed)
            return ""

    def _release(self, piece: str, *, is_last: bool = False) -> str | None:
        """Make text final up to a stop string, which is returned, or else up to what may become one."""
        window = self._held_text + piece
        stops = self.sampling_params.stop_strings
        match = _first_match(window, stops) if self.may_stop else None
        if match is None:
            final = len(window) if is_last else len(window) - _longest_open_prefix(window, stops)
        else:
            start, stop = match
            final = start + len(stop) if self.sampling_params.include_stop_str_in_output else start
        self.text += window[:final]
        self._held_text = "" if match else window[final:]
        return match[1] if match else None


def _first_match(text: str, stops: Iterable[str]) -> tuple[int, str] | None:
    """Start and stop string of the match that ends first in `text`; of several ending there, the longest."""
    matches = [(start, stop) for stop in stops if (start := text.find(stop)) >= 0]
    return min(matches, key=lambda match: (match[0] + len(match[1]), match[0]), default=None)


def _longest_open_prefix(text: str, stops: Iterable[str]) -> int:
    """Length of the longest end of `text` that is the beginning, but not the whole, of a stop string."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest
