"""Wrong rewrites made by hand, and which part of the verification stops each.

`python -m tests.transforms.seeded_bugs` writes the table in docs/verification.md anew.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from autodeploy import Effect, Pipeline, Program, Target, default_pipeline
from autodeploy import custom_ops as ops
from autodeploy.capture.export import capture
from autodeploy.capture.skeleton import skeleton_of
from autodeploy.recipes import Cast, Cat, Recipe, Reshape, Slice, Take, Unary
from autodeploy.transforms.rewrite import aten, calls, erase_dead, insert_call, insert_parameter, replace_call, val
from autodeploy.transforms.verify import VerificationError, verify_structure
from autodeploy.transforms.verify_numeric import NumericVerifier, leaf_types
from tests.models.families import make_model
from tests.transforms.helpers import family_program

Damage = Callable[[Program], None]
REWRITE, FUSION, PARAMETERS, INPUTS = Effect.REWRITE, Effect.FUSION, Effect.PARAMETERS, Effect.INPUTS
STAGES = {
    "exported": "cleanup",
    "canonical": "fuse_linears",
    "fused": "fuse_add_norm",
    "lowered": "gather_logits",
    "appended": "fuse_rope_append",
}
"""Stage -> the last pass before the damage."""
TWO_LAYERS: dict[str, Any] = {"num_hidden_layers": 2}
MIXED = {**TWO_LAYERS, "layer_types": ["sliding_attention", "full_attention"]}
SCALES = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 4.0, "attention_multiplier": 0.25}
FAMILIES: dict[str, dict[str, Any]] = {
    "granite_swa": {**MIXED, **SCALES},
    "gemma2": MIXED,
    "starcoder2": TWO_LAYERS,
    "qwen3": TWO_LAYERS,  # its parameters in bfloat16
    "gpt2": {"n_layer": 2},
    "youtu": TWO_LAYERS,  # attention over a latent
}


@dataclass(frozen=True)
class Bug:
    name: str
    kind: str
    """dtype, shape, numbers, recipe, order"""
    family: str
    stage: str
    effect: Effect
    """What the wrong pass declares."""
    damage: Damage


# What a damage is made of


def edit(target: Any, index: int, change: Callable[[Any], Any], nth: int = 0) -> Damage:
    """One argument of one call is something else."""

    def damage(program: Program) -> None:
        node = calls(program, target)[nth]
        node.args = (*node.args[:index], change(node.args[index]), *node.args[index + 1 :])

    return damage


def swap(target: Any, i: int, j: int, nth: int = 0) -> Damage:
    def damage(program: Program) -> None:
        node = calls(program, target)[nth]
        args = list(node.args)
        args[i], args[j] = args[j], args[i]
        node.args = tuple(args)

    return damage


def exchange(target: Any, index: int, first: int, second: int) -> Damage:
    """Two calls have each other's argument."""

    def damage(program: Program) -> None:
        a, b = calls(program, target)[first], calls(program, target)[second]
        mine, other = a.args[index], b.args[index]
        if isinstance(other, fx.Node) and other.op == "get_attr":
            a.prepend(other)
        a.args, b.args = (*a.args[:index], other, *a.args[index + 1 :]), (*b.args[:index], mine, *b.args[index + 1 :])

    return damage


def take(target: Any, index: int, source: int, nth: int) -> Damage:
    """The nth call has the argument of another."""

    def damage(program: Program) -> None:
        edit(target, index, lambda _: calls(program, target)[source].args[index], nth)(program)

    return damage


def drop(target: Any, index: int) -> Damage:
    """The call ends before that argument."""

    def damage(program: Program) -> None:
        node = calls(program, target)[0]
        node.args = node.args[:index]

    return damage


def bypass(target: Any, nth: int = 0) -> Damage:
    def damage(program: Program) -> None:
        node = calls(program, target)[nth]
        node.replace_all_uses_with(node.args[0])  # pyright: ignore[reportArgumentType]

    return damage


def become(target: Any, other: Any, nth: int = 0) -> Damage:
    def damage(program: Program) -> None:
        node = calls(program, target)[nth]
        replace_call(program, node, other, *node.args)

    return damage


def after(target: Any, op: Any, *args: Any, nth: int = 0) -> Damage:
    """Every user reads op(result, *args)."""

    def damage(program: Program) -> None:
        node = calls(program, target)[nth]
        changed = insert_call(program, node.next, op, node, *args)
        node.replace_all_uses_with(changed, delete_user_cb=lambda user: user is not changed)

    return damage


