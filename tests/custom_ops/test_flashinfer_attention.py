"""FlashInfer without a GPU: what is planned is what the op means, its calls fit FlashInfer's own signatures, who asks gets it."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import autodeploy
from autodeploy import ConfigError, SamplingParams, Target
from autodeploy.config import LLMArgs
from autodeploy.custom_ops import flashinfer_attention as module
from autodeploy.custom_ops.attention import Visible, attend, paged_attention
from autodeploy.plugins import edited_pipeline
from tests.custom_ops.triton_ops import CUDA
from tests.models.families import make_model
from tests.test_gpu_program import compiled_for_gpu

PAGE, D = 4, 64


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
            length = (len(mine) - 1) * parts[0].shape[1] + int(last[i])
            k, v = (part[mine.long()].flatten(0, 1)[:length].transpose(0, 1) for part in parts)
            offset = length - (rows.stop - rows.start)
            sinks, softcap = (extra[0] if extra else None), settings["logits_soft_cap"] or 0.0
            out[rows] = attend(q[rows].transpose(0, 1), k, v, offset, sinks, settings["sm_scale"], visible, softcap)
        return out


class SinkWrapper(Wrapper):
    """The one that is given sinks."""


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins of FlashInfer's wrappers, and nothing planned."""
    stand_in = SimpleNamespace(
        BatchPrefillWithPagedKVCacheWrapper=Wrapper, BatchAttentionWithAttentionSinkWrapper=SinkWrapper, __spec__=object()
    )
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    monkeypatch.setattr(module, "PLANNED", module.PlannedAttention())
    monkeypatch.setattr(module, "WORKSPACE_BYTES", 16)


def step(new: list[int], lengths: list[int]) -> dict[str, np.ndarray]:
    """Requests whose pages lie in disorder."""
    table = np.random.default_rng(0).permutation(np.arange(1, 1 + 8 * len(new))).reshape(len(new), 8)
    bounds = np.cumsum([0, *new]).astype(np.int32)
    return {"cu_seqlens_q": bounds, "seq_lens": np.array(lengths, np.int32), "page_table": table}


def run(batch: dict[str, np.ndarray], window: int = 0, softcap: float = 0.0, sinks: bool = False) -> None:
    """A layer of the step, beside the op's reference."""
    generator = torch.Generator().manual_seed(1)
    tokens = int(batch["cu_seqlens_q"][-1])
    q = torch.randn(1, 4, tokens, D, generator=generator)
    cache = torch.randn(40, PAGE, 2, 2 * D, generator=generator)
    if window:  # what lies behind it is not this request's any more
        batch = {**batch, f"page_table_window_{window}": batch["page_table"]}
    tensors = [torch.from_numpy(batch[name]) for name in ("page_table", "cu_seqlens_q", "seq_lens")]
    args = (q, cache, *tensors, torch.randn(4, generator=generator) if sinks else None, 0.1, window, softcap, D)
    ours, right = module.flashinfer_attention(*args), paged_attention.reference(*args)
    assert ours.shape == right.shape and (ours - right).norm() < 1e-5 * right.norm()


@pytest.mark.parametrize("settings", [{}, {"window": 6}, {"softcap": 5.0}, {"sinks": True}, {"window": 6, "sinks": True}])
@pytest.mark.parametrize("shape", [([1, 1, 1], [9, 17, 1]), ([5, 1, 12], [5, 30, 13])], ids=["decode", "mixed"])
def test_what_is_planned_is_what_the_op_means(installed: None, shape: Any, settings: dict[str, Any]) -> None:
    batch = step(*shape)
    module.plan_step(batch)
    run(batch, **settings)
    (wrapper,) = module.PLANNED.wrappers.values()
    assert type(wrapper) is (SinkWrapper if settings.get("sinks") else Wrapper)


def test_one_wrapper_a_batch_size_planned_once_a_step_for_all_layers_of_a_kind(installed: None) -> None:
    first, second, prefill = step([1, 1], [9, 3]), step([1, 1], [10, 4]), step([3, 1], [3, 8])
    for batch in (first, second, prefill):
        module.plan_step(batch)
        run(batch)
        run(batch)
    sizes = {size: wrapper for (_, size), wrapper in module.PLANNED.wrappers.items()}
    assert {size: len(wrapper.plans) for size, wrapper in sizes.items()} == {2: 2, 0: 1}
    assert sizes[2].made[1]["use_cuda_graph"] and len(sizes[2].made[1]["paged_kv_indices_buf"]) == 42
    assert "use_cuda_graph" not in sizes[0].made[1]
    module.plan_step(first)  # a replay calls no layer: what its graph reads is planned all the same
    assert len(sizes[2].plans) == 3 and len(sizes[0].plans) == 1


