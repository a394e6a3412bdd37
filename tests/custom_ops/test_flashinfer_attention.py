"""FlashInfer's backend without a GPU: what is planned is what the op means, and its calls fit FlashInfer's own signatures."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from autodeploy.custom_ops import attention_backend
from autodeploy.custom_ops.attention import Visible, attend, paged_attention
from autodeploy.specs import AttentionLayer, Target
from tests.custom_ops.triton_ops import CUDA

PAGE, D = 4, 64
LAYER = AttentionLayer(4, 2, 128, 128, "bfloat16", 0.1)


class Wrapper:
    """Takes what FlashInfer's wrappers take, keeps it, and computes by the pages that it was given."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.made, self.plans = (args, settings), []

    def plan(self, *args: Any, **settings: Any) -> None:
        self.plans.append((args, settings))

    def run(self, q: Any, parts: Any, *extra: Any) -> Any:
        (starts, firsts, pages, last, *_), settings = self.plans[-1]
        assert parts[0].stride() == parts[1].stride()  # its kernels read one for both
        out, visible = torch.empty_like(q), Visible(settings["window_left"] + 1)
        for i in range(len(last)):
            rows = slice(int(starts[i]), int(starts[i + 1]))
            mine = pages[int(firsts[i]) : int(firsts[i + 1])]
            length = (len(mine) - 1) * PAGE + int(last[i])
            k, v = (part[mine.long()].flatten(0, 1)[:length].transpose(0, 1) for part in parts)
            offset = length - (rows.stop - rows.start)
            sinks, softcap = (extra[0] if extra else None), settings["logits_soft_cap"] or 0.0
            out[rows] = attend(q[rows].transpose(0, 1), k, v, offset, sinks, settings["sm_scale"], visible, softcap)
        return out


class SinkWrapper(Wrapper):
    """The one that is given sinks."""


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The backend over stand-ins of FlashInfer's wrappers."""
    before = list(attention_backend.ATTENTION_BACKENDS)
    found = import_module("autodeploy.custom_ops.flashinfer_attention")
    stand_in = SimpleNamespace(
        BatchPrefillWithPagedKVCacheWrapper=Wrapper, BatchAttentionWithAttentionSinkWrapper=SinkWrapper, __spec__=object()
    )
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    monkeypatch.setattr(found, "BACKEND", found.FlashInferBackend())
    monkeypatch.setattr(found, "WORKSPACE_BYTES", 16)
    yield found
    attention_backend.ATTENTION_BACKENDS[:] = before


def step(new: list[int], lengths: list[int]) -> dict[str, np.ndarray]:
    """Requests whose pages lie in disorder."""
    table = np.random.default_rng(0).permutation(np.arange(1, 1 + 8 * len(new))).reshape(len(new), 8)
    bounds = np.cumsum([0, *new]).astype(np.int32)
    return {"cu_seqlens_q": bounds, "seq_lens": np.array(lengths, np.int32), "page_table": table}


def run(module: Any, batch: dict[str, np.ndarray], window: int = 0, softcap: float = 0.0, sinks: bool = False) -> None:
    """A layer of the step, beside the op's reference."""
    generator = torch.Generator().manual_seed(1)
    tokens = int(batch["cu_seqlens_q"][-1])
    q = torch.randn(1, 4, tokens, D, generator=generator)
    cache = torch.randn(40, PAGE, 2, 2 * D, generator=generator)
    if window:  # what lies behind it is not this request's any more
        batch = {**batch, f"page_table_window_{window}": batch["page_table"]}
    tensors = [torch.from_numpy(batch[name]) for name in ("page_table", "cu_seqlens_q", "seq_lens")]
    args = (q, cache, *tensors, torch.randn(4, generator=generator) if sinks else None, 0.1, window, softcap, D)
    ours, right = module.planned_attention(*args), paged_attention.reference(*args)
    assert ours.shape == right.shape and (ours - right).norm() < 1e-5 * right.norm()


@pytest.mark.parametrize("settings", [{}, {"window": 6}, {"softcap": 5.0}, {"sinks": True}, {"window": 6, "sinks": True}])
@pytest.mark.parametrize("shape", [([1, 1, 1], [9, 17, 1]), ([5, 1, 12], [5, 30, 13])], ids=["decode", "mixed"])
def test_what_is_planned_is_what_the_op_means(module: Any, shape: Any, settings: dict[str, Any]) -> None:
    batch = step(*shape)
    module.BACKEND.plan(batch)
    run(module, batch, **settings)
    (wrapper,) = module.BACKEND.wrappers.values()
    assert type(wrapper) is (SinkWrapper if settings.get("sinks") else Wrapper)


def test_one_wrapper_a_batch_size_planned_once_a_step_for_all_layers_of_a_kind(module: Any) -> None:
    first, second, prefill = step([1, 1], [9, 3]), step([1, 1], [10, 4]), step([3, 1], [3, 8])
    for batch in (first, second, prefill):
        module.BACKEND.plan(batch)
        run(module, batch)
        run(module, batch)
    sizes = {size: wrapper for (_, size), wrapper in module.BACKEND.wrappers.items()}
    assert {size: len(wrapper.plans) for size, wrapper in sizes.items()} == {2: 2, 0: 1}
    assert sizes[2].made[1]["use_cuda_graph"] and len(sizes[2].made[1]["paged_kv_indices_buf"]) == 42
    assert "use_cuda_graph" not in sizes[0].made[1]
    module.BACKEND.plan(first)  # a replay calls no layer: what its graph reads is planned all the same
    assert len(sizes[2].plans) == 3 and len(sizes[0].plans) == 1


def test_what_it_does_not_serve(module: Any) -> None:
    backend = module.BACKEND
    assert backend.unsupported(LAYER, CUDA) == []
    assert backend.unsupported(LAYER, Target()) == ["it runs on GPUs, not on cpu"]
    cases = {
        "it has no float32": {"dtype": "float32"},
        "keys and values are of different widths": {"head_dim_v": 64},
        "it has no heads of 96": {"head_dim_k": 96, "head_dim_v": 96},
        "it has no chunks": {"chunk": 8},
        "it has no alibi": {"has_alibi": True},
        "it has no latent cache": {"is_latent": True},
        "it has no softcap beside sinks": {"has_sinks": True, "softcap": 1.0},
    }
    for reason, change in cases.items():
        assert backend.unsupported(replace(LAYER, **change), CUDA) == [reason]


def test_calls_fit_the_signatures_of_flashinfer(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for sinks in (False, True):
        batch = step([1, 1], [9, 3])
        module.BACKEND.plan(batch)
        run(module, batch, sinks=sinks)
    made = list(module.BACKEND.wrappers.values())
    monkeypatch.delitem(sys.modules, "flashinfer")
    flashinfer = pytest.importorskip("flashinfer")
    for wrapper, name in zip(
        made, ("BatchPrefillWithPagedKVCacheWrapper", "BatchAttentionWithAttentionSinkWrapper"), strict=True
    ):
        real = getattr(flashinfer, name)
        inspect.signature(real.__init__).bind(None, *wrapper.made[0], **wrapper.made[1])
        for args, settings in wrapper.plans:
            bound = inspect.signature(real.plan).bind(None, *args, **settings).arguments
            assert (bound["num_qo_heads"], bound["num_kv_heads"], bound["head_dim_qk"], bound["page_size"]) == (4, 2, D, PAGE)
