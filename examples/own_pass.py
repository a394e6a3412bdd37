"""Add a graph pass of your own: here, one that only counts."""

from dataclasses import dataclass
from typing import ClassVar

from autodeploy import LLM, Program, Target, Transform
from autodeploy.cli import DEMO_MODEL


@dataclass(frozen=True, kw_only=True)
class CountLinears(Transform):
    """Print how many linears are left after fusion."""

    name: ClassVar[str] = "count_linears"

    def apply(self, program: Program, target: Target) -> int:
        print("linears:", program.op_counts()["aten.linear"])
        return 0


with LLM(DEMO_MODEL, pipeline=lambda default: default.insert_after("fuse_linears", CountLinears())) as llm:
    print(llm.generate("321+123=").outputs[0].text)
