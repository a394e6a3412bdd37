"""docs/write-a-pass.md is run from its first to its last block; docs/passes.md is what the passes say of themselves."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from pytest import CaptureFixture, MonkeyPatch

from autodeploy import default_pipeline

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


def test_the_tutorial_shows_the_example_package() -> None:
    (shown,) = re.findall(r"```toml\n(.*?)```", TUTORIAL, re.DOTALL)
    assert shown == (ROOT / "tests" / "plugin_example" / "pyproject.toml").read_text(encoding="utf-8")


def test_the_list_of_passes_is_up_to_date() -> None:
    written = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")
    made = runpy.run_path(str(ROOT / "tools" / "make_passes_doc.py"))["passes_doc"]()
    assert written == made, "run `python tools/make_passes_doc.py`"


@pytest.mark.parametrize("name", default_pipeline().names())
def test_every_pass_shows_the_program_before_and_after(name: str) -> None:
    section = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8").partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert "before:" in section
    assert "after:" in section
