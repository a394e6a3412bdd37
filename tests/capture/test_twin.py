"""A model too large for float64 is verified on a small twin with the same kinds of layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Qwen3Config

from autodeploy import ConfigError, Pipeline, Target, Transform, TransformError, default_pipeline
from autodeploy import custom_ops as ops
from autodeploy._compile import trace
from autodeploy.capture.skeleton import build_skeleton
from autodeploy.capture.twin import capture_twin
from autodeploy.config import LLMArgs
from autodeploy.program import Program
from autodeploy.report.timeline import Timeline
from autodeploy.specs import SlidingWindowKV
from autodeploy.transforms.rewrite import calls
from tests.models.families import FAMILIES, make_config

LARGE = Qwen3Config(num_hidden_layers=2, hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8)
LIMIT = 2 << 30


def test_a_twin_keeps_the_pattern_of_layers_and_the_grouping_of_heads() -> None:
    config = Gemma2Config(num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8)
    program = capture_twin(config, torch.bfloat16, LIMIT).program
    default_pipeline().run(program, Target(), verify="numeric")
    assert [isinstance(spec, SlidingWindowKV) for spec in program.caches.values()] == [True, False]
    q, k = calls_of_attention(config)
    assert q // k == 2


def calls_of_attention(config: Any) -> tuple[int, int]:
    program = capture_twin(config, torch.bfloat16, LIMIT).program
    q, k = calls(program, ops.attention)[0].args[:2]
    return q.meta["val"].shape[1], k.meta["val"].shape[1]  # pyright: ignore


@pytest.mark.parametrize("name", ["cohere", "gemma4_text", "gpt2", "youtu"])
def test_families_have_twins_that_verify(name: str) -> None:
    assert name in FAMILIES
    program = capture_twin(make_config(name), torch.bfloat16, LIMIT).program
    default_pipeline().run(program, Target(), verify="numeric")


def test_a_large_model_is_verified_on_its_twin_and_a_wrong_pass_is_stopped(tmp_path) -> None:
    class WrongEps(Transform):
        name = "wrong_eps"

        def apply(self, program: Program, target: Target) -> int:
            for node in calls(program, ops.rms_norm):
                node.args = (*node.args[:2], 0.01, *node.args[3:])
            return 1

    skeleton: Any = build_skeleton(LARGE, torch.bfloat16)
    timeline = Timeline()
    trace(LLMArgs(model=skeleton, verify="numeric"), timeline)
    assert list(timeline.seconds) == ["export", "verify on a small twin", "passes"]
    wrong = Pipeline((*default_pipeline().passes[:5], WrongEps(), *default_pipeline().passes[5:]))
    with pytest.raises(TransformError, match=r"wrong_eps.*in float64"):
        trace(LLMArgs(model=skeleton, verify="numeric", pipeline=wrong), Timeline())


def test_no_twin_within_the_limit_is_an_error_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"no small twin.*verify='structure'"):
        capture_twin(LARGE, torch.bfloat16, 1000)
