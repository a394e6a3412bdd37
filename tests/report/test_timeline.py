"""Phases of a start: their times, and a bar for who sees one."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from autodeploy.report.timeline import Timeline, is_terminal


@pytest.mark.parametrize("show", [True, False])
def test_a_phase_is_timed_and_drawn_where_it_is_seen(show: bool, capsys: pytest.CaptureFixture[str]) -> None:
    timeline = Timeline(show)
    with timeline.phase("load weights", 3) as advance:
        advance("one of them")
    with pytest.raises(ZeroDivisionError), timeline.phase("passes", None):
        _ = 1 / 0
    assert list(timeline.seconds) == list(timeline.cpu_seconds) == ["load weights", "passes"]
    drawn = capsys.readouterr().err
    assert ("load weights" in drawn and "3/3" in drawn) if show else not drawn


@pytest.mark.parametrize("stderr", [None, "closed"])
def test_no_terminal_where_there_is_no_stderr(stderr: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    if stderr:
        with (tmp_path / "log").open("w") as stderr:
            pass
    monkeypatch.setattr(sys, "stderr", stderr)
    assert not is_terminal()
