"""The parity test would notice: one attention argument changed in the graph, and the comparison fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

import autodeploy
from autodeploy import Program, Target, Transform, ops
from autodeploy.transforms.rewrite import calls
from tests.models.families import make_model
from tests.models.parity import check_logits


@dataclass(frozen=True, kw_only=True)
class ChangeAttention(Transform):
    """Set one argument of every attention call that has a window (or of all)."""

    name: ClassVar[str] = "change_attention"
    argument: int
    value: Any
    windowed_only: bool = False

    def apply(self, program: Program, target: Target) -> int:
        for node in calls(program, ops.attention):
            if node.args[5] or not self.windowed_only:
                node.args = (*node.args[: self.argument], self.value, *node.args[self.argument + 1 :])
        return 1


SINKS, SCALE, WINDOW, SOFTCAP, CHUNK, ALIBI = 3, 4, 5, 6, 8, 9
SEEDED = {
    "a window one too wide": ("granite_swa", ChangeAttention(argument=WINDOW, value=9, windowed_only=True)),
    "a window lost": ("starcoder2", ChangeAttention(argument=WINDOW, value=0)),
    "sinks lost": ("granite_swa", ChangeAttention(argument=SINKS, value=None)),
    "chunks lost": ("llama4_text", ChangeAttention(argument=CHUNK, value=0)),
    "alibi lost": ("bloom", ChangeAttention(argument=ALIBI, value=None)),
    "a softcap lost": ("gemma2", ChangeAttention(argument=SOFTCAP, value=0.0)),
    "the default scale": ("granite", ChangeAttention(argument=SCALE, value=0.25)),
}


@pytest.mark.parametrize("name", SEEDED)
def test_a_seeded_bug_in_attention_is_noticed(name: str) -> None:
    family, bug = SEEDED[name]
    model = make_model(family)
    compiled = autodeploy.compile(model, pipeline=lambda default: default.insert_before("insert_paged_attention", bug))
    with pytest.raises(AssertionError, match="relative error"):
        check_logits(model, compiled)
    compiled.shutdown()