def before(target: Any, index: int, op: Any, *args: Any, nth: int = 0) -> Damage:
    """One argument passes through op(argument, *args) first."""

    def damage(program: Program) -> None:
        node = calls(program, target)[nth]
        node.args = (
            *node.args[:index],
            insert_call(program, node, op, node.args[index], *args),
            *node.args[index + 1 :],
        )

    return damage


def value(target: Any, change: Callable[[Tensor], Tensor] | None) -> Damage:
    """The value noted for a node is another one, or none."""

    def damage(program: Program) -> None:
        node = calls(program, target)[0]
        known = node.meta.pop("val")
        if change is not None:
            node.meta["val"] = change(known)

    return damage


@dataclass(frozen=True)
class Altered(Unary):
    """A recipe with a step that does not belong there."""

    change: Callable[[Tensor], Tensor]

    def __str__(self) -> str:
        return f"altered({self.source})"

    def apply(self, *tensors: Tensor) -> Tensor:
        return self.change(tensors[0])


def recipe(ending: str, change: Callable[[Any], Recipe]) -> Damage:
    """The recipe of the first parameter with that ending is another one."""

    def damage(program: Program) -> None:
        name = next(name for name in program.weights if name.endswith(ending))
        program.weights = program.weights.with_recipes({name: change(program.weights[name])})

    return damage


def altered(ending: str, change: Callable[[Tensor], Tensor]) -> Damage:
    return recipe(ending, lambda old: Altered(old, change))


def joined(ending: str, change: Callable[[tuple[Recipe, ...]], tuple[Recipe, ...]], dim: int = 0) -> Damage:
    return recipe(ending, lambda old: Cat(change(old.parts), dim))


# Damages that are more than one step


def one_user_only(program: Program) -> None:
    """A halved norm is meant for all its readers and reaches one of them."""
    linear = calls(program, aten.linear.default)[1]
    linear.args = (insert_call(program, linear, aten.mul.Tensor, linear.args[0], 0.5), *linear.args[1:])


def queries_turned_one_further(program: Program) -> None:
    rope = calls(program, ops.rope)[0]
    copies: dict[fx.Node, fx.Node] = {}

    def copy_of(node: fx.Node) -> fx.Node:
        if node.op == "placeholder":
            return copies.setdefault(node, insert_call(program, rope, aten.add.Tensor, node, 1))
        if node.op == "get_attr":
            return node
        if node not in copies:
            args = fx.map_arg(node.args, copy_of)
            copies[node] = insert_call(program, rope, node.target, *args)  # pyright: ignore
        return copies[node]

    rope.args = (rope.args[0], copy_of(rope.args[1]), copy_of(rope.args[2]), rope.args[3])  # pyright: ignore


def positions_for_tokens(program: Program) -> None:
    positions = program.graph.graph.find_nodes(op="placeholder")[1]
    edit(aten.embedding.default, 1, lambda ids: positions)(program)


def untied_head(program: Program) -> None:
    head = calls(program, aten.linear.default)[-1]
    table: Any = head.args[1]
    copy = insert_parameter(program, head, "lm_head.weight", program.parameter(table.target))
    program.weights = program.weights.with_recipes({"lm_head.weight": Altered(Take(table.target), lambda t: t.roll(1, 0))})
    head.args = (head.args[0], copy)


def residual_of_another_layer(program: Program) -> None:
    adds = [node for node in calls(program, aten.add.Tensor) if val(node).dim() == 3]
    adds[2].args = (adds[0], adds[2].args[1])


def norm_of_another_layer(program: Program) -> None:
    norms = calls(program, ops.rms_norm)
    norms[2].args = (norms[1].args[0], *norms[2].args[1:])


def results_of_sum(program: Program) -> tuple[fx.Node, fx.Node]:
    """The sum and its norm, of the first of these calls."""
    total, normed = calls(program, ops.add_rms_norm)[0].users
    return total, normed


def sum_for_its_norm(program: Program) -> None:
    total, normed = results_of_sum(program)
    total.args, normed.args = normed.args, total.args


def added_twice(program: Program) -> None:
    node = calls(program, ops.add_rms_norm)[0]
    node.args = (node.args[0], node.args[0], *node.args[2:])


def sum_without_residual(program: Program) -> None:
    total, _ = results_of_sum(program)
    node: Any = total.args[0]
    total.replace_all_uses_with(node.args[0])


