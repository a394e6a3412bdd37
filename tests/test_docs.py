"""What the documents show is what happens: their Python runs, their commands are the Makefile's, the examples work."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from autodeploy import Target, default_pipeline
from autodeploy.cli import app
from autodeploy.specs import Mesh

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_in_the_readme_runs(number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(BLOCKS[number], f"README.md block {number}", "exec"), {"__name__": "readme"})
    if number == 0:
        assert "579" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.timeout(400)
def test_the_page_about_quantization_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "quantization.md").read_text()
    (tmp_path / "autodeploy").symlink_to(ROOT / "autodeploy")
    (tmp_path / "text.txt").write_text("What is 100+200? 300. Reverse: abc. cba. " * 20)
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "docs/quantization.md", "exec"), {"__name__": "page"})
    printed = capsys.readouterr().out
    assert "579" in printed and "in memory:" in printed
    commands = re.findall(r"^\$ autodeploy (.*)$", page, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["eval", "quantize"]
    for command in commands:
        CliRunner().invoke(app, shlex.split(command), catch_exceptions=False)
    assert (tmp_path / "quantized" / "model.safetensors").exists()


def test_the_readme_installs_as_the_makefile_does() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("$(BIN)/", "")
    commands = [line.removeprefix("$ ") for line in README.splitlines() if line.startswith("$ python -m pip")]
    assert len(commands) == 2
    for command in commands:
        assert shlex.split(command) in [shlex.split(line.strip()) for line in makefile.splitlines() if "pip install" in line]


def test_the_readme_names_every_pass_in_order() -> None:
    table = README[README.index("| pass |") : README.index("Attention masks are never")]
    assert re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))) == (
        default_pipeline(Target(mesh=Mesh(2))).names()
    )
