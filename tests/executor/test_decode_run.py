"""Requests that are advanced together get what they get one by one, whatever ends, comes or fails in between."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import autodeploy
from autodeploy import SamplingParams
from autodeploy.executor.decode_run import DecodeRun
from autodeploy.executor.engine import ADExecutor
from tests.models.families import make_model

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [9] * 21, [11]]
SMALL = {"page_size": 4, "max_tokens": 400}


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of requests of each step that was made without a look at each."""
    steps, original = list[int](), ADExecutor._step_of_run

    def step(executor: ADExecutor, run: DecodeRun) -> bool:
        made = original(executor, run)
        if made:
            steps.append(len(run.requests))
        return made

    monkeypatch.setattr(ADExecutor, "_step_of_run", step)
    yield steps


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecodeRun, "suits", classmethod(lambda cls, request: False))


def results(compiled: Any, params: Any) -> list[tuple[Any, ...]]:
    found = [output.outputs[0] for output in compiled.generate(PROMPTS, params)]
    return [(each.token_ids, each.finish_reason, each.stop_reason) for each in found]


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "qwen3_next"])
def test_tokens_and_reasons_are_those_of_one_by_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = autodeploy.compile(make_model(family), kv_cache_config=SMALL)
    lengths = [SamplingParams(max_tokens=count, ignore_eos=True, temperature=0.0) for count in (40, 17, 40, 31)]
    with counted(monkeypatch) as steps:
        together = results(compiled, lengths)
        tokens = [token for ids, *_ in together for token in ids[5:]]
        stopping = SamplingParams(max_tokens=40, temperature=0.0, stop_token_ids=[tokens[3], tokens[-1]])
        stopped = results(compiled, stopping)
    assert len(steps) >= 40 and {2, 4} <= set(steps)
    compiled.executor.scheduler.check()
    one_by_one(monkeypatch)
    with counted(monkeypatch) as none:
        assert results(compiled, lengths) == together and results(compiled, stopping) == stopped
    assert not none and "stop" in {reason for _, reason, _ in stopped}
    compiled.shutdown()


def test_a_pool_that_is_too_small_for_all_preempts_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = make_model("qwen3"), SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.0)
    roomy = autodeploy.compile(model, kv_cache_config=SMALL)
    expected = results(roomy, params)
    roomy.shutdown()
    tight = autodeploy.compile(model, kv_cache_config={"page_size": 4, "max_tokens": 80})
    with counted(monkeypatch) as steps:
        assert results(tight, params) == expected
    assert tight.executor.num_preemptions > 0 and steps
    tight.executor.scheduler.check()
    tight.shutdown()


def test_who_is_aborted_keeps_its_tokens_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = autodeploy.compile(make_model("qwen3"), kv_cache_config=SMALL)
    params = SamplingParams(max_tokens=90, ignore_eos=True, temperature=0.0)
    expected = results(compiled, params)
    enough = threading.Event()
    forward, seen = compiled.runner.forward, [0]

    def counting(*args: Any) -> Any:
        seen[0] += 1
        if seen[0] == 20:
            enough.set()
            threading.Event().wait(0.2)  # so that the abort comes in the middle
        return forward(*args)

    monkeypatch.setattr(compiled.runner, "forward", counting)
    with counted(monkeypatch) as steps:
        handles = [compiled.submit(prompt, params) for prompt in PROMPTS]
        enough.wait()
        handles[1].abort()
        outputs = [handle.output().outputs[0] for handle in handles]
    assert outputs[1].finish_reason == "abort" and 0 < len(outputs[1].token_ids) < 90
    for output, (ids, *_) in zip(outputs, expected, strict=True):
        assert output.token_ids == ids[: len(output.token_ids)]
    assert {3, 4} <= set(steps)
    compiled.shutdown()


def test_a_forward_that_fails_in_between_ends_one_request_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = autodeploy.compile(make_model("qwen3"), kv_cache_config=SMALL)
    params = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.0)
    expected = results(compiled, params)
    forward, left = compiled.runner.forward, [12]

    def failing(batch: Any, rows: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("once")
        return forward(batch, rows)

    monkeypatch.setattr(compiled.runner, "forward", failing)
    with counted(monkeypatch) as steps:
        assert results(compiled, params) == expected  # alone, each gets past it
    assert steps
    compiled.executor.scheduler.check()
    compiled.shutdown()


def test_logits_that_are_not_finite_end_their_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = autodeploy.compile(make_model("qwen3"), kv_cache_config=SMALL)
    params = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.0)
    expected = results(compiled, params)
    forward, left = compiled.runner.forward, [12]

    def spoiling(batch: Any, rows: Any) -> Any:
        logits = forward(batch, rows)
        left[0] -= 1
        if left[0] == 0:
            logits = logits.clone()
            logits[2] = float("nan")
        return logits

    monkeypatch.setattr(compiled.runner, "forward", spoiling)
    outputs = compiled.generate(PROMPTS, params)
    assert [output.error is not None for output in outputs] == [False, False, True, False]
    for output, (ids, *_) in zip(outputs, expected, strict=True):
        assert output.outputs[0].token_ids == ids[: len(output.outputs[0].token_ids)]
    compiled.shutdown()


def test_drawn_requests_are_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = autodeploy.compile(make_model("qwen3"), kv_cache_config=SMALL)
    with counted(monkeypatch) as steps:
        compiled.generate([[1, 2]], SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0))
    assert not steps
    compiled.shutdown()


def test_streamed_requests_get_each_token_at_once_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = autodeploy.compile(make_model("qwen3"), kv_cache_config=SMALL)
    greedy = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.0)
    expected = results(compiled, greedy)
    with counted(monkeypatch) as steps:
        handles = [compiled.submit(prompt, greedy, streaming=i < 2) for i, prompt in enumerate(PROMPTS)]
        parts = [[part.outputs[0] for part in handle] for handle in handles]
    assert len(steps) >= 8
    for found, (token_ids, *_), streams in zip(parts, expected, (True, True, False, False), strict=True):
        assert found[-1].token_ids == token_ids and found[-1].finish_reason == "length"
        assert [part.token_ids for part in found] == [token_ids[: i + 1] for i in range(12)] if streams else len(found) == 1
        assert [token for part in found for token in part.token_ids_diff] == token_ids
        assert all(part.finish_reason is None for part in found[:-1])
    compiled.shutdown()
