"""The Triton kernels compile for a GPU that is not here, within their budgets, and the page about them is up to date."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from autodeploy.custom_ops.gpu import Variant

TOOL = Path(__file__).parents[1] / "tools" / "compile_kernels.py"


def environment(cache: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "TRITON_CACHE_DIR": str(cache)}


@pytest.mark.timeout(400)
def test_every_variant_keeps_to_its_budget_and_the_page_says_what_it_takes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL), "--check"], env=environment(tmp_path), capture_output=True, text=True, timeout=390
    )
    assert done.returncode == 0 and " 0 breaches" in done.stdout, done.stdout + done.stderr


def test_a_breach_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the tool takes it out of the environment
    tool = runpy.run_path(str(TOOL))
    taken = tool["Taken"](200, 8, 300_000, {"HMMA": 4})
    strict = Variant(None, "strict", {}, max_registers=100, must=("HGMMA",))
    assert [reason.partition(",")[0] for reason in tool["breaches"](strict, taken)] == [
        "200 registers",
        "8 bytes of registers are spilled",
        "300000 bytes of shared memory",
        "no HGMMA",
    ]
