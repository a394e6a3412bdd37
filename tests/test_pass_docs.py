"""docs/write-a-pass.md is run from its first to its last block; docs/passes.md is what the passes say of themselves."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest import CaptureFixture, MonkeyPatch
from torch import Tensor, nn
from typer.testing import CliRunner

from autodeploy import default_pipeline
from autodeploy.cli import DEMO_MODEL, app
from autodeploy.transforms.quantize import QuantizeWeights
from autodeploy.transforms.quantize_cache import QuantizeCache
from tests.transforms.helpers import apply, toy_program

ROOT = Path(__file__).parents[1]
TUTORIAL = (ROOT / "docs" / "write-a-pass.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", TUTORIAL, re.DOTALL)


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: MonkeyPatch, capsys: CaptureFixture[str]) -> None:
    assert len(BLOCKS) == TUTORIAL.count("```python")
    assert {name for name, _ in BLOCKS} == {"my_pass.py", "try_it.py"}
    for name, text in BLOCKS:
        with (tmp_path / name).open("a", encoding="utf-8") as file:
            file.write(text + "\n\n")
    monkeypatch.syspath_prepend(tmp_path)
    runpy.run_path(str(tmp_path / "try_it.py"), run_name="__main__")
    assert "fuse_linear_add" in capsys.readouterr().out
    check_scaled_sums_are_left_alone()


def check_scaled_sums_are_left_alone() -> None:
    from my_pass import FuseLinearAdd  # pyright: ignore[reportMissingImports]

    def body(toy: Any, x: Tensor, positions: Tensor) -> Tensor:
        return torch.add(toy.extra["first"](x) + x, toy.extra["second"](x), alpha=0.5)

    program, _ = toy_program(body, **{name: nn.Linear(16, 16, bias=False) for name in ("first", "second")})
    assert apply(program, FuseLinearAdd()) == [1]


def test_the_tutorial_shows_the_program_as_it_is() -> None:
    """Its excerpt is made of lines of the program, in their order; `...` stands for any number of them."""
    (shown,) = re.findall(r"```text\n(.*?)```", TUTORIAL, re.DOTALL)
    done = CliRunner().invoke(app, ["inspect", str(DEMO_MODEL), "--after", "match_mlp"], catch_exceptions=False)
    lines = iter(done.stdout.splitlines())
    wanted = [line for line in shown.splitlines() if line.strip() != "..."]
    assert len(wanted) == 4
    assert [line for line in wanted if line not in lines] == []


def test_the_tutorial_shows_the_example_package() -> None:
    (shown,) = re.findall(r"```toml\n(.*?)```", TUTORIAL, re.DOTALL)
    assert shown == (ROOT / "tests" / "plugin_example" / "pyproject.toml").read_text(encoding="utf-8")


def test_the_list_of_passes_is_up_to_date() -> None:
    written = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")
    made = runpy.run_path(str(ROOT / "tools" / "make_passes_doc.py"))["passes_doc"]()
    assert written == made, "run `python tools/make_passes_doc.py`"


@pytest.mark.parametrize("name", default_pipeline(None, QuantizeWeights(), QuantizeCache()).names())
def test_every_pass_shows_the_program_before_and_after(name: str) -> None:
    section = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8").partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert "before:" in section
    assert "after:" in section