def norm_skipped(program: Program) -> None:
    linear: Any = calls(program, aten.linear.default)[0]
    linear.args = (linear.args[0].args[0], *linear.args[1:])


def late_append(program: Program) -> None:
    calls(program, ops.paged_attention)[0].append(calls(program, ops.kv_append)[0])


def no_append(program: Program) -> None:
    program.graph.graph.erase_node(calls(program, ops.kv_append)[1])


def appended_twice(program: Program) -> None:
    append = calls(program, ops.kv_append)[0]
    insert_call(program, append.next, ops.kv_append, *append.args)


def appends_in_another_order(program: Program) -> None:
    exchange(ops.kv_append, 2, 0, 1)(program)
    exchange(ops.paged_attention, 1, 0, 1)(program)


def shared_cache(program: Program) -> None:
    take(ops.kv_append, 2, 0, 1)(program)
    take(ops.paged_attention, 1, 0, 1)(program)


def positions_for_slots(program: Program) -> None:
    append = calls(program, ops.kv_append)[0]
    positions = program.graph.graph.find_nodes(op="placeholder")[1]
    append.args = (*append.args[:3], insert_call(program, append, aten.select.int, positions, 0, 0))


def lengths_for_starts(program: Program) -> None:
    """Number of keys instead of where the queries begin."""
    swap(ops.paged_attention, 3, 4)(program)


def logits_without_gather(program: Program) -> None:
    select = calls(program, aten.index_select.default)[0]
    select.replace_all_uses_with(select.args[0])  # pyright: ignore[reportArgumentType]


def in_place(program: Program) -> None:
    insert_call(program, program.graph.graph.output_node(), aten.relu_.default, calls(program, aten.linear.default)[-1])


def keys_rotated_with_values(program: Program) -> None:
    attention = calls(program, ops.attention)[0]
    cos, sin = calls(program, ops.rope)[1].args[1:3]
    attention.args = (
        *attention.args[:2],
        insert_call(program, attention, ops.rope, attention.args[2], cos, sin, False),
        *attention.args[3:],
    )


half, wide = torch.bfloat16, torch.float64
norm, rope, gated, attend, paged = ops.rms_norm, ops.rope, ops.gated_activation, ops.attention, ops.paged_attention
add_norm = ops.add_rms_norm
linear, add, mul, getitem, split = (
    aten.linear.default,
    aten.add.Tensor,
    aten.mul.Tensor,
    operator.getitem,
    aten.split_with_sizes.default,
)
G, M, S, Q, P, Y = "granite_swa", "gemma2", "starcoder2", "qwen3", "gpt2", "youtu"
C, F, L, A, X = "canonical", "fused", "lowered", "appended", "exported"

