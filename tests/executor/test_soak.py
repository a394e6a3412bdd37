"""Many mixed requests through a real model, some aborted: nothing leaks, survivors are as alone."""

from __future__ import annotations

import random
import time

import pytest

import autodeploy
from autodeploy import SamplingParams
from tests.models.families import make_model

NUM_REQUESTS, ABORTED_SHARE = 300, 0.3


@pytest.fixture(scope="module")
def compiled():
    """A pool of less than two of the longest requests, small steps: preemption and chunking all the time. In float64 the order
    of sums in a batch cannot turn a token."""
    model = make_model("qwen3", num_hidden_layers=1)
    tight = {"page_size": 4, "max_tokens": 160}
    compiled = autodeploy.compile(model, dtype="float64", max_num_tokens=24, max_batch_size=12, kv_cache_config=tight)
    yield compiled
    compiled.shutdown()


def mixed_request(rng: random.Random) -> tuple[list[int], SamplingParams]:
    ids = [rng.randrange(3, 256) for _ in range(rng.choice((1, 3, 9, 20, 41, 60)))]
    return ids, SamplingParams(max_tokens=rng.randint(1, 30), stop_token_ids=[rng.randrange(256)], seed=rng.randrange(9))


def test_300_mixed_requests_with_aborts_leak_no_page_and_survivors_equal_their_solo_run(compiled) -> None:
    rng = random.Random(0)
    requests = [mixed_request(rng) for _ in range(NUM_REQUESTS)]
    handles = []
    aborted = set()
    for i, (ids, params) in enumerate(requests):
        handles.append(compiled.submit(ids, params))
        if rng.random() < ABORTED_SHARE:
            aborted.add(i)
            if rng.random() < 0.5:
                time.sleep(rng.random() * 0.02)
            handles[rng.choice(sorted(aborted))].abort()  # some twice, some before they start, some after they end
    for i in aborted:
        handles[i].abort()
    outputs = [handle.result(120) for handle in handles]
    executor = compiled.executor
    executor.scheduler.check()
    assert executor.scheduler.kv.num_free_pages == executor.scheduler.kv.num_usable_pages
    assert not executor.scheduler.has_work and not executor._handles
    assert executor.num_preemptions > 50
    survivors = [i for i in range(NUM_REQUESTS) if outputs[i].outputs[0].finish_reason != "abort"]
    assert len(survivors) >= 0.6 * NUM_REQUESTS and len(survivors) < NUM_REQUESTS
    for i in survivors[::6]:
        ids, params = requests[i]
        alone = compiled.submit(ids, params).result(60).outputs[0]
        assert (alone.token_ids, alone.finish_reason) == (outputs[i].outputs[0].token_ids, outputs[i].outputs[0].finish_reason)
    for i in aborted:
        alone_ids = outputs[i].outputs[0].token_ids
        assert len(alone_ids) <= (requests[i][1].max_tokens or 0)
