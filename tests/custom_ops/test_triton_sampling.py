"""The largest logit of each row by Triton, in its interpreter: that of torch, and the first of equals."""

from __future__ import annotations

import pytest
import torch

from autodeploy.custom_ops import triton_sampling
from autodeploy.executor.sampler import Sampler
from tests.custom_ops.test_cpp_pointwise import rows_of_logits
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