BUGS = [
    # one number or argument of a call
    Bug("norm with another eps", "numbers", G, C, FUSION, edit(norm, 2, lambda eps: 1e-2)),
    Bug("norm with an offset", "numbers", G, C, FUSION, edit(norm, 3, lambda offset: 1.0)),
    Bug("norm without its offset", "numbers", M, C, FUSION, edit(norm, 3, lambda offset: 0.0)),
    Bug("norm without its weight", "numbers", G, C, FUSION, edit(norm, 1, lambda weight: None)),
    Bug("norm left out", "numbers", G, C, FUSION, bypass(norm)),
    Bug("norm after attention left out", "numbers", M, C, FUSION, bypass(norm, 1)),
    Bug("norm of the keys left out", "numbers", Q, C, FUSION, bypass(norm, 2)),
    Bug("norm weights of two norms exchanged", "numbers", G, C, FUSION, exchange(norm, 1, 0, 1)),
    Bug("norm reads another layer", "numbers", G, C, FUSION, norm_of_another_layer),
    Bug("linear reads past the norm", "numbers", G, C, REWRITE, norm_skipped),
    Bug("layer norm with another eps", "numbers", S, C, FUSION, edit(ops.layer_norm, 3, lambda eps: 1e-2)),
    Bug("layer norm without its bias", "numbers", S, C, FUSION, edit(ops.layer_norm, 2, lambda bias: None)),
    Bug("layer norm with weight and bias swapped", "numbers", S, C, FUSION, swap(ops.layer_norm, 1, 2)),
    Bug("layer norm taken for an rms norm", "numbers", S, C, FUSION, lambda program: replace_by_rms(program)),
    Bug("cos and sin swapped", "numbers", G, C, FUSION, swap(rope, 1, 2)),
    Bug("rope by pairs instead of halves", "numbers", G, C, FUSION, edit(rope, 3, lambda interleaved: True)),
    Bug("rope left out", "numbers", G, C, FUSION, bypass(rope)),
    Bug("rope applied twice", "numbers", G, C, FUSION, lambda program: after_rope(program)),
    Bug("rope of the queries one position further", "numbers", G, C, FUSION, queries_turned_one_further),
    Bug("rope on the values too", "numbers", G, C, FUSION, keys_rotated_with_values),
    Bug("rope frequencies divided instead of multiplied", "numbers", G, C, REWRITE, become(mul, aten.div.Tensor, 1)),
    Bug("cos folded with the wrong scale", "numbers", G, C, REWRITE, edit(mul, 1, lambda scale: 1.001, 2)),
    Bug("learned positions off by one", "numbers", P, C, REWRITE, before(aten.embedding.default, 1, aten.add.Tensor, 1, nth=1)),
    Bug("positions for tokens", "numbers", G, C, REWRITE, positions_for_tokens),
    Bug("gate and up swapped", "numbers", G, C, FUSION, swap(gated, 0, 1)),
    Bug("gate used twice", "numbers", G, C, FUSION, lambda program: gate_twice(program)),
    Bug("another gated activation", "numbers", G, C, FUSION, edit(gated, 2, lambda name: "gelu")),
    Bug("exact gelu for its tanh form", "numbers", M, C, FUSION, edit(gated, 2, lambda name: "gelu")),
    Bug("silu for gelu", "numbers", S, C, REWRITE, become(aten.gelu.default, aten.silu.default)),
    Bug("gelu loses its tanh form", "numbers", S, C, REWRITE, become(aten.gelu.default, aten.gelu.default)),
    Bug("attention scale a little off", "numbers", G, C, FUSION, edit(attend, 4, lambda scale: scale * 0.99)),
    Bug("attention scale applied to the queries too", "numbers", G, C, FUSION, before(attend, 0, mul, 0.25)),
    Bug("window off by one", "numbers", G, C, FUSION, edit(attend, 5, lambda window: window + 1)),
    Bug("window lost", "numbers", G, C, FUSION, edit(attend, 5, lambda window: 0)),
    Bug("windows of two layers exchanged", "numbers", M, C, FUSION, exchange(attend, 5, 0, 1)),
    Bug("softcap lost", "numbers", M, C, FUSION, edit(attend, 6, lambda softcap: 0.0)),
    Bug("sinks lost", "numbers", G, C, FUSION, edit(attend, 3, lambda sinks: None)),
    Bug("sinks of another layer", "numbers", G, C, FUSION, take(attend, 3, 1, 0)),
    Bug("keys and values swapped", "numbers", G, C, FUSION, swap(attend, 1, 2)),
    Bug("keys of another layer", "numbers", G, C, FUSION, take(attend, 1, 0, 1)),
    Bug("heads in reverse order", "numbers", G, C, FUSION, after(attend, aten.flip.default, [2])),
    Bug("residual left out", "numbers", G, C, REWRITE, bypass(add)),
    Bug("residual subtracted", "numbers", G, C, REWRITE, become(add, aten.sub.Tensor)),
    Bug("residual added to itself", "numbers", G, C, REWRITE, lambda program: doubled_residual(program)),
    Bug("residual of another layer", "numbers", G, C, REWRITE, residual_of_another_layer),
    Bug("linear scaled by a half", "numbers", G, C, REWRITE, after(linear, mul, 0.5)),
    Bug("embedding scale dropped", "numbers", M, C, REWRITE, bypass(mul)),
    Bug("residual scale dropped", "numbers", G, C, REWRITE, bypass(mul, 4)),
    Bug("residual scaled twice", "numbers", G, C, REWRITE, after(mul, mul, 0.5, nth=4)),
    Bug("logits multiplied instead of divided", "numbers", G, C, REWRITE, become(aten.div.Tensor, mul)),
    Bug("softcap of the logits dropped", "numbers", M, C, REWRITE, bypass(aten.tanh.default)),
    Bug("bias dropped", "numbers", S, C, REWRITE, drop(linear, 2)),
    Bug("biases of two layers exchanged", "numbers", S, C, REWRITE, exchange(linear, 2, 0, 4)),
    Bug("square weight transposed", "numbers", G, C, REWRITE, before(linear, 1, aten.t.default, nth=1)),
    Bug("parts of a split exchanged", "numbers", G, C, REWRITE, exchange(getitem, 1, 1, 2)),
    Bug("only one of three users redirected", "numbers", G, X, REWRITE, one_user_only),
    Bug("linears read each other's weight", "numbers", G, X, REWRITE, exchange(linear, 1, 1, 2)),
    Bug("values rounded on the way", "numbers", G, C, FUSION, lambda program: rounded(program)),
    Bug("sum and its norm exchanged", "numbers", G, F, FUSION, sum_for_its_norm),
    Bug("residual added twice before a norm", "numbers", G, F, FUSION, added_twice),
    Bug("sum with the residual of another layer", "numbers", G, F, FUSION, take(add_norm, 1, 0, 2)),
    Bug("fused norm with another norm's weight", "numbers", G, F, FUSION, exchange(add_norm, 2, 0, 1)),
    Bug("fused norm with another eps", "numbers", G, F, FUSION, edit(add_norm, 3, lambda eps: 1e-2)),
    Bug("fused norm without its offset", "numbers", M, F, FUSION, edit(add_norm, 4, lambda offset: 0.0)),
    Bug("readers of a sum get it without the residual", "numbers", G, F, FUSION, sum_without_residual),
    Bug("paged scale negated", "numbers", G, L, FUSION, edit(paged, 6, lambda scale: -scale)),
    Bug("paged window one short", "numbers", G, L, FUSION, edit(paged, 7, lambda window: window - 1)),
    Bug("paged softcap lost", "numbers", M, L, INPUTS, edit(paged, 8, lambda softcap: 0.0)),
    Bug("paged sinks lost", "numbers", G, L, INPUTS, edit(paged, 5, lambda sinks: None)),
    Bug("pages in reverse order", "numbers", G, L, INPUTS, before(paged, 2, aten.flip.default, [1])),
    Bug("one key too few", "numbers", G, L, INPUTS, before(paged, 4, aten.sub.Tensor, 1)),
    Bug("query starts and key counts swapped", "numbers", G, L, INPUTS, lengths_for_starts),
    Bug("logits of the wrong rows", "numbers", G, L, INPUTS, before(aten.index_select.default, 2, aten.flip.default, [0])),
    # recipes
    Bug("joined parts in reverse order", "recipe", G, C, PARAMETERS, joined("v_proj.weight", lambda parts: parts[::-1])),
    Bug("a joined part twice", "recipe", G, C, PARAMETERS, joined("v_proj.weight", lambda parts: (*parts[:2], parts[1]))),
    Bug("a joined part missing", "recipe", G, C, PARAMETERS, joined("up_proj.weight", lambda parts: parts[:1])),
    Bug("parts joined along the other dim", "recipe", G, C, PARAMETERS, joined("up_proj.weight", lambda parts: parts, 1)),
    Bug("biases joined in another order", "recipe", S, C, PARAMETERS, joined("v_proj.bias", lambda p: (p[0], p[2], p[1]))),
    Bug(
        "another layer's weight",
        "recipe",
        G,
        C,
        PARAMETERS,
        recipe("0.mlp.down_proj.weight", lambda old: Take(old.name.replace("0", "1"))),
    ),
    Bug("recipe changed without saying so", "recipe", G, C, REWRITE, altered("down_proj.weight", lambda t: t)),
    Bug("transposed recipe of a square matrix", "recipe", G, C, PARAMETERS, altered("o_proj.weight", lambda t: t.T)),
    Bug("rows one too far", "recipe", G, C, PARAMETERS, altered("o_proj.weight", lambda t: t.roll(1, 0))),
    Bug("rows not sliced", "recipe", G, C, PARAMETERS, altered("o_proj.weight", lambda t: torch.cat([t, t]))),
    Bug("recipe casts to half precision", "recipe", G, C, PARAMETERS, recipe("o_proj.weight", lambda old: Cast(old, half))),
    Bug("recipe rounds", "recipe", G, C, PARAMETERS, altered("o_proj.weight", lambda t: t.to(half).to(t.dtype))),
    Bug("offset of the norm weight folded in twice", "recipe", M, C, PARAMETERS, altered("layernorm.weight", lambda t: t + 1)),
    Bug("frequencies folded wrongly", "recipe", G, C, PARAMETERS, altered("inv_freq", lambda t: t * 0.5)),
    Bug("recipe of a tensor that is not there", "recipe", G, C, PARAMETERS, recipe("o_proj.weight", lambda _: Take("nowhere"))),
    Bug("head no longer the tied table", "recipe", M, C, PARAMETERS, untied_head),
    # attention over a latent
    Bug("rows for keys and for values exchanged", "numbers", Y, C, PARAMETERS, lambda program: queries_by_value_rows(program)),
    Bug("scale of the longer keys", "numbers", Y, C, PARAMETERS, edit(attend, 4, lambda scale: 40**-0.5)),
    Bug("shared part of the queries behind the latent", "numbers", Y, C, PARAMETERS, lambda p: latent_parts_exchanged(0)(p)),
    Bug("shared part of the keys behind the latent", "numbers", Y, C, PARAMETERS, lambda p: latent_parts_exchanged(1)(p)),
    Bug("values cut from the front of the keys", "numbers", Y, C, PARAMETERS, lambda p: values_from_the_shared_part_on(p)),
    Bug("values read before their norm", "numbers", Y, C, PARAMETERS, lambda program: latent_before_its_norm(program)),
    Bug("latent of another layer", "numbers", Y, C, PARAMETERS, lambda program: latent_of_another_layer(program)),
    Bug("rows for keys one too far", "recipe", Y, C, PARAMETERS, recipe("kv_b_proj.keys", lambda old: moved_on(old))),
    Bug("rows for values one too near", "recipe", Y, C, PARAMETERS, recipe("kv_b_proj.values", lambda old: moved_on(old, -1))),
    Bug("rows for values of another head", "recipe", Y, C, PARAMETERS, altered("kv_b_proj.values", lambda t: t.roll(1, 0))),
    Bug("heads taken for the inner dim of rows", "recipe", Y, C, PARAMETERS, recipe("kv_b_proj.keys", lambda o: regrouped(o))),
    Bug("latent cache read past its values", "order", Y, L, INPUTS, lambda program: latent_parts_exchanged_when_paged(program)),
    # order and caches
    Bug("read before written", "order", G, L, INPUTS, late_append),
    Bug("a layer appends nothing", "order", G, L, INPUTS, no_append),
    Bug("a layer appends twice", "order", G, L, REWRITE, appended_twice),
    Bug("appends in another order", "order", Q, L, REWRITE, appends_in_another_order),
    Bug("cache of another layer for reading", "order", Q, L, INPUTS, take(paged, 1, 0, 1)),
    Bug("cache of another layer", "order", Q, L, INPUTS, shared_cache),
    Bug("caches of two layers exchanged for reading", "order", Q, L, INPUTS, exchange(paged, 1, 0, 1)),
    Bug("keys appended as values", "order", G, L, INPUTS, swap(ops.kv_append, 0, 1)),
    Bug("positions for slots", "order", G, L, INPUTS, positions_for_slots),
    Bug("slots one too far", "order", G, L, INPUTS, before(ops.kv_append, 3, aten.add.Tensor, 1)),
    Bug("keys turned and stored as values", "order", G, A, FUSION, swap(ops.rope_append, 1, 2)),
    Bug("turned keys in the cache of another layer", "order", Q, A, REWRITE, take(ops.rope_append, 3, 0, 1)),
    Bug("turned keys one slot too far", "order", G, A, FUSION, before(ops.rope_append, 4, aten.add.Tensor, 1)),
    Bug("keys normed without their weight", "numbers", Q, A, FUSION, edit(ops.rope_append, 9, lambda _: None)),
    Bug("neither queries nor keys normed", "numbers", Q, A, FUSION, edit(ops.rope_append, 10, lambda _: -1.0)),
    Bug("turned by pairs in place of halves", "numbers", Q, A, FUSION, edit(ops.rope_append, 7, lambda _: True)),
    Bug("sin for cos where keys are stored", "numbers", G, A, FUSION, swap(ops.rope_append, 5, 6)),
    Bug("writes into a value", "order", G, C, REWRITE, in_place),
    # dtypes and shapes
    Bug("stale dtype", "dtype", G, C, REWRITE, value(linear, lambda known: known.to(half))),
    Bug("no value noted", "dtype", G, C, REWRITE, value(linear, None)),
    Bug("input of a linear widened", "dtype", G, C, FUSION, before(linear, 0, aten.to.dtype, wide)),
    Bug("weight of a linear narrowed", "dtype", G, C, FUSION, before(linear, 1, aten.to.dtype, half)),
    Bug("input of a norm widened", "dtype", Q, C, FUSION, before(norm, 0, aten.to.dtype, torch.float32)),
    Bug("residual of a fused norm widened", "dtype", Q, F, FUSION, before(add_norm, 1, aten.to.dtype, torch.float32)),
    Bug("residual in another dtype", "dtype", Q, C, FUSION, before(add, 0, aten.to.dtype, torch.float32)),
    Bug("logits in another dtype", "dtype", G, C, FUSION, lambda program: output_through(program, aten.to.dtype, half)),
    Bug("cast of cos left out", "dtype", Q, C, FUSION, lambda program: cos_uncast(program)),
    Bug("activation not cast back", "dtype", G, C, FUSION, after(gated, aten.to.dtype, half)),
    Bug("queries narrowed", "dtype", G, L, FUSION, before(paged, 0, aten.to.dtype, half)),
    Bug("keys narrowed before they are stored", "dtype", G, L, INPUTS, before(ops.kv_append, 0, aten.to.dtype, half)),
    Bug("cos widened where keys are stored", "dtype", Q, A, FUSION, before(ops.rope_append, 5, aten.to.dtype, torch.float32)),
    Bug("values narrowed where keys are stored", "dtype", G, A, FUSION, before(ops.rope_append, 2, aten.to.dtype, half)),
    Bug("cos widened", "dtype", Q, C, FUSION, before(rope, 1, aten.to.dtype, torch.float32)),
    Bug("up widened", "dtype", Q, C, FUSION, before(gated, 1, aten.to.dtype, torch.float32)),
    Bug("a third result of two", "shape", G, F, FUSION, edit(getitem, 1, lambda place: 2, 3)),
    Bug("stale shape", "shape", G, C, REWRITE, value(linear, lambda known: known[..., :3])),
    Bug("input and weight of a linear swapped", "shape", G, C, REWRITE, swap(linear, 0, 1)),
    Bug("split sizes swapped", "shape", G, C, PARAMETERS, edit(split, 1, lambda sizes: [sizes[1], sizes[0], sizes[2]])),
    Bug("split along the tokens", "shape", G, C, PARAMETERS, edit(split, 2, lambda dim: 1)),
    Bug("queries taken for keys", "shape", G, C, REWRITE, exchange(getitem, 1, 0, 1)),
    Bug("heads and tokens not exchanged", "shape", G, C, REWRITE, edit(aten.transpose.int, 2, lambda dim: 3)),
    Bug("joined along the tokens", "shape", G, C, REWRITE, edit(aten.cat.default, 1, lambda dim: 1)),
    Bug("cos broadcast over tokens", "shape", G, C, REWRITE, edit(aten.unsqueeze.default, 1, lambda dim: 2, 1)),
    Bug("half the vocabulary", "shape", G, C, REWRITE, lambda program: output_through(program, aten.slice.Tensor, 2, 0, 9)),
    Bug("head dim doubled in a view", "shape", G, C, REWRITE, edit(aten.view.default, 1, lambda sizes: [*sizes[:3], 32])),
    Bug("logits of all rows", "shape", G, L, REWRITE, logits_without_gather),
]


