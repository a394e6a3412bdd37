"""Quantization at compile time: which matrices become what, proved as other passes are, and what the model then computes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import autodeploy
from autodeploy import ConfigError, Program, QuantConfig, SamplingParams, Target
from autodeploy.custom_ops.cpp_quantized import BytePanels, HalfBytePanels
from autodeploy.formats import SCHEMES, Format
from autodeploy.recipes import Quantize
from autodeploy.report.html import _weights
from autodeploy.report.tables import describe, remark_texts
from autodeploy.report.timeline import Timeline
from autodeploy.transforms.quantize import QuantizeWeights
from tests.executor.test_packing import tensors_of
from tests.marks import needs_byte_kernels
from tests.models.families import make_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


def rounded_model(model: Any, config: QuantConfig) -> Any:
    """A copy of the model whose linears hold what their weights are rounded to, by names and without the pass."""
    dense = type(model)(model.config)
    dense.load_state_dict(model.state_dict())
    head = {"int4": SCHEMES["w8a8"]}.get(config.scheme, SCHEMES[config.scheme])
    for name, parameter in dense.named_parameters():
        is_head = name.startswith("lm_head") or (name.startswith("model.embed") and model.config.tie_word_embeddings)
        if not (is_head or name.endswith("_proj.weight") or ".experts." in name):
            continue
        if is_head and config.scheme in ("fp8", "mxfp4", "nvfp4"):
            continue
        form = head if is_head else SCHEMES[config.scheme]
        parameter.data = form.dequantize(tuple(parameter.shape), *form.quantize(parameter.data))
    return dense


def logits(model: Any, **options: Any) -> Tensor:
    compiled = autodeploy.compile(model, **options)
    found = compiled(IDS)
    compiled.shutdown()
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_logits_are_those_of_a_model_that_holds_the_rounded_weights(family: str, scheme: str) -> None:
    model = make_model(family)
    found = logits(model, quantization=scheme)
    with torch.no_grad():
        before, expected = model(IDS).logits, rounded_model(model, QuantConfig(scheme=scheme))(IDS).logits
    assert (found - expected).abs().max() < 1e-4 < (found - before).abs().max()


def lowered(model: Any, **options: Any) -> Program:
    compiled = autodeploy.compile(model, **options)
    compiled.shutdown()
    return compiled.program


def quantized_names(program: Program) -> set[str]:
    """Leaves below a rounding."""
    text = " ".join(str(program.weights[name]) for name in program.weights)
    return set(re.findall(r"quantize\(([\w.]+)", text))


def test_routers_and_what_is_excluded_stay_as_they_are() -> None:
    everything = quantized_names(lowered(make_model("qwen3_moe"), quantization="int8"))
    assert "model.layers.0.self_attn.q_proj.weight" in everything and any("experts" in name for name in everything)
    assert not [name for name in everything if "gate.weight" in name or "norm" in name]
    without = lowered(
        make_model("qwen3_moe"), quantization={"scheme": "int8", "exclude": ["*.o_proj", "*experts*"], "lm_head": False}
    )
    left = {name for name in everything if "o_proj" not in name and "experts" not in name and "lm_head" not in name}
    assert quantized_names(without) == left and len(left) < len(everything)


def test_the_pass_is_proved_and_shown() -> None:
    program = lowered(make_model("qwen3"), quantization="int4", verify="numeric")
    (record,) = [record for record in program.history if record.name == "quantize"]
    heads = [recipe for recipe in program.weights.recipes.values() if isinstance(recipe, Quantize) and recipe.format.bits == 8]
    assert record.rewrites == 1 + 7 * 2 and len(heads) == 1
    assert "quantize(model.layers.0.mlp.up_proj.weight, int4)" in str(program)


def test_applied_once_more_it_finds_nothing_and_a_saved_program_is_the_same(tmp_path: Path) -> None:
    joined = lowered(make_model("qwen3"), quantization="w8a8", pipeline=lambda passes: passes.without("select_kernels"))
    before = joined.weights
    assert QuantizeWeights(scheme="w8a8").apply(joined, Target()) == 0 and joined.weights == before
    program = lowered(make_model("qwen3"), quantization="w8a8")
    program.save(tmp_path)
    assert Program.load(tmp_path).weights == program.weights


def test_columns_that_groups_do_not_divide_stay_dense_and_the_report_says_so(tmp_path: Path) -> None:
    program = lowered(make_model("qwen3", intermediate_size=72), quantization="int4")
    names = quantized_names(program)
    assert [name for name in names if "up_proj" in name] and not [name for name in names if "down_proj" in name]
    (text,) = remark_texts(program)
    assert text.startswith("dense, since groups of 32 do not divide its 72 columns: 2 (model.layers.0.mlp.down_proj.weight, ")
    assert text in describe(program, Timeline()) and "do not divide its 72 columns" in _weights(program)
    program.save(tmp_path)
    assert remark_texts(Program.load(tmp_path)) == [text]


def test_experts_whose_inputs_come_first_are_rounded_along_them() -> None:
    model = make_model("gpt_oss")
    found = logits(model, quantization="int8")
    for layer in model.model.layers:
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            steps = weight.data.abs().amax(1, keepdim=True) / 127
            weight.data = (weight.data / steps).round() * steps
    dense = QuantConfig(scheme="int8", exclude=("*experts*",))
    assert (found - logits(model, quantization=dense)).abs().max() < 1e-5


@needs_byte_kernels
@pytest.mark.parametrize(
    ("scheme", "provider", "limit"), [("w8a8", "cpp_w8a8", 0.1), ("int8", "cpp_w8a16", 0.03), ("int4", "cpp_w4a8", 0.1)]
)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_kernels_of_whole_numbers_in_a_bfloat16_model(family: str, scheme: str, provider: str, limit: float) -> None:
    model = make_model(family, tie_word_embeddings=True).bfloat16()
    compiled = autodeploy.compile(model, quantization=scheme)
    providers = {op: {choice.provider for choice in compiled.program.providers[op]} for op in ("linear", "embedding")}
    routers = {"cpp"} if "moe" in family else set()
    heads = {"cpp_w8a8"} if scheme == "int4" else set()
    assert providers == {"linear": {provider} | routers | heads, "embedding": {"cpp_w8"}}
    if "moe" in family:
        assert {choice.provider for choice in compiled.program.providers["moe"]} == {provider}
    with torch.no_grad():
        exact = rounded_model(model.double(), QuantConfig(scheme=scheme))(IDS).logits
    assert float((compiled(IDS) - exact).norm() / exact.norm()) < limit
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    alone = compiled.generate([[5, 6, 7]], params)[0].outputs[0].token_ids
    together = compiled.generate([[9] * 30, [5, 6, 7], [1]], params)[1].outputs[0].token_ids
    compiled.shutdown()
    assert alone == together


@needs_byte_kernels
@pytest.mark.parametrize(("scheme", "bytes_per_number"), [("w8a8", 1), ("int8", 1), ("int4", 0.5 + 2 / 32)])
def test_nothing_stays_beside_the_packed_numbers(scheme: str, bytes_per_number: float) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 4096, "head_dim": 128}
    compiled = autodeploy.compile(make_model("qwen3", tie_word_embeddings=True, **wide).bfloat16(), quantization=scheme)
    tensors = tensors_of(compiled)
    packed = {name: value for name, value in tensors.items() if isinstance(value, BytePanels | HalfBytePanels)}
    assert not [name for name, value in tensors.items() if name not in packed and value.dim() > 1]
    for value in packed.values():
        size = bytes_per_number if isinstance(value, HalfBytePanels) else 1
        assert value.nbytes < 1.05 * size * value.num_outputs * value.num_inputs
    assert len([name for name in tensors if "embed" in name]) == 1
    in_memory = sum(value.nbytes for value in tensors.values())
    assert f"in memory: {in_memory / 1e6:.1f} MB" in compiled.report()
    assert in_memory < 0.6 * compiled.program.weight_bytes
    compiled.shutdown()


@needs_byte_kernels
def test_experts_of_a_checkpoint_are_rounded_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("qwen3_moe").bfloat16()
    model.save_pretrained(tmp_path)
    expected = logits(tmp_path, quantization="int4", dtype="float32")  # of dense experts that were rounded together
    largest, original = [0], Format.quantize

    def quantize(self: Format, dense: Tensor) -> tuple[Tensor, ...]:
        largest.append(dense.dim())
        return original(self, dense)

    monkeypatch.setattr(Format, "quantize", quantize)
    found = logits(tmp_path, quantization="int4", program_cache=False)
    assert float((found - expected).norm() / expected.norm()) < 0.1
    assert max(largest) == 2  # experts are stacked once they are whole numbers


def test_options_that_are_refused() -> None:
    model = make_model("qwen3")
    for given, message in (
        ("w8a9", "Did you mean 'w8a8'"),
        ({"scheme": "w8a8", "group_size": 64}, "group_size is for scheme='int4'"),
        ({"scheme": "int4", "group_size": 12}, "multiple of 8"),
        ({"sheme": "int4"}, "Did you mean 'scheme'"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            autodeploy.compile(model, quantization=given)
    with pytest.raises(ConfigError, match="backend='pytorch'"):
        autodeploy.compile(model, quantization="int8", backend="pytorch")
    eager = autodeploy.compile(model, backend="pytorch")
    with pytest.raises(ConfigError, match="there is no program"):
        eager.report()
    eager.shutdown()
    with pytest.raises(ConfigError, match="QuantizeWeights"):
        autodeploy.compile(model, quantization="int8", pipeline=autodeploy.default_pipeline())
