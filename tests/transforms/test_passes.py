"""Each pass finds what it is for, leaves near misses alone, and finds nothing the second time."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autodeploy import ConfigError, TransformError, default_pipeline
from autodeploy import custom_ops as ops
from autodeploy.custom_ops import symbolic
from autodeploy.program import Program
from autodeploy.recipes import Cat, Take
from autodeploy.specs import Target
from autodeploy.transforms.base import Transform
from autodeploy.transforms.cleanup import Cleanup
from autodeploy.transforms.fuse_add_norm import FuseAddNorm
from autodeploy.transforms.fuse_linears import FuseLinears
from autodeploy.transforms.fuse_rope_append import FuseRopeAppend
from autodeploy.transforms.gather_logits import GatherLogits
from autodeploy.transforms.insert_paged_attention import InsertPagedAttention
from autodeploy.transforms.match_mlp import MatchMLP
from autodeploy.transforms.match_norm import MatchNorm
from autodeploy.transforms.match_rope import MatchRope
from autodeploy.transforms.rewrite import arguments, aten, calls, val
from autodeploy.transforms.select_kernels import SelectKernels
from tests.transforms.helpers import WIDTH, apply, family_program, toy_program


def run_family(name: str, **overrides):
    program, _ = family_program(name, **overrides)
    default_pipeline().run(program, Target())
    return program, {record.name: record.rewrites for record in program.history}


@pytest.mark.parametrize(
    ("name", "norms", "ropes", "gated", "fused", "sums"),
    [
        ("qwen3", 9, 4, 2, 4, 4),  # 2 layers x (2 norms + q and k norms) + final
        ("gemma2", 17, 8, 4, 8, 8),
        ("cohere", 7, 4, 2, 2, 0),  # one norm per layer, q and k norms
        ("gpt2", 5, 0, 0, 0, 0),
        ("granite_swa", 9, 8, 4, 8, 8),
        ("minicpm3", 9, 4, 2, 4, 4),
    ],
)
def test_every_norm_rope_activation_and_joint_projection_of_a_family_is_found(name, norms, ropes, gated, fused, sums) -> None:
    program, rewrites = run_family(name)
    found = [rewrites[key] for key in ("match_norm", "match_rope", "match_mlp", "fuse_linears", "fuse_add_norm")]
    assert found == [norms, ropes, gated, fused, sums]
    assert not any("rsqrt" in op for op in program.op_counts())


def test_bf16_norms_match_with_their_casts_inside() -> None:
    program, rewrites = run_family("qwen3", dtype=torch.bfloat16)
    model_casts = [op for op in program.op_counts() if "rsqrt" in op or "pow" in op]
    assert rewrites["match_norm"] == 9 and not model_casts


ALSO = [
    *("diffllama", "gemma2", "gemma3n_text", "gpt2", "granite_swa", "llama_dynamic", "minicpm3"),
    *("olmo2", "opt", "phi", "phi3_longrope", "starcoder2", "youtu"),
]


@pytest.mark.parametrize("name", ["qwen3", "cohere", *(pytest.param(name, marks=pytest.mark.slow) for name in ALSO)])
def test_a_second_application_of_each_pass_finds_nothing(name) -> None:
    program, _ = family_program(name)
    for item in default_pipeline():
        apply(program, item)
        text = str(program).split("inputs:")[1]
        assert apply(program, item) == [0], item.name
        assert str(program).split("inputs:")[1] == text, item.name


def test_cleanup_drops_what_does_nothing_and_computes_equal_things_once() -> None:
    def body(toy, x, positions):
        a = F.dropout(x, 0.5, training=False)[:, 0:]
        return a.to(a.dtype).exp() + x.exp()

    program, _ = toy_program(body)
    apply(program, Cleanup())
    assert program.op_counts() == {"aten.embedding": 1, "aten.exp": 1, "aten.add.Tensor": 1, "aten.linear": 1}


def test_a_product_with_a_gate_is_no_norm_weight() -> None:
    def body(toy, x, positions):
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return torch.sigmoid(x) * normed

    program, _ = toy_program(body)
    apply(program, MatchNorm())
    node = next(node for node in program.graph.graph.nodes if "rms_norm" in node.name)
    assert node.args[1] is None and "aten.sigmoid" in program.op_counts()


def test_a_mean_over_another_dim_is_no_norm() -> None:
    program, _ = toy_program(lambda toy, x, p: x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6))
    assert apply(program, MatchNorm()) == [0]


def test_rotated_thirds_are_no_rope() -> None:
    def body(toy, x, positions):
        x4 = x[:, None]
        rotated = torch.cat((-x4[..., 5:], x4[..., :5]), dim=-1)
        return (x4 * x4.cos() + rotated * x4.sin())[:, 0]

    program, _ = toy_program(body)
    assert apply(program, Cleanup(), MatchRope())[1] == 0


def test_an_activation_that_others_read_stays() -> None:
    def body(toy, x, positions):
        active = F.silu(x)
        return active * x + active

    program, _ = toy_program(body)
    assert apply(program, MatchMLP()) == [0]


def test_fused_weights_are_recipes_and_biases_are_fused_with_biases() -> None:
    def body(toy, x, positions):
        return toy.extra["a"](x) * toy.extra["b"](x) + toy.extra["c"](x)

    layers = {"a": nn.Linear(WIDTH, WIDTH), "b": nn.Linear(WIDTH, WIDTH), "c": nn.Linear(WIDTH, WIDTH, bias=False)}
    program, _ = toy_program(body, **layers)
    assert apply(program, FuseLinears()) == [1]
    assert program.weights["extra.a_b.weight"] == Cat((Take("extra.a.weight"), Take("extra.b.weight")), dim=0)
    assert program.weights["extra.a_b.bias"] == Cat((Take("extra.a.bias"), Take("extra.b.bias")), dim=0)
    assert program.weights["extra.c.weight"] == Take("extra.c.weight")
    assert "extra.a.weight" not in set(program.weights)


def test_a_weight_used_twice_is_not_fused() -> None:
    def body(toy, x, positions):
        return toy.extra["a"](x) + toy.extra["b"](x) + toy.extra["a"](x.exp())

    program, _ = toy_program(body, a=nn.Linear(WIDTH, WIDTH), b=nn.Linear(WIDTH, WIDTH))
    assert apply(program, FuseLinears()) == [0]


def norm_of(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def test_a_sum_goes_to_all_its_readers_and_only_one_of_two_norms_is_fused() -> None:
    def body(toy, x, positions):
        total = x + x.exp()
        return total.sin() * norm_of(total) + norm_of(total.cos() * total) + total

    program, _ = toy_program(body)
    assert apply(program, Cleanup(), MatchNorm(), FuseAddNorm())[1:] == [2, 1]
    total, normed = calls(program, operator.getitem)
    assert calls(program, ops.add_rms_norm)[0].args[2:] == (None, 1e-6, 0.0, False)
    assert len(total.users) == 4 and [user.target for user in normed.users] == [aten.mul.Tensor]


@pytest.mark.parametrize(
    "total",
    [
        lambda x: torch.add(x, x.exp(), alpha=2),
        lambda x: x + x[..., :1],
        lambda x: x + 1.0,
        lambda x: x + x.exp().transpose(1, 2).contiguous().transpose(1, 2),
    ],
    ids=["scaled", "broadcast", "number", "another layout"],
)
def test_sums_that_are_not_fused_with_their_norm(total) -> None:
    def body(toy, x, positions):
        h = total(x)
        return norm_of(h) + h

    program, _ = toy_program(body)
    assert apply(program, Cleanup(), MatchNorm(), FuseAddNorm())[1:] == [1, 0]


def test_a_sum_that_the_norm_alone_reads_leaves_no_reader_behind() -> None:
    program, _ = toy_program(lambda toy, x, positions: norm_of(x + x.exp()))
    assert apply(program, Cleanup(), MatchNorm(), FuseAddNorm())[1:] == [1, 1]
    assert [node.args[1] for node in calls(program, operator.getitem)] == [1]


def test_layers_with_shared_kv_share_one_cache_and_append_once() -> None:
    program, _ = family_program("gemma3n_text")
    apply(program, Cleanup(), InsertPagedAttention())
    counts = program.op_counts()
    assert counts["autodeploy.paged_attention"] == 4 and counts["autodeploy.kv_append"] == 2
    assert list(program.caches) == ["kv_cache_0", "kv_cache_1"]


@pytest.mark.parametrize(("family", "layers", "normed"), [("qwen3", 2, True), ("llama", 2, False), ("gpt2", 0, False)])
def test_what_is_turned_alike_is_turned_and_appended_at_once(family: str, layers: int, normed: bool) -> None:
    program, _ = family_program(family)
    apply(program, Cleanup(), MatchNorm(), MatchRope(), InsertPagedAttention())
    appends = len(calls(program, ops.kv_append))
    assert apply(program, FuseRopeAppend())[-1] == layers
    fused = calls(program, ops.rope_append)
    assert len(fused) == layers and len(calls(program, ops.kv_append)) == appends - layers and not calls(program, ops.rope)
    assert all((arguments(node)["eps"] >= 0) == normed for node in fused)


def test_queries_turned_by_other_angles_are_left_alone() -> None:
    program, _ = family_program("llama")
    apply(program, Cleanup(), MatchRope(), InsertPagedAttention())
    queries = calls(program, ops.rope)[0]
    queries.args = (queries.args[0], queries.args[2], queries.args[1], False)
    assert apply(program, FuseRopeAppend())[-1] == 1 and len(calls(program, ops.rope)) == 2


def test_windows_become_sliding_window_caches() -> None:
    program, _ = family_program("gemma2")
    apply(program, Cleanup(), InsertPagedAttention())
    assert [getattr(spec, "window", 0) for spec in program.caches.values()] == [8, 0, 8, 0]


@pytest.mark.parametrize("fused", [(), (MatchMLP(), FuseLinears(), FuseAddNorm())], ids=["plain", "fused"])
def test_only_wanted_rows_go_through_what_lies_behind_the_last_attention(fused: tuple[Transform, ...]) -> None:
    program, _ = family_program("gemma2")
    apply(program, Cleanup(), MatchNorm(), *fused, InsertPagedAttention(), GatherLogits())
    nodes = list(program.graph.graph.nodes)
    last = nodes.index(calls(program, ops.paged_attention)[-1])
    rows = {node: str(val(node).shape[1]) for node in nodes[last:] if node.target is aten.linear.default}
    assert len(rows) == (5 if not fused else 4) and set(rows.values()) == {str(val(program_output(program)).shape[1])}
    first, second = calls(program, aten.index_select.default)
    assert first.args[1:] == second.args[1:] and str(first.args[2]) == "logits_indices"
    assert "logits_indices" in program.inputs


def program_output(program: Program) -> Any:
    return program.graph.graph.output_node().args[0]


def test_rows_are_selected_in_front_of_what_mixes_them() -> None:
    def body(toy, x, positions):
        return toy.extra["a"](x.cumsum(1)).exp() + x.sin().mean(1, keepdim=True)

    program, _ = toy_program(body, a=nn.Linear(WIDTH, WIDTH))
    assert apply(program, Cleanup(), GatherLogits()) == [0, 1]
    (selected,) = calls(program, aten.index_select.default)
    assert selected.args[0].target is aten.cumsum.default and [user.target for user in selected.users] == [aten.linear.default]


def test_a_part_of_what_others_need_whole_is_selected_by_itself() -> None:
    def body(toy, x, positions):
        part, other = x.cumsum(1).split([8, 8], dim=-1)
        return toy.extra["a"](part.exp() * part) + other.sum()

    program, _ = toy_program(body, a=nn.Linear(8, WIDTH))
    assert apply(program, Cleanup(), GatherLogits())[-1] == 1
    (selected,) = calls(program, aten.index_select.default)
    assert selected.args[0].target is operator.getitem and len(selected.users) == 2


def test_every_semantic_op_gets_a_provider_and_mutating_ones_survive_dead_code_elimination() -> None:
    program, _ = family_program("qwen3")
    apply(program, Cleanup(), InsertPagedAttention(), SelectKernels())
    assert set(program.providers) == {"attention", "embedding", "kv_append", "linear", "paged_attention"}
    program.graph.graph.eliminate_dead_code()
    assert sum(symbolic(node.target) is ops.kv_append.overload for node in program.graph.graph.nodes) == 2


def test_pipeline_edits_are_by_name_with_a_suggestion() -> None:
    pipeline = default_pipeline()
    assert pipeline.without("match_rope", "match_mlp").names() == [
        n for n in pipeline.names() if n not in ("match_rope", "match_mlp")
    ]
    assert pipeline.without("match_mlp").insert_after("cleanup", MatchMLP()).names()[:2] == ["cleanup", "match_mlp"]
    with pytest.raises(ConfigError, match="Did you mean 'match_rope'"):
        pipeline.insert_before("match_rop", MatchMLP())
    with pytest.raises(ConfigError, match="no option 'width'"):
        pipeline.configure("match_mlp", width=3)


def test_a_pass_that_leaves_the_program_broken_is_named() -> None:
    class Breaks(Cleanup):
        name = "breaks"

        def apply(self, program, target):
            program.inputs["nonsense"] = program.inputs["input_ids"]
            return 1

    program, _ = family_program("qwen3", num_hidden_layers=1)
    with pytest.raises(TransformError, match=r"breaks.*nonsense.*Passes before it: cleanup"):
        apply(program, Cleanup(), Breaks())
