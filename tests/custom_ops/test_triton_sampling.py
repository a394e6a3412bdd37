"""Choosing tokens by Triton, in its interpreter: the largest logit as torch finds it, and draws as the sampler's own on CPUs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from autodeploy.config import SamplingParams
from autodeploy.custom_ops import triton_sampling
from autodeploy.errors import ExecutionError
from autodeploy.executor.sampler import Sampler, _draw, _settings, distribution
from tests.custom_ops.test_cpp_pointwise import rows_of_logits
from tests.executor.test_sampler import FILTERS, make
from tests.triton_interpreter import install

install()


@pytest.mark.parametrize("programs", [1, 12, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_the_largest_of_each_row_is_that_of_torch(dtype: torch.dtype, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one part, in two and in many."""
    monkeypatch.setattr(triton_sampling, "PROGRAMS", programs)
    monkeypatch.setattr(triton_sampling, "BLOCK", 256)
    logits = rows_of_logits(dtype)
    for width in (3000, 2990, 17):
        highest, where = triton_sampling.largest_of_rows(logits[:, :width])
        expected = logits[:, :width].max(-1)
        assert torch.equal(highest, expected.values.float()) and torch.equal(where, expected.indices)
    logits[2, 2987] = float("nan")
    highest, where = triton_sampling.largest_of_rows(logits)
    assert highest.isnan().tolist() == [False, False, True, False, False, False] and bool((where < 3000).all())
    assert triton_sampling.largest_of_rows(logits[:, 2987:2988])[0].isnan().tolist() == [row == 2 for row in range(6)]


def test_the_sampler_takes_it_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = rows_of_logits(torch.bfloat16)[:4]
    assert not triton_sampling.fits(logits)
    monkeypatch.setattr(triton_sampling, "fits", lambda x: True)
    tokens = Sampler(vocab_size=2999).largest(logits)
    assert tokens is not None and tokens.tolist() == logits[:, :2999].argmax(-1).tolist()


MIXES = [
    *FILTERS,
    {"top_k": 300},
    {"top_k": 40, "min_p": 0.02},
    {"top_p": 0.99, "temperature": 2.0},
    {"top_k": 100, "top_p": 0.9},
]


def draws(logits: Tensor, params: list[SamplingParams], uniform: list[float]) -> list[int]:
    """By one launch, of rows that lie the other way round."""
    rows = range(len(params) - 1, -1, -1)
    settings = torch.tensor([(row, *_settings(params[row]), uniform[row]) for row in rows], dtype=torch.float64)
    tokens = torch.full((len(params),), -1)
    triton_sampling.draw(logits, logits.max(-1).values.float(), settings.T.contiguous(), tokens)
    return tokens.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_draws_are_those_of_the_sampler(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row for each way to filter, each with a number of its own; 16-bit logits have equals, in the nucleus and around k."""
    monkeypatch.setattr(triton_sampling, "DRAW_BLOCK", 512)
    torch.manual_seed(1)
    logits = (3 * torch.randn(len(MIXES), 803)).to(dtype)[:, :801]
    logits[:, 100] = -math.inf
    params, uniform = [SamplingParams(**options) for options in MIXES], torch.rand(len(MIXES), dtype=torch.float64).tolist()
    expected = []
    for row, own, number in zip(logits.float(), params, uniform, strict=True):
        tokens, probabilities = distribution(row, own)
        expected.append(int(tokens[_draw(probabilities, number)]))
    assert draws(logits, params, uniform) == expected


def test_the_bounds_of_a_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equals as many stay as top_p needs, all that tie with the last of top_k, and the last number picks the last token."""
    monkeypatch.setattr(triton_sampling, "DRAW_BLOCK", 16)
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0, -math.inf]).expand(6, 5)
    params = [{"top_k": 2}, {"top_k": 2}, {"top_p": 0.6}, {"top_p": 0.1}, {"temperature": 1.0}, {"top_p": 0.999}]
    last = math.nextafter(1.0, 0.0)
    found = draws(scores.contiguous(), [SamplingParams(**options) for options in params], [0.0, last, last, last, last, last])
    assert found == [1, 3, 2, 1, 3, 0]


def test_rows_that_draw_are_drawn_together_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one launch, with the tokens that every row would get by itself; others are sampled as ever."""
    launches, draw = [], triton_sampling.draw
    torch.manual_seed(2)
    logits = 3 * torch.randn(7, 301)
    logits[4, 3] = math.nan
    options: tuple[dict[str, Any], ...]
    options = ({"top_p": 0.9}, {}, {"temperature": 0.8}, {"top_k": 9, "presence_penalty": 0.5}, {"top_p": 0.5}, {"min_p": 0.1})
    options += ({"temperature": 1.0, "min_tokens": 3},)
    requests = [make(i, seed=i, **own) for i, own in enumerate(options)]
    expected = Sampler(vocab_size=300)(logits, requests)
    monkeypatch.setattr(triton_sampling, "fits", lambda x: len(x) > 1)
    monkeypatch.setattr(triton_sampling, "draw", lambda *given: (launches.append(given[2][0].tolist()), draw(*given)))
    found = Sampler(vocab_size=300)(logits, requests)
    assert isinstance(found.pop(4), ExecutionError) and isinstance(expected.pop(4), ExecutionError)
    assert found == expected and launches == [[0, 2, 4, 5]]
