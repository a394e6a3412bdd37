"""Which engines there are to compare with, and where each is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from autodeploy.errors import ConfigError, did_you_mean

OURS = "autodeploy"
MODULES = {
    "hf": "transformers",
    "hf-cb": "transformers",
    "openvino": "openvino_genai",
    "ort": "onnxruntime_genai",
    "vllm": "vllm",
}
"""Peer -> what its Python must be able to import."""
LLAMACPP = "llamacpp"
CONVERT = (LLAMACPP, "openvino", "ort")
"""Peers that read no checkpoint of transformers: it is converted first, and rounded if it is asked for."""
ROUND = (OURS, *CONVERT)
"""Engines that can quantize a checkpoint of bfloat16."""
PEERS = ("hf", "hf-cb", LLAMACPP, "openvino", "ort", "vllm")


@dataclass(frozen=True)
class Engine:
    """An engine that can be started here."""

    name: str
    python: str = sys.executable
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def worker(self) -> str:
        return self.name.replace("-", "_")

    @property
    def needs_preparation(self) -> bool:
        """Whether the checkpoint is converted first."""
        return self.name in CONVERT

    @property
    def compiles(self) -> bool:
        """Whether later starts are faster than the first."""
        return self.name in (OURS, "vllm")


def variable(name: str) -> str:
    """The environment variable that says where a peer is."""
    return f"AUTODEPLOY_BENCH_{name.replace('-', '_').upper()}"


def find(against: str, paths: Sequence[str]) -> tuple[list[Engine], dict[str, str]]:
    """The peers asked for that are here, and why the others are not.

    against: names separated by commas. paths: NAME=PATH, the peer's Python (for llamacpp the folder of llama.cpp); absent, the
    environment variable, then this Python. Raises ConfigError for an unknown name.
    """
    given = dict(_split(path) for path in paths)
    found: list[Engine] = []
    absent: dict[str, str] = {}
    for name in filter(None, (part.strip() for part in against.split(","))):
        _refuse_unknown(name)
        engine = _find(name, given.get(name) or os.environ.get(variable(name)))
        if isinstance(engine, Engine):
            found.append(engine)
        else:
            absent[name] = engine
    return found, absent


def _split(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals:
        raise ConfigError(f"--peer-path is '{text}', but it has the form NAME=PATH")
    _refuse_unknown(name)
    return name, path


def _refuse_unknown(name: str) -> None:
    if name not in PEERS:
        raise ConfigError(f"'{name}' is no engine to compare with; there are {', '.join(PEERS)}.{did_you_mean(name, PEERS)}")


def _find(name: str, path: str | None) -> Engine | str:
    if name == LLAMACPP:
        return _find_llamacpp(path)
    python = path or sys.executable
    if shutil.which(python) is None:
        return f"not installed: there is no {python}"
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{MODULES[name]}') is None)"
    if subprocess.run([python, "-c", code], capture_output=True).returncode:
        return f"not installed: {python} has no {MODULES[name]}; name another with {variable(name)}"
    return Engine(name, python)


def _find_llamacpp(path: str | None) -> Engine | str:
    folder = Path(path) if path else Path(shutil.which("llama-batched-bench") or ".").parent
    if not any((folder / part / "llama-batched-bench").exists() for part in (".", "build/bin")):
        return f"not installed: no llama-batched-bench; name the folder of llama.cpp with {variable(LLAMACPP)}"
    return Engine(LLAMACPP, environment={variable(LLAMACPP): str(folder.resolve())})
