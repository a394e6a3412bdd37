"""Pipeline: an immutable list of passes, edited by name, and the loop that runs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from autodeploy.errors import AutoDeployError, ConfigError, TransformError, did_you_mean
from autodeploy.program import PassRecord, Program
from autodeploy.specs import Target
from autodeploy.transforms.base import Transform
from autodeploy.transforms.rewrite import erase_dead

Observer = Callable[[Program, PassRecord], None]


@dataclass(frozen=True)
class Pipeline:
    passes: tuple[Transform, ...]

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

    def configure(self, name: str, **options: Any) -> Pipeline:
        """The pass with some of its fields changed."""
        item = self.passes[self.index(name)]
        known = list(item.__dataclass_fields__)
        for option in options:
            if option not in known:
                raise ConfigError(
                    f"pass '{name}' has no option '{option}'.{did_you_mean(option, known)} It has: {', '.join(known) or 'none'}"
                )
        return self.replace(name, replace(item, **options))

    def _spliced(self, at: int, removed: int, item: Transform) -> Pipeline:
        return Pipeline((*self.passes[:at], item, *self.passes[at + removed :]))

    def run(self, program: Program, target: Target, *observers: Observer) -> Program:
        """Apply every pass in order, in place; each leaves a record, and a program that checks."""
        for item in self.passes:
            record = _run_pass(item, program, target)
            program.history.append(record)
            for observe in observers:
                observe(program, record)
        return program


def _run_pass(item: Transform, program: Program, target: Target) -> PassRecord:
    before, started = program.op_counts(), time.perf_counter()
    try:
        rewrites = item.apply(program, target)
        if rewrites:
            erase_dead(program)
            program.graph.graph.lint()
            program.check()
    except AutoDeployError:
        raise
    except Exception as error:
        earlier = ", ".join(record.name for record in program.history) or "none"
        raise TransformError(f"{type(error).__name__}: {error} (passes before it: {earlier})", transform=item.name) from error
    after = program.op_counts()
    delta = {name: after[name] - before[name] for name in sorted(before | after) if after[name] != before[name]}
    return PassRecord(item.name, rewrites, time.perf_counter() - started, delta)
