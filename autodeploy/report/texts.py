"""A program's text at chosen moments of its compilation."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import unified_diff

from autodeploy.program import PassRecord, Program

EXPORT = "export"
"""The moment before the first pass, as an observer is told it."""


class TextsAfter:
    """An observer that keeps the program's text after the passes of these names."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.texts: dict[str, str] = {}

    def __call__(self, program: Program, record: PassRecord) -> None:
        if record.name in self.names:
            self.texts[record.name] = str(program)

    def diff(self, before: str, after: str) -> str:
        """What the passes from `before` to `after` changed, as a unified diff; empty when nothing."""
        old, new = (self.texts[name].splitlines() for name in (before, after))
        return "\n".join(unified_diff(old, new, f"after {before}", f"after {after}", lineterm=""))


def moment_before(name: str, passes: Sequence[str]) -> str:
    """The pass that runs before this one, or the export."""
    return [EXPORT, *passes][passes.index(name)]


def formulas(program: Program) -> str:
    """One line per parameter: its name, dtype, shape and recipe."""
    lines = str(program).splitlines()
    start, stop = lines.index("weights:"), lines.index("graph:")
    return "\n".join(line.strip() for line in lines[start + 1 : stop])
