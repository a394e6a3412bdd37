"""The loop of a worker process: a line of JSON in, a line of JSON out. What libraries print goes to standard error."""

import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    begun = time.perf_counter()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(sys.argv[1], begun)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = worker.do(request.pop("do"), request)
        except Exception as error:  # whatever it is, the process that asked is told, and may ask for more
            traceback.print_exc()
            answer = {"error": " ".join(reason(error).split())[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    worker.close()


def reason(error: Exception) -> str:
    """What went wrong; of a command that failed, the last that it said."""
    if not isinstance(error, subprocess.CalledProcessError):
        return f"{type(error).__name__}: {error}"
    said = (error.stderr or "it said nothing").strip().splitlines()
    return f"{Path(error.cmd[0]).name} ended with code {error.returncode}: {said[-1]}"


class Worker:
    """Calls the functions of an engine's file by name; answers carry the times of this process, and when they were ready."""

    def __init__(self, name: str, begun: float) -> None:
        self.name, self.begun = name, begun
        self.module: Any = None

    def do(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if self.module is None:
            self.module = importlib.import_module(f"worker_{self.name}")
        imported = time.perf_counter()
        answer = getattr(self.module, name)(**arguments)
        return {**answer, "begun": self.begun, "imported": imported, "at": time.perf_counter()}

    def close(self) -> None:
        """Let an engine end its threads."""
        if (close := getattr(self.module, "close", None)) is not None:
            close()


if __name__ == "__main__":  # an engine may start processes that import this file again
    main()
