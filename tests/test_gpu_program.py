"""A program compiled for a GPU, run in Triton's interpreter: the tokens are those of eager, and Triton serves what it can."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from autodeploy import QuantConfig, SamplingParams, default_pipeline
from autodeploy._compile import CompiledModel
from autodeploy._lower import lower
from autodeploy.config import LLMArgs
from autodeploy.executor.model_runner import ModelRunner
from autodeploy.report.tables import describe
from autodeploy.report.timeline import Timeline
from autodeploy.transforms.quantize import QuantizeWeights
from autodeploy.transforms.quantize_cache import QuantizeCache
from tests.capture.test_quantized import BY_NAME, LLAMA, write, write_gpt_oss
from tests.custom_ops.triton_ops import CUDA
from tests.models.families import make_model
from tests.transforms.test_quantize import rounded_model

PROMPTS = [[5, 6, 7, 8, 9], [11], [3, 4, 5]]


def compiled_for_gpu(model: Any, pipeline: Any, **options: Any) -> CompiledModel:
    """Its tensors lie on the CPU, where the interpreter is."""
    options = {"program_cache": False, "max_num_tokens": 16, "max_batch_size": 4, **options}
    args, timeline = LLMArgs(model=model, **options), Timeline(show=False)
    lowered, _ = lower(args, pipeline, CUDA, timeline)
    runner = ModelRunner(lowered.program, lowered.source, "cpu")
    runner.records_steps = False
    return CompiledModel(args, lowered.facts, timeline, runner, lowered.program)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_tokens_are_those_of_eager(family: str) -> None:
    model = make_model(family)
    compiled = compiled_for_gpu(model, default_pipeline(CUDA))
    chosen = {op: {choice.provider for choice in choices} for op, choices in compiled.program.providers.items()}
    assert {op for op, names in chosen.items() if names != {"triton"}} <= {"attention", "linear", "embedding"}, chosen
    assert "it runs on CPUs, not on cuda" in describe(compiled.program, compiled.timeline)
    outputs = compiled.generate(PROMPTS, SamplingParams(max_tokens=4, ignore_eos=True))
    compiled.shutdown()
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            expected = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert output.outputs[0].token_ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_logits_over_a_cache_of_8_bits(dtype: str) -> None:
    model = make_model("llama", num_hidden_layers=1)
    compiled = compiled_for_gpu(model, default_pipeline(CUDA, quantize_cache=QuantizeCache(dtype=dtype)))
    assert {choice.provider for choice in compiled.program.providers["paged_attention"]} == {"triton"}
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        exact = model(ids).logits
    assert 1e-6 < (compiled(ids) - exact).norm() / exact.norm() < 0.05
    compiled.shutdown()


@pytest.mark.parametrize(
    ("scheme", "provider"),
    [
        ("w8a8", "triton_w8a8"),
        ("int8", "triton_w8a16"),
        ("int4", "triton_w4a16"),
        ("fp8", "triton_fp8"),
        ("mxfp4", "triton_fp4"),
        ("nvfp4", "triton_fp4"),
    ],
)
def test_weights_of_fewer_bits_stay_so(scheme: Any, provider: str) -> None:
    model = make_model("llama", num_hidden_layers=1).bfloat16()
    compiled = compiled_for_gpu(model, default_pipeline(CUDA, QuantizeWeights(scheme=scheme)))
    assert provider in {choice.provider for choice in compiled.program.providers["linear"]}
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        exact = rounded_model(model.double(), QuantConfig(scheme=scheme))(ids).logits
    assert (compiled(ids) - exact).norm() / exact.norm() < 0.05
    compiled.shutdown()


@pytest.mark.parametrize(
    ("name", "provider"),
    [
        ("block fp8", "triton_fp8"),
        ("modelopt fp8", "triton_fp8"),
        ("gptq", "triton_w4a16"),
        ("compressed-tensors int8", "triton_w8a16"),
    ],
)
def test_quantized_checkpoints_stay_so(name: str, provider: str, tmp_path: Path) -> None:
    quantized, dense = write(tmp_path, BY_NAME[name], make_model("llama", **LLAMA))
    found = {}
    for folder in (quantized, dense):
        compiled = compiled_for_gpu(str(folder), default_pipeline(CUDA), dtype="bfloat16")
        providers = {choice.provider for choice in compiled.program.providers["linear"]}
        assert (provider in providers) == (folder == quantized), providers
        found[folder] = compiled(torch.tensor([[5, 6, 7, 8]]))
        compiled.shutdown()
    assert (found[quantized] - found[dense]).norm() / found[dense].norm() < 0.05


def served_alike(quantized: Path, dense: Path, provider: str) -> None:
    """Experts stay in few bits: logits are those of float32 on the dense checkpoint, tokens those of its program."""
    ids, tokens, params = torch.tensor([[5, 6, 7, 8]]), [], SamplingParams(max_tokens=3, ignore_eos=True)
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(ids).logits
    for folder, name in ((quantized, provider), (dense, "triton")):
        compiled = compiled_for_gpu(str(folder), default_pipeline(CUDA), dtype="bfloat16")
        assert {choice.provider for choice in compiled.program.providers["moe"]} == {name}
        assert (compiled(ids) - exact).norm() / exact.norm() < 0.05
        tokens.append([output.outputs[0].token_ids for output in compiled.generate(PROMPTS[:2], params)])
        compiled.shutdown()
    assert tokens[0] == tokens[1]


def test_gpt_oss_keeps_its_experts_in_mxfp4(tmp_path: Path) -> None:
    served_alike(*write_gpt_oss(tmp_path, num_hidden_layers=1, layer_types=["sliding_attention"]), "triton_fp4")


@pytest.mark.parametrize(("name", "provider"), [("block fp8", "triton_fp8"), ("gptq", "triton_w4a16")])
def test_qwen3_moe_keeps_its_experts_in_few_bits(name: str, provider: str, tmp_path: Path) -> None:
    model = make_model("qwen3_moe", moe_intermediate_size=64, num_hidden_layers=1)
    served_alike(*write(tmp_path, BY_NAME[name], model), provider)


def test_a_machine_without_a_gpu_imports_none_of_it() -> None:
    code = (
        "import sys, torch, autodeploy\n"
        "llm = autodeploy.LLM('autodeploy/demo_model')\n"
        "llm.generate('1+1=')\n"
        "llm.compiled.report()\n"
        "llm.shutdown()\n"
        "ours = [name for name in sys.modules if name.startswith('autodeploy.custom_ops.kernels')]\n"
        "assert not ours and 'flashinfer' not in sys.modules and not torch.cuda.is_initialized(), ours\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
