"""A plan as tables, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from autodeploy.plan.estimate import Estimate
from autodeploy.plan.plan import Plan, amount

SHOWN_GROUPS = 12


def weight_table(plan: Plan) -> Table:
    """The shard plan: the largest groups of parameters, and how each is divided."""
    names = Column("parameters", overflow="fold")  # a name that is cut short says nothing
    table = Table(names, "number", "shape", "stored as", "divided", "bytes", title="weights of a rank")
    for group in plan.groups[:SHOWN_GROUPS]:
        shape = ", ".join(map(str, group.shape))
        table.add_row(Text(group.name), str(group.count), Text(f"[{shape}]"), group.stored, group.cut, amount(group.num_bytes))
    if rest := plan.groups[SHOWN_GROUPS:]:
        number, size = sum(group.count for group in rest), sum(group.num_bytes for group in rest)
        table.add_row(f"{len(rest)} smaller groups", str(number), "", "", "", amount(size))
    return table


def memory_table(plan: Plan) -> Table:
    mesh = plan.mesh
    table = Table("memory", "bytes", "", title=f"a rank of tp={mesh.tp} ep={mesh.ep} pp={mesh.pp} on {plan.device.name}")
    table.add_row("weights", amount(plan.weight_bytes), f"{plan.weight_bytes:,} bytes")
    table.add_row("workspace", amount(plan.workspace_bytes), f"steps of {plan.max_num_tokens:,} tokens")
    each = f"{plan.cache_bytes_per_token:,} bytes per token"
    if plan.cache_bytes_per_request:
        each += f", {plan.cache_bytes_per_request:,} per request"
    table.add_row("caches", amount(plan.left_bytes), f"all that is left; {each}; room for {plan.cache_tokens:,} tokens")
    table.add_row("all", amount(plan.device.memory), plan.device.source)
    return table


def step_table(plan: Plan) -> Table:
    """Bounds of decode steps and of one prompt."""
    title = f"at the least, with {plan.context:,} tokens of context: bounds, not forecasts"
    table = Table("step", "requests", "ms", "tokens/s", "read", "TFLOP", "ms in collectives", "limit", title=title)
    for estimate in plan.decode:
        table.add_row("decode", *_cells(estimate))
    table.add_row("prefill", *_cells(plan.prefill))
    return table


def _cells(estimate: Estimate) -> Iterator[str]:
    seconds = estimate.seconds
    yield str(estimate.requests)
    yield f"{seconds * 1e3:.2f}"
    yield f"{estimate.tokens / seconds:,.0f}"
    yield amount(estimate.read_bytes)
    yield f"{sum(estimate.flop.values()) / 1e12:.3g}"
    yield f"{estimate.collective_seconds * 1e3:.2f}"
    yield estimate.limit if estimate.fits else f"{estimate.limit}; the caches have no room for it"


def collective_text(plan: Plan) -> str:
    """One line on what ranks send each other in a decode step."""
    if not plan.collectives:
        return "collectives: none"
    parts = [f"{each.count} {each.op} of {each.num_bytes:,} bytes" for each in plan.collectives]
    return f"collectives of a step, for each token, over {plan.device.link.name}: {', '.join(parts)}"


def as_json(plan: Plan) -> str:
    data: dict[str, Any] = asdict(plan)
    data |= {"left_bytes": plan.left_bytes, "needed_bytes": plan.needed_bytes}
    data["decode"] = [_estimate(each) for each in plan.decode]
    data["prefill"] = _estimate(plan.prefill)
    return json.dumps(data, indent=1) + "\n"


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return asdict(estimate) | {"seconds": estimate.seconds, "limit": estimate.limit}