def latent_parts_exchanged(nth: int) -> Damage:
    """The shared part after the latent one: in the queries (0) or in the keys (1) of the first layer."""

    def damage(program: Program) -> None:
        node: Any = calls(program, attend)[0].args[nth]
        node.args = (node.args[0][::-1], *node.args[1:])

    return damage


def queries_by_value_rows(program: Program) -> None:
    """Rows for keys and rows for values have the same shape here."""
    nodes: Any = calls(program, aten.einsum.default)[:2]
    rows = [node.args[1][1] for node in nodes]
    for node, other in zip(nodes, reversed(rows), strict=True):
        node.args = (node.args[0], [node.args[1][0], other])


def latent_parts_exchanged_when_paged(program: Program) -> None:
    """What is appended ends with the shared part, and values are the last numbers of a slot."""
    node: Any = calls(program, ops.kv_append)[0].args[0]
    node.args = (node.args[0][::-1], *node.args[1:])


def moved_on(cut: Slice, by: int = 1) -> Slice:
    return replace(cut, start=cut.start + by, stop=cut.stop + by)


def regrouped(cut: Slice) -> Recipe:
    """Row i of head h is the weight's row i * H + h."""
    whole: Any = cut.source
    heads, stride, rank = whole.shape
    by_row = Altered(Reshape(whole.source, (stride, heads, rank)), lambda t: t.transpose(0, 1).contiguous())
    return replace(cut, source=by_row)


