"""Layers shared among ranks compute what they did before, and a rank has its part of every matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx

from autodeploy import ConfigError, TransformError, UnsupportedModelError
from autodeploy import custom_ops as ops
from autodeploy.custom_ops import symbolic
from autodeploy.program import Program
from autodeploy.recipes import Numbers, Recipe, Reshape, Shard
from autodeploy.specs import Mesh, Target
from autodeploy.transforms import rewrite
from autodeploy.transforms.plan_sharding import plan_sharding
from autodeploy.transforms.rewrite import aten, calls, val
from autodeploy.transforms.shard import ShardModel
from benchmarks import shard_plans
from tests.models.families import FAMILIES
from tests.transforms.sharding import canonical, shared

TWO = Mesh(2)
FEW = {
    ("llama", TWO): "grouped queries",
    ("llama", Mesh(4)): "fewer key/value heads than ranks",
    ("qwen3_moe", Mesh(4, 2)): "experts dealt out to two groups, their columns inside of each",
    ("gpt_oss", TWO): "sinks, biases, experts with biases",
    ("olmo2", TWO): "a norm over all heads",
    ("phi3", TWO): "fused queries, keys and values, fused gate and up",
    ("gpt_neox", TWO): "parallel residual, heads with their queries, keys and values side by side",
    ("deepseek_v3", TWO): "latent attention",
    ("bamba", TWO): "state spaces and convolutions",
    ("qwen3_next", TWO): "gated delta rule, tokens and heads merged",
    ("gpt2", TWO): "weights the other way round, a tied table",
}
UNSHARED = {
    "diffllama": "queries are halves of heads",
    "falcon": "keys are picked by a table of numbers",
    "falcon_alibi": "the same",
    "falcon_alibi_heads": "slopes are computed",
    "falcon_multi_query": "keys are picked by a table of numbers",
    "gemma3n_text": "gates of inputs per layer",
    "gemma4_text": "gates of inputs per layer",
    "jetmoe": "keys repeated for each expert",
    "recurrent_gemma": "gates of blocks of channels",
    "rwkv": "norms over groups of channels",
    "stablelm": "a norm for each head, by a list",
    "zamba": "a state space of matrices for each head",
}
"""Families of which ranks cannot share everything, and what is in the way."""


@pytest.mark.parametrize(("family", "mesh"), FEW, ids=[f"{family}-{mesh.tp}-{mesh.ep}" for family, mesh in FEW])
def test_ranks_together_compute_the_same(family: str, mesh: Mesh) -> None:
    found = shared(family, mesh)
    assert found.rewrites > 0
    found.compare()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family(family: str) -> None:
    if family in UNSHARED:
        with pytest.raises(UnsupportedModelError, match="ranks cannot share"):
            shared(family, TWO)
    shared(family, TWO, item=ShardModel(replicate=family in UNSHARED)).compare()


def test_equal_layers_are_derived_once(monkeypatch: pytest.MonkeyPatch) -> None:
    derived = list[Any]()
    monkeypatch.setattr(rewrite, "symbolic", lambda target: derived.append(target) or symbolic(target))
    counts = []
    for num_layers in (2, 4):
        (program, _), before = canonical("llama", num_hidden_layers=num_layers), len(derived)
        assert ShardModel().apply(program, Target(mesh=TWO))
        counts.append(len(derived) - before)
    assert counts[1] == counts[0] > 0


def test_each_rank_has_its_part_of_every_matrix_and_adds_up_twice_a_layer() -> None:
    found = shared("llama", TWO)
    whole = {name: tuple(tensor.shape) for name, tensor in found.before.tensors.items()}
    for name in found.program.weights:
        if name.endswith("_proj.weight") or name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert 2 * found.program.parameter(name).numel() == torch.Size(whole[name]).numel(), name
    counts = found.program.op_counts()
    assert counts["autodeploy.all_reduce"] == 1 + 2 * 2
    assert counts["autodeploy.all_gather"] == 1
    heads = {(val(node.args[0]).shape[1], val(node.args[1]).shape[1]) for node in calls(found.program, ops.attention)}
    assert heads == {(2, 1)}


def test_once_more_it_finds_nothing_to_do() -> None:
    program = shared("llama", TWO).program
    assert ShardModel().apply(program, Target(mesh=TWO)) == 0
    assert ShardModel().apply(canonical("llama")[0], Target()) == 0


def test_the_plan_says_how_each_parameter_is_shared() -> None:
    program, _ = canonical("qwen3_moe")
    plan = plan_sharding(program, Mesh(2, 2))
    kinds = {name.removeprefix("model.layers.0."): share.kind for name, share in plan.parameters.items()}
    assert kinds["self_attn.q_proj.weight"] == kinds["lm_head.weight"] == "column"
    assert (kinds["self_attn.o_proj.weight"], kinds["mlp.experts.down_proj"]) == ("row", "expert")
    assert (kinds["model.embed_tokens.weight"], kinds["mlp.gate.weight"]) == ("vocabulary", "replicate")
    assert set(plan.parameters) == set(program.weights)
    assert plan.to_json()["parameters"]["model.layers.1.mlp.experts.down_proj"]["dims"] == {"0": (((0, 4),), ((4, 8),))}
    assert "2 x row: dim 1 0:32|32:64" in str(plan)


def test_what_cannot_be_shared_is_named_and_computed_by_all_on_request() -> None:
    with pytest.raises(UnsupportedModelError, match=r"ranks cannot share linear_\d+: at .*replicate=True"):
        shared("diffllama", TWO)
    found = shared("diffllama", Mesh(2), item=ShardModel(replicate=True))
    found.compare()
    assert "model.layers.0.mlp.down_proj.weight" in sharded_names(found.program)


def test_a_plan_of_the_users_own_goes_before() -> None:
    found = shared("llama", TWO, item=ShardModel(rules={"*.0.mlp.up_proj": "replicate", "*.self_attn.o_proj.weight": "row"}))
    found.compare()
    names = sharded_names(found.program)
    assert not [name for name in names if ".0.mlp." in name]  # what would be shared with it is not, either
    assert {"model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.o_proj.weight"} <= names


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"*.self_attn.o_proj": "column"},
            r"says column of 'model.layers.0.self_attn.o_proj.weight', but .* row \(dim 1",
        ),
        ({"*.mlp.upproj": "replicate"}, r"no parameter is called '\*.mlp.upproj'"),
    ],
)
def test_a_plan_that_cannot_be_followed(rules: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shared("llama", TWO, item=ShardModel(rules=rules))


def test_where_transformers_differs_is_written_down() -> None:
    hints = {"layers.*.mlp.up_proj": "rowwise", "layers.*.mlp.down_proj": "rowwise", "embed_tokens": "embedding_rowwise"}
    (choice,) = shared("llama", TWO, item=ShardModel(hints=hints)).program.providers["shard"]
    assert choice.against == {"transformers": ("model.layers.*.mlp.up_proj: column here, row there",)}


def sharded_names(program: Program) -> set[str]:
    return {name for name, recipe in program.weights.recipes.items() if isinstance(recipe, Shard)}


def test_an_odd_vocabulary_is_padded() -> None:
    found = shared("llama", Mesh(4), vocab_size=129)
    assert found.program.parameter("lm_head.weight").shape[0] == 33
    found.compare()


def test_heads_that_ranks_do_not_divide_are_padded() -> None:
    found = shared("llama", Mesh(4), num_attention_heads=6, num_key_value_heads=3, hidden_size=48)
    assert {val(node.args[0]).shape[1] for node in calls(found.program, ops.attention)} == {2}
    found.compare()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_ranks", [8, 64])
@pytest.mark.parametrize("name", shard_plans.CONFIGS)
def test_large_models_on_many_ranks(name: str, num_ranks: int) -> None:
    found = shard_plans.in_own_process(name, num_ranks)
    assert found["total"] <= shard_plans.LIMIT
    assert (found["refused"], found["differs"]) == ({}, [])
    assert found["shared"] > 0.98 * (1 - 1 / num_ranks)


# Wrong programs, made wrong after the pass


def recipe(program: Program, name: str, change: Callable[[Any], Recipe]) -> None:
    program.weights = program.weights.with_recipes({name: change(program.weights[name])})


def swapped(shard: Shard) -> Recipe:
    """The ranks' parts in the other order."""
    return Shard(shard.source, shard.dim, shard.ranges[::-1])


