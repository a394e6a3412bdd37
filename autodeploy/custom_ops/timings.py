"""A file of measured times: of calls on this machine, by these versions and kernels. What has changed has another file."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from autodeploy.cache_folder import cache_folder
from autodeploy.custom_ops.op import SEMANTIC_OPS

FORMAT_VERSION = 1
ROUNDS, LEAST_ROUNDS, ENOUGH = 7, 2, 0.05
"""Each of several calls is timed that often, in turns; less often when seconds have passed."""
KERNELS = Path(__file__).parent / "kernels"

Seconds = Mapping[str, float]
"""What was timed -> the shortest time of a call."""


@dataclass
class Timings:
    """Times by call. path: the file that keeps them; None keeps them no longer than this object."""

    path: Path | None
    environment: Mapping[str, str]
    calls: dict[str, Seconds] = field(default_factory=dict)
    is_changed: bool = False

    @classmethod
    def of(cls, device: str) -> Timings:
        """Those of this machine; empty where there is no file of them, or none that can be used."""
        environment, path = environment_of(device), None
        if os.environ.get("AUTODEPLOY_CACHE_DIR") != "off":
            path = cache_folder() / "autotune" / f"{key_of(environment)}.json"
        return cls(path, environment, {} if path is None else _read(path, environment))

    def add(self, call: str, seconds: Seconds) -> None:
        self.calls[call], self.is_changed = seconds, True

    def save(self) -> None:
        """Write what was added, for the owner alone: the file is there as a whole or as it was. Without a folder, nothing."""
        if self.path is None or not self.is_changed:
            return
        data = {"format": FORMAT_VERSION, "environment": dict(self.environment), "calls": self.calls}
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self.path.parent)  # made for the owner alone
            with os.fdopen(descriptor, "w") as file:
                json.dump(data, file, indent=1, sort_keys=True)
            os.replace(name, self.path)
        except OSError:
            return  # the next start times again
        self.is_changed = False


def _read(path: Path, environment: Mapping[str, str]) -> dict[str, Seconds]:
    """The times in a file; none from one that is damaged, of another environment, or that others can write."""
    try:
        status, data = path.stat(), json.loads(path.read_bytes())
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            return {}
        if (data["format"], data["environment"]) != (FORMAT_VERSION, dict(environment)):
            return {}
        return {
            str(call): {str(name): float(value) for name, value in seconds.items()} for call, seconds in data["calls"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def key_of(environment: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(environment), sort_keys=True).encode()).hexdigest()[:32]


def environment_of(device: str) -> dict[str, str]:
    """What times depend on beside the call: the processor, threads, versions, and the source of all kernels."""
    facts = {
        "processor": torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu(),
        "threads": str(torch.get_num_threads()),
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "settings": json.dumps(
            {key: os.environ[key] for key in sorted(os.environ) if key.startswith(("AUTODEPLOY_CPP", "ONEDNN"))}
        ),
        "kernels": _sources(),
    }
    return facts | kernel_packages()


def kernel_packages() -> dict[str, str]:
    """Versions of the optional packages that bring or compile kernels; empty where one is not installed."""
    return {name: _version(name) for name in ("triton", "flashinfer-python")}


def _cpu() -> str:
    """Its name and what it can do."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in reversed(lines) if ":" in line}
    flags = hashlib.sha256(found.get("flags", found.get("Features", "")).encode()).hexdigest()[:16]
    return f"{platform.machine()} {found.get('model name', '')} {flags}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _sources() -> str:
    """A hash of every module that has providers, and of all that lies among the kernels."""
    functions = [provider.function for op in SEMANTIC_OPS.values() for provider in op.providers]
    names = {getattr(function, "__module__", "") for function in functions}
    modules = [getattr(sys.modules.get(name), "__file__", None) for name in names]
    paths = {Path(name) for name in modules if name} | {path for path in KERNELS.iterdir() if path.is_file()}
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def time_in_turns(calls: Mapping[str, Callable[[], Any]], device: str) -> Seconds:
    """The shortest time of each call. They take turns, so that a busy moment of the machine is not one call's alone."""
    for call in calls.values():
        _seconds(call, device)  # kernels are compiled and memory is taken
    best, started = dict.fromkeys(calls, float("inf")), time.perf_counter()
    for done in range(ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - started > ENOUGH:
            break
        for name, call in calls.items():
            best[name] = min(best[name], _seconds(call, device))
    return best


def _seconds(call: Callable[[], Any], device: str) -> float:
    if device.startswith("cuda"):
        return _seconds_on_gpu(call, device)
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _seconds_on_gpu(call: Callable[[], Any], device: str, repeats: int = 10) -> float:
    """Between two marks on the stream, of several calls: one alone may be shorter than what starts it."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    for _ in range(repeats):
        call()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1e3 / repeats


def is_here(device: str) -> bool:
    """Whether calls for that device can be timed."""
    return device == "cpu" or (device.startswith("cuda") and torch.cuda.is_available())