def values_from_the_shared_part_on(program: Program) -> None:
    """As wide as the latent, but cut from the front of the keys."""
    node: Any = calls(program, attend)[0]
    keys, values = node.args[1:3]
    node.args = (*node.args[:2], insert_call(program, node, aten.slice.Tensor, keys, 3, 0, val(values).shape[3]), *node.args[3:])


def latent_before_its_norm(program: Program) -> None:
    node: Any = calls(program, attend)[0]
    latent = node.args[2]
    before_norm = insert_call(program, node, latent.target, latent.args[0].args[0], *latent.args[1:])
    node.args = (*node.args[:2], before_norm, *node.args[3:])


def latent_of_another_layer(program: Program) -> None:
    take(attend, 2, 0, 1)(program)


def replace_by_rms(program: Program) -> None:
    node: Any = calls(program, ops.layer_norm)[0]
    replace_call(program, node, norm, node.args[0], node.args[1], node.args[3], 0.0, False)


def after_rope(program: Program) -> None:
    node = calls(program, rope)[0]
    after(rope, rope, *node.args[1:])(program)


def gate_twice(program: Program) -> None:
    node = calls(program, gated)[0]
    node.args = (node.args[0], node.args[0], node.args[2])


def doubled_residual(program: Program) -> None:
    node = calls(program, add)[0]
    node.args = (node.args[0], node.args[0])


