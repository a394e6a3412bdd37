"""A real size, measured as a stranger would measure it: memory and compile time of the published Qwen3-0.6B shape."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "real_size.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_qwen3_of_0_6b_parameters_loads_lean_and_compiles_quickly(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--folder", str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    assert figures["num_tokens"] == 24 * 48
    assert figures["weight_bytes"] >= 1.19e9
    assert figures["peak_over_weights_and_pool"] <= 1.25
    assert figures["export_and_passes_cpu_seconds"] <= 30