def layer(dtype: torch.dtype = torch.bfloat16, head_dim: int = 128, **call: Any) -> dict[str, Any]:
    """The arguments of a call that it serves, but for what is given."""
    sizes = {"q": (1, 4, 3, head_dim), "cache": (40, PAGE, 2, 2 * head_dim)}
    given: dict[str, Any] = {name: torch.empty(size, dtype=dtype, device="meta") for name, size in sizes.items()}
    numbers = {"scale": 0.1, "window": 0, "softcap": 0.0, "head_dim_v": head_dim, "chunk": 0, "alibi": None, "sinks": None}
    tables = {"page_table": torch.zeros(1, 8, dtype=torch.int64)}
    tables |= {name: torch.zeros(2, dtype=torch.int32) for name in ("cu_seqlens_q", "seq_lens")}
    return {**given, **tables, **numbers, **call}


def test_what_it_does_not_serve(installed: None) -> None:
    provider = paged_attention.named("flashinfer")
    assert provider.supports(CUDA, **layer()) == []
    assert provider.supports(Target(), **layer()) == ["it runs on GPUs, not on cpu"]
    cases: dict[str, dict[str, Any]] = {
        "it has no float32": {"dtype": torch.float32},
        "the cache is of another dtype": {"cache": torch.empty(40, PAGE, 2, 264, dtype=torch.int8, device="meta")},
        "keys and values are of different widths": {"head_dim_v": 64},
        "it has no latent cache": {"cache": torch.empty(40, PAGE, 1, 128, dtype=torch.bfloat16, device="meta")},
        "it has no heads of 96": {"head_dim": 96},
        "it has no chunks": {"chunk": 8},
        "it has no alibi": {"alibi": torch.empty(4)},
        "it has no softcap beside sinks": {"sinks": torch.empty(4), "softcap": 1.0},
    }
    for reason, change in cases.items():
        assert provider.supports(CUDA, **layer(**change)) == [reason]


def test_a_model_is_served_by_it_where_it_is_asked_for_and_nowhere_else(installed: None) -> None:
    assert paged_attention.choose(CUDA, **layer())[0].name == "triton"
    model = make_model("llama", head_dim=D, num_hidden_layers=1).bfloat16()
    compiled = compiled_for_gpu(model, edited_pipeline(None, (), CUDA, attention="flashinfer"))
    chosen = {op: {choice.provider for choice in choices} for op, choices in compiled.program.providers.items()}
    assert chosen["paged_attention"] == {"flashinfer"} and chosen["rope_append"] == {"triton"}
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        exact = model.float()(ids).logits
    assert (compiled(ids) - exact).norm() < 0.03 * exact.norm()
    steps = compiled.executor.num_steps
    compiled.generate([[5, 6, 7], [8]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert sum(len(wrapper.plans) for wrapper in module.PLANNED.wrappers.values()) == compiled.executor.num_steps > steps
    compiled.shutdown()


def test_asking_for_what_is_not_there_names_the_reason_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"'flashinfer' cannot .* not installed \(python -m pip install .* use 'triton' or 'torch'"
    ):
        edited_pipeline(None, (), CUDA, attention="flashinfer")
    for name in ("flashinfer", "triton"):
        with pytest.raises(ConfigError, match=rf"'{name}' cannot serve .* GPUs, not on cpu\. Leave .* use ('cpp' or )?'torch'"):
            autodeploy.compile(make_model("llama"), attention_backend=name, device="cpu")
    with pytest.raises(ConfigError, match=r"Did you mean 'flashinfer'\?"):
        LLMArgs(model="x", attention_backend="flashinfr")  # pyright: ignore[reportArgumentType]
    assert LLMArgs(model="x", attn_backend="TRITON").attention_backend == "triton"  # pyright: ignore[reportCallIssue]
    assert LLMArgs(model="x", attention_backend=None).attention_backend == "auto"  # pyright: ignore[reportArgumentType]


def test_a_layer_that_it_does_not_serve_is_an_error(installed: None) -> None:
    pipeline = edited_pipeline(None, (), CUDA, attention="flashinfer")
    with pytest.raises(ConfigError, match=r"'flashinfer' cannot .*: it has no heads of 16\. Leave .* use 'triton' or 'torch'"):
        compiled_for_gpu(make_model("llama", num_hidden_layers=1).bfloat16(), pipeline)


def test_torch_is_the_reference() -> None:
    model = make_model("llama", num_hidden_layers=1)
    compiled = autodeploy.compile(model, attention_backend="torch")
    assert {choice.provider for choice in compiled.program.providers["paged_attention"]} == {"reference"}
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert (compiled(ids) - model(ids).logits).abs().max() < 1e-4
    compiled.shutdown()


def test_calls_fit_the_signatures_of_flashinfer(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for sinks in (False, True):
        batch = step([1, 1], [9, 3])
        module.plan_step(batch)
        run(batch, sinks=sinks)
    made = list(module.PLANNED.wrappers.values())
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
