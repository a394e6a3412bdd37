"""Own C++ kernels for CPUs: built once by the compiler that is there, for what this CPU can do, and called with plain pointers.

The sources need no torch header, so a build takes seconds. `AUTODEPLOY_NO_CPP=1` does without them, `AUTODEPLOY_CPP_ISA` chooses
another instruction set of `ISAS`, `AUTODEPLOY_CPP_SANITIZE=1` builds with ASan and UBSan (libasan must then be preloaded).
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autodeploy.cache_folder import cache_folder
from autodeploy.cores import available_cores

SOURCES = Path(__file__).parent / "kernels"
ISAS = {
    "avx512_bf16": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "avx512_bf16", "avx512_vnni"),
    "avx512_vnni": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "avx512_vnni"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"),
    "avx2": ("avx2", "fma"),
    "generic": (),
}
"""Instruction sets, larger ones first, each with the CPU flags it needs: the compiler's flags too, less the underscores."""
FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fno-tree-pre",  # it fetches operands of the next round early, and the sums of this one no longer fit in registers
    "-Wall",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",  # the headers of GCC 12 make undefined vectors that way
)
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1")
PARTS = ("attention_int8", "attention_float8")
"""Sources that are libraries of their own, built when first asked for: few models need them, and compilers take long."""
FORMATS = {"p": "q", "l": "q", "f": "f4x"}
"""Of arguments, eight bytes each."""


class BuildError(Exception):
    """The kernels cannot be had; the text says why."""


def against_cpp(target: Any, part: str = "") -> list[str]:
    """The reasons against own C++ kernels on this machine; the first question builds them."""
    if target.device != "cpu":
        return [f"it runs on CPUs, not on {target.device}"]
    library = kernels(part)
    return [str(library)] if isinstance(library, BuildError) else []


class Kernel:
    """A C function of the kernels, bound at its first call.

    signature: one letter an argument: p a pointer (of a tensor: `data_ptr()`; 0 is null), l an integer, f a float.
    part: which of `PARTS` has it, if one does.
    """

    def __init__(self, name: str, signature: str, part: str = "") -> None:
        self.name, self.part = name, part
        self.pack = struct.Struct("<" + "".join(FORMATS[letter] for letter in signature)).pack
        """The arguments as they lie in memory: one pointer to them costs less than to convert each."""

    @cached_property
    def function(self) -> Any:
        library = kernels(self.part)
        if isinstance(library, BuildError):
            raise library
        function = getattr(library, f"autodeploy_{self.name}")
        function.argtypes, function.restype = [ctypes.c_char_p], None
        return function

    def __call__(self, *args: Any) -> None:
        self.function(self.pack(*args))
        if (calls := getattr(_recording, "calls", None)) is not None:
            calls.append((self, args))

    @cached_property
    def address(self) -> int:
        return ctypes.cast(self.function, ctypes.c_void_p).value or 0


def pointer(tensor: torch.Tensor | None) -> int:
    """Where its numbers are; 0 without one."""
    return 0 if tensor is None else tensor.data_ptr()


_recording = threading.local()


@contextmanager
def record_kernels() -> Iterator[list[tuple[Kernel, tuple[Any, ...]]]]:
    """Lists the calls of kernels, as (kernel, arguments), that this thread makes meanwhile.

    They may be made again as long as the tensors behind the pointers stay: so a number among the arguments may follow from shapes
    and settings, never from what a tensor holds.
    """
    _recording.calls = calls = []
    try:
        yield calls
    finally:
        _recording.calls = None


_run = Kernel("run", "pll")


class KernelCalls:
    """Calls of kernels that are made again all at once, by one team of threads (kernels/step.cpp)."""

    def __init__(self, calls: Sequence[tuple[Kernel, tuple[Any, ...]]]) -> None:
        packed = [kernel.pack(*args) for kernel, args in calls]
        self._packed = ctypes.create_string_buffer(b"".join(packed))
        start = ctypes.addressof(self._packed)
        places = (start + end - len(one) for end, one in zip(accumulate(map(len, packed)), packed, strict=True))
        self._table = np.array(
            [(kernel.address, place) for (kernel, _), place in zip(calls, places, strict=True)], dtype=np.int64
        )
        self._call = _run.pack(self._table.ctypes.data, len(calls), torch.get_num_threads())
        self._run = _run.function

    def __call__(self) -> None:
        self._run(self._call)


def isas() -> list[str]:
    """The instruction sets of this CPU, best first."""
    info = Path("/proc/cpuinfo")
    return isas_of(info.read_text() if info.exists() else "")


