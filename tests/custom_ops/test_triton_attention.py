"""Paged attention, rotary embedding and the writes to the cache by Triton, in its interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autodeploy import custom_ops as ops
from autodeploy.custom_ops import kv_append, paged_attention, rope_append, triton_attention
from autodeploy.custom_ops.attention import scaled_rows, unscaled
from tests.custom_ops.test_cpp_attention import EXTRAS, Extras, Shape, Step, empty_cache
from tests.custom_ops.test_cpp_pointwise import layouts, numbers
from tests.custom_ops.triton_ops import CUDA, check, error, provider_of

SHAPES = {
    "plain": Shape(4, 2, 64, 64, 16),
    "odd": Shape(6, 2, 33, 7, 3),
    "one group of 18": Shape(18, 1, 20, 20, 4),
    "latent": Shape(18, 1, 72, 64, 8, latent=True),
    "keys are values": Shape(4, 1, 16, 16, 8, latent=True),
}
MIXED, DECODING = ((1, 30), (5, 5), (20, 41), (1, 1)), ((1, 30), (1, 1), (1, 71))
EVERY = (("plain", "nothing"), ("plain", "everything"), ("odd", "everything"), ("one group of 18", "window, sinks"))
EVERY += (("latent", "nothing"), ("latent", "everything"), ("keys are values", "nothing"))


@pytest.mark.parametrize(("shape", "extras"), EVERY)
@pytest.mark.parametrize("requests", [MIXED, DECODING], ids=["mixed", "decoding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention(dtype: torch.dtype, requests: Any, shape: str, extras: str) -> None:
    torch.manual_seed(0)
    step = Step(SHAPES[shape], dtype, EXTRAS[extras], requests)
    exact = paged_attention.reference(*step.arguments(torch.float64))
    step.page_table.clamp_(min=0)  # pages that nobody reads are absent for the reference; their number is read here
    arguments = step.arguments()
    ours = provider_of(paged_attention, *arguments).function(*arguments)
    limit = 1e-6 if dtype is torch.float32 else 1.3 * error(paged_attention.reference(*arguments), exact)
    assert error(ours, exact) <= limit


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shape", ["plain", "latent"])
def test_a_cache_of_8_bits(shape: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    step = Step(SHAPES[shape], torch.float32, Extras(), MIXED)
    sizes = (step.shape.head_dim_k, step.shape.head_dim_v)
    parts = [step.cache] if step.shape.latent else list(step.cache.split(sizes, -1))
    step.cache = scaled_rows([part.nan_to_num() for part in parts], dtype)
    arguments = step.arguments()
    arguments = (arguments[0], step.cache, *arguments[2:])
    exact = paged_attention.reference(*arguments)
    assert error(provider_of(paged_attention, *arguments).function(*arguments), exact.double()) < 1e-6


class Watched:
    """A kernel, and the grids that it was launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.grids = kernel, list[Any]()

    def __getitem__(self, grid: Any) -> Any:
        self.grids.append(grid)
        return self.kernel[grid]


def test_the_keys_of_a_long_request_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(triton_attention, "LEAST_SPLIT", 32)
    monkeypatch.setattr(triton_attention, "_attention", watched := Watched(triton_attention._attention))
    for extras in ("nothing", "everything"):
        step = Step(SHAPES["plain"], torch.float32, EXTRAS[extras], ((1, 200), (1, 3), (1, 90)))
        exact = paged_attention.reference(*step.arguments(torch.float64))
        step.page_table.clamp_(min=0)
        assert error(provider_of(paged_attention, *step.arguments()).function(*step.arguments()), exact) < 1e-6
    assert watched.grids == [(3, 2, 7), (3, 2, 7)]  # of 208 places


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rope(dtype: torch.dtype, interleaved: bool) -> None:
    for width in (6, 64):
        for name, x in layouts(width, dtype).items():
            if x.dim() == 4 and name != "many":
                angles = numbers(1, x.shape[2], width, scale=3.0)
                check(ops.rope, x, angles.cos().to(dtype)[:, None], angles.sin().to(dtype), interleaved)


KINDS = {"as it is": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_and_values_are_written_as_the_reference_writes_them(dtype: torch.dtype, latent: bool, kind: str) -> None:
    torch.manual_seed(0)
    k = torch.randn(1, 5, 4, 40).to(dtype).transpose(1, 2)
    v = None if latent else torch.randn(1, 4, 36, 5).to(dtype).transpose(2, 3)
    k[0, 1, 0] = 0
    ours = empty_cache(40 if latent else 76, 4, KINDS[kind] or dtype)
    expected, slots = ours.clone(), torch.randperm(256)[:5]
    provider_of(kv_append, k, v, ours, slots).function(k, v, ours, slots)
    kv_append.reference(k, v, expected, slots)
    assert torch.equal(_bits(ours), _bits(expected))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [(), (1e-6, 0.0, False), (1e-5, 1.0, True)], ids=["plain", "normed", "offset"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_and_appending(interleaved: bool, norm: tuple[Any, ...], kind: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 3, 16, 40).transpose(1, 2).split([8, 4, 4], 1)
    v = v[..., :36]
    cos, sin = (torch.randn(1, 1, 3, 40) for _ in range(2))
    weights = [torch.randn(40), None] if norm else []
    ours = empty_cache(76, 4, KINDS[kind] or torch.float32)
    expected, slots = ours.clone(), torch.randperm(256)[:3]
    arguments = (slots, cos, sin, interleaved, *weights, *norm)
    found = provider_of(rope_append, q, k, v, ours, *arguments).function(q, k, v, ours, *arguments)
    assert error(found, rope_append.reference(q, k, v, expected, *arguments).double()) < 1e-6
    if KINDS[kind] is not None:
        pairs = [torch.cat(unscaled(cache.view(KINDS[kind])[:, :, :, :], 40, 36), -1) for cache in (ours, expected)]
        torch.testing.assert_close(*pairs, rtol=0.13 if kind == "fp8" else 0, atol=float(pairs[1].abs().max()) / 127)
        assert error(pairs[0], pairs[1].double()) < 2e-3
    else:
        assert torch.allclose(ours.nan_to_num(99), expected.nan_to_num(99), rtol=1e-5, atol=1e-5)


def _bits(cache: torch.Tensor) -> torch.Tensor:
    return cache.view(torch.uint8) if cache.element_size() == 1 else cache.nan_to_num(99)


def test_a_weight_for_each_head_is_left_to_the_reference() -> None:
    q, k, v = torch.randn(1, 8, 3, 16).split([4, 2, 2], 1)
    angle, cache = torch.randn(1, 1, 3, 16), torch.zeros(4, 4, 2, 32)
    call = (q, k, v, cache, torch.arange(3), angle, angle, False, torch.ones(4, 1, 16), None, 1e-6)
    provider, against = rope_append.choose(CUDA, *call)
    assert provider.name == "reference" and "not one dense vector" in str(against["triton"])
