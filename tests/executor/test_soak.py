"""Many mixed requests through a real model, some aborted, some preempted: nothing leaks, survivors are as alone."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest

import autodeploy
from autodeploy import CompiledModel, SamplingParams
from autodeploy.executor.outputs import RequestHandle, RequestOutput
from tests.models.families import make_model

ABORTED_SHARE = 0.3
FAMILIES = {
    "qwen3": 300,
    "mamba2": 60,
    "qwen3_next": 60,
}
"""Requests of the quick run."""
LONG = 1000
CASES = [
    *(pytest.param((family, count), id=f"{count}-{family}") for family, count in FAMILIES.items()),
    *(
        pytest.param((family, LONG), id=f"{LONG}-{family}", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])
        for family in ("qwen3_next", "mamba2")
    ),
]


@pytest.fixture(scope="module", params=CASES)
def soak(request: pytest.FixtureRequest) -> Iterator[tuple[CompiledModel, int]]:
    """A pool of less than two of the longest requests, small steps: preemption and chunking all the time. In float64 the order
    of sums in a batch cannot turn a token."""
    family, count = request.param
    model = make_model(family, **({"num_hidden_layers": 1} if family == "qwen3" else {}))
    tight = {"page_size": 4, "max_tokens": 160}
    compiled = autodeploy.compile(model, dtype="float64", max_num_tokens=24, max_batch_size=12, kv_cache_config=tight)
    yield compiled, count
    compiled.shutdown()


def mixed_request(rng: random.Random) -> tuple[list[int], SamplingParams]:
    ids = [rng.randrange(3, 256) for _ in range(rng.choice((1, 3, 9, 20, 41, 60)))]
    return ids, SamplingParams(max_tokens=rng.randint(1, 30), stop_token_ids=[rng.randrange(256)], seed=rng.randrange(9))


def run(
    compiled: CompiledModel, requests: list[tuple[list[int], SamplingParams]], rng: random.Random
) -> tuple[list[RequestOutput], set[int]]:
    """Outputs of all requests, and which of them somebody tried to abort."""
    handles: list[RequestHandle] = []
    aborted: set[int] = set()
    for i, (ids, params) in enumerate(requests):
        handles.append(compiled.submit(ids, params))
        if rng.random() < ABORTED_SHARE:
            aborted.add(i)
            if rng.random() < 0.5:
                time.sleep(rng.random() * 0.02)
            handles[rng.choice(sorted(aborted))].abort()  # some twice, some before they start, some after they end
    for i in aborted:
        handles[i].abort()
    for _ in range(
        len(handles) // 4
    ):  # caches of states never run out by themselves; not for ever, or a slow machine gets nowhere
        if waiting := [handle for handle in handles if not handle.finished]:
            compiled.executor.preempt(rng.choice(waiting[:12]).request_id)
            time.sleep(0.01)
    return [handle.result(900) for handle in handles], aborted


def test_mixed_requests_with_aborts_leak_nothing_and_survivors_equal_their_solo_run(soak: tuple[CompiledModel, int]) -> None:
    compiled, count = soak
    rng = random.Random(0)
    requests = [mixed_request(rng) for _ in range(count)]
    outputs, aborted = run(compiled, requests, rng)
    executor = compiled.executor
    executor.scheduler.check()
    assert not executor.scheduler.has_work and not executor._handles
    assert executor.num_preemptions >= 3
    survivors = [i for i in range(count) if outputs[i].outputs[0].finish_reason != "abort"]
    assert 0.6 * count <= len(survivors) < count
    for i in survivors[::6] if count < LONG else survivors:
        ids, params = requests[i]
        alone = compiled.submit(ids, params).result(60).outputs[0]
        assert (alone.token_ids, alone.finish_reason) == (outputs[i].outputs[0].token_ids, outputs[i].outputs[0].finish_reason)
    for i in aborted:
        assert len(outputs[i].outputs[0].token_ids) <= (requests[i][1].max_tokens or 0)
