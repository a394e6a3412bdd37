"""Results as tables for the terminal. A star marks a figure during which other processes were busy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from autodeploy.bench.growth import Point
from autodeploy.bench.metrics import PERCENTILES, latencies
from autodeploy.bench.results import EngineResult, Results, best_rate, computer
from autodeploy.bench.startup import Start
from autodeploy.bench.watch import QUIET
from autodeploy.bench.workload import Cell
from autodeploy.report.markup import num_bytes

KINDS = {"decode": EngineResult.decode_rate, "e2e": EngineResult.e2e_rate, "prefill": EngineResult.prefill_rate}
NONE = "-"


def throughput_table(results: Results) -> Table:
    """One row per cell and kind: rate, ceiling, and the share of it that is reached."""
    table = Table("cell", "", title="tokens per second, and this machine's ceiling")
    for name in ("tokens/s", "ceiling", "share"):
        table.add_column(name, justify="right")
    for cell in results.cells:
        name = str(cell)
        for kind in KINDS:
            if (share := results.share(kind, cell)) is not None:
                ceiling = number(results.ceiling(kind, cell))
                table.add_row(name, kind, _rate(results.ours, kind, cell), ceiling, f"{100 * share:.0f} %")
                name = ""
    return table


def latency_table(results: Results) -> Table:
    table = Table("cell", "ms", title="latency")
    for name in ("mean", *(f"p{at}" for at in PERCENTILES)):
        table.add_column(name, justify="right")
    for cell in results.cells:
        for i, (name, spread) in enumerate(latencies([run.times for run in results.ours.runs[cell]]).items()):
            values = [] if spread is None else [spread.mean, *spread.percentiles.values()]
            star = "*" if results.ours.is_noisy(cell) else ""
            texts = [f"{1000 * value:.1f}{star}" for value in values] or [NONE] * (1 + len(PERCENTILES))
            table.add_row("" if i else str(cell), name, *texts)
    return table


def startup_table(first: Start, later: Start) -> Table:
    """first: with an empty cache. later: medians of the starts after it."""
    table = Table("phase", title="start-up; medians of the starts with a cached program")
    for name in ("first: s", "CPU s", "cached: s", "CPU s"):
        table.add_column(name, justify="right")
    for name in dict.fromkeys([*first.seconds, *later.seconds]):
        table.add_row(name, *(text for start in (first, later) for text in _seconds(start, name)))
    return table


def _seconds(start: Start, phase: str) -> tuple[str, str]:
    """Wall and CPU."""
    star = "*" if start.foreign_cores > QUIET else ""
    wall, cpu = (f"{found[phase]:.2f}" if phase in found else NONE for found in (start.seconds, start.cpu_seconds))
    return (wall + star if wall != NONE else NONE), cpu


def growth_table(points: Sequence[Point]) -> Table:
    """One row per value and figure: the time, its floor, and how many times that it is."""
    table = Table("", "", title="milliseconds, and this machine's floor")
    for name in ("ms", "floor", "times the floor"):
        table.add_column(name, justify="right")
    for point, previous in zip(points, [None, *points], strict=False):
        if previous is not None and previous.unit != point.unit:
            table.add_section()
        for i, figure in enumerate(point.figures):
            milliseconds = number(1000 * figure.seconds) + ("*" if figure.is_noisy else "")
            floor, times = number(1000 * figure.floor_seconds), f"{number(figure.times_floor)}x"
            table.add_row("" if i else point.name, figure.name, milliseconds, floor, times)
    return table


def scheduling_table(costs: Mapping[int, Mapping[str, float]]) -> Table:
    """One row per number of requests; microseconds of a step of each kind."""
    kinds = next(iter(costs.values()))
    table = Table("requests", *(f"{name}, us" for name in kinds), title="a decode step besides the model")
    for column in table.columns:
        column.justify = "right"
    for many, seconds in costs.items():
        table.add_row(str(many), *(number(1e6 * value) for value in seconds.values()))
    return table


def compare_table(results: Results) -> Table:
    """Figures down, engines across; then autodeploy over the best of the others, and the ceiling."""
    table = Table("tokens per second", title="compared")
    peers = len(results.engines) > 1
    for name in [
        *(engine.name for engine in results.engines),
        *(["ours / best peer"] if peers else []),
        "ceiling",
        "share of it",
    ]:
        table.add_column(name, justify="right", overflow="fold")
    for kind, cell in columns_of(results):
        rates = (_rate(engine, kind, cell) for engine in results.engines)
        ratio = [_ratio(results, kind, cell)] if peers else []
        share = results.share(kind, cell)
        limit = [number(results.ceiling(kind, cell)), NONE if share is None else f"{100 * share:.0f} %"]
        table.add_row(_heading(results, kind, cell), *rates, *ratio, *limit)
    table.add_section()
    table.add_row("process start to first token, s", *map(_first_token, results.engines))
    if any(engine.first_start_seconds for engine in results.engines):
        table.add_row("the same, the first time, s", *(number(engine.first_start_seconds) for engine in results.engines))
    table.add_row("peak RssAnon", *(num_bytes(engine.peak_anon_bytes) for engine in results.engines))
    return table


def columns_of(results: Results) -> list[tuple[str, Cell]]:
    """A prefill cell has its prefill rate; the others their decode rate and, of several requests, end to end."""
    columns = []
    for cell in results.cells:
        kinds = ["prefill"] if cell.output_len == 1 else ["decode"] if cell.concurrency == 1 else ["decode", "e2e"]
        columns += [(kind, cell) for kind in kinds]
    return columns


def _heading(results: Results, kind: str, cell: Cell) -> str:
    if kind == "prefill":
        return cell.name
    lengths = {other.input_len for other in results.cells if other.output_len > 1}
    return f"{kind}, {cell.name}" + (f", {cell.input_len:,} in" if len(lengths) > 1 else "")


def _ratio(results: Results, kind: str, cell: Cell) -> str:
    ours, best = KINDS[kind](results.ours, cell), best_rate(KINDS[kind](peer, cell) for peer in results.engines[1:])
    return NONE if ours is None or best is None else f"{ours / best:.2f}x"


def _first_token(engine: EngineResult) -> str:
    if engine.first_token_seconds is None:
        return "failed"
    return f"{engine.first_token_seconds:.1f}{'*' if engine.is_noisy_start else ''}"


def _rate(engine: EngineResult, kind: str, cell: Cell) -> str:
    if (rate := KINDS[kind](engine, cell)) is None:
        return NONE
    return number(rate) + ("*" if engine.is_noisy(cell) else "")


def number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def footer(results: Results) -> str:
    """What the figures were measured on and with."""
    here, machine = computer(), results.machine
    star = "*" if machine.is_noisy else ""
    looks = (
        f", {min(machine.looks) / 1e9:.1f} to {max(machine.looks) / 1e9:.1f} in {len(machine.looks)} looks"
        if machine.looks
        else ""
    )
    lines = [
        f"{here['cpu']}, {here['cores']} cores, {results.threads} threads; "
        f"measured: reads {machine.read_rate / 1e9:.1f}{star} GB/s ({machine.pages} pages{looks}), "
        f"multiplies {machine.flop_rate / 1e9:,.0f}{star} GFLOP/s",
        f"weights {num_bytes(results.weight_bytes)}, read in a step {num_bytes(results.size.weight_bytes)}; KV pool "
        f"{num_bytes(results.pool_bytes)}; autodeploy's peak RssAnon {num_bytes(results.ours.peak_anon_bytes)}",
    ]
    for engine in results.engines:
        versions = ", ".join(f"{name} {version}" for name, version in engine.versions.items())
        lines.append(f"{engine.name}: {engine.error or versions}")
    lines += [f"{name}: {why}" for name, why in results.not_installed.items()]
    if machine.is_noisy or any(run.is_noisy for engine in results.engines for runs in engine.runs.values() for run in runs):
        lines.append(f"* other processes used more than {QUIET} cores meanwhile")
    return "\n".join(lines)