def of_layer(program: Program, number: int, op: Any) -> fx.Node:
    return calls(program, op)[number]


def skip(node: fx.Node) -> None:
    """Its readers read what it reads."""
    node.replace_all_uses_with(node.args[0])  # pyright: ignore[reportArgumentType]


def _reduce_again(program: Program) -> None:
    node = of_layer(program, 1, ops.all_reduce)
    with program.graph.graph.inserting_after(node):
        again = program.graph.graph.call_function(ops.all_reduce.overload, (node,))
    again.meta = dict(node.meta)
    node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)


def _one_reader_without(program: Program) -> None:
    node = of_layer(program, 1, ops.all_reduce)
    next(iter(node.users)).replace_input_with(node, node.args[0])  # pyright: ignore[reportArgumentType]


def _local_statistics(program: Program) -> None:
    node = of_layer(program, 0, ops.sharded_rms_norm)
    node.target, node.args = ops.rms_norm.overload, node.args[:5]


def _cut_elsewhere(program: Program) -> None:
    """Keys begin where queries have not ended."""
    node = next(node for node in calls(program, aten.slice.Tensor) if node.args[2] not in (0, None))
    node.args = (*node.args[:2], 0, node.args[3] - node.args[2])  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]


def _other_reader(program: Program) -> None:
    """A layer reads the sum of another one."""
    first, second = of_layer(program, 1, ops.all_reduce), of_layer(program, 3, ops.all_reduce)
    for user in list(second.users):
        user.replace_input_with(second, first)


