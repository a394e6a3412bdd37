"""The C++ sources are right for CPUs that this one is not: each test runs what its own CPU can, and compiles what it cannot."""

from __future__ import annotations

import platform
import subprocess
import threading

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


@needs_cpp_kernels
@pytest.mark.parametrize("part", cpp.PARTS)
def test_a_part_is_a_library_of_its_own_with_the_team_of_the_others(part: str) -> None:
    symbol = f"autodeploy_paged_{part}"
    whole, own = cpp.kernels(), cpp.kernels(part)
    assert not isinstance(whole, cpp.BuildError) and not isinstance(own, cpp.BuildError)
    assert hasattr(whole, "autodeploy_paged_attention") and not hasattr(whole, symbol)
    assert hasattr(own, symbol)
    listed = subprocess.run(["nm", "-D", "--undefined-only", own._name], capture_output=True, text=True, check=True).stdout
    assert {"team", "me"} <= {line.split()[-1] for line in listed.splitlines()}


def test_floats_come_before_pairs_of_bfloat16_on_cpus_of_intel() -> None:
    flags = "flags : " + " ".join({flag for needed in cpp.ISAS.values() for flag in needed})
    assert cpp.isas_of(f"vendor_id : AuthenticAMD\n{flags}") == list(cpp.ISAS)
    assert cpp.isas_of(f"vendor_id : GenuineIntel\n{flags}")[:3] == ["avx512_vnni", "avx512_bf16", "avx512"]
    assert cpp.isas_of(f"vendor_id : GenuineIntel\n{flags.replace('avx512_bf16', '')}")[:2] == ["avx512_vnni", "avx512"]


def test_they_are_built_ahead_once_and_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    builders: list[str] = []
    monkeypatch.setattr(cpp, "kernels", lambda: builders.append(threading.current_thread().name))
    cpp.build_ahead.cache_clear()
    for _ in range(3):
        cpp.build_ahead()
    for thread in threading.enumerate():
        if thread.name == "kernels":
            thread.join()
    assert builders == ["kernels"]
