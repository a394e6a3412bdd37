"""The tests of the C++ kernels again, with kernels that check every access and every operation without a defined result."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_kernels_touch_only_memory_that_is_theirs() -> None:
    files = sorted(str(path) for path in HERE.glob("test_cpp*.py") if path != Path(__file__))
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    variables = {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0", "AUTODEPLOY_CPP_SANITIZE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "900", "-m", "not slow", *files]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
