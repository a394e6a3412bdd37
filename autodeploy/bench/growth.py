"""How the time of a step and of a prompt grows with the context, with the requests and with the layers, one of them at a time.

Beside each figure stands its floor: the time this machine would take if nothing but reading and multiplying took any.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

from autodeploy.bench.ceilings import Machine
from autodeploy.bench.results import Results
from autodeploy.bench.workload import Cell

STEP, PROMPT, START = "step", "prompt", "process start to first token"


@dataclass(frozen=True)
class Figure:
    """A measured time and the least it could be; seconds."""

    name: str
    seconds: float
    floor_seconds: float
    is_noisy: bool

    @property
    def times_floor(self) -> float:
        return self.seconds / self.floor_seconds


@dataclass(frozen=True)
class Point:
    """What was measured at one value of what grows. unit: of the value, in the singular."""

    value: int
    unit: str
    figures: tuple[Figure, ...]

    @property
    def name(self) -> str:
        return f"{self.value:,} {self.unit}{'s' if self.value != 1 else ''}"


@dataclass(frozen=True)
class Plan:
    """Lengths of prompts and numbers of requests; while one varies, the first of the other holds."""

    lengths: Sequence[int]
    requests: Sequence[int]
    output_len: int

    def cell(self, length: int | None = None, requests: int | None = None) -> Cell:
        many = requests or self.requests[0]
        return Cell(many, length or self.lengths[0], self.output_len, many)

    def by_length(self) -> dict[int, Cell]:
        """None when there is but one length, so that nothing grows."""
        return {length: self.cell(length=length) for length in self.lengths if len(self.lengths) > 1}

    def by_requests(self) -> dict[int, Cell]:
        return {many: self.cell(requests=many) for many in self.requests if len(self.requests) > 1}

    def cells(self) -> list[Cell]:
        """Those of both; each once."""
        return list(dict.fromkeys([*self.by_length().values(), *self.by_requests().values()]))


def share_limits(measured: Sequence[Results]) -> None:
    """A limit is the best that was seen, whichever model was measured then: so floors can be compared."""
    best = reduce(Machine.best_with, (results.machine for results in measured))
    for results in measured:
        results.machine = best


def points_of(plan: Plan, results: Results) -> list[Point]:
    """With the context, then with the requests."""
    context = [Point(value, "token", figures(results, cell)) for value, cell in plan.by_length().items()]
    return context + [Point(value, "request", figures(results, cell)) for value, cell in plan.by_requests().items()]


def point_of_depth(plan: Plan, num_layers: int, results: Results) -> Point:
    """results: of a model with so many layers."""
    return Point(num_layers, "layer", (*figures(results, plan.cell()), start_figure(results)))


def figures(results: Results, cell: Cell) -> tuple[Figure, ...]:
    return tuple(_figures(results, cell))


def _figures(results: Results, cell: Cell) -> Iterator[Figure]:
    noisy = results.ours.is_noisy(cell) or results.machine.is_noisy
    rate, ceiling = results.ours.decode_rate(cell), results.ceiling("decode", cell)
    if rate is not None and ceiling is not None:
        yield Figure(STEP, cell.concurrency / rate, cell.concurrency / ceiling, noisy)
    rate, ceiling = results.ours.prefill_rate(cell), results.ceiling("prefill", cell)
    if rate is not None and ceiling is not None:
        yield Figure(PROMPT, cell.input_len / rate, cell.input_len / ceiling, noisy)


def start_figure(results: Results) -> Figure:
    """From the start of the process to the first token; the floor is one reading of the weights."""
    assert results.ours.first_token_seconds is not None
    floor = results.weight_bytes / results.machine.read_rate
    return Figure(START, results.ours.first_token_seconds, floor, results.ours.is_noisy_start or results.machine.is_noisy)