def rounded(program: Program) -> None:
    """Through bfloat16 and back: the dtypes agree and float64 shows nothing."""
    node = calls(program, norm)[0]
    node.args = (insert_call(program, node, aten.to.dtype, node.args[0], half), *node.args[1:])
    node.args = (insert_call(program, node, aten.to.dtype, node.args[0], torch.float32), *node.args[1:])


def output_through(program: Program, op: Any, *args: Any) -> None:
    output = program.graph.graph.output_node()
    old: Any = output.args[0]
    output.args = (insert_call(program, output, op, old, *args),)


def cos_uncast(program: Program) -> None:
    """cos and sin are computed in float32; the cast to the model's dtype goes."""
    cos = calls(program, aten.cos.default)[0]
    cast = next(node for node in calls(program, aten.to.dtype) if node.args[1] is half and cos in reached(node))
    cast.replace_all_uses_with(cast.args[0])  # pyright: ignore[reportArgumentType]


def reached(node: fx.Node) -> set[fx.Node]:
    """All that a node is computed from."""
    return {node}.union(*map(reached, node.all_input_nodes))


# Running them


def bfloat16_program(family: str, overrides: dict[str, Any]) -> Program:
    model = make_model(family, **overrides)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(half)
    return capture(skeleton_of(model), dict(model.named_buffers())).program