def isas_of(cpuinfo: str) -> list[str]:
    """The instruction sets of a CPU, best first, by what Linux says of it.

    On Intel's (Sapphire and Emerald Rapids) an instruction that multiplies pairs of bfloat16 takes as long as four that multiply
    as many floats, so making floats of them is faster (docs/log.md).
    """
    lines = cpuinfo.splitlines()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    names = [name for name, needed in ISAS.items() if set(needed) <= set(flags)]
    if "avx512_bf16" in names and any("GenuineIntel" in line for line in lines):
        names[:2] = reversed(names[:2])
    return names


def isa() -> str:
    """The instruction set kernels are built for."""
    chosen = os.environ.get("AUTODEPLOY_CPP_ISA") or isas()[0]
    if chosen not in isas():
        raise BuildError(f"AUTODEPLOY_CPP_ISA={chosen} is not one of this CPU: {', '.join(isas())}")
    return chosen


def compiler_flags(name: str) -> list[str]:
    """What kernels for an instruction set are compiled with."""
    return [*FLAGS, *(f"-m{flag.replace('_', '')}" for flag in ISAS[name])]


@cache
def multiplies_bfloat16() -> bool:
    """Whether the kernels multiply pairs of bfloat16 as they are."""
    return isa() == "avx512_bf16"


@cache
def multiplies_bytes() -> bool:
    """Whether the kernels multiply whole numbers of 8 bits: AVX-512 without an instruction for it has none."""
    return isa() == "avx2" or "avx512_vnni" in ISAS[isa()]


@cache
def widens_bytes() -> bool:
    """Whether they make 16 bits of them first."""
    return isa() == "avx2"


@cache
def kernels(part: str = "") -> ctypes.CDLL | BuildError:
    """The compiled kernels, all but those of `PARTS` or those of one part, or why there are none."""
    if os.environ.get("AUTODEPLOY_NO_CPP", "0") not in ("", "0"):
        return BuildError("AUTODEPLOY_NO_CPP is set")
    try:
        return ctypes.CDLL(str(_built(part)))
    except (BuildError, OSError) as error:
        return BuildError(f"the C++ kernels are not to be had: {error}")


@cache
def build_ahead() -> None:
    """Have a thread build the kernels if they are not there, while other things are done; who needs them waits for it."""
    threading.Thread(target=kernels, name="kernels", daemon=True).start()


def _built(part: str) -> Path:
    """The library of these sources, compiler and instruction set; its name is their hash, and a second file holds its own."""
    compiler = _compiler()
    flags = compiler_flags(isa())
    flags += SANITIZE if os.environ.get("AUTODEPLOY_CPP_SANITIZE") else ()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256(repr((flags, version, platform.machine(), torch.__version__)).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.read_bytes())
    folder = _owned(cache_folder() / "kernels")
    library = folder / f"{'-'.join(filter(None, (digest.hexdigest()[:32], part)))}.so"
    sources = [path for path in sorted(SOURCES.glob("*.cpp")) if (path.stem if path.stem in PARTS else "") == part]
    others = [f"-L{folder}", f"-l:{_built('').name}", "-Wl,-rpath,$ORIGIN"] if part else []  # they have the team of threads
    if not _is_intact(library):
        with _locked(folder):
            if not _is_intact(library):  # nobody else has built it meanwhile
                _build([compiler, *flags], sources, others, library)
    return library


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (found := shutil.which(name)):
            return found
    raise BuildError("no C++ compiler was found (g++, clang++, c++ or $CXX)")


def _build(compiler: list[str], sources: list[Path], linked: list[str], library: Path) -> None:
    """Each source by a compiler of its own, one for each core, then the linker."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:

        def compiled(source: Path) -> str:
            into = str(Path(folder) / f"{source.stem}.o")
            _run_compiler(*compiler, "-c", str(source), "-o", into)
            return into

        with ThreadPoolExecutor(available_cores()) as pool:
            objects = list(pool.map(compiled, sources))
        new = Path(folder) / library.name
        _run_compiler(*compiler, "-shared", *objects, *linked, "-o", str(new))
        _checksum_of(library).write_text(hashlib.sha256(new.read_bytes()).hexdigest())
        new.replace(library)


def _run_compiler(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"the compiler failed: {done.stderr.strip()[:2000]}")


def _checksum_of(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _is_intact(library: Path) -> bool:
    if not library.exists() or not _checksum_of(library).exists():
        return False
    return hashlib.sha256(library.read_bytes()).hexdigest() == _checksum_of(library).read_text()


def _owned(folder: Path) -> Path:
    """The folder, made for its owner alone; what others could have written there is not loaded."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise BuildError(f"{folder} belongs to others or can be written by others; chmod 700 it, or set AUTODEPLOY_CACHE_DIR")
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
