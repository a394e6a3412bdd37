"""Decode steps that start before the tokens of the last one are known give what plain ones give, whatever ends or fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import autodeploy
from autodeploy import CompiledModel, SamplingParams
from autodeploy.executor.cuda_graphs import LaunchedStep
from tests.executor.test_cuda_graphs import CpuDevice, graphs_of, with_graphs
from tests.models.families import make_model
from tools.gpu_speed import StepWatch

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [9] * 21, [11]]
LENGTHS = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (30, 17, 30, 25)]
LONG = SamplingParams(max_tokens=40, ignore_eos=True)


def results(compiled: CompiledModel, params: Any) -> list[tuple[Any, ...]]:
    found = [output.outputs[0] for output in compiled.generate(PROMPTS, params)]  # pyright: ignore
    return [(each.token_ids, each.finish_reason, each.stop_reason) for each in found]


def plain_results(family: str, *params: Any) -> list[Any]:
    compiled = autodeploy.compile(make_model(family), kv_cache_config={"page_size": 4, "max_tokens": 512})
    found = [results(compiled, each) for each in params]
    compiled.shutdown()
    return found


def watch(compiled: CompiledModel) -> list[bool | None]:
    """Of each launched step, whether the tokens of the one before it were known to the host; None where there is none."""
    graphs, known = graphs_of(compiled), list[bool | None]()
    launch = graphs.launch

    def watched(batch: Any, after: LaunchedStep | None) -> LaunchedStep:
        known.append(None if after is None else "found" in after.__dict__)
        return launch(batch, after)

    graphs.launch = watched  # pyright: ignore[reportAttributeAccessIssue]
    return known


def stopping(tokens: list[tuple[Any, ...]]) -> SamplingParams:
    """Ends some requests in the middle, at tokens of theirs."""
    return SamplingParams(max_tokens=30, ignore_eos=True, stop_token_ids=[tokens[0][0][13], tokens[2][0][21]])


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "qwen3_next"])
def test_tokens_and_reasons_are_those_of_plain_steps(family: str) -> None:
    (expected,) = plain_results(family, LENGTHS)
    stops = stopping(expected)
    (stopped,) = plain_results(family, stops)
    assert {reason for _, reason, _ in stopped} >= {"stop"}
    compiled = with_graphs(family, CpuDevice())
    known = watch(compiled)
    for _ in range(2):  # the second time with graphs from the first step on
        assert results(compiled, LENGTHS) == expected
        assert results(compiled, stops) == stopped
    assert known.count(False) >= 40 and True not in known  # each is launched before the tokens of the last one are known
    assert graphs_of(compiled).num_replays > 40
    compiled.executor.scheduler.check()  # pyright: ignore[reportOptionalMemberAccess]
    compiled.shutdown()


def test_the_plain_loop_waits_for_each_step_once() -> None:
    (expected,) = plain_results("qwen3", LENGTHS)
    compiled = with_graphs("qwen3", CpuDevice(), disable_overlap_scheduler=True)
    known = watch(compiled)
    assert results(compiled, LENGTHS) == expected
    assert len(known) >= 20 and set(known) == {None}
    compiled.shutdown()


def test_greedy_tokens_are_found_inside_the_graph() -> None:
    compiled = with_graphs("qwen3", CpuDevice())
    results(compiled, LENGTHS)
    graphs = graphs_of(compiled)
    calls, greedy = list[int](), graphs.greedy
    assert greedy is not None and all(step.chosen is not None for step in graphs.captured.values())
    graphs.greedy = lambda logits: calls.append(len(logits)) or greedy(logits)
    seen, launch = set[int](), graphs.launch

    def counted(batch: Any, after: Any) -> LaunchedStep:
        before, replays = len(calls), graphs.num_replays
        step = launch(batch, after)
        if graphs.num_replays > replays and len(batch["seq_lens"]) in (1, 2, 4):
            assert len(calls) == before + 1 and calls[-1] == len(batch["seq_lens"])  # the replay's own, here a plain call
            seen.add(calls[-1])
        return step

    graphs.launch = counted  # pyright: ignore[reportAttributeAccessIssue]
    results(compiled, LENGTHS)
    assert seen
    compiled.shutdown()


def test_a_pool_that_is_too_small_preempts_as_ever() -> None:
    (expected,) = plain_results("qwen3", LONG)
    compiled = with_graphs("qwen3", CpuDevice(), pool=100)
    known = watch(compiled)
    assert results(compiled, LONG) == expected
    assert compiled.executor.num_preemptions > 0 and False in known
    compiled.executor.scheduler.check()
    compiled.shutdown()


def test_who_is_aborted_or_comes_in_between_leaves_the_others_their_tokens() -> None:
    (expected,) = plain_results("qwen3_next", LONG)
    compiled = with_graphs("qwen3_next", CpuDevice())
    graphs, enough, count = graphs_of(compiled), threading.Event(), [0]
    launch = graphs.launch

    def counting(batch: Any, after: Any) -> LaunchedStep:
        count[0] += 1
        if count[0] == 12:
            enough.set()
            threading.Event().wait(0.2)  # so that the commands come in the middle
        return launch(batch, after)

    graphs.launch = counting  # pyright: ignore[reportAttributeAccessIssue]
    handles = [compiled.submit(prompt, LONG, streaming=i == 2) for i, prompt in enumerate(PROMPTS[:3])]
    enough.wait(20)
    handles[1].abort()
    handles.append(compiled.submit(PROMPTS[3], LONG))
    outputs = [handle.output().outputs[0] for handle in handles]
    assert outputs[1].finish_reason == "abort" and 0 < len(outputs[1].token_ids) < 40
    for output, (tokens, *_) in zip(outputs, expected, strict=True):
        assert output.token_ids == tokens[: len(output.token_ids)]
    assert [len(output.token_ids) for output in outputs[::2]] == [40, 40] and len(outputs[3].token_ids) == 40
    compiled.shutdown()


@pytest.mark.parametrize("where", ["launch", "wait"])
def test_a_step_that_fails_in_between_ends_no_request_that_gets_past_it_alone(where: str) -> None:
    (expected,) = plain_results("qwen3_next", LONG)
    compiled = with_graphs("qwen3_next", CpuDevice())
    graphs, left = graphs_of(compiled), [12]
    launch = graphs.launch

    def fail() -> Any:
        raise RuntimeError("once")

    def failing(batch: Any, after: Any) -> LaunchedStep:
        left[0] -= 1
        step = launch(batch, after)
        if left[0] == 0:
            return LaunchedStep(step.chosen, fail) if where == "wait" else fail()
        return step

    graphs.launch = failing  # pyright: ignore[reportAttributeAccessIssue]
    assert results(compiled, LONG) == expected and left[0] < 0
    compiled.executor.scheduler.check()
    compiled.shutdown()


def test_logits_that_are_not_finite_end_their_request_alone() -> None:
    (expected,) = plain_results("qwen3", LONG)
    compiled = with_graphs("qwen3", CpuDevice())
    graphs, left = graphs_of(compiled), [12]
    launch = graphs.launch

    def spoiling(batch: Any, after: Any) -> LaunchedStep:
        step, left[0] = launch(batch, after), left[0] - 1
        if left[0] == 0:
            found = step.found.copy()
            found[2] = torch.nan, 0
            return LaunchedStep(torch.from_numpy(found), lambda: found)
        return step

    graphs.launch = spoiling  # pyright: ignore[reportAttributeAccessIssue]
    outputs: Any = compiled.generate(PROMPTS, LONG)
    assert [output.error is not None for output in outputs] == [False, False, True, False]
    for output, (tokens, *_) in zip(outputs, expected, strict=True):
        assert output.outputs[0].token_ids == tokens[: len(output.outputs[0].token_ids)]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [40, 40, len(outputs[2].outputs[0].token_ids), 40]
    compiled.shutdown()


class SlowDevice(CpuDevice):
    """Tokens are there 3 ms after they are asked for."""

    def download(self, source: torch.Tensor) -> Callable[[], np.ndarray]:
        found = super().download(source)

        def wait() -> np.ndarray:
            time.sleep(0.003)
            return found()

        return wait


@pytest.mark.parametrize("overlaps", [True, False])
def test_the_watch_of_the_speed_check_counts_launched_steps_and_what_they_wait_for(overlaps: bool) -> None:
    compiled = with_graphs("qwen3", SlowDevice(), disable_overlap_scheduler=not overlaps)
    results(compiled, LENGTHS[0])
    steps_before, watch = compiled.executor.num_steps, StepWatch(compiled, is_gpu=False)
    results(compiled, LENGTHS)
    steps = watch.take()
    assert len(steps) == compiled.executor.num_steps - steps_before
    launched, others = [each for each in steps if each.launched], [each for each in steps if not each.launched]
    assert len(launched) >= 20 and all(each.num_tokens == each.num_requests for each in launched)
    assert {each.num_requests for each in launched} >= {4, 2} and max(each.num_tokens for each in others) > 4
    waiting = [each for each in launched if each.waited]
    assert len(launched) - len(waiting) <= (4 if overlaps else 0)  # the first of a run has nothing to wait for
    assert all(0.003 <= each.waited <= each.seconds for each in waiting)
    compiled.shutdown()
