"""Python's collector of cycles, at rest while much is made that stays: looking through it is a fifth of importing torch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """What is made meanwhile counts as old afterwards: it is looked at when everything is, not before."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if not gc.get_freeze_count():  # nobody else wants something left alone for good
                gc.freeze()
                gc.unfreeze()  # to the oldest
            gc.enable()
