"""Experts in a format are turned where the model has their inputs first; recipes and calls stay the same function."""

from __future__ import annotations

import pytest
import torch

from autodeploy import Target, default_pipeline
from autodeploy.formats import SCHEMES
from autodeploy.recipes import Cast, Dequantize, Permute, Take, format_of, substitute, turned
from autodeploy.specs import Mesh
from autodeploy.transforms.pipeline import Pipeline
from autodeploy.transforms.quantize import QuantizeWeights
from autodeploy.transforms.transpose_experts import TransposeExperts
from tests.transforms.helpers import family_program

TURN = (0, 2, 1)
TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(2)])
def test_rounded_experts_of_gpt_oss(mesh: Mesh) -> None:
    target = Target("cuda", mesh=mesh)
    program, _ = family_program("gpt_oss", intermediate_size=64, **TWO_LAYERS)
    pipeline = default_pipeline(target, QuantizeWeights(scheme="mxfp4"))
    Pipeline(pipeline.passes[: pipeline.index("fuse_linears")]).run(program, target, verify="numeric")
    made = {record.name: record.rewrites for record in program.history}
    assert made["transpose_experts"] == 2
    for layer in range(2):
        for name in ("gate_up_proj", "down_proj"):
            assert program.weights.format_of(f"model.layers.{layer}.mlp.experts.{name}") == SCHEMES["mxfp4"]
    assert TransposeExperts().apply(program, target) == 0


def test_dense_experts_stay_as_they_are() -> None:
    program, _ = family_program("gpt_oss", **TWO_LAYERS)
    Pipeline((TransposeExperts(),)).run(program, Target("cuda"))
    assert program.history[-1].rewrites == 0


def test_a_stored_matrix_is_known_turned_and_read_without_the_turn() -> None:
    form = SCHEMES["mxfp4"]
    stored = Dequantize((Take("codes"), Take("scales")), form, (2, 64, 32))
    turns = Cast(Permute(stored, TURN), torch.bfloat16)
    assert format_of(turns, {}) is None and format_of(turns, {}, is_turned=True) == form
    plan = substitute(turned(Take("experts")), {"experts": turns})
    assert plan == Cast(stored, torch.bfloat16) and format_of(plan, {}) == form
    assert turned(turned(stored)) == stored
