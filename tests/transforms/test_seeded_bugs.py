"""Wrong rewrites are caught, those of dtypes and shapes by structure alone, as docs/verification.md says."""

from __future__ import annotations

import pytest

from autodeploy import Effect
from tests.transforms.seeded_bugs import BUGS, DOCUMENT, HEAD, Bench, table


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench.build()


@pytest.fixture(scope="module")
def found(bench: Bench) -> dict[str, str]:
    return {bug.name: bench.caught_by(bug) for bug in BUGS}


def test_there_are_enough_of_them_and_each_has_a_name() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 60
    assert len({bug.family for bug in BUGS}) >= 4 and {bug.kind for bug in BUGS} == {
        "dtype",
        "shape",
        "numbers",
        "recipe",
        "order",
    }


def test_all_are_caught(found: dict[str, str]) -> None:
    assert [name for name, caught in found.items() if caught == "nothing"] == []


def test_dtypes_and_shapes_are_caught_by_structure_alone(found: dict[str, str]) -> None:
    late = [bug.name for bug in BUGS if bug.kind in ("dtype", "shape") and found[bug.name] != "structure"]
    assert late == []


def test_the_documented_table_is_that_of_today(found: dict[str, str]) -> None:
    text = DOCUMENT.read_text()
    assert text[text.index(HEAD) :] == table(found), "run `python -m tests.transforms.seeded_bugs`"


def test_no_change_is_no_bug(bench: Bench) -> None:
    for (family, _), program in bench.programs.items():
        bench.verifiers[family].compare(program, program.snapshot().as_program(), Effect.FUSION)
