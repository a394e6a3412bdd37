"""Pipeline: an immutable list of passes, edited by name, and the loop that runs it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from traceback import walk_tb
from typing import Any

from torch import fx

from autodeploy.errors import AutoDeployError, ConfigError, TransformError, did_you_mean
from autodeploy.program import NodeRecord, PassRecord, Program, Snapshot
from autodeploy.specs import Target
from autodeploy.transforms.base import Effect, Transform
from autodeploy.transforms.check_shares import check_shares
from autodeploy.transforms.reproducer import is_importable, write_reproducer
from autodeploy.transforms.rewrite import erase_dead
from autodeploy.transforms.verify import VerificationError, verify_structure
from autodeploy.transforms.verify_numeric import NumericVerifier, leaf_types

Observer = Callable[[Program, PassRecord], None]


@dataclass(frozen=True)
class Pipeline:
    passes: tuple[Transform, ...]

    def __post_init__(self) -> None:
        for item in self.passes:
            if not isinstance(item, Transform):
                what = f"the class {item.__name__}; write {item.__name__}()" if isinstance(item, type) else f"{item!r}"
                raise ConfigError(f"a pipeline holds instances of Transform, not {what}")

    def __iter__(self) -> Iterator[Transform]:
        return iter(self.passes)

    def names(self) -> list[str]:
        return [item.name for item in self.passes]

    def index(self, name: str) -> int:
        if name not in self.names():
            raise ConfigError(
                f"no pass named '{name}' in the pipeline.{did_you_mean(name, self.names())} It has: {', '.join(self.names())}"
            )
        return self.names().index(name)

    def insert_before(self, name: str, item: Transform) -> Pipeline:
        return self._spliced(self.index(name), 0, item)

    def insert_after(self, name: str, item: Transform) -> Pipeline:
        return self._spliced(self.index(name) + 1, 0, item)

    def replace(self, name: str, item: Transform) -> Pipeline:
        return self._spliced(self.index(name), 1, item)

    def without(self, *names: str) -> Pipeline:
        dropped = {self.index(name) for name in names}
        return Pipeline(tuple(item for i, item in enumerate(self.passes) if i not in dropped))

    def configure(self, name: str, /, **options: Any) -> Pipeline:
        """The pass with some of its fields changed."""
        item = self.passes[self.index(name)]
        known = [field.name for field in fields(item) if field.init]
        for option in options:
            if option not in known:
                raise ConfigError(
                    f"pass '{name}' has no option '{option}'.{did_you_mean(option, known)} It has: {', '.join(known) or 'none'}"
                )
        return self.replace(name, replace(item, **options))

    def _spliced(self, at: int, removed: int, item: Transform) -> Pipeline:
        before, after = self.passes[:at], self.passes[at + removed :]
        edited = Pipeline((*before, item, *after))
        if item.name in {other.name for other in (*before, *after)}:
            raise ConfigError(f"'{item.name}' is already in the pipeline; give the second one another name")
        return edited

    def run(self, program: Program, target: Target, *observers: Observer, verify: str = "structure") -> Program:
        """Apply every pass in order, in place; each is recorded.

        verify, after every pass that did something: "structure" (see `verify_structure`); "numeric", its numbers too, on drawn
        data in float64, which needs a program as exported; or "off". A pass that fails leaves the program as it was before it.
        Raises TransformError, or UnsupportedModelError as it is.
        """
        checks = Checks(verify, NumericVerifier(leaf_types(program)) if verify == "numeric" else None)
        for i, item in enumerate(self.passes):
            record = _run_pass(item, program, target, checks, self.passes[i:])
            program.history.append(record)
            for observe in observers:
                observe(program, record)
        program.graph.recompile()
        return program


@dataclass(frozen=True)
class Checks:
    """What is verified after a pass."""

    verify: str
    numeric: NumericVerifier | None = None

    def run(self, before: Snapshot, program: Program, effect: Effect) -> None:
        if self.verify != "off":
            verify_structure(before, program, effect)
            if effect is Effect.SHARDING:
                check_shares(before, program)
        if self.numeric is not None:
            self.numeric.compare(before.as_program(), program, effect)


def _run_pass(item: Transform, program: Program, target: Target, checks: Checks, remaining: tuple[Transform, ...]) -> PassRecord:
    before, started = program.op_counts(), time.perf_counter()
    snapshot = program.snapshot()
    try:
        rewrites = _apply(item, program, target, snapshot)
        if rewrites:
            erase_dead(program)
            checks.run(snapshot, program, item.effect)
    except Exception as error:
        program.restore(snapshot)
        if isinstance(error, AutoDeployError):
            raise
        raise _explained(error, item, program, _reproducer(program, remaining, target, checks, error)) from error
    return PassRecord(item.name, rewrites, time.perf_counter() - started, _delta(before, program.op_counts()))


def _apply(item: Transform, program: Program, target: Target, before: Snapshot) -> int:
    """How many rewrites the pass made; raises VerificationError when that is no count, or none though something changed."""
    rewrites: Any = item.apply(program, target)
    if type(rewrites) is not int or rewrites < 0:
        raise VerificationError(f"apply returned {rewrites!r}; it must return how many rewrites it made (an int)")
    if not rewrites and (changes := _changes(before, program)):
        raise VerificationError(f"apply returned 0 but changed the program ({changes}); return the number of rewrites")
    return rewrites


def _changes(before: Snapshot, program: Program) -> str:
    """What differs from the snapshot: calls more and fewer, else what else it is; empty when nothing."""
    now = program.snapshot()
    if len(now.nodes) != len(before.nodes) or not all(map(_is_same_call, before.nodes, now.nodes)):
        delta = _delta(before.as_program().op_counts(), program.op_counts())
        return ", ".join(f"{count:+d} {name}" for name, count in delta.items()) or "arguments or order of calls"
    tables = ("inputs", "caches", "weights", "rope_thresholds", "providers")
    changed = [name for name in tables if getattr(before.program, name) != getattr(program, name)]
    same_tensors = all(now.tensors.get(name) is tensor for name, tensor in before.tensors.items())
    return ", ".join(changed + ([] if same_tensors or changed else ["parameters"]))


def _is_same_call(a: NodeRecord, b: NodeRecord) -> bool:
    same = a.node is b.node and a.op == b.op and a.name == b.name and a.target == b.target
    return same and (a.args is b.args or a.args == b.args) and (a.kwargs is b.kwargs or a.kwargs == b.kwargs)


def _delta(before: Counter[str], after: Counter[str]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in sorted(before | after) if after[name] != before[name]}


def _reproducer(
    program: Program, remaining: tuple[Transform, ...], target: Target, checks: Checks, error: Exception
) -> Path | None:
    """The folder to run again from; None when the program cannot be saved, which must not hide the error itself."""
    try:
        return write_reproducer(program, remaining, target, checks.verify, error)
    except (AssertionError, OSError, TypeError):
        return None


def _explained(error: Exception, item: Transform, program: Program, folder: Path | None) -> TransformError:
    where = error.node if isinstance(error, VerificationError) else _node_at_work(error)
    earlier = ", ".join(record.name for record in program.history) or "none"
    message = (str(error).splitlines() or [""])[0]
    reason = f"{type(error).__name__}: {message}{f' (at node {where})' if where and where not in message else ''}"
    remedy = "The program is as it was before the pass" + (f"; run it again with: autodeploy replay {folder}" if folder else "")
    if folder and not is_importable(item):
        remedy += f" (first move {type(item).__qualname__} to a module that can be imported, and let it fail there)"
    return TransformError(f"{reason}. Passes before it: {earlier}. {remedy}", transform=item.name)


def _node_at_work(error: Exception) -> str:
    """The graph node that the innermost frame of the traceback was looking at."""
    nodes = [
        value.name
        for frame, _ in walk_tb(error.__traceback__)
        for name, value in frame.f_locals.items()
        if isinstance(value, fx.Node) and name in ("node", "before", "old")
    ]
    return nodes[-1] if nodes else ""
