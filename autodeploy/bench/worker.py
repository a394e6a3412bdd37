"""A process that does one engine's work: started, told what to do by lines of JSON, and ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import autodeploy
from autodeploy.errors import AutoDeployError

WORKERS = Path(__file__).parent / "workers"
GRACE = 10.0
"""Seconds a process has to end by itself."""
COMPILED_ONCE = {"PYTHONDONTWRITEBYTECODE": ""}
"""Python keeps the modules it compiles, as it does unless told otherwise: pip has not compiled what is installed editable."""
PATIENCE = 1800.0
"""Seconds after which a process that has not answered is ended."""


class WorkerError(AutoDeployError):
    """An engine failed, or its process ended; the others go on."""


class Worker:
    """One process of `workers/`, run by any Python: it needs nothing of ours but that folder."""

    patience = PATIENCE

    def __init__(self, name: str, python: str = sys.executable, environment: Mapping[str, str] | None = None) -> None:
        self.name, self.started = name, time.perf_counter()
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [python, str(WORKERS), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **COMPILED_ONCE, **_own_packages(python), **(environment or {})},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have it do one thing and wait for the answer. Raises WorkerError."""
        assert self._process.stdin is not None and self._process.stdout is not None
        limit = threading.Timer(self.patience, self._process.kill)
        limit.start()
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            limit.cancel()
        if not line:
            raise WorkerError(f"{self.name}: its process ended with code {self._process.wait()}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process. No harm when it has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(GRACE)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines: Sequence[str] = self._errors.read().strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def _own_packages(python: str) -> dict[str, str]:
    """The worker that is ours imports this very autodeploy, installed or not."""
    if python != sys.executable:
        return {}
    paths = [str(Path(autodeploy.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}
