"""Ranks that Ray starts on two nodes. Ray is optional: without it there is one test."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import autodeploy
from autodeploy import ConfigError

ROOT = Path(__file__).parents[2]
HAS_RAY = importlib.util.find_spec("ray") is not None


@pytest.mark.skipif(HAS_RAY, reason="Ray is there")
def test_without_ray_it_is_asked_for(folder: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs Ray, which is not installed: pip install 'autodeploy\[ray\]'"):
        autodeploy.compile(folder, program_cache=cache, tensor_parallel_size=2, distributed_executor_backend="ray")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not HAS_RAY, reason="needs Ray")
def test_two_nodes(folder: Path, cache: Path) -> None:
    command = [sys.executable, "-m", "tests.distributed.under_ray", str(folder), str(cache)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    own = [line for line in result.stdout.splitlines() if "(raylet)" not in line]  # Ray tells of the killed one, too
    assert own == [
        "same tokens on 2 nodes",
        "rank 1 is gone",
        "Ray has no room for 3 ranks with a CPU each after 2 s",
    ]
