"""How experts gate is found by probing; what is not known is refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface
from transformers.models.beam.modeling_beam import BeamExperts
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.doge.configuration_doge import DogeConfig
from transformers.models.doge.modeling_doge import DogeForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import OpenAIPrivacyFilterExperts
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

import autodeploy
from autodeploy import Program, Target, Transform, UnsupportedModelError, ops
from autodeploy.capture.experts import Gate, gate_of
from autodeploy.capture.export import capture
from autodeploy.capture.skeleton import skeleton_of
from autodeploy.custom_ops.moe import gate_experts
from autodeploy.transforms.prove_packing import ProvePacking
from autodeploy.transforms.rewrite import calls
from tests.models.families import COMMON, make_model
from tests.models.parity import check_logits
from tests.transforms.helpers import apply, family_program, toy_program

SIZES = {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "hidden_size": 8,
    "intermediate_size": 6,
    "moe_intermediate_size": 6,
    "moe_hidden_size": 8,
    "moe_latent_size": None,
    "post_norm_eps": 1e-5,
    "mlp_bias": False,
    "swiglu_limit": 7.0,
    "swiglu_alpha": 1.702,
}


def experts(kind: Any, activation: str = "silu", **changes: Any) -> Any:
    sizes = {**SIZES, "hidden_act": activation, "mlp_hidden_act": activation, **changes}
    return kind(SimpleNamespace(**sizes))


FOUND = {
    "mixtral": (experts(MixtralExperts), Gate("halves", "silu")),
    "relu": (experts(MixtralExperts, "relu"), Gate("halves", "relu")),
    "gelu": (experts(MixtralExperts, "gelu"), Gate("halves", "gelu")),
    "gelu tanh": (experts(MixtralExperts, "gelu_pytorch_tanh"), Gate("halves", "gelu_tanh")),
    "quick gelu": (experts(MixtralExperts, "quick_gelu"), Gate("halves", "swish", 1.702)),
    "in float32": (experts(BeamExperts), Gate("halves", "silu")),
    "limited": (experts(DeepseekV4Experts, swiglu_limit=3.5), Gate("halves", "silu", 1.0, 3.5)),
    "pairs": (experts(GptOssExperts), Gate("pairs", "swish", 1.702, 7.0, 1.0)),
    "halves of the same": (experts(OpenAIPrivacyFilterExperts), Gate("halves", "swish", 1.702, 7.0, 1.0)),
    "no gate": (experts(NemotronHExperts, "relu2"), Gate("plain", "relu2")),
}


@pytest.mark.parametrize("name", FOUND)
def test_the_gate_is_found_by_probing(name: str) -> None:
    module, expected = FOUND[name]
    assert gate_of(module) == expected


REFUSED = {
    "clamped behind its activation": (lambda: _step(), "_apply_gate of its experts is no gate that is known here"),
    "unknown activation": (lambda: experts(MixtralExperts, "mish"), "_apply_gate of its experts is no gate"),
    "norm of its own": (lambda: experts(MuseSparkExperts), "its experts have a norm of their own"),
}


def _step() -> Any:
    module: Any = Step3p7Experts(SimpleNamespace(**SIZES, hidden_act="silu"), swiglu_limit=2.0)
    module.has_gate, module.config = True, SimpleNamespace()
    return module


@pytest.mark.parametrize("name", REFUSED)
def test_a_gate_that_is_not_known_is_refused_with_class_and_line(name: str) -> None:
    make, reason = REFUSED[name]
    module = make()
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        gate_of(module, "model.layers.0.mlp.experts")
    assert type(module).__name__ in caught.value.source and ", line " in caught.value.source
    assert caught.value.module_path == "model.layers.0.mlp.experts"


@pytest.mark.parametrize(("name", "layers"), [("qwen3_moe", 2), ("dbrx", 2)])
def test_each_expert_layer_is_one_op(name: str, layers: int) -> None:
    program, _ = family_program(name)
    assert len(calls(program, ops.moe)) == layers


def test_experts_that_mix_the_tokens_of_a_row_are_refused() -> None:
    model = DogeForCausalLM(DogeConfig(**COMMON, is_moe=True, num_experts=16, num_experts_per_tok=2))
    with pytest.raises(UnsupportedModelError, match=r"modeling_doge"):
        autodeploy.compile(model)


def test_experts_that_read_columns_of_tokens_are_refused() -> None:
    def across(toy: Any, x: Tensor, positions: Tensor) -> Tensor:
        rows, weight = x[0].T, toy.extra["experts"].weight[None]
        index = torch.zeros(rows.shape[0], 1, dtype=torch.int64)
        mixed = ops.moe(rows, index, index.float(), weight, weight, None, None, False, "plain", "relu", 1.0, 0.0, 0.0)
        return mixed.T[None]

    program, _ = toy_program(across, experts=nn.Linear(16, 16))
    with pytest.raises(UnsupportedModelError, match="its experts do not get one row per token"):
        apply(program, ProvePacking())


class ChangeExperts(Transform):
    """Set one argument of every expert op."""

    name = "change_experts"

    def apply(self, program: Program, target: Target) -> int:
        for node in calls(program, ops.moe):
            node.args = (*node.args[:-2], 0.0, node.args[-1])
        return 1


def test_a_lost_limit_would_be_noticed() -> None:
    model = make_model("gpt_oss")
    bug = ChangeExperts()
    compiled = autodeploy.compile(model, pipeline=lambda default: default.insert_before("insert_paged_attention", bug))
    with pytest.raises(AssertionError, match="relative error"):
        check_logits(model, compiled)
    compiled.shutdown()


@pytest.mark.parametrize("name", ["mixtral", "dbrx"])
def test_the_user_s_model_is_not_touched(name: str) -> None:
    model = make_model(name)
    before, implementation = [module.forward for module in model.modules()], model.config._experts_implementation
    capture(skeleton_of(model), dict(model.named_buffers()))
    assert [module.forward for module in model.modules()] == before
    assert model.config._experts_implementation == implementation
    assert "autodeploy" not in ExpertsInterface._global_mapping


def test_layers_that_gate_alike_are_compared_with_one_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr("autodeploy.capture.experts.gate_experts", lambda *args: tried.append(args) or gate_experts(*args))
    counts = []
    for num_layers in (1, 3):
        model, before = (
            make_model("gpt_oss", num_hidden_layers=num_layers, layer_types=["full_attention"] * num_layers),
            len(tried),
        )
        capture(skeleton_of(model), dict(model.named_buffers()))
        counts.append(len(tried) - before)
    assert counts[1] - counts[0] == 2 < counts[0]
