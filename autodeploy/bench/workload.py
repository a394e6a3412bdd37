"""What is asked of an engine: so many requests, so many at once, so many tokens in and out."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from autodeploy.errors import ConfigError


@dataclass(frozen=True)
class Cell:
    """One point that is measured. `concurrency` requests are under way at any time until all `num_requests` are done."""

    concurrency: int
    input_len: int
    output_len: int
    num_requests: int

    def __str__(self) -> str:
        many = "" if self.num_requests == self.concurrency else f" of {self.num_requests}"
        return f"{self.concurrency}{many} x {self.input_len} in, {self.output_len} out"

    @property
    def name(self) -> str:
        """For headings, where every request of a group has these lengths."""
        if self.output_len == 1:
            return f"prefill {self.input_len:,}"
        return f"{self.concurrency} request{'s' if self.concurrency != 1 else ''}"

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """Random token ids; other ones for another seed, so that no cache of prefixes helps."""
        draw = random.Random(f"{self} {seed}")
        return [[draw.randrange(vocab_size) for _ in range(self.input_len)] for _ in range(self.num_requests)]


def cells_of(concurrency: str, input_len: str, output_len: int, num_requests: int | None, prefill_len: str = "0") -> list[Cell]:
    """Every length of prompt with every number of requests at once; each `prefill_len` adds one prompt with one token out."""
    pairs = itertools.product(counts(input_len, "--input-len"), counts(concurrency, "--concurrency"))
    cells = [Cell(many, length, output_len, num_requests or many) for length, many in pairs]
    if any(cell.num_requests < cell.concurrency for cell in cells):
        raise ConfigError(f"--num-requests {num_requests} is less than --concurrency; so many can never be under way at once")
    lengths = [] if prefill_len == "0" else counts(prefill_len, "--prefill-len")
    return cells + [Cell(1, length, 1, 1) for length in lengths]


def counts(text: str, option: str) -> list[int]:
    """1,8,32 -> [1, 8, 32]. Raises ConfigError for anything but whole numbers above 0."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise ConfigError(f"{option} is '{text}', but it is one whole number above 0, or several separated by commas")
    return values


def longest(cells: Sequence[Cell]) -> int:
    """Tokens of the longest request, prompt and output."""
    return max(cell.input_len + cell.output_len for cell in cells)


def most_tokens(cells: Sequence[Cell]) -> int:
    """Tokens that are under way at once, at most."""
    return max(cell.concurrency * (cell.input_len + cell.output_len) for cell in cells)
