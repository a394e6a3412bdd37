"""Where this package keeps what later starts can use again: lowered programs and compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$AUTODEPLOY_CACHE_DIR, $XDG_CACHE_HOME/autodeploy or ~/.cache/autodeploy ("off" only stops programs from being stored)."""
    given = os.environ.get("AUTODEPLOY_CACHE_DIR", "off")
    if given != "off":
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autodeploy"
