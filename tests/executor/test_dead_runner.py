"""A runner that says it is dead, or never comes back: nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

import autodeploy
from autodeploy import CompiledModel, EngineDeadError, SamplingParams
from autodeploy.executor import engine
from tests.models.families import make_model


@pytest.fixture
def compiled() -> Iterator[CompiledModel]:
    compiled = autodeploy.compile(make_model("llama", num_hidden_layers=1))
    yield compiled
    compiled.shutdown()


def test_a_runner_that_is_dead_is_not_tried_with_single_requests(
    compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*given: Any) -> Any:
        raise EngineDeadError("rank 1 is gone")

    monkeypatch.setattr(compiled.runner, "forward", die)
    with pytest.raises(EngineDeadError, match=r"^rank 1 is gone$"):
        compiled.generate([[3, 4], [5]])  # also in a list, where the failures of requests are not raised
    with pytest.raises(EngineDeadError, match="the engine has ended"):
        compiled.generate([3])


def test_requests_end_even_if_the_runner_never_comes_back(compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hang(*given: Any) -> Any:
        entered.set()
        leave.wait(30)
        raise EngineDeadError("too late")

    monkeypatch.setattr(engine, "PATIENCE", 0.1)
    monkeypatch.setattr(compiled.runner, "forward", hang)
    handles = [compiled.submit([3, 4], SamplingParams()) for _ in range(2)]
    assert entered.wait(10)
    handles.append(compiled.submit([5], SamplingParams()))  # still in the queue
    compiled.executor.fail(EngineDeadError("a rank hangs"))
    for handle in handles:
        with pytest.raises(EngineDeadError, match="a rank hangs"):
            handle.result(5)
    leave.set()
    compiled.shutdown()
