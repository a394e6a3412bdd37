"""A model is written in one process and measured in another, by the peak of its anonymous memory."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run(description: str | None, write: Callable[[Path], None], measure: Callable[[Path], dict[str, Any]]) -> None:
    """The command line of a benchmark: this script runs itself once for each part, and the second one prints JSON.

    What is heavy is imported inside `write` and `measure`, since this process needs none of it.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the model is, or will be written")
    parser.add_argument("--keep", action="store_true", help="do not delete the model afterwards")
    parser.add_argument("--part", choices=["write", "measure"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part == "write":
        write(args.folder)
    elif args.part == "measure":
        print(json.dumps(measure(args.folder), indent=2))
    else:
        folder = args.folder or Path(tempfile.mkdtemp(prefix=f"{Path(sys.argv[0]).stem}-"))
        try:
            for part in ("write", "measure") if not (folder / "config.json").exists() else ("measure",):
                subprocess.run([sys.executable, sys.argv[0], "--folder", str(folder), "--part", part], check=True)
        finally:
            if not args.keep:
                shutil.rmtree(folder, ignore_errors=True)


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


class PeakMemory:
    """Samples RssAnon every 10 ms until stopped."""

    def __init__(self) -> None:
        self.peak, self._stop = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, anonymous_bytes())

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.peak
