"""The text of compiled programs is that of tests/goldens/programs/*.txt. After a change made on purpose, update the files:

python -m tests.test_program_text --update

Kernels are not selected, since which one is taken may depend on the machine. Values are numbered in the order of the text: the
numbers of torch.export count what it has dropped again too.
"""

import sys
from collections import Counter
from difflib import unified_diff
from pathlib import Path
from typing import Any

import pytest

from autodeploy import Program, Target, default_pipeline
from autodeploy.program import op_name
from tests.transforms.helpers import family_program

FOLDER = Path(__file__).parent / "goldens" / "programs"
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {},
}
"""Family -> what its small config is changed by: two layers each."""


def program_text(name: str) -> str:
    program, _ = family_program(name, **CHANGES[name])
    default_pipeline(Target()).without("select_kernels").run(program, Target())
    number_values(program)
    return f"{program}\n"


def number_values(program: Program) -> None:
    """Name every value after its op and how many of that op come before it."""
    counts = Counter[str]()
    for node in program.graph.graph.nodes:
        if node.op == "call_function":
            op = op_name(node.target).split(".")[1]
            node.name = f"{op}_{counts[op]}"
            counts[op] += 1


@pytest.mark.parametrize("name", CHANGES)
def test_the_text_of_a_program_is_the_one_agreed_on(name: str) -> None:
    agreed, now = (FOLDER / f"{name}.txt").read_text(encoding="utf-8"), program_text(name)
    changes = unified_diff(agreed.splitlines(), now.splitlines(), "agreed on", "now", lineterm="", n=1)
    assert agreed == now, "\n".join(["run `python -m tests.test_program_text --update` if this is meant", *changes])


def test_every_golden_text_is_compared() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == CHANGES.keys()


def test_neither_the_text_nor_the_file_holds_an_address(tmp_path: Path) -> None:
    program, _ = family_program("llama")
    default_pipeline(Target()).run(program, Target())
    program.save(tmp_path)
    assert "[1, N, 64] = " in str(program)
    for text in (str(program), (tmp_path / "program.json").read_text()):
        assert " at 0x" not in text and "<function" not in text


if __name__ == "__main__" and sys.argv[1:] == ["--update"]:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for family in CHANGES:
        (FOLDER / f"{family}.txt").write_text(program_text(family), encoding="utf-8")
