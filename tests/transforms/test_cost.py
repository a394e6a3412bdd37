"""What verification and the pipeline cost on the published Qwen3-0.6B shape (no weights are needed for that)."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from autodeploy import Program, Target, default_pipeline
from autodeploy.capture.export import capture
from autodeploy.capture.skeleton import build_skeleton
from autodeploy.transforms import pipeline
from autodeploy.transforms.verify import verify_structure

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


def cpu_seconds(call: Callable[[], Any]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def run_pipeline(program: Program) -> None:
    default_pipeline().run(program.snapshot().as_program(), Target())


@pytest.fixture(scope="module")
def program_of_28_layers() -> Program:
    return exported(28)


@pytest.mark.slow
def test_structure_verification_of_28_layers_costs_at_most_two_cpu_seconds(
    program_of_28_layers: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = list[float]()

    def timed(*args: Any) -> None:
        runs[-1] += cpu_seconds(lambda: verify_structure(*args))

    monkeypatch.setattr(pipeline, "verify_structure", timed)
    for _ in range(3):
        runs.append(0.0)
        run_pipeline(program_of_28_layers)
    print(f"structure verification: {[round(seconds, 2) for seconds in runs]} CPU s")
    assert 0 < median(runs) <= 2.0


@pytest.mark.slow
def test_a_snapshot_costs_at_most_ten_milliseconds_per_thousand_nodes(program_of_28_layers: Program) -> None:
    thousands = len(program_of_28_layers.graph.graph.nodes) / 1000
    cost = median(cpu_seconds(program_of_28_layers.snapshot) for _ in range(9)) / thousands
    print(f"snapshot: {cost * 1e3:.1f} ms per 1,000 nodes")
    assert cost <= 0.010


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_pipeline_is_linear_in_layers() -> None:
    seconds = dict[int, float]()
    for layers in (8, 16, 32, 64):
        program = exported(layers)
        seconds[layers] = median(cpu_seconds(lambda program=program: run_pipeline(program)) for _ in range(3))
    print({layers: round(value, 2) for layers, value in seconds.items()})
    assert seconds[64] / 64 <= 1.5 * seconds[16] / 16
