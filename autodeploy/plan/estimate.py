"""How long steps take at the least: what must be read, or multiplied, whichever takes longer; then what must be sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autodeploy.plan.devices import COLLECTIVE_SECONDS, Device
from autodeploy.plan.work import Step, Work


@dataclass(frozen=True)
class Estimate:
    """Steps of one shape. Seconds are bounds: no step of this program can take less, and real ones take more."""

    requests: int
    tokens: int
    """That the steps compute, all together."""
    read_bytes: float
    flop: Mapping[str, float]
    read_seconds: float
    flop_seconds: float
    collective_seconds: float
    fits: bool
    """Whether the caches have room for these requests."""

    @property
    def seconds(self) -> float:
        return max(self.read_seconds, self.flop_seconds) + self.collective_seconds

    @property
    def limit(self) -> str:
        """What most of the time goes to."""
        parts = {"memory": self.read_seconds, "products": self.flop_seconds, "collectives": self.collective_seconds}
        return max(parts, key=parts.__getitem__)


def one_after_the_other(parts: Sequence[Estimate]) -> Estimate:
    """Of the same tokens through several programs."""
    return Estimate(
        requests=parts[0].requests,
        tokens=parts[0].tokens,
        read_bytes=sum(part.read_bytes for part in parts),
        flop=_together([part.flop for part in parts]),
        read_seconds=sum(part.read_seconds for part in parts),
        flop_seconds=sum(part.flop_seconds for part in parts),
        collective_seconds=sum(part.collective_seconds for part in parts),
        fits=all(part.fits for part in parts),
    )


def estimate(steps: Sequence[Step], works: Sequence[Work], device: Device, num_ranks: int, fits: bool) -> Estimate:
    """Of steps one after the other."""
    read = [work.weight_bytes + work.cache_bytes for work in works]
    rates = [sum(count / device.flop_rate(dtype) for dtype, count in work.flop.items()) for work in works]
    sent = [
        count * collective_seconds(op, num_bytes, num_ranks, device)
        for work in works
        for (op, num_bytes), count in work.collectives.items()
    ]
    flop, tokens = _together([work.flop for work in works]), sum(step.requests * step.tokens for step in steps)
    return Estimate(steps[0].requests, tokens, sum(read), flop, sum(read) / device.read_rate, sum(rates), sum(sent), fits)


def _together(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Operations by element type; in a fixed order, so that a plan written twice is the same."""
    return {dtype: sum(each.get(dtype, 0) for each in counts) for dtype in sorted({dtype for each in counts for dtype in each})}


def collective_seconds(op: str, num_bytes: float, num_ranks: int, device: Device) -> float:
    """Of one over a ring: a sum goes round twice, a gathering once, and each step passes on one rank's part."""
    rounds = 2 if op == "all_reduce" else 1
    steps, link = rounds * (num_ranks - 1), device.link
    return COLLECTIVE_SECONDS + steps * (link.step_seconds + num_bytes / num_ranks / link.bytes_per_second)
