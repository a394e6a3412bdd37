"""The command as a user runs it: real processes, their output and their exit codes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

import autodeploy
from autodeploy.cli import main
from autodeploy.transforms.default import default_pipeline
from tests.test_inspect import FAILING

DEMO = str(Path(autodeploy.__file__).parent / "demo_model")
INSTALLED = Path(sys.executable).with_name("autodeploy")
COMMAND = [str(INSTALLED)] if INSTALLED.exists() else [sys.executable, "-m", "autodeploy.cli"]
ENVIRONMENT = {**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

LINES = {
    "version": ["version"],
    "help": ["generate", "--help"],
    "demo": ["demo", "--questions", "20", "--shown", "3"],
    "json": ["generate", DEMO, "--chat", "--json", "--prompt", "What is 123+456?", "--prompt", "400+77=", "--stop", "79"],
    "second fails": ["generate", DEMO, "--chat", "--prompt", "What is 123+456?", "--prompt", "x" * 300],
    "inspect": ["inspect", DEMO],
    "usage": ["generate", DEMO],
}


class Runs:
    """Starts each command line once, two at a time."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(2)
        self.started: dict[str, Future[subprocess.CompletedProcess[str]]] = {}

    def __getitem__(self, name: str) -> subprocess.CompletedProcess[str]:
        for each in LINES if not self.started else ():
            self.started[each] = self.pool.submit(run, LINES[each])
        return self.started[name].result()


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    root = Path(autodeploy.__file__).parents[1]
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=ENVIRONMENT, cwd=root, timeout=120)


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    runs = Runs()
    yield runs
    runs.pool.shutdown(cancel_futures=True)


def test_version_names_what_it_stands_on(runs: Runs) -> None:
    assert runs["version"].returncode == 0
    assert f"autodeploy {autodeploy.__version__}" in runs["version"].stdout
    assert re.search(r"torch \d+\..*transformers \d+\.", runs["version"].stdout, re.DOTALL)


def test_help_explains_the_options(runs: Runs) -> None:
    assert runs["help"].returncode == 0
    assert all(option in runs["help"].stdout for option in ("--prompt", "--max-tokens", "--json", "--stop"))


def test_demo_prints_answers_score_speed_and_passes(runs: Runs) -> None:
    done = runs["demo"]
    assert done.returncode == 0, done.stderr
    score = re.search(r"exact match: (\d+) of 20 \(", done.stdout)
    assert score and int(score[1]) >= 10
    assert re.search(r"generated \d+ tokens in [\d.]+ s: \d+ tokens/s", done.stdout)
    assert len(re.findall(r"right|wrong", done.stdout)) == 3
    assert re.search("pass.*rewrites.*seconds", done.stdout)
    assert all(re.search(rf"\b{name}\b.*\d+\.\d{{3}}", done.stdout) for name in default_pipeline().names())


def test_generate_prints_a_json_object_per_prompt_and_stops_at_text(runs: Runs) -> None:
    done = runs["json"]
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["prompt"], first["text"], first["finish_reason"]) == ("What is 123+456?", "5", "stop")
    assert len(first["token_ids"]) == 3
    assert second["prompt"] == "400+77="


def test_an_error_is_one_line_on_stderr_after_what_was_generated_and_exit_code_1(runs: Runs) -> None:
    done = runs["second fails"]
    assert done.stdout.splitlines()[0] == "579"
    assert done.returncode == 1
    assert re.fullmatch(r"RequestError: The prompt has 3\d\d tokens .* max_seq_len is 256\. Shorten.*\n", done.stderr)


def test_inspect_prints_passes_kernels_caches_and_the_program(runs: Runs) -> None:
    done = runs["inspect"]
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in default_pipeline().names())
    assert re.search(r"kernels.*caches: 6, \d+ bytes per token.*weights: \d+ parameters", done.stdout, re.DOTALL)
    assert re.search(r"program \(lowered;.*inputs:\n  input_ids.*paged_attention\(.*return ", done.stdout, re.DOTALL)


def test_an_error_shows_brackets_and_joins_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["autodeploy", "generate", "no [such]\nfolder [/here]", "--prompt", "x"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    shown = capsys.readouterr()
    assert re.fullmatch(r"CheckpointError: no \[such\] folder \[/here\] is not a folder \(relative to /.*\)\..*\n", shown.err)
    assert shown.out == ""


def test_modules_in_the_current_directory_are_found_for_plugins_and_for_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "passes_here.py").write_text(FAILING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])

    def shown(*arguments: str) -> str:
        sys.modules.pop("passes_here", None)
        monkeypatch.setattr(sys, "argv", ["autodeploy", *arguments])
        with pytest.raises(SystemExit):
            main()
        return capsys.readouterr().err

    first = shown("inspect", DEMO, "--plugin", "passes_here:plugin")
    found = re.search(r"transform 'failing': ArithmeticError: on purpose.* autodeploy replay (\S+)$", first)
    assert found, first
    assert "transform 'failing': ArithmeticError: on purpose" in shown("replay", found[1])


def test_a_missing_option_is_a_usage_error(runs: Runs) -> None:
    assert runs["usage"].returncode == 2
    assert "--prompt" in runs["usage"].stderr
    assert "Traceback" not in runs["usage"].stderr
