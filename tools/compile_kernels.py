"""Compile every Triton kernel without a GPU, check what each variant takes, and write docs/kernels.md.

    python tools/compile_kernels.py [--arch 90] [--check | --no-page]

--check writes nothing and fails where the page is stale; only sm_90 has budgets and a page. Exits with 1 when a variant takes
more than it may or lacks an instruction that it must have: registers, spills (none may be), shared memory, tensor cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from autodeploy.custom_ops import kernels
from autodeploy.custom_ops.gpu import Variant

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "kernels.md"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INSTRUCTIONS = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA", "UTMALDG", "LDGSTS")
"""Worth counting: tensor cores, and copies to shared memory that nobody waits for."""
FP8, FP8_ARCH = "*fp8e4nv", 89
"""A type of Triton's, and the first GPUs that have it."""
HEADER = """# Triton kernels

Written by `python tools/compile_kernels.py`; a test fails when it is stale. Each variant is compiled for sm_90 without a GPU
(`make kernels`), and must keep to its budget: no spills, at most 227 KB of shared memory, the registers that it was given, and
tensor cores where it multiplies matrices. What the kernels compute is tested in Triton's interpreter (`tests/custom_ops/`).

| kernel | variant | warps | stages | registers | shared memory | instructions |
|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Taken:
    """What a compiled variant takes."""

    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]


def variants() -> Iterator[tuple[str, Variant]]:
    """(module, variant) of all kernels."""
    for info in sorted(iter_modules(kernels.__path__), key=lambda info: info.name):
        for variant in getattr(import_module(f"{kernels.__name__}.{info.name}"), "VARIANTS", ()):
            yield info.name, variant


def compiled(variant: Variant, arch: int) -> Taken:
    """Machine code for that compute capability, and what it takes."""
    function: Any = variant.kernel
    names, constants = function.arg_names, variant.constants
    unknown = set(constants) - set(names)
    assert not unknown, f"{function.__name__} has no arguments {sorted(unknown)}"
    types = {name: "constexpr" if name in constants else variant.types.get(name, "i32") for name in names}
    places = {name: (i,) for i, name in enumerate(names)}
    aligned = [name for name in names if types[name].startswith("*") or name.endswith(("stride", "width"))]
    source = ASTSource(
        fn=function,
        signature=types,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name in aligned if types[name] != "constexpr"},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    built: Any = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, code = (_dump(flag, file.name) for flag in ("-res-usage", "-sass"))
    numbers = dict(item.split(":", 1) for item in usage.split() if item.startswith(("REG:", "STACK:")))
    counts = {name: sum(f" {name}" in line for line in code.splitlines()) for name in INSTRUCTIONS}
    return Taken(int(numbers["REG"]), int(numbers["STACK"]), built.metadata.shared, {k: n for k, n in counts.items() if n})


def _dump(flag: str, file: str) -> str:
    return subprocess.run([CUOBJDUMP, flag, file], capture_output=True, text=True, check=True).stdout


def breaches(variant: Variant, taken: Taken) -> list[str]:
    """What a variant takes that it may not, or lacks."""
    checks = {
        f"{taken.registers} registers, {variant.max_registers} are allowed": taken.registers > variant.max_registers,
        f"{taken.stack} bytes of registers are spilled": taken.stack > 0,
        f"{taken.shared} bytes of shared memory, {variant.max_shared} are allowed": taken.shared > variant.max_shared,
    }
    checks |= {f"no {name}": name not in taken.instructions for name in variant.must}
    return [reason for reason, holds in checks.items() if holds]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--no-page", action="store_true")
    options = parser.parse_args()
    rows, failed, skipped = [], 0, 0
    for module, variant in variants():
        if options.arch < FP8_ARCH and FP8 in map(variant.types.get, variant.kernel.arg_names):
            skipped += 1
            continue
        taken = compiled(variant, options.arch)
        name = f"{module}.{variant.kernel.__name__}"
        for reason in breaches(variant, taken) if options.arch == 90 else ():
            failed += 1
            print(f"{name}, {variant.label}: {reason}", file=sys.stderr)
        counts = ", ".join(f"{key} {count}" for key, count in taken.instructions.items())
        sizes = f"{variant.num_warps} | {variant.num_stages} | {taken.registers} | {taken.shared:,} | {counts}"
        rows.append(f"| `{name}` | {variant.label} | {sizes} |\n")
    print(
        f"triton {triton.__version__}, sm_{options.arch}: {len(rows)} variants, {failed} breaches"
        + f", {skipped} of fp8 skipped" * (skipped > 0)
    )
    page = HEADER + "".join(rows)
    if options.check and page != FILE.read_text(encoding="utf-8"):
        print("docs/kernels.md is stale: run `python tools/compile_kernels.py`", file=sys.stderr)
        failed += 1
    elif not (options.check or options.no_page) and options.arch == 90:
        FILE.write_text(page, encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
