"""Stacking the experts of a checkpoint takes no more memory than the weights themselves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "moe_memory.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_gigabytes_of_single_experts_are_stacked_within_a_fifth_more_memory(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, SCRIPT, "--folder", tmp_path / "model"], check=True, capture_output=True, text=True)
    result = json.loads(run.stdout)
    assert result["weight_bytes"] > 2e9
    assert result["stored_tensors"] > 10 * result["parameters"]
    assert result["peak_over_weights"] <= 1.2, result
