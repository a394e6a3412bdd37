"""What was measured: runs, engines, and the summary of the runs of one engine in one cell."""

from __future__ import annotations

import platform
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from autodeploy.bench.ceilings import Machine, ModelSize, decode_ceiling, e2e_ceiling, prefill_ceiling
from autodeploy.bench.metrics import RunTimes, latencies
from autodeploy.bench.watch import QUIET
from autodeploy.bench.workload import Cell
from autodeploy.cores import available_cores

CEILINGS = {"decode": decode_ceiling, "e2e": e2e_ceiling, "prefill": prefill_ceiling}
RATES: dict[str, Callable[[RunTimes, Cell], float | None]] = {
    "decode": lambda times, cell: times.decode_rate,
    "e2e": lambda times, cell: times.e2e_rate,
    "prefill": lambda times, cell: times.prefill_rate(cell.input_len),
}


@dataclass(frozen=True)
class Run:
    """One run of one engine in one cell."""

    times: RunTimes
    foreign_cores: float
    is_spread: bool = False
    """The times of single tokens are not known: they are spread evenly."""
    limits: Machine | None = None
    """What the machine could do right before and after it."""

    @property
    def is_noisy(self) -> bool:
        return self.foreign_cores > QUIET


@dataclass
class EngineResult:
    """One engine's process: what it is, how it started, what it took and all its runs."""

    name: str
    versions: dict[str, str] = field(default_factory=dict)
    load_seconds: float | None = None
    first_token_seconds: float | None = None
    """From the start of its process."""
    first_start_seconds: float | None = None
    """The same of an engine that compiles and keeps what it compiled, before there was any."""
    is_noisy_start: bool = False
    peak_anon_bytes: int = 0
    error: str = ""
    runs: dict[Cell, list[Run]] = field(default_factory=dict)

    def median(self, kind: str, cell: Cell) -> float | None:
        """Of one figure over the runs of a cell."""
        values = [value for run in self.runs.get(cell, ()) if (value := RATES[kind](run.times, cell)) is not None]
        return statistics.median(values) if values else None

    def add(self, cell: Cell, run: Run | None) -> None:
        if run is not None:
            self.runs.setdefault(cell, []).append(run)

    def decode_rate(self, cell: Cell) -> float | None:
        return self.median("decode", cell)

    def e2e_rate(self, cell: Cell) -> float | None:
        return self.median("e2e", cell)

    def prefill_rate(self, cell: Cell) -> float | None:
        return self.median("prefill", cell)

    def is_noisy(self, cell: Cell) -> bool:
        return any(run.is_noisy for run in self.runs.get(cell, ()))

    def as_json(self) -> dict[str, Any]:
        fields = ("name", "versions", "load_seconds", "first_token_seconds", "first_start_seconds", "peak_anon_bytes", "error")
        return {**{name: getattr(self, name) for name in fields}, "cells": [self._cell(cell) for cell in self.runs]}

    def _cell(self, cell: Cell) -> dict[str, Any]:
        times = [run.times for run in self.runs[cell]]
        return {
            **asdict(cell),
            "decode_rate": self.decode_rate(cell),
            "e2e_rate": self.e2e_rate(cell),
            "prefill_rate": self.prefill_rate(cell),
            "is_noisy": self.is_noisy(cell),
            "token_times_are_spread_evenly": any(run.is_spread for run in self.runs[cell]),
            "latency_seconds": {name: spread and asdict(spread) for name, spread in latencies(times).items()},
            "runs": [
                {
                    "decode_rate": run.times.decode_rate,
                    "e2e_rate": run.times.e2e_rate,
                    "prefill_rate": run.times.prefill_rate(cell.input_len),
                    "foreign_cores": run.foreign_cores,
                    "limits": run.limits and asdict(run.limits),
                }
                for run in self.runs[cell]
            ],
        }


@dataclass
class Results:
    """One command's measurements; `engines[0]` is autodeploy."""

    model: str
    cells: list[Cell]
    threads: int
    machine: Machine
    size: ModelSize
    engines: list[EngineResult]
    weight_bytes: int
    """Of the parameters as compiled."""
    pool_bytes: int
    not_installed: dict[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> EngineResult:
        return self.engines[0]

    def ceiling(self, kind: str, cell: Cell) -> float | None:
        """Tokens per second, the median over our runs; None where the figure does not exist. kind: decode, e2e or prefill."""
        if (kind != "prefill" and cell.output_len == 1) or (kind == "prefill" and cell.num_requests > 1):
            return None
        return statistics.median(self._ceilings(kind, cell) or [CEILINGS[kind](self.machine, self.size, cell)])

    def share(self, kind: str, cell: Cell) -> float | None:
        """The median share of its own ceiling that a run of ours reached: on a shared host ceilings move."""
        if self.ceiling(kind, cell) is None:
            return None
        rates = [RATES[kind](run.times, cell) for run in self.ours.runs.get(cell, ())]
        shares = [rate / limit for rate, limit in zip(rates, self._ceilings(kind, cell), strict=True) if rate is not None]
        return statistics.median(shares) if shares else None

    def _ceilings(self, kind: str, cell: Cell) -> list[float]:
        """At the time of each run of ours."""
        runs = self.ours.runs.get(cell, ())
        return [CEILINGS[kind](run.limits or self.machine, self.size, cell) for run in runs]

    def as_json(self) -> dict[str, Any]:
        return {
            "computer": computer(),
            "threads": self.threads,
            "model": self.model,
            "limits": asdict(self.machine),
            "size": asdict(self.size),
            "weight_bytes": self.weight_bytes,
            "pool_bytes": self.pool_bytes,
            "ceilings": [{**asdict(cell), **{kind: self.ceiling(kind, cell) for kind in CEILINGS}} for cell in self.cells],
            "shares": [{**asdict(cell), **{kind: self.share(kind, cell) for kind in CEILINGS}} for cell in self.cells],
            "engines": [engine.as_json() for engine in self.engines],
            "not_installed": self.not_installed,
        }


def computer() -> dict[str, Any]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return {
        "cpu": name[1] if name else platform.processor(),
        "cores": available_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def best_rate(rates: Iterable[float | None]) -> float | None:
    """The largest; None when there is none."""
    return max((rate for rate in rates if rate is not None), default=None)
