"""The C++ sources are right for CPUs that this one is not: each test runs what its own CPU can, and compiles what it cannot."""

from __future__ import annotations

import platform
import subprocess

import pytest

from autodeploy.custom_ops import cpp
from tests.marks import needs_cpp_kernels


@needs_cpp_kernels
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are those of x86-64")
@pytest.mark.parametrize("isa", [isa for isa in cpp.ISAS if isa not in cpp.isas()])
def test_the_sources_compile_for_other_instruction_sets(isa: str) -> None:
    command = ["g++", *cpp.compiler_flags(isa), "-Werror", "-fsyntax-only", *map(str, sorted(cpp.SOURCES.glob("*.cpp")))]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[:2000]
