"""Threads are as many as the container may run at once."""

import os
from pathlib import Path

import pytest
import torch

import autodeploy
from autodeploy import cores
from tests.models.families import make_model


@pytest.mark.parametrize(
    ("text", "expected"), [("max 100000", 99), ("150000 100000", 1), ("50000 100000", 1), ("9900000 100000", 99)]
)
def test_the_quota_of_the_control_group_counts(text: str, expected: int, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(text)
    allowed = len(os.sched_getaffinity(0))
    assert cores.available_cores(tmp_path / "cpu.max") == min(expected, allowed)
    assert cores.available_cores(tmp_path / "none") == allowed


def test_torch_starts_no_more_threads_than_there_are_cores() -> None:
    torch.set_num_threads(1000)
    try:
        autodeploy.compile(make_model("llama", num_hidden_layers=1)).shutdown()
        assert torch.get_num_threads() == cores.available_cores()
    finally:
        torch.set_num_threads(2)


def test_threads_left_over_from_loading_end_when_the_executor_starts() -> None:
    """Linux names every thread of a process; the threads of OpenMP belong to the one that started them."""
    torch.randn(600, 600) @ torch.randn(600, 600)
    (torch.randn(1 << 20) + 1).sum()
    before = len(os.listdir("/proc/self/task"))
    cores.end_idle_threads()
    assert len(os.listdir("/proc/self/task")) < before
    assert float((torch.ones(1 << 20) + 1).sum()) == 2 << 20
