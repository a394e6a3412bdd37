"""Every pass of every family gives the same numbers; wrong rewrites and wrong recipes do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import autodeploy
from autodeploy import Effect, Pipeline, Program, Target, Transform, TransformError, default_pipeline
from autodeploy import custom_ops as ops
from autodeploy.transforms.rewrite import calls, insert_call, replace_call
from autodeploy.transforms.verify_numeric import NumericVerifier
from autodeploy.weights import Cat
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
class Wrong(Transform):
    """One seeded bug, with the effect that lets it through the structural checks."""

    name: ClassVar[str] = "wrong"
    bug: str

    @property
    def effect(self) -> Effect:  # pyright: ignore[reportIncompatibleVariableOverride]
        return BUGS[self.bug][1]

    def apply(self, program: Program, target: Target) -> int:
        BUGS[self.bug][2](program)
        return 1


def first(program: Program, target: Any) -> Any:
    return calls(program, target)[0]


def with_argument(target: Any, index: int, change: Any) -> Any:
    def damage(program: Program) -> None:
        node = first(program, target)
        node.args = (*node.args[:index], change(node.args[index]), *node.args[index + 1 :])

    return damage


def with_swapped(target: Any, i: int, j: int) -> Any:
    def damage(program: Program) -> None:
        node = first(program, target)
        args = list(node.args)
        args[i], args[j] = args[j], args[i]
        node.args = tuple(args)

    return damage


def reversed_fusion(program: Program) -> None:
    name = next(name for name, recipe in program.weights.recipes.items() if isinstance(recipe, Cat))
    recipe = program.weights[name]
    assert isinstance(recipe, Cat)
    program.weights = program.weights.with_recipes({name: Cat(recipe.parts[::-1], recipe.dim)})


def other_layer(program: Program) -> None:
    here, there = "model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"
    program.weights = program.weights.with_recipes({here: program.weights[there]})


def late_append(program: Program) -> None:
    append, read = first(program, ops.kv_append), first(program, ops.paged_attention)
    read.append(append)


def halved(target: Any) -> Any:
    def damage(program: Program) -> None:
        node = first(program, target)
        scaled = insert_call(program, node.next, aten.mul.Tensor, node, 0.5)
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)

    return damage


def bypassed(target: Any) -> Any:
    def damage(program: Program) -> None:
        node = first(program, target)
        node.replace_all_uses_with(node.args[0])

    return damage


def replaced(target: Any, other: Any) -> Any:
    def damage(program: Program) -> None:
        node = first(program, target)
        replace_call(program, node, other, *node.args)

    return damage


def wrong_shared_cache(program: Program) -> None:
    append, read = calls(program, ops.kv_append)[1], calls(program, ops.paged_attention)[1]
    append.args = (*append.args[:2], calls(program, ops.kv_append)[0].args[2], append.args[3])
    read.args = (read.args[0], append.args[2], *read.args[2:])


CANONICAL, LOWERED = "fuse_linears", "insert_paged_attention"
REWRITE, PARAMETERS, INPUTS, FUSION = Effect.REWRITE, Effect.PARAMETERS, Effect.INPUTS, Effect.FUSION
BUGS: dict[str, tuple[str, Effect, Any]] = {
    "norm eps": (CANONICAL, FUSION, with_argument(ops.rms_norm.overload, 2, lambda eps: 1e-2)),
    "norm offset": (CANONICAL, FUSION, with_argument(ops.rms_norm.overload, 3, lambda offset: 1.0)),
    "norm without its weight": (CANONICAL, FUSION, with_argument(ops.rms_norm.overload, 1, lambda weight: None)),
    "norm left out": (CANONICAL, FUSION, bypassed(ops.rms_norm.overload)),
    "cos and sin swapped": (CANONICAL, FUSION, with_swapped(ops.rope.overload, 1, 2)),
    "rope interleaved": (CANONICAL, FUSION, with_argument(ops.rope.overload, 3, lambda interleaved: True)),
    "rope left out": (CANONICAL, FUSION, bypassed(ops.rope.overload)),
    "gate and up swapped": (CANONICAL, FUSION, with_swapped(ops.gated_activation.overload, 0, 1)),
    "another activation": (CANONICAL, FUSION, with_argument(ops.gated_activation.overload, 2, lambda name: "gelu")),
    "attention scale": (CANONICAL, FUSION, with_argument(ops.attention.overload, 4, lambda scale: scale * 0.99)),
    "window off by one": (CANONICAL, FUSION, with_argument(ops.attention.overload, 5, lambda window: window + 1)),
    "window lost": (CANONICAL, FUSION, with_argument(ops.attention.overload, 5, lambda window: 0)),
    "sinks lost": (CANONICAL, FUSION, with_argument(ops.attention.overload, 3, lambda sinks: None)),
    "keys and values swapped": (CANONICAL, FUSION, with_swapped(ops.attention.overload, 1, 2)),
    "residual left out": (CANONICAL, REWRITE, bypassed(aten.add.Tensor)),
    "residual subtracted": (CANONICAL, REWRITE, replaced(aten.add.Tensor, aten.sub.Tensor)),
    "scaled by a half": (CANONICAL, REWRITE, halved(aten.linear.default)),
    "positions as tokens": (
        CANONICAL,
        REWRITE,
        with_argument(aten.embedding.default, 1, lambda ids: ids.graph.find_nodes(op="placeholder")[1]),
    ),
    "parts joined in another order": (CANONICAL, PARAMETERS, reversed_fusion),
    "another layer's weight": (CANONICAL, PARAMETERS, other_layer),
    "read before written": (LOWERED, INPUTS, late_append),
    "another layer's cache": (LOWERED, INPUTS, wrong_shared_cache),
    "paged scale": (LOWERED, FUSION, with_argument(ops.paged_attention.overload, 6, lambda scale: -scale)),
    "paged window": (LOWERED, FUSION, with_argument(ops.paged_attention.overload, 7, lambda window: window - 1)),
}


@pytest.fixture(scope="module")
def stages() -> dict[str, tuple[Program, NumericVerifier]]:
    from autodeploy.transforms.verify_numeric import leaf_types

    program, _ = family_program("granite_swa", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    verifier, found = NumericVerifier(leaf_types(program)), {}
    for item in default_pipeline():
        Pipeline((item,)).run(program, Target())
        found[item.name] = program.snapshot().as_program(), verifier
    return found


@pytest.mark.parametrize("bug", BUGS)
def test_a_seeded_bug_is_caught(bug: str, stages: Any) -> None:
    from autodeploy.transforms.verify import VerificationError, verify_structure

    stage, effect, damage = BUGS[bug]
    original, verifier = stages[stage]
    program = original.snapshot().as_program()
    before = program.snapshot()
    damage(program)
    with pytest.raises(VerificationError):
        program.graph.graph.eliminate_dead_code()
        verify_structure(before, program, effect)
        verifier.compare(before.as_program(), program, effect)


def test_no_change_is_no_bug(stages: Any) -> None:
    for original, verifier in stages.values():
        verifier.compare(original, original.snapshot().as_program(), Effect.FUSION)


def test_a_wrong_pass_is_stopped_by_name() -> None:
    program, _ = family_program("qwen3", num_hidden_layers=2)
    pipeline = default_pipeline().insert_after("match_norm", Wrong(bug="norm eps"))
    with pytest.raises(TransformError, match=r"transform 'wrong': VerificationError: in float64 its logits differ by"):
        pipeline.run(program, Target(), verify="numeric")


def test_a_model_too_large_for_it_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"would need .* GiB.*verify='structure'"):
        NumericVerifier({"w": ("bfloat16", (40000, 40000))})
