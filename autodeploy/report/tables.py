"""The report of one compile as text."""

from __future__ import annotations

from io import StringIO

from rich.console import Console
from rich.table import Table

from autodeploy.program import Program
from autodeploy.report.timeline import Timeline


def pass_table(program: Program) -> Table:
    """Pass, rewrites, seconds, what changed in op counts."""
    table = Table("pass", "rewrites", "seconds", "ops", title="passes")
    for record in program.history:
        delta = ", ".join(f"{count:+d} {name}" for name, count in record.op_delta.items())
        table.add_row(record.name, str(record.rewrites), f"{record.seconds:.3f}", delta)
    return table


def provider_table(program: Program) -> Table:
    table = Table("op", "provider", title="kernels")
    for name, provider in program.providers.items():
        table.add_row(name, provider)
    return table


def describe(program: Program, timeline: Timeline, page_size: int) -> str:
    """Passes, kernels, caches, weights and start-up seconds."""
    console = Console(width=160, file=StringIO())
    cache_bytes = sum(spec.bytes_per_page(page_size) for spec in program.caches.values()) // page_size
    weight_bytes = sum(program.parameter(name).nbytes for name in program.weights)
    console.print(pass_table(program), provider_table(program))
    console.print(f"caches: {len(program.caches)}, {cache_bytes} bytes per token")
    console.print(f"weights: {len(program.weights)} parameters, {weight_bytes / 1e6:.1f} MB")
    console.print(f"start-up: {timeline}")
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
