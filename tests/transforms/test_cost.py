"""What verification and the pipeline cost on the published Qwen3-0.6B shape (no weights are needed for that)."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from autodeploy import Program, Target, default_pipeline
from autodeploy.capture.export import capture
from autodeploy.capture.skeleton import build_skeleton

SHAPE: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def exported(num_layers: int) -> Program:
    skeleton = build_skeleton(Qwen3Config(**SHAPE, num_hidden_layers=num_layers), torch.bfloat16)
    return capture(skeleton, dict(skeleton.named_buffers())).program


def cpu_seconds(program: Program, verify: str) -> float:
    copy = program.snapshot().as_program()
    started = time.process_time()
    default_pipeline().run(copy, Target(), verify=verify)
    return time.process_time() - started


@pytest.mark.slow
def test_structure_verification_of_28_layers_costs_at_most_two_cpu_seconds() -> None:
    program = exported(28)
    cost = min(cpu_seconds(program, "structure") - cpu_seconds(program, "off") for _ in range(2))
    print(f"structure verification: {cost:.2f} CPU s")
    assert cost <= 2.0


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_pipeline_is_linear_in_layers() -> None:
    seconds = {layers: min(cpu_seconds(exported(layers), "structure") for _ in range(1)) for layers in (8, 16, 32, 64)}
    print({layers: round(value, 2) for layers, value in seconds.items()})
    assert seconds[64] / 64 <= 1.5 * seconds[16] / 16
