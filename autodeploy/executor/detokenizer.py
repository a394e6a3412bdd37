"""Text from tokens as they come, in linear time and never with half a character."""

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\ufffd"  # what a tokenizer writes for bytes that are no character (yet)
_MAX_PENDING = 16  # tokens; a character takes at most 4
_MAX_CHARACTER_TOKENS = 4


class IncrementalDetokenizer:
    """Detokenises one request's output.

    All pieces joined equal `tokenizer.decode(output_token_ids)` without clean-up of spaces. A piece is held back while the
    text ends in bytes that may be an unfinished character, but not for ever: what no further token can complete is released
    after a few tokens. A tokenizer with byte fallback that meets invalid bytes right after valid ones may keep the valid
    ones, where one decode of everything would drop them.

    Each step decodes a short window: `context` tokens whose text is already out, so that the tokenizer treats the following
    ones as a continuation (leading spaces!), then the pending tokens. The prompt is not part of the context: the text is
    that of the output alone.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        if not getattr(tokenizer, "is_fast", True):
            self._options["spaces_between_special_tokens"] = spaces_between_special_tokens
        self._pieces: list[str] = []
        self._context: list[int] = []
        self._context_chars = 0
        self._pending: list[int] = []

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self._pieces)

    def append(self, token_ids: Sequence[int]) -> str:
        """Take further tokens; return the text that became certain, often empty."""
        return "".join([self._append(token_id) for token_id in token_ids])

    def _append(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._decode(self._context + self._pending)
        if len(text) > self._context_chars and not text.endswith(_REPLACEMENT):
            return self._release(len(self._pending), text)
        if len(self._pending) <= _MAX_PENDING:
            return ""
        if len(text) <= self._context_chars:
            self._pending.clear()  # special or unknown tokens: they never print anything
            return ""
        return self._release(self._clean_cut())

    def finish(self) -> str:
        """Return the text still held back."""
        return self._release(len(self._pending)) if self._pending else ""

    def _release(self, count: int, text: str | None = None) -> str:
        """Return the text of the first `count` pending tokens, which then are the context; `text` is context and these."""
        released = self._pending[:count]
        piece = (self._decode(self._context + released) if text is None else text)[self._context_chars :]
        del self._pending[:count]
        self._context = released
        self._context_chars = len(self._decode(released))
        self._pieces.append(piece)
        return piece

    def _clean_cut(self) -> int:
        """How many pending tokens can be released without splitting a character: a split one decodes to more replacements."""
        window = self._context + self._pending
        cuts = range(len(window) - 1, len(window) - 1 - _MAX_CHARACTER_TOKENS, -1)
        best = min(cuts, key=lambda cut: len(self._decode(window[:cut])) + len(self._decode(window[cut:])))
        return best - len(self._context)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, **self._options)
