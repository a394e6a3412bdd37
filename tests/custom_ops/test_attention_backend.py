"""An attention backend of a plugin: its layout, its ops, its work before each step; refused layers stay with the paged one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import autodeploy
from autodeploy import ConfigError, SamplingParams, ops
from autodeploy.custom_ops.attention import Visible, attend
from autodeploy.custom_ops.attention_backend import ATTENTION_BACKENDS
from autodeploy.program import Choice
from autodeploy.specs import AttentionLayer, BatchMetadata, PagedKV, Target
from tests.models.families import make_model
from tests.models.parity import check_parity


@ops.semantic_op(mutates=["cache"], fake=lambda k, v, cache, slot_mapping: None)
def wide_append(k: Tensor, v: Tensor | None, cache: Tensor, slot_mapping: Tensor) -> None:
    """Keys and values side by side, in float64."""
    assert v is not None
    cache.flatten(0, 1)[slot_mapping] = torch.cat([k, v], dim=-1)[0].transpose(0, 1).double()


def _shape(q: Tensor, *args: Any) -> Tensor:
    return q.new_empty(1, q.shape[2], q.shape[1], args[8])


@ops.semantic_op(fake=_shape)
def wide_attention(
    q: Tensor,
    cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    head_dim_v: int,
) -> Tensor:
    """Each request by itself, all of it in float64."""
    outputs = []
    for table, start, stop, length in zip(page_table, cu_seqlens_q, cu_seqlens_q[1:], seq_lens, strict=False):
        kv = cache[table].flatten(0, 1)[: int(length)].transpose(0, 1)
        queries = q[0, :, int(start) : int(stop)].double()
        offset = int(length - (stop - start))
        outputs.append(attend(queries, kv[..., : q.shape[3]], kv[..., q.shape[3] :], offset, None, scale, Visible()))
    return torch.cat(outputs)[None].to(q.dtype)


class WideBackend(ops.AttentionBackend):
    name = "wide"

    def __init__(self) -> None:
        self.planned: list[int] = []

    def unsupported(self, layer: AttentionLayer, target: Target) -> list[str]:
        wrong = {"softcap": layer.softcap, "window": layer.window}
        return [f"it has no {what}" for what, given in wrong.items() if given]

    def cache_spec(self, layer: AttentionLayer) -> PagedKV:
        return replace(super().cache_spec(layer), dtype="float64")

    def lower(self, layer: AttentionLayer) -> ops.LoweredAttention:
        return ops.LoweredAttention(wide_append, wide_attention)

    def plan(self, batch: BatchMetadata) -> None:
        self.planned.append(len(batch["seq_lens"]))


@pytest.fixture
def backend() -> Iterator[WideBackend]:
    before = list(ATTENTION_BACKENDS)
    ops.register_attention_backend(backend := WideBackend())
    yield backend
    ATTENTION_BACKENDS[:] = before


def test_a_registered_backend_serves_the_layers_it_supports(backend: WideBackend) -> None:
    verdict = check_parity(make_model("llama"))
    assert verdict.judged > 200 and max(backend.planned) > 1


def test_its_caches_its_plan_and_its_choice_are_on_the_program(backend: WideBackend) -> None:
    compiled = autodeploy.compile(make_model("llama"), verify="numeric")
    compiled.generate([[5, 6, 7], [8]], SamplingParams(max_tokens=4, ignore_eos=True))
    executor, program = compiled.executor, compiled.program
    compiled.shutdown()
    assert len(backend.planned) == executor.num_steps and set(backend.planned) == {2}
    assert {spec.dtype for spec in program.caches.values()} == {"float64"}
    assert program.providers["attention"] == (Choice("wide"),)
    assert program.op_counts()["test_attention_backend.wide_attention"] == 2


def test_layers_it_refuses_stay_with_the_paged_backend_and_the_report_says_why(backend: WideBackend) -> None:
    compiled = autodeploy.compile(make_model("gemma2"))
    against = {"wide": ("it has no softcap",)}, {"wide": ("it has no softcap", "it has no window")}
    choices = compiled.program.providers["attention"]
    assert sorted(choices, key=str) == sorted((Choice("paged", reasons) for reasons in against), key=str)
    assert "it has no softcap, it has no window" in compiled.report()
    compiled.shutdown()


def test_it_is_not_passed_over_where_another_one_is_asked_for(backend: WideBackend) -> None:
    with pytest.raises(ConfigError, match="attention_backend='torch', but a plugin's 'wide' serves attention"):
        autodeploy.compile(make_model("llama"), attention_backend="torch")


def test_registering_a_name_again_replaces_it(backend: WideBackend) -> None:
    ops.register_attention_backend(again := WideBackend())
    assert [known for known in ATTENTION_BACKENDS if known.name == "wide"] == [again]