@dataclass(frozen=True)
class Bench:
    """Programs of every family at every stage."""

    programs: dict[tuple[str, str], Program]
    verifiers: dict[str, NumericVerifier]

    @classmethod
    def build(cls) -> Bench:
        programs, verifiers = {}, {}
        for family, overrides in FAMILIES.items():
            program = bfloat16_program(family, overrides) if family == Q else family_program(family, **overrides)[0]
            verifiers[family] = NumericVerifier(leaf_types(program))
            for item in default_pipeline():
                Pipeline((item,)).run(program, Target())
                programs |= {(family, s): program.snapshot().as_program() for s, last in STAGES.items() if last == item.name}
        return cls(programs, verifiers)

    def caught_by(self, bug: Bug) -> str:
        """structure, numbers or nothing."""
        program = self.programs[bug.family, bug.stage].snapshot().as_program()
        snapshot = program.snapshot()
        bug.damage(program)
        erase_dead(program)
        try:
            verify_structure(snapshot, program, bug.effect)
        except VerificationError:
            return "structure"
        try:
            self.verifiers[bug.family].compare(snapshot.as_program(), program, bug.effect)
        except Exception:  # a graph that cannot be run is caught as well: the pipeline takes any error for a failed pass
            return "numbers"
        return "nothing"


DOCUMENT = Path(__file__).parents[2] / "docs" / "verification.md"
HEAD = "| wrong rewrite | kind | program | level | declared as | caught by |"


def table(found: dict[str, str]) -> str:
    rows = [[bug.name, bug.kind, bug.family, bug.stage, bug.effect.value, found[bug.name]] for bug in BUGS]
    return "\n".join([HEAD, "|---|---|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def main() -> None:
    bench = Bench.build()
    text = DOCUMENT.read_text()
    DOCUMENT.write_text(text[: text.index(HEAD)] + table({bug.name: bench.caught_by(bug) for bug in BUGS}))


if __name__ == "__main__":
    main()
