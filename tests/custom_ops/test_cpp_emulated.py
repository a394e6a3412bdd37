"""The tests of the C++ kernels again, as built for CPUs with products of bfloat16, these products made of floats."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autodeploy.custom_ops.cpp import isas

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif("avx512_vnni" not in isas(), reason="needs AVX-512 with VNNI")
def test_kernels_for_products_of_bfloat16_are_right_without_them(tmp_path: Path) -> None:
    files = [str(HERE / f"test_cpp_{name}.py") for name in ("attention", "linear", "quantized")]
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    which = ["-m", "not slow", "-k", "not instruction_set and not lesser"]  # those choose their own
    command = [sys.executable, "-m", "pytest", "-q", "-p", "emulated_bf16", "-p", "no:cacheprovider", *which, *files]
    variables = {"PYTHONPATH": path, "AUTODEPLOY_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert " passed" in done.stdout
