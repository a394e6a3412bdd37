"""How long a step has taken, as the thread sees it that watches."""

import pytest

from autodeploy.distributed import ranks
from autodeploy.distributed.ranks import Stopwatch


def test_only_what_is_done_counts_and_a_stopped_process_counts_little(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(ranks.time, "monotonic", lambda: now[0])
    watch = Stopwatch(longest=1.0)

    def look_after(seconds: float) -> float:
        now[0] += seconds
        return watch.look()

    assert look_after(0.5) == 0.0
    with watch:
        assert look_after(0.5) == 0.0  # seen for the first time
        assert look_after(0.5) == 0.5
        assert look_after(100.0) == 1.5  # this process was stopped itself
    assert look_after(0.5) == 0.0
    with watch:
        pass
    with watch:
        assert look_after(0.5) == 0.0  # another one