def _first(program: Program, values: tuple[int, ...]) -> None:
    name = next(name for name in program.weights if name.startswith("first_of_rank."))
    each = tuple(((rank, rank + 1),) for rank in range(len(values)))
    recipe(program, name, lambda _: Reshape(Shard(Numbers(values), -1, each), ()))


LAYER = "model.layers.0."


def part(name: str, change: Callable[[Any], Recipe]) -> Callable[[Program], None]:
    """Another recipe for a parameter of the first layer."""
    return lambda program: recipe(program, LAYER + name, change)


def without(op: Any, number: int) -> Callable[[Program], None]:
    """The program without one call."""
    return lambda program: skip(of_layer(program, number, op))


def halves(shard: Shard) -> Recipe:
    return Shard(shard.source, -2, (((0, 32),), ((32, 64),)))


def whole(shard: Shard) -> Recipe:
    return shard.source


def rows(shard: Shard) -> Recipe:
    return Shard(shard.source, -2, shard.ranges)


def first_for_all(shard: Shard) -> Recipe:
    return Shard(shard.source, shard.dim, (shard.ranges[0],) * 2)


@dataclass(frozen=True)
class Bug:
    name: str
    family: str
    make: Callable[[Program], object]
    mesh: Mesh = TWO


BUGS = [
    Bug("no sum behind attention", "llama", without(ops.all_reduce, 1)),
    Bug("no sum behind the MLP", "llama", without(ops.all_reduce, 2)),
    Bug("no sum behind the table", "llama", without(ops.all_reduce, 0)),
    Bug("no sum behind experts", "qwen3_moe", without(ops.all_reduce, 2), Mesh(2, 2)),
    Bug("added up twice", "llama", _reduce_again),
    Bug("one reader without the sum", "llama", _one_reader_without),
    Bug("the sum of another layer", "llama", _other_reader),
    Bug("no gather of the logits", "llama", without(ops.all_gather, 0)),
    Bug("columns of o_proj swapped", "llama", part("self_attn.o_proj.weight", swapped)),
    Bug("rows of q_proj swapped", "llama", part("self_attn.q_proj.weight", swapped)),
    Bug("rows of k_proj swapped", "llama", part("self_attn.k_proj.weight", swapped)),
    Bug("o_proj by rows", "llama", part("self_attn.o_proj.weight", rows)),
    Bug("every rank has the first columns", "llama", part("mlp.down_proj.weight", first_for_all)),
    Bug("a bias added by every rank", "gpt_oss", part("self_attn.o_proj.bias", whole)),
    Bug("a bias of other heads", "gpt_oss", part("self_attn.q_proj.bias", swapped)),
    Bug("sinks of other heads", "gpt_oss", part("self_attn.sinks", swapped)),
    Bug("a bias of experts added by every rank", "gpt_oss", part("mlp.experts.down_proj_bias", whole)),
    Bug("gate and up cut as one", "qwen3_moe", part("mlp.experts.gate_up_proj", halves)),
    Bug("other experts down than up", "qwen3_moe", part("mlp.experts.down_proj", swapped), Mesh(2, 2)),
    Bug("experts counted from elsewhere", "qwen3_moe", lambda p: _first(p, (4, 0)), Mesh(2, 2)),
    Bug("rows of the table from elsewhere", "llama", lambda p: _first(p, (128, 0))),
    Bug("the scale of a norm over all heads, of other heads", "olmo2", part("self_attn.q_norm.weight", swapped)),
    Bug("a norm over all heads by local statistics", "olmo2", _local_statistics),
    Bug("fused keys from the wrong place", "phi3", _cut_elsewhere),
    Bug("heads of a state space swapped", "bamba", part("mamba.dt_bias", swapped)),
]


@dataclass(frozen=True, kw_only=True)
class Broken(ShardModel):
    bug: Any = None

    def apply(self, program: Program, target: Target) -> int:
        rewrites = super().apply(program, target)
        self.bug.make(program)
        program.graph.graph.eliminate_dead_code()
        return rewrites


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name.replace(" ", "-") for bug in BUGS])
def test_a_wrong_sharding_is_stopped_while_compiling(bug: Bug) -> None:
    with pytest.raises(TransformError, match="transform 'shard': VerificationError"):
        shared(bug.family, bug.mesh, item=Broken(bug=bug))
