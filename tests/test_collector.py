"""The collector of cycles rests while things are made that stay, and nobody notices afterwards."""

import gc
import subprocess
import sys

import pytest

from autodeploy.collector import collector_at_rest


def test_nothing_is_collected_meanwhile_and_all_of_it_afterwards() -> None:
    class Node:
        alive = 0

        def __init__(self) -> None:
            self.me = self
            Node.alive += 1

        def __del__(self) -> None:
            Node.alive -= 1

    with collector_at_rest():
        assert not gc.isenabled()
        for _ in range(10_000):
            Node()
        assert Node.alive == 10_000
        with collector_at_rest():
            pass
        assert not gc.isenabled()  # an inner one ends nothing
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    assert gc.get_count()[0] < 700  # they are among the old ones
    gc.collect()
    assert Node.alive == 0


def test_whoever_has_switched_it_off_or_frozen_something_finds_it_so() -> None:
    gc.disable()
    try:
        with collector_at_rest():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with collector_at_rest():
            made: list[list[int]] = [[] for _ in range(10_000)]
        assert made
        assert 0 < gc.get_freeze_count() <= frozen  # nothing was added or set free; something of another thread may be gone
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("name", ["LLM", "ops"])
def test_importing_collects_nothing(name: str) -> None:
    script = (
        "import gc; runs = []; gc.collect(); gc.callbacks.append(lambda phase, info: runs.append(info))\n"
        f"import autodeploy; before = len(runs); autodeploy.{name}; print(len(runs) - before, gc.isenabled())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.split() == ["0", "True"]
