"""Calls that choose tokens, as cases beside those of the graph's ops: torch's and the sampler's own way, or Triton's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from autodeploy.config import SamplingParams
from autodeploy.custom_ops import triton_sampling
from autodeploy.custom_ops.gpu import against_triton
from autodeploy.custom_ops.op import Provider, SemanticOp
from autodeploy.executor.sampler import _draw, _settings, distribution
from tools.gpu_cases import Args, Case, Draw

FILTERS = ({"temperature": 0.7}, {"top_k": 40}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.8, "min_p": 0.02}, {"min_p": 0.05})


def largest_of_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    highest, first = x.max(-1)
    return highest, first


def draw(x: Tensor, highest: Tensor, settings: Tensor, tokens: Tensor) -> None:
    """As the kernel's provider says, row by row."""
    for row, temperature, top_k, top_p, min_p, uniform in settings.T.tolist():
        params = SamplingParams(temperature=temperature, top_k=int(top_k), top_p=top_p, min_p=min_p)
        found, probabilities = distribution(x[int(row)].to(torch.promote_types(x.dtype, torch.float32)), params)
        tokens[int(row)] = found[_draw(probabilities, uniform)]


def _op(reference: Callable[..., Any], provided: Callable[..., Any], mutates: tuple[str, ...] = ()) -> SemanticOp:
    op = SemanticOp(reference.__name__, reference, reference, mutates, [])
    op.register(Provider("reference", reference))
    op.register(Provider("triton", provided, lambda target, x, **_: against_triton(target, x)))
    return op


LARGEST = _op(largest_of_rows, triton_sampling.largest_of_rows)
DRAW = _op(draw, triton_sampling.draw, ("tokens",))


def _logits(given: Draw, rows: int) -> Tensor:
    return given.normal(rows, 8 * given.sizes.inner, scale=3.0)


def _draws(options: dict[str, Any]) -> Callable[[Draw], Args]:
    def make(given: Draw) -> Args:
        count = given.sizes.decode
        x, uniform = _logits(given, count), torch.rand(count, dtype=torch.float64).tolist()
        rows = [(row, *_settings(SamplingParams(**options)), u) for row, u in enumerate(uniform)]
        tokens = torch.zeros(count, dtype=torch.int64, device=given.device)
        settings = torch.tensor(rows, dtype=torch.float64).T.contiguous().to(given.device)
        return x, x.max(-1).values.float(), settings, tokens

    return make


def cases() -> Iterator[Case]:
    for rows in (1, 64):
        yield Case(LARGEST, f"{rows} rows", lambda given, rows=rows: (_logits(given, rows),))
    for options in FILTERS:
        yield Case(DRAW, ", ".join(f"{name} {value}" for name, value in options.items()), _draws(options))
