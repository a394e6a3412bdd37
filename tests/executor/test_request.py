"""Stop rules, text that is final once shown, and access to tokens."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from autodeploy.config import SamplingParams
from autodeploy.executor.request import FinishReason, Request

EOS = 99


class Letters:
    """A detokenizer of one text per token."""

    def __init__(self, vocabulary: Sequence[str] = "abcdefghijklmnopqrstuvwxyz", tail: str = "") -> None:
        self.vocabulary, self.text, self._tail = vocabulary, "", tail

    def append(self, token_ids: Sequence[int]) -> str:
        piece = "".join("$" if token == EOS else self.vocabulary[token] for token in token_ids)
        self.text += piece
        return piece

    def finish(self) -> str:
        self.text += self._tail
        return self._tail


def make(prompt: int = 3, max_new_tokens: int = 50, detokenizer: Letters | None = None, **options: Any) -> Request:
    params = SamplingParams(max_tokens=None, **options)
    return Request(1, list(range(prompt)), params, frozenset({EOS}), max_new_tokens, detokenizer or Letters())


def feed(request: Request, text: str) -> list[str]:
    """Append letters until the request ends; returns the text shown after each."""
    shown = []
    for letter in text:
        if request.is_finished:
            break
        request.append(EOS if letter == "$" else ord(letter) - ord("a"))
        shown.append(request.text)
    return shown


def test_length_ends_the_request() -> None:
    request = make(max_new_tokens=3)
    assert feed(request, "abcdef") == ["a", "ab", "abc"]
    assert request.finish_reason is FinishReason.LENGTH and request.stop_reason is None


def test_prompt_only_request_ends_without_a_token() -> None:
    request = make(max_new_tokens=0)
    request.append(5)
    assert request.is_finished and request.output_token_ids == [] and request.text == ""
    assert request.finish_reason is FinishReason.LENGTH


def test_eos_is_kept_in_ids_and_left_out_of_text() -> None:
    request = make()
    feed(request, "ab$")
    assert (request.finish_reason, request.stop_reason) == (FinishReason.STOP, None)
    assert request.output_token_ids == [0, 1, EOS] and request.text == "ab"
    kept = make(include_stop_str_in_output=True)
    feed(kept, "ab$")
    assert kept.text == "ab$"


def test_eos_at_the_last_token_is_stop_and_not_length() -> None:
    request = make(max_new_tokens=3)
    feed(request, "ab$")
    assert request.finish_reason is FinishReason.STOP


def test_ignore_eos_goes_on() -> None:
    request = make(ignore_eos=True, max_new_tokens=4)
    assert feed(request, "a$bc")[-1] == "a$bc"
    assert request.finish_reason is FinishReason.LENGTH


def test_stop_token_ids_name_the_token() -> None:
    request = make(stop_token_ids=[2], ignore_eos=True)
    feed(request, "abcd")
    assert (request.finish_reason, request.stop_reason, request.text) == (FinishReason.STOP, 2, "ab")


def test_stop_string_is_never_shown() -> None:
    request = make(stop=["cde"])
    assert feed(request, "abcdxcdef") == ["a", "ab", "ab", "ab", "abcdx", "abcdx", "abcdx", "abcdx"]
    assert (request.finish_reason, request.stop_reason) == (FinishReason.STOP, "cde")


def test_stop_string_inside_one_token() -> None:
    for include, text in ((False, "he"), (True, "hello")):
        request = make(detokenizer=Letters(["hello world"]), stop="llo", include_stop_str_in_output=include)
        request.append(0)
        assert request.text == text and request.stop_reason == "llo"


def test_the_stop_string_that_ends_first_wins_whatever_the_tokens() -> None:
    for pieces in (["abcd"], ["a", "b", "c", "d"], ["ab", "cd"]):
        request = make(detokenizer=Letters(pieces), stop=["abcd", "b"])
        for token in range(len(pieces)):
            if not request.is_finished:
                request.append(token)
        assert (request.stop_reason, request.text) == ("b", "a")


def test_text_held_back_is_shown_at_the_end() -> None:
    request = make(stop="cde", max_new_tokens=4)
    assert feed(request, "abcd")[-1] == "abcd"
    aborted = make(stop="cde")
    assert feed(aborted, "abcd")[-1] == "ab"
    aborted.finish(FinishReason.ABORT)
    assert aborted.text == "abcd"


def test_last_text_of_the_detokenizer_may_meet_a_stop_string() -> None:
    request = make(detokenizer=Letters(tail="yz!"), stop="yz", max_new_tokens=2)
    assert feed(request, "ab")[-1] == "ab"
    assert (request.finish_reason, request.stop_reason) == (FinishReason.STOP, "yz")
    failed = make(detokenizer=Letters(tail="yz!"), stop="yz")
    feed(failed, "a")
    failed.finish(FinishReason.ERROR, error=RuntimeError("x"))
    assert failed.finish_reason is FinishReason.ERROR and failed.error is not None


def test_min_tokens_hold_off_every_stop() -> None:
    assert len(feed(make(min_tokens=3), "$$$$")) == 3
    assert len(feed(make(min_tokens=3, stop="a"), "aaaa")) == 3
    assert len(feed(make(min_tokens=3, stop_token_ids=[0]), "aaaa")) == 3
    assert len(feed(make(min_tokens=3, max_new_tokens=2), "$$$$")) == 2


def test_a_stop_string_before_min_tokens_is_text_like_any_other() -> None:
    request = make(min_tokens=2, stop=["a", "xy"])
    assert feed(request, "axbxy") == ["a", "a", "axb", "axb", "axb"]
    assert request.stop_reason == "xy"


def test_only_the_first_finish_counts() -> None:
    request = make()
    request.finish(FinishReason.ABORT)
    request.finish(FinishReason.ERROR, error=RuntimeError("late"))
    assert request.finish_reason is FinishReason.ABORT and request.error is None


def test_without_detokenizer_there_is_no_text() -> None:
    request = Request(1, [1], SamplingParams(), frozenset({EOS}), 5)
    request.append(3)
    request.append(EOS)
    assert request.text == "" and request.finish_reason is FinishReason.STOP


STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


@given(pieces=st.lists(st.text("abc", max_size=4), min_size=1, max_size=12), stops=STOPS, include=st.booleans())
def test_stop_strings_agree_with_a_search_letter_by_letter(pieces: list[str], stops: list[str], include: bool) -> None:
    text = "".join(pieces)
    expected, reason = text, None
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            reason = max(ending, key=len)
            expected = text[:end] if include else text[: end - len(reason)]
            break
    request = make(detokenizer=Letters(pieces), stop=stops, max_new_tokens=len(pieces), include_stop_str_in_output=include)
    shown = [""]
    for token in range(len(pieces)):
        if not request.is_finished:
            request.append(token)
            shown.append(request.text)
    assert (request.text, request.stop_reason) == (expected, reason)
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))


@given(num_prompt=st.integers(1, 6), num_output=st.integers(0, 6), data=st.data())
def test_token_ids_slices_prompt_and_output_together(num_prompt: int, num_output: int, data: st.DataObject) -> None:
    request = make(prompt=num_prompt)
    request.output_token_ids.extend(range(100, 100 + num_output))
    everything = request.prompt_token_ids + request.output_token_ids
    start = data.draw(st.integers(0, len(everything)))
    stop = data.draw(st.integers(start, len(everything)))
    assert request.token_ids(start, stop) == everything[start:stop]


def test_progress() -> None:
    request = make(prompt=3)
    assert (request.num_tokens, request.num_uncomputed, request.is_prefill) == (3, 3, True)
    request.num_computed_tokens = 2
    assert request.is_prefill is False  # one token left, the rest is in the cache: computed as a decode is
    request.num_computed_tokens = 3
    request.append(0)
    assert (request.num_tokens, request.num_uncomputed, request.is_prefill) == (4, 1, False)
    assert make(prompt=1).is_prefill


def test_rope_length_is_that_of_the_prompt_and_then_grows() -> None:
    request = make(prompt=3)
    assert [request.rope_len(position) for position in range(5)] == [3, 3, 3, 4, 5]
    feed(request, "abc")
    request.num_computed_tokens = 5
    request.restart_rope()
    assert request.num_computed_tokens == 0
    assert [request.rope_len(position) for position in (0, 5, 6)] == [6, 6, 7]
