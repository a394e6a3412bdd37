"""Recurrent layers of stock models become one op each, found by the functions and buffers that families share."""

from __future__ import annotations

import threading
from collections import Counter
from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.models.rwkv import modeling_rwkv

from autodeploy import UnsupportedModelError
from autodeploy.capture import recurrent
from autodeploy.capture.recurrent import route_recurrent
from autodeploy.capture.recurrent_layers import weights_still_to_scale
from autodeploy.custom_ops.recurrent import RECURRENT_OPS
from autodeploy.executor.model_runner import _executable
from autodeploy.program import Program
from autodeploy.transforms.cleanup import Cleanup
from autodeploy.transforms.match_conv import MatchConv
from tests.models.families import make_model
from tests.transforms.helpers import apply, family_program

CONV, DELTA = "causal_conv1d", "gated_delta_rule"
LAYERS: dict[str, dict[str, int]] = {
    "bailing_hybrid": {CONV: 2, DELTA: 2},
    "bamba": {CONV: 1, "ssd": 1},
    "falcon_h1": {CONV: 2, "ssd": 2},
    "falcon_mamba": {CONV: 2, "selective_scan": 2},
    "granitemoehybrid": {CONV: 2, "ssd": 2},
    "jamba": {CONV: 2, "selective_scan": 2},
    "kimi_linear": {CONV: 2, DELTA: 2},
    "lfm2": {CONV: 2},
    "lfm2_moe": {CONV: 2},
    "lfm3": {CONV: 2},
    "mamba": {CONV: 2, "selective_scan": 2},
    "mamba2": {CONV: 2, "ssd": 2},
    "minimax": {"ssd": 1},
    "nemotron_h": {CONV: 1, "ssd": 1},
    "olmo_hybrid": {CONV: 2, DELTA: 2},
    "qwen3_5_moe_text": {CONV: 2, DELTA: 2},
    "qwen3_5_text": {CONV: 2, DELTA: 2},
    "qwen3_next": {CONV: 2, DELTA: 2},
    "recurrent_gemma": {CONV: 2, "linear_scan": 2},
    "rwkv": {"token_shift": 8, "wkv": 4},
    "zamba": {CONV: 6, "selective_scan": 12},  # one scan per head of a layer
    "zamba2": {CONV: 4, "ssd": 4},
}
QUICK = {"mamba", "minimax"}


def run(program: Program, model: Any, *inputs: torch.Tensor) -> torch.Tensor:
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    return _executable(program, {name: tensors[name] for name in program.weights}, "cpu")(*inputs)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYERS])
def test_every_layer_is_one_op_right_at_any_length(name: str) -> None:
    program, model = family_program(name)
    apply(program, Cleanup(), MatchConv())
    names = {op.whole.overload: op.whole.name for op in RECURRENT_OPS.values()}
    found = Counter(names[node.target] for node in program.graph.graph.nodes if node.target in names)
    assert found == LAYERS[name]
    for length in (1, 3, 70):
        ids = torch.arange(3, 3 + length)[None]
        with torch.no_grad():
            ours = run(program, model, ids, torch.arange(length)[None])
            eager = deepcopy(model)(ids, use_cache=False).logits  # it may change its weights in place
        assert float((ours - eager).abs().max() / eager.abs().max()) <= 1e-5


def test_seams_are_ours_in_this_thread_and_while_tracing_only() -> None:
    model, original = make_model("rwkv"), modeling_rwkv.rwkv_linear_attention
    args = torch.zeros(8), torch.zeros(8), torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    elsewhere: list[Any] = []
    with route_recurrent(model, None):
        assert modeling_rwkv.rwkv_linear_attention is not original
        with pytest.raises(UnsupportedModelError, match=r"modeling_rwkv, line \d+: rwkv_linear_attention is called with .*state"):
            modeling_rwkv.rwkv_linear_attention(*args, return_state=True)
        thread = threading.Thread(target=lambda: elsewhere.append(modeling_rwkv.rwkv_linear_attention(*args, return_state=True)))
        thread.start()
        thread.join()
    assert len(elsewhere[0][1]) == 3
    assert modeling_rwkv.rwkv_linear_attention is original


def test_a_function_of_that_name_with_other_parameters_is_refused() -> None:
    def mamba2_chunk_scan(hidden_states, dt, A, B, C, window_size):
        return hidden_states

    call = recurrent._routed(mamba2_chunk_scan, recurrent.SEAMS["mamba2_chunk_scan"])
    with pytest.raises(UnsupportedModelError, match=r"mamba2_chunk_scan is called with .'window_size'."):
        call(*[torch.zeros(1, 1, 1, 1)] * 5, 3)


def test_states_and_packing_that_an_op_does_not_model_are_refused() -> None:
    x, dt, a, b = torch.randn(1, 4, 2, 3), torch.rand(1, 4, 2), -torch.rand(2), torch.randn(1, 4, 1, 5)
    scan = recurrent._routed(modeling_mamba2.mamba2_chunk_scan, recurrent.SEAMS["mamba2_chunk_scan"])
    for name, value in {"initial_states": x, "z": x, "seq_idx": dt, "return_final_states": True}.items():
        with pytest.raises(UnsupportedModelError, match=rf"called with .'{name}'."):
            scan(x, dt, a, b, b, chunk_size=8, **{name: value})
    limited = scan(x, dt, a, b, b, chunk_size=8, dt_limit=(0.3, 0.6), dt_bias=a, D=a, dt_softplus=True)
    stock = modeling_mamba2.mamba2_chunk_scan(x, dt, a, b, b, 8, dt_limit=(0.3, 0.6), dt_bias=a, D=a, dt_softplus=True)
    torch.testing.assert_close(limited, stock)
    name = "torch_chunk_gated_delta_rule"
    delta = recurrent._routed(getattr(modeling_qwen3_next, name), recurrent.SEAMS[name])
    with pytest.raises(UnsupportedModelError, match=r"called with .'cu_seqlens'."):
        delta(x, x, x, g=-dt, beta=dt, cu_seqlens=dt)
    for l2norm in (True, False):
        stock = modeling_qwen3_next.torch_chunk_gated_delta_rule(x, x, x, g=-dt, beta=dt, use_qk_l2norm_in_kernel=l2norm)
        torch.testing.assert_close(delta(x, x, x, g=-dt, beta=dt, use_qk_l2norm_in_kernel=l2norm)[0], stock[0])


def test_weights_that_eager_will_divide_are_copied_once() -> None:
    model = make_model("rwkv")
    copied = weights_still_to_scale(model)
    assert len(copied) == 2 * model.config.num_hidden_layers
    before = {name: weight.clone() for name, weight in copied.items()}
    with torch.no_grad():
        model(torch.tensor([[3]]))
    changed = {name for name in copied if not torch.equal(before[name], model.get_parameter(name))}
    assert len(changed) == 4 and all(torch.equal(copied[name], before[name]) for name in copied)
    assert weights_still_to_scale(model) == {}
