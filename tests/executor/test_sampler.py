"""Sampling against transformers' logits processors, and draws that depend on nothing but the request."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from autodeploy.config import SamplingParams
from autodeploy.errors import ExecutionError
from autodeploy.executor.request import Request
from autodeploy.executor.sampler import Sampler, _draw, distribution

VOCAB = 101
EOS = 7


def make(request_id: int = 1, prompt: tuple[int, ...] = (1, 2, 3), output: tuple[int, ...] = (), **options: Any) -> Request:
    request = Request(request_id, list(prompt), SamplingParams(max_tokens=None, **options), frozenset({EOS}), 1000)
    request.output_token_ids.extend(output)
    return request


def random_logits(rows: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def drawn(sampler: Sampler, logits: Tensor, request: Request, count: int) -> list[int]:
    """`count` draws of one request from the same logits [1, vocab], with nothing appended."""
    found = [sampler(logits, [request])[0] for _ in range(count)]
    return [token for token in found if isinstance(token, int)]


FILTERS = [
    {"temperature": 0.7},
    {"temperature": 1.5},
    {"top_k": 5},
    {"top_k": 500},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"top_p": 1.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.05, "temperature": 1.3},
    {"top_p": 0.95, "min_p": 0.02, "temperature": 0.6},
]


@pytest.mark.parametrize("options", FILTERS)
@pytest.mark.parametrize("seed", range(5))
def test_distribution_is_that_of_transformers(options: dict[str, Any], seed: int) -> None:
    scores = random_logits(1, seed)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(options.get("temperature", 1.0)))])
    if "top_k" in options:
        warpers.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        warpers.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        warpers.append(MinPLogitsWarper(options["min_p"]))
    ids = torch.zeros(1, 1, dtype=torch.long)
    expected = warpers(ids, scores.clone()).softmax(dim=-1)[0]  # pyright: ignore[reportArgumentType]
    tokens, probabilities = distribution(scores[0], SamplingParams(**options))
    assert set(tokens.tolist()) == set(expected.nonzero().flatten().tolist())
    torch.testing.assert_close(probabilities, expected[tokens], rtol=1e-5, atol=1e-7)


def test_top_k_keeps_ties_as_transformers_does() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0])
    tokens, _ = distribution(scores, SamplingParams(top_k=2))
    assert set(tokens.tolist()) == {1, 2, 3}


def test_top_p_stops_at_the_token_that_reaches_it() -> None:
    tokens, probabilities = distribution(torch.tensor([0.25, 0.5, 0.25]).log(), SamplingParams(top_p=0.5))
    assert tokens.tolist() == [1] and probabilities.tolist() == [1.0]


@pytest.mark.parametrize("factor", [0.5, 1.3, 2.0])
def test_repetition_penalty_is_that_of_transformers(factor: float) -> None:
    request = make(prompt=(1, 2, 2, 50), output=(60, 60, 3), repetition_penalty=factor)
    logits = random_logits(1)
    ids = torch.tensor([request.prompt_token_ids + request.output_token_ids])
    expected = RepetitionPenaltyLogitsProcessor(factor)(ids, logits.clone())  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(Sampler(VOCAB)._penalised(logits[0], request), expected[0])


def test_presence_and_frequency_count_the_output_only() -> None:
    request = make(prompt=(1, 1, 2), output=(5, 5, 6), presence_penalty=0.5, frequency_penalty=0.25)
    expected = torch.zeros(VOCAB)
    expected[5], expected[6] = -0.5 - 2 * 0.25, -0.5 - 0.25
    torch.testing.assert_close(Sampler(VOCAB)._penalised(torch.zeros(VOCAB), request), expected)


def test_counts_grow_with_the_output_and_equal_a_fresh_count() -> None:
    sampler, request = Sampler(VOCAB), make(repetition_penalty=1.2, frequency_penalty=0.3)
    logits = random_logits(1)
    for token in (4, 4, 9, 1):
        old = sampler._penalised(logits[0], request)
        request.append(token)
        assert not torch.equal(sampler._penalised(logits[0], request), old)
    torch.testing.assert_close(sampler._penalised(logits[0], request), Sampler(VOCAB)._penalised(logits[0], request))


def test_penalties_change_a_greedy_choice() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 6] = 2.0, 1.9
    assert Sampler(VOCAB)(logits, [make(output=(5,), frequency_penalty=0.2)]) == [6]
    assert Sampler(VOCAB)(logits, [make(output=(5,))]) == [5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_greedy_is_argmax(dtype: torch.dtype) -> None:
    logits = random_logits(6).to(dtype)
    requests = [make(i, temperature=0.0) if i % 2 else make(i) for i in range(6)]
    assert Sampler(VOCAB)(logits, requests) == logits.argmax(dim=-1).tolist()


def test_padded_vocabulary_is_never_chosen() -> None:
    logits = torch.zeros(2, VOCAB + 10)
    logits[:, VOCAB + 3] = 50.0
    tokens = Sampler(VOCAB)(logits, [make(1), make(2, temperature=1.0)])
    assert all(isinstance(token, int) and token < VOCAB for token in tokens)


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"top_k": 6}, {"top_p": 0.7}, {"min_p": 0.1, "temperature": 1.5}])
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    logits = random_logits(1, seed=3, scale=1.5)
    params = SamplingParams(**options)
    tokens, probabilities = distribution(logits[0], params)
    count = 5_000
    found = torch.tensor(drawn(Sampler(VOCAB, seed=1), logits, make(**options), count)).bincount(minlength=VOCAB)
    assert found.sum() == count == found[tokens].sum()
    expected = probabilities.double() * count
    common = expected >= 5
    observed = torch.cat([found[tokens][common].double(), found[tokens][~common].sum()[None].double()])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    keep = wanted > 0
    statistic = ((observed - wanted)[keep] ** 2 / wanted[keep]).sum().item()
    degrees = max(int(keep.sum()) - 1, 1)
    assert statistic < degrees + 4 * math.sqrt(2 * degrees)  # four standard deviations of chi-square


def test_a_draw_at_the_edge_of_an_interval_takes_a_possible_token() -> None:
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    edges = {0.0: 1, 0.2499: 1, 0.25: 3, math.nextafter(1.0, 0.0): 3, 1.0: 3}
    assert {uniform: _draw(probabilities, uniform) for uniform in edges} == edges


def test_first_draws_of_many_requests_follow_the_distribution_too() -> None:
    """Seeds derived from consecutive request ids give independent numbers."""
    sampler = Sampler(VOCAB, seed=0)
    numbers = torch.tensor([sampler._uniform(make(i)) for i in range(4_000)])
    counts = numbers.histc(bins=20, min=0.0, max=1.0)
    assert ((counts - 200) ** 2 / 200).sum() < 19 + 4 * math.sqrt(38)


def generate(orders: list[list[int]], seeds: dict[int, int | None]) -> dict[int, list[int]]:
    """Tokens of each request when step i samples the requests `orders[i]`; logits depend on the request and its progress."""
    sampler = Sampler(VOCAB, seed=5)
    requests = {i: make(i, temperature=1.0, top_p=0.95, frequency_penalty=0.1, seed=seed) for i, seed in seeds.items()}
    for order in orders:
        batch = [requests[i] for i in order]
        logits = torch.cat([random_logits(1, seed=100 * r.request_id + len(r.output_token_ids)) for r in batch])
        for request, token in zip(batch, sampler(logits, batch), strict=True):
            assert isinstance(token, int)
            request.append(token)
    return {i: request.output_token_ids for i, request in requests.items()}


def test_draws_do_not_depend_on_the_batch() -> None:
    seeds = {1: 42, 2: None, 3: 43}
    together = generate([[1, 2, 3]] * 6, seeds)
    assert generate([[3, 1, 2], [2, 3, 1]] * 3, seeds) == together
    assert generate([[1]] * 6 + [[3]] * 6 + [[2]] * 6, seeds) == together
    assert generate([[1, 2], [3]] * 6, seeds) == together


def test_the_seed_decides() -> None:
    logits = random_logits(1, scale=1.0)
    first, same, other, derived, next_derived = (
        drawn(Sampler(VOCAB, seed=9), logits, make(request_id, temperature=1.0, seed=seed), 30)
        for request_id, seed in [(1, 4), (2, 4), (1, 5), (1, None), (2, None)]
    )
    assert first == same
    assert len({tuple(tokens) for tokens in (first, other, derived, next_derived)}) == 4
    again = drawn(Sampler(VOCAB, seed=9), logits, make(1, temperature=1.0), 30)
    elsewhere = drawn(Sampler(VOCAB, seed=10), logits, make(1, temperature=1.0), 30)
    assert again == derived != elsewhere


def test_forget_drops_everything() -> None:
    sampler, request = Sampler(VOCAB), make(temperature=1.0, repetition_penalty=1.1, seed=3)
    logits = random_logits(1)
    first = sampler(logits, [request])
    assert sampler._generators and sampler._histories
    sampler.forget(request)
    sampler.forget(request)
    assert not sampler._generators and not sampler._histories
    assert sampler(logits, [request]) == first


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}])
def test_a_row_that_is_not_finite_fails_alone(bad: float, options: dict[str, Any]) -> None:
    logits = random_logits(3)
    clean = Sampler(VOCAB)(logits, [make(i, **options) for i in range(3)])
    logits[1] = bad if bad < 0 else logits[1].index_fill(0, torch.tensor([4]), bad)
    found = Sampler(VOCAB)(logits, [make(i, **options) for i in range(3)])
    assert isinstance(found[1], ExecutionError) and "Request 1" in str(found[1])
    assert [found[0], found[2]] == [clean[0], clean[2]]


def test_masked_tokens_are_no_failure_and_never_drawn() -> None:
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, [3, 90]] = 0.0
    assert set(drawn(Sampler(VOCAB), logits, make(temperature=1.0), 60)) == {3, 90}
    assert Sampler(VOCAB)(logits, [make()]) == [3]


def test_min_tokens_ban_what_would_stop() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS], logits[0, 8], logits[0, 9] = 9.0, 8.0, 7.0
    assert Sampler(VOCAB)(logits, [make(min_tokens=2)]) == [8]
    assert Sampler(VOCAB)(logits, [make(min_tokens=2, stop_token_ids=[8, 5000])]) == [9]
    assert Sampler(VOCAB)(logits, [make(min_tokens=2, ignore_eos=True)]) == [EOS]
    assert Sampler(VOCAB)(logits, [make(min_tokens=2, output=(1, 2))]) == [EOS]
    assert EOS not in drawn(Sampler(VOCAB), logits, make(min_tokens=2, temperature=2.0), 50)


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    logits = random_logits(1)
    assert set(drawn(Sampler(VOCAB), logits, make(temperature=1e-30), 5)) == {int(logits.argmax())}


def test_logits_are_left_as_they_were() -> None:
    logits = random_logits(2)
    before = logits.clone()
    Sampler(VOCAB)(
        logits, [make(1, temperature=1.0, repetition_penalty=1.5, min_tokens=3), make(2, output=(1,), presence_penalty=1)]
    )
    assert torch.equal(logits, before)
