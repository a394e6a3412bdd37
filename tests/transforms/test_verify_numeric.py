"""Every pass of every family gives the same numbers; wrong rewrites and wrong recipes do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import autodeploy
from autodeploy import Effect, Program, Target, Transform, TransformError, default_pipeline
from autodeploy import custom_ops as ops
from autodeploy.transforms.rewrite import calls
from autodeploy.transforms.verify_numeric import NumericVerifier
from tests.models.families import FAMILIES, make_model
from tests.transforms.helpers import family_program

aten = torch.ops.aten
QUICK = {
    "cohere",
    "diffllama",
    "gemma2",
    "gpt2",
    "granite_swa",
    "llama_dynamic",
    "minicpm3",
    "olmo2",
    "opt",
    "phi",
    "phi3_longrope",
    "qwen3",
    "starcoder2",
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES])
def test_every_default_pass_keeps_the_numbers(name: str) -> None:
    program, _ = family_program(name)
    default_pipeline().run(program, Target(), verify="numeric")
    assert [record.name for record in program.history] == default_pipeline().names()


def test_compile_takes_the_option() -> None:
    compiled = autodeploy.compile(make_model("qwen3", num_hidden_layers=1), verify="numeric")
    compiled.shutdown()


@dataclass(frozen=True, kw_only=True)
class WrongEps(Transform):
    """Nothing that the structure of a program shows."""

    name: ClassVar[str] = "wrong"
    effect: ClassVar[Effect] = Effect.FUSION

    def apply(self, program: Program, target: Target) -> int:
        node = calls(program, ops.rms_norm)[0]
        node.args = (*node.args[:2], 1e-2, *node.args[3:])
        return 1


def test_a_wrong_pass_is_stopped_by_name() -> None:
    program, _ = family_program("qwen3", num_hidden_layers=2)
    pipeline = default_pipeline().insert_after("match_norm", WrongEps())
    with pytest.raises(TransformError, match=r"transform 'wrong': VerificationError: in float64 its logits differ by"):
        pipeline.run(program, Target(), verify="numeric")


def test_a_model_too_large_for_it_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"would need .* GiB.*verify='structure'"):
        NumericVerifier({"w": ("bfloat16", (40000, 40000))})
