"""From the times of tokens to figures. Times are seconds of one clock (CLOCK_MONOTONIC); rates are tokens per second."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class RequestTimes:
    """When a request was handed in, and when each of its tokens was there."""

    submitted: float
    tokens: tuple[float, ...]

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.tokens[0] - self.submitted

    @property
    def e2e(self) -> float:
        """Time to the last token."""
        return self.tokens[-1] - self.submitted

    @property
    def gaps(self) -> list[float]:
        """ITL: the time from each token to the next."""
        return [after - before for before, after in pairwise(self.tokens)]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None when there is but one."""
        return (self.tokens[-1] - self.tokens[0]) / (len(self.tokens) - 1) if len(self.tokens) > 1 else None


@dataclass(frozen=True)
class RunTimes:
    """All requests of one run."""

    requests: tuple[RequestTimes, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(request.tokens) for request in self.requests)

    @property
    def e2e_rate(self) -> float:
        """All generated tokens over the time from the first request handed in to the last token, prefill included."""
        started = min(request.submitted for request in self.requests)
        return self.num_tokens / (max(request.tokens[-1] for request in self.requests) - started)

    @property
    def decode_rate(self) -> float | None:
        """Tokens generated after every request has its first one, over the time since then; None when there are none."""
        since = max(request.tokens[0] for request in self.requests)
        until = max(request.tokens[-1] for request in self.requests)
        later = sum(time > since for request in self.requests for time in request.tokens)
        return later / (until - since) if later else None

    def prefill_rate(self, input_len: int) -> float | None:
        """Prompt tokens over the time to the first token; only of a run of one request."""
        return input_len / self.requests[0].ttft if len(self.requests) == 1 else None


@dataclass(frozen=True)
class Spread:
    """Seconds: mean and percentiles of some times."""

    mean: float
    percentiles: dict[int, float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        if not values:
            return None
        return cls(sum(values) / len(values), {at: percentile(values, at) for at in PERCENTILES})


def latencies(runs: Sequence[RunTimes]) -> dict[str, Spread | None]:
    """TTFT, TPOT and end to end over the requests, ITL over every pair of neighbouring tokens, of all runs together."""
    requests = [request for run in runs for request in run.requests]
    return {
        "TTFT": Spread.of([request.ttft for request in requests]),
        "TPOT": Spread.of([request.tpot for request in requests if request.tpot is not None]),
        "ITL": Spread.of([gap for request in requests for gap in request.gaps]),
        "E2E": Spread.of([request.e2e for request in requests]),
    }


def percentile(values: Sequence[float], at: float) -> float:
    """With straight lines between the ranks: 0 is the least value, 100 the largest."""
    ordered = sorted(values)
    rank = at / 100 * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (rank - low) * (ordered[high] - ordered[low])
