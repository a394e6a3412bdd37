"""A KV cache of 8 bits: its numbers are those of Hugging Face's own model over a cache that rounds as it stores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import autodeploy
from autodeploy import ConfigError, SamplingParams
from tests.models.families import make_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 60, 61, 62, 3, 5, 6]])


class RoundingCache(DynamicCache):
    """Keeps the nearest multiples of each head's largest number over 127 (int8), or of it over 448 (floats of 8 bits)."""

    def __init__(self, dtype: str) -> None:
        super().__init__()
        self.dtype = dtype

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(self._rounded(key_states), self._rounded(value_states), *args, **kwargs)

    def _rounded(self, x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / (127 if self.dtype == "int8" else 448)
        ratio = x / step
        return step * (ratio.round() if self.dtype == "int8" else ratio.to(torch.float8_e4m3fn).float())


def logits(model: Any, **options: Any) -> Tensor:
    compiled = autodeploy.compile(model, **options)
    found = compiled(IDS)
    compiled.shutdown()
    return found


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("step", [64, 4])
def test_logits_are_those_over_a_cache_that_rounds(family: str, dtype: str, step: int) -> None:
    model = make_model(family)
    with torch.no_grad():
        expected = model(IDS, past_key_values=RoundingCache(dtype)).logits
        exact = model(IDS).logits
    found = logits(model, kv_cache_config={"dtype": dtype, "page_size": 4}, max_num_tokens=step, max_batch_size=1)
    assert (found - expected).abs().max() < 1e-4 < (found - exact).abs().max()


def test_latent_caches_and_models_with_states_as_well() -> None:
    for family in ("deepseek_v3", "qwen3_next"):
        model = make_model(family)
        compiled = autodeploy.compile(model, kv_cache_config={"dtype": "int8"}, verify="numeric")
        kinds = {type(spec).__name__: spec.dtype for spec in compiled.program.caches.values()}
        assert kinds == ({"LatentKV": "int8"} if family == "deepseek_v3" else {"PagedKV": "int8", "RecurrentState": "float32"})
        with torch.no_grad():
            exact = model(IDS).logits
        assert 1e-6 < (compiled(IDS) - exact).norm() / exact.norm() < 0.02
        compiled.shutdown()


def test_a_pool_of_the_same_bytes_holds_nearly_twice_the_tokens_and_requests_stay_apart() -> None:
    model, params = make_model("qwen3", head_dim=128).bfloat16(), SamplingParams(max_tokens=12, ignore_eos=True)
    tokens = {}
    for dtype in ("auto", "int8"):
        compiled = autodeploy.compile(model, kv_cache_config={"dtype": dtype, "page_size": 4, "max_bytes": 1 << 19})
        tokens[dtype] = compiled.num_pool_tokens
        alone = compiled.generate([[5, 6, 7]], params)[0].outputs[0].token_ids
        together = compiled.generate([[9] * 30, [5, 6, 7], [1]], params)[1].outputs[0].token_ids
        compiled.shutdown()
        assert alone == together
    assert 1.8 < tokens["int8"] / tokens["auto"] < 2


def test_what_is_refused() -> None:
    for options, message in (
        ({"kv_cache_config": {"dtype": "int9"}}, "none of auto, int8, fp8. Did you mean 'int8'"),
        ({"kv_cache_config": {"dtype": "int8"}}, "a multiple of 4 numbers, and kv_cache_0 has 18. Leave 'dtype' out"),
        ({"kv_cache_config": {"dtype": "int8"}, "backend": "pytorch"}, "use backend='autodeploy'"),
        ({"kv_cache_config": {"dtype": "int8"}, "pipeline": autodeploy.default_pipeline()}, "put a QuantizeCache pass into"),
    ):
        with pytest.raises(ConfigError, match=message):
            autodeploy.compile(make_model("gpt2", n_embd=36, n_head=4), **options)
