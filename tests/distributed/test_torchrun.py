"""Ranks that torchrun starts: all run the same script, and rank 0 serves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import autodeploy
from autodeploy import SamplingParams

ROOT = Path(__file__).parents[2]


def test_one_script_on_every_rank(folder: Path, cache: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "tests.distributed.under_torchrun", str(folder), str(cache)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    answer, last = result.stdout.splitlines()  # of rank 0 alone
    assert last == "after the engine, on rank 0"
    compiled = autodeploy.compile(folder, program_cache=cache)
    outputs = compiled.generate([[5, 6, 7], [8]], SamplingParams(max_tokens=8, ignore_eos=True))
    compiled.shutdown()
    assert json.loads(answer) == ["0", *(output.outputs[0].token_ids for output in outputs)]
