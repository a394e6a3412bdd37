"""In bfloat16 our logits are as near to float64 as eager's, and a request's are the same alone and among others.

Errors are root mean squares against the same weights in float64, relative to the logits' own.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import autodeploy
from tests.models.families import make_model

FAMILIES = ["llama", "qwen3", "gemma2", "gpt_oss", "mixtral", "deepseek_v3", "bloom", "qwen3_next"]


def error(logits: Tensor, exact: Tensor) -> float:
    return float((logits.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_is_that_of_eager_and_company_changes_nothing_beyond_it(family: str) -> None:
    model = make_model(family).bfloat16()
    ids = torch.randint(0, 90, (32, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        eager = model(ids).logits
        compiled = autodeploy.compile(model)
        together = compiled(ids)
        alone = torch.cat([compiled(row[None]) for row in ids[:4]])
        compiled.shutdown()
        model.set_experts_implementation("eager")  # the other ones know no float64
        exact = model.double()(ids).logits
    theirs = error(eager, exact)
    assert error(together, exact) <= 1.2 * theirs
    assert error(alone, together[:4].double()) <= theirs
