"""Steps of a model whose layers lie in several stages: every rank does its stage's part of one, and rank 0 gets the logits.

A step goes through in parts (`parts_of`), so that a stage works on one while the next stage works on the one before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autodeploy.executor.batch import WantedRows
from autodeploy.executor.model_runner import ModelRunner
from autodeploy.executor.parts import parts_of
from autodeploy.specs import BatchMetadata, Mesh

Forward = Callable[[BatchMetadata, list[WantedRows]], Tensor]


@dataclass(frozen=True)
class LogitsKind:
    """What a row of logits is."""

    size: int
    dtype: torch.dtype


def forward_of(runner: ModelRunner, mesh: Mesh, rank: int, ends: Any, kind: LogitsKind | None = None) -> Forward:
    """How this rank does a step. ends: the group of rank 0 and `mesh.logits_rank`. kind: for rank 0, where there are stages."""
    if mesh.pp == 1:
        return lambda batch, rows: runner.forward(batch, rows)
    steps = StagedSteps(runner, mesh, ends, kind)
    return {0: steps.forward_and_collect, mesh.logits_rank: steps.forward_and_return}.get(rank, steps.forward)


@dataclass(frozen=True)
class StagedSteps:
    runner: ModelRunner
    mesh: Mesh
    ends: Any
    kind: LogitsKind | None

    def forward(self, batch: BatchMetadata, rows: list[WantedRows]) -> Tensor:
        """What the last part leaves."""
        return [self.runner.forward(part, []) for part in parts_of(batch, self.mesh.pp)][-1]

    def forward_and_return(self, batch: BatchMetadata, rows: list[WantedRows]) -> Tensor:
        """On the rank that has the logits."""
        logits = torch.empty(0)
        for part in parts_of(batch, self.mesh.pp):
            logits = self.runner.forward(part, [])
            if len(logits):
                dist.send(logits.contiguous(), 0, self.ends)
        return logits

    def forward_and_collect(self, batch: BatchMetadata, rows: list[WantedRows]) -> Tensor:
        """On rank 0: the logits of all parts. Asked for before there are any, or both ends would wait for each other."""
        assert self.kind is not None
        parts = parts_of(batch, self.mesh.pp)
        counts = [len(part["logits_indices"]) for part in parts]
        logits = torch.empty(sum(counts), self.kind.size, dtype=self.kind.dtype, device=self.runner.device)
        asked = [dist.irecv(rows, self.mesh.logits_rank, self.ends) for rows in logits.split(counts) if len(rows)]
        for part in parts:
            self.runner.forward(part, [])
        for work in asked:
            assert work is not None  # this rank is in the group
            work.wait()
        return logits
