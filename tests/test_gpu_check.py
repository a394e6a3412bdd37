"""tools/gpu_check.sh without a GPU: its plumbing runs on the CPU, and what needs a GPU is skipped with a reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def run(part: str, folder: Path, *options: str, code: int = 0) -> tuple[dict[str, Any], str]:
    """The JSON of a part, and what it printed."""
    environment = {**os.environ, "OUT": str(folder), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    command = ["bash", str(ROOT / "tools" / "gpu_check.sh"), part, "--dry-run", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150, check=False)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    assert [path.name for path in folder.iterdir()] == [f"gpu_check_{part}.json"]
    return json.loads((folder / f"gpu_check_{part}.json").read_text()), done.stdout


def statuses(found: dict[str, Any]) -> dict[str, str]:
    return {row["name"]: row["status"] for row in found["rows"]}


def test_numerics(tmp_path: Path) -> None:
    found, text = run("numerics", tmp_path)
    rows = statuses(found)
    assert rows["limits of the card"] == rows["Triton providers"] == "skipped" and found["counts"]["failed"] == 0
    ops = {name.split()[0] for name in rows}
    assert ops >= {"rms_norm", "add_rms_norm", "layer_norm", "gated_activation", "rope", "rope_append", "kv_append"}
    assert ops >= {"paged_attention", "moe", "linear", "ssd_cached", "gated_delta_rule_cached", "causal_conv1d_cached"}
    assert ops >= {"largest_of_rows", "draw"}
    assert all(row["error"] <= row["allowed"] and row["provider"] for row in found["rows"] if row["status"] == "ok")
    assert found["environment"]["torch"] and found["environment"]["sources"]
    assert "skipped  Triton providers" in text and "no GPU" in text


def test_e2e(tmp_path: Path) -> None:
    found, _ = run("e2e", tmp_path)
    assert statuses(found) == {"CUDA graphs": "skipped", "llama float32": "ok", "llama bfloat16": "ok"}
    assert found["rows"][1]["plain same"] == "120/120" and "paged_attention" in found["rows"][1]["providers"]


def test_speed_and_a_new_process_that_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    whole, text = run("speed", tmp_path)
    cells = ["start", "decode 1", "decode 4", "prefill 32", "prefill 64", "HF 2", "decode 2 without graphs"]
    assert statuses(whole) == {"limits of the card": "skipped", **{f"tiny llama: {cell}": "ok" for cell in cells}}
    assert all(row["step_ms"] > 0 for row in whole["rows"] if ": decode" in row["name"]) and "tokens_per_s=" in text

    rows = [{**row, "status": "failed"} if row["name"].endswith("decode 4") else row for row in whole["rows"][:4]]
    (tmp_path / "gpu_check_speed.json").write_text(json.dumps({**whole, "rows": rows}))
    found, _ = run("speed", tmp_path, "--resume", code=1)
    names = [row["name"].removeprefix("tiny llama: ") for row in found["rows"]]
    assert found["rows"][:4] == rows and names[4:] == ["start again after 4 rows", *cells[3:]]
    assert found["counts"]["failed"] == 1


def test_what_does_not_fit_into_the_budget_is_skipped(tmp_path: Path) -> None:
    found, _ = run("numerics", tmp_path, "--budget", "0")
    assert {row["status"] for row in found["rows"]} == {"skipped"} and "s are left" in found["rows"][-1]["reason"]


def test_an_unknown_part_is_refused() -> None:
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "all"]
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run(command, capture_output=True, check=True, timeout=60)
