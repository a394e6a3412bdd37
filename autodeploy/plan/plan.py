"""A plan: what one rank of a layout holds, what fits beside it, and how long a step takes at the least."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from autodeploy._lower import lower
from autodeploy.config import LLMArgs
from autodeploy.custom_ops.gpu import has_triton
from autodeploy.errors import ConfigError
from autodeploy.executor.pool_sizes import PoolSizes
from autodeploy.plan.devices import Device
from autodeploy.plan.estimate import Estimate, estimate, one_after_the_other
from autodeploy.plan.weights import Group, groups
from autodeploy.plan.work import Counting, Step, Work
from autodeploy.plan.workspace import workspace_bytes
from autodeploy.plugins import edited_pipeline
from autodeploy.program import Program
from autodeploy.program_cache import Lowered
from autodeploy.report.timeline import Timeline
from autodeploy.specs import Mesh, Target, bytes_per_request, bytes_per_token
from autodeploy.transforms.split_stages import split_stages

HALF = ("bfloat16", "float16")
MACHINE = 8
"""GPUs that reach each other by the links of the table."""
MANY_TOKENS = 1 << 32
"""More than any cache holds."""


@dataclass(frozen=True)
class Collective:
    """Collectives of a decode step that are alike."""

    op: str
    count: int
    num_bytes: int
    """What a rank has when one is done, for each request."""


@dataclass(frozen=True)
class Plan:
    """Bytes are those of one rank; every rank has as many."""

    model: str
    device: Device
    mesh: Mesh
    context: int
    max_num_tokens: int
    groups: tuple[Group, ...]
    weight_bytes: int
    workspace_bytes: int
    cache_bytes_per_token: int
    cache_bytes_per_request: int
    needed_cache_bytes: int
    """For one request of the whole context."""
    cache_tokens: int
    """That fit into what is left; 0 where not even that one request does."""
    collectives: tuple[Collective, ...]
    decode: tuple[Estimate, ...]
    prefill: Estimate
    notes: tuple[str, ...]

    @property
    def needed_bytes(self) -> int:
        """The least this layout can do with."""
        return self.weight_bytes + self.workspace_bytes + self.needed_cache_bytes

    @property
    def left_bytes(self) -> int:
        """For caches; less than none where the rest does not fit."""
        return self.device.memory - self.weight_bytes - self.workspace_bytes


def lower_for(args: LLMArgs, mesh: Mesh, timeline: Timeline) -> Lowered:
    """The program that each rank of a layout runs, from config.json alone. Raises ConfigError for a layout there is none for."""
    if mesh.tp % mesh.ep:
        raise ConfigError(f"--ep {mesh.ep} does not divide --tp {mesh.tp}: experts are dealt out to groups of these ranks.")
    target = Target(args.device, args.kv_cache_config.page_size, mesh)
    pipeline = edited_pipeline(
        args.pipeline, args.plugins, target, args.quantization, args.kv_cache_config.dtype, args.shard_plan
    )
    return lower(args, pipeline, target, timeline, meta=True)[0]


def plan_program(
    program: Program, args: LLMArgs, device: Device, mesh: Mesh, context: int, requests: Sequence[int] = (1, 8, 64)
) -> Plan:
    """Of a lowered program for one rank. requests: decode steps that are estimated."""
    found, specs = groups(program), list(program.caches.values())
    pools = PoolSizes(specs, max(requests), context, args.kv_cache_config.page_size, args.max_num_tokens)
    weights, workspace = sum(group.num_bytes for group in found), workspace_bytes(program, args.max_num_tokens, max(requests))
    needed, left = pools.num_bytes(pages_of(context, pools.page_size)), device.memory - weights - workspace
    tokens = pools.num_pages(MANY_TOKENS, left) * pools.page_size if left >= needed else 0
    counting = Counting(program, mesh.ep)
    decode = [Step(count, 1, context) for count in requests]
    works = [counting.work(step) for step in decode]
    prefill = [Step(1, min(args.max_num_tokens, context - at), min(context, at + args.max_num_tokens))
               for at in range(0, context, args.max_num_tokens)]  # fmt: skip
    return Plan(
        model=Path(args.model).resolve().name,
        device=device,
        mesh=mesh,
        context=context,
        max_num_tokens=args.max_num_tokens,
        groups=tuple(found),
        weight_bytes=weights,
        workspace_bytes=workspace,
        cache_bytes_per_token=bytes_per_token(specs),
        cache_bytes_per_request=bytes_per_request(specs),
        needed_cache_bytes=needed,
        cache_tokens=tokens,
        collectives=_collectives(counting.work(Step(1, 1, context))),
        decode=tuple(
            estimate([step], [work], device, mesh.tp, pools.num_bytes(step.requests * pages_of(context, pools.page_size)) <= left)
            for step, work in zip(decode, works, strict=True)
        ),
        prefill=estimate(prefill, list(map(counting.work, prefill)), device, mesh.tp, tokens > 0),
        notes=tuple(_notes(program, args, mesh)),
    )


def plan_stages(
    program: Program, args: LLMArgs, device: Device, mesh: Mesh, context: int, requests: Sequence[int] = (1, 8, 64)
) -> Plan:
    """As `plan_program`, of a program that is cut into stages: the stage that needs most, and steps through all of them."""
    plans = [plan_program(stage, args, device, mesh, context, requests) for stage in split_stages(program, mesh.pp)]
    largest = max(plans, key=lambda plan: plan.needed_bytes)
    if mesh.pp == 1:
        return largest
    return replace(
        largest,
        cache_tokens=min(plan.cache_tokens for plan in plans),
        collectives=_together(plans),
        decode=tuple(one_after_the_other(steps) for steps in zip(*(plan.decode for plan in plans), strict=True)),
        prefill=one_after_the_other([plan.prefill for plan in plans]),
        notes=(
            *largest.notes,
            f"weights and memory are those of stage {plans.index(largest)} of {mesh.pp}, which needs most; a step goes through "
            "all stages, and what is sent between them is not in the bounds",
        ),
    )


def _together(plans: Sequence[Plan]) -> tuple[Collective, ...]:
    """Collectives of all stages, those that are alike as one."""
    counts = Counter[tuple[str, int]]()
    for each in (each for plan in plans for each in plan.collectives):
        counts[each.op, each.num_bytes] += each.count
    return tuple(Collective(op, count, num_bytes) for (op, num_bytes), count in sorted(counts.items()))


def pages_of(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)


def refuse_what_does_not_fit(plan: Plan) -> None:
    """Raises ConfigError that names what takes most, and what would help."""
    if plan.needed_bytes <= plan.device.memory:
        return
    largest = ", ".join(f"{group.name} {amount(group.num_bytes)}" for group in plan.groups[:4])
    mesh, times, missing = plan.mesh, ceil(plan.needed_bytes / plan.device.memory), plan.needed_bytes - plan.device.memory
    remedies = [f"more ranks (--tp; {times} times as many if everything were divided)"]
    dense = sum(group.num_bytes for group in plan.groups if group.readers == "linear" and group.stored in HALF)
    if dense * 3 / 4 > missing:  # 4 bits for 16
        remedies.append("fewer bits (--quantization)")
    if plan.left_bytes > 0:
        remedies.append(f"a shorter --context than {plan.context}")
    raise ConfigError(
        f"{plan.model} does not fit: a rank of tp={mesh.tp} ep={mesh.ep} pp={mesh.pp} needs {amount(plan.weight_bytes)} for "
        f"weights, {amount(plan.workspace_bytes)} to work in and {amount(plan.needed_cache_bytes)} for the caches of one "
        f"request of {plan.context} tokens, but {plan.device.name} has {amount(plan.device.memory)}. "
        f"Largest: {largest}. Use {' or '.join(remedies)}.{''.join(f' Note: {note}.' for note in plan.notes)}"
    )


def amount(num_bytes: float) -> str:
    """As data sheets count: a GB is 10^9 bytes."""
    unit, size = next(((unit, size) for unit, size in (("GB", 1e9), ("MB", 1e6)) if abs(num_bytes) >= size / 10), ("kB", 1e3))
    return f"{num_bytes / size:.2f} {unit}"


def _collectives(work: Work) -> tuple[Collective, ...]:
    return tuple(Collective(op, count, num_bytes) for (op, num_bytes), count in sorted(work.collectives.items()))


def _notes(program: Program, args: LLMArgs, mesh: Mesh) -> list[str]:
    """What a reader must know of these figures."""
    found = []
    if mesh.tp > 1 and not any(group.cut for group in groups(program)):
        found.append(f"no pass divided this program: each of the {mesh.tp} ranks holds all of it")
    if mesh.tp > MACHINE:
        found.append(f"a machine has {MACHINE} of these GPUs; that links between machines are slower is not in the bounds")
    if args.device != "cpu" and not has_triton():
        found.append("triton is not installed here, so that weights of few bits are counted dense; install it for a true plan")
    return found
