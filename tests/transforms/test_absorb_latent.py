"""Attention over a latent is absorbed in every form it is written in, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import autodeploy
from autodeploy import Program, Target, UnsupportedModelError, default_pipeline
from autodeploy import custom_ops as ops
from autodeploy.recipes import Reshape, Slice, Take, evaluate, substitute
from autodeploy.specs import LatentKV
from autodeploy.transforms.absorb_latent import AbsorbLatent
from autodeploy.transforms.cleanup import Cleanup
from autodeploy.transforms.insert_paged_attention import InsertPagedAttention
from autodeploy.transforms.pipeline import Pipeline
from autodeploy.transforms.rewrite import calls
from autodeploy.transforms.verify_numeric import NumericVerifier, leaf_types
from tests.models.families import COMMON, make_model
from tests.models.mechanisms import LATENT
from tests.models.parity import check_logits
from tests.transforms.helpers import WIDTH, apply, family_program, toy_program

H, R, DN, DR, DV = 4, 6, 4, 2, 5

Parts = tuple[Tensor, Tensor]
Expand = Callable[[Any, Tensor], Parts]


def per_head(toy: Any, latent: Tensor) -> Parts:
    heads = toy.extra["kv"](latent).view(1, -1, H, DN + DV).transpose(1, 2)
    return heads.split([DN, DV], dim=-1)  # pyright: ignore


def sliced_unflattened(toy: Any, latent: Tensor) -> Parts:
    heads = toy.extra["kv"](latent).unflatten(-1, (H, -1)).permute(0, 2, 1, 3).contiguous()
    return heads[..., :DN], heads[..., DN:]


def values_first(toy: Any, latent: Tensor) -> Parts:
    heads = toy.extra["kv"](latent).reshape(1, -1, H, DN + DV).movedim(2, 1)
    return heads[..., DV:], heads[..., :DV]


def all_keys_then_all_values(toy: Any, latent: Tensor) -> Parts:
    k, v = toy.extra["kv"](latent).split([H * DN, H * DV], dim=-1)
    return k.view(1, -1, H, DN).transpose(1, 2), v.view(1, -1, H, DV).transpose(1, 2)


def two_linears(toy: Any, latent: Tensor) -> Parts:
    k, v = toy.extra["k"](latent), toy.extra["v"](latent)
    return k.view(1, -1, H, DN).transpose(1, 2), v.view(1, -1, H, DV).transpose(1, 2)


def one_more_dim(toy: Any, latent: Tensor) -> Parts:
    return per_head(toy, latent.view(1, 1, -1, R))


def rope_last(k: Tensor, shared: Tensor) -> Tensor:
    return torch.cat([k, shared.unsqueeze(1).expand(-1, H, -1, -1)], dim=-1)


def rope_first_repeated(k: Tensor, shared: Tensor) -> Tensor:
    return torch.cat([shared[:, None].repeat(1, H, 1, 1), k], dim=3)


def written_into_place(k: Tensor, shared: Tensor) -> Tensor:
    keys = k.new_empty(1, H, k.shape[2], DN + DR)
    keys[..., :DR].copy_(shared.view(1, -1, 1, DR).transpose(1, 2).expand(1, H, -1, DR))
    keys[..., DR:] = k
    return keys


def no_rope(k: Tensor, shared: Tensor) -> Tensor:
    return k


def latent_attention(
    expand: Expand = per_head, join: Any = rope_last, window: int = 0, bias: bool = False
) -> tuple[Program, Any]:
    """A toy with one attention over a latent; the queries are as wide as the keys."""

    def body(toy: Any, x: Tensor, positions: Tensor) -> Tensor:
        latent, shared = toy.extra["a"](x).split([R, DR], dim=-1)
        k, v = expand(toy, latent.sin())
        k = join(k, shared.cos())
        q = toy.extra["q"](x).view(1, -1, H, DN + DR).transpose(1, 2)[..., : k.shape[-1]]
        mixed = ops.attention(q, k, v, None, 0.3, window, 0.0, -1)
        return toy.extra["o"](mixed.view(1, -1, H * v.shape[-1]))

    sizes = {"a": R + DR, "q": H * (DN + DR)}
    layers = {name: nn.Linear(WIDTH, size, bias=False) for name, size in sizes.items()}
    layers |= {name: nn.Linear(R, H * size, bias=bias) for name, size in {"kv": DN + DV, "k": DN, "v": DV}.items()}
    return toy_program(body, **layers, o=nn.Linear(H * DV, WIDTH))


def absorb(program: Program) -> int:
    """Rewrites that the pass makes, its numbers verified."""
    apply(program, Cleanup())
    Pipeline((AbsorbLatent(),)).run(program, Target(), verify="numeric")
    assert apply(program, AbsorbLatent()) == [0]
    return next(record.rewrites for record in program.history if record.name == "absorb_latent")


EXPANSIONS = [per_head, sliced_unflattened, values_first, all_keys_then_all_values, two_linears, one_more_dim]


@pytest.mark.parametrize(
    ("expand", "join"),
    [*((expand, rope_last) for expand in EXPANSIONS), (per_head, rope_first_repeated), (two_linears, written_into_place)],
)
def test_every_way_of_writing_it_is_the_same_layout(expand: Expand, join: Any) -> None:
    program, _ = latent_attention(expand, join)
    assert absorb(program) == 1
    apply(program, InsertPagedAttention())
    assert program.caches == {"kv_cache_0": LatentKV(1, DR + R, R, "float32")}
    assert not any("kv.weight" in name or name.endswith(("k.weight", "v.weight")) for name in program.weights)


def test_keys_may_have_no_part_that_heads_share() -> None:
    program, _ = latent_attention(join=no_rope)
    assert absorb(program) == 1
    (node,) = calls(program, ops.attention)
    assert node.args[1] is node.args[2]


def normed_keys(toy: Any, latent: Tensor) -> Parts:
    k, v = per_head(toy, latent)
    return k * torch.rsqrt(k.pow(2).mean(-1, keepdim=True) + 1e-6), v


def turned_keys(toy: Any, latent: Tensor) -> Parts:
    k, v = per_head(toy, latent)
    return k * torch.arange(1.0, DN + 1).cos(), v


def heads_in_reverse(toy: Any, latent: Tensor) -> Parts:
    k, v = per_head(toy, latent)
    return torch.cat([k[:, i : i + 1] for i in reversed(range(H))], dim=1), v


def heads_of_another(toy: Any, latent: Tensor) -> Parts:
    k, v = per_head(toy, latent)
    return torch.cat([k[:, :2], k[:, :2]], dim=1), v


def values_of_another_latent(toy: Any, latent: Tensor) -> Parts:
    return per_head(toy, latent)[0], per_head(toy, latent.cos())[1]


def rounded_on_the_way(toy: Any, latent: Tensor) -> Parts:
    k, v = per_head(toy, latent)
    return k.to(torch.bfloat16).to(torch.float32), v


def padded_values(toy: Any, latent: Tensor) -> Parts:
    k, v = per_head(toy, latent)
    return k, torch.cat([v[..., :-1], v.new_zeros(1, H, v.shape[2], 1)], dim=-1)


NEAR = [
    *(normed_keys, turned_keys, heads_in_reverse, heads_of_another),
    *(values_of_another_latent, rounded_on_the_way, padded_values),
]


@pytest.mark.parametrize("expand", NEAR)
def test_keys_and_values_that_are_more_than_a_linear_of_one_latent_stay(expand: Expand) -> None:
    assert absorb(latent_attention(expand)[0]) == 0


def test_a_bias_or_a_window_stays() -> None:
    assert absorb(latent_attention(bias=True)[0]) == 0
    assert absorb(latent_attention(window=3)[0]) == 0


def interleaved_rope(k: Tensor, shared: Tensor) -> Tensor:
    both = shared[:, None].expand(-1, H, -1, -1)
    return torch.cat([k[..., :1], both, k[..., 1:]], dim=-1)


def rope_of_another_token(k: Tensor, shared: Tensor) -> Tensor:
    return rope_last(torch.cat([k[:, :, 1:], k[:, :, :1]], dim=2), shared)


@pytest.mark.parametrize("join", [interleaved_rope, rope_of_another_token])
def test_keys_of_another_order_stay(join: Any) -> None:
    program, _ = latent_attention(join=join)
    assert apply(program, Cleanup(), AbsorbLatent())[1] == 0


def test_plain_attention_without_rope_stays_although_its_input_is_smaller_than_keys_and_values() -> None:
    def body(toy: Any, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = (toy.extra[name](x).view(1, -1, H, WIDTH // H).transpose(1, 2) for name in "qkv")
        return ops.attention(q, k, v, None, 0.3, 0, 0.0, -1).view(1, -1, WIDTH)

    program, _ = toy_program(body, **{name: nn.Linear(WIDTH, WIDTH, bias=False) for name in "qkv"})
    assert absorb(program) == 0


def test_two_calls_over_the_same_latent_share_a_cache_and_an_outside_reader_keeps_the_weight() -> None:
    def body(toy: Any, x: Tensor, positions: Tensor) -> Tensor:
        k, v = per_head(toy, toy.extra["a"](x).sin())
        first, second = (toy.extra[name](x).view(1, -1, H, DN).transpose(1, 2) for name in "qr")
        both = ops.attention(first, k, v, None, 0.3, 0, 0.0, -1) + ops.attention(second, k, v, None, 0.3, 0, 0.0, -1)
        return toy.extra["o"]((both + v.transpose(1, 2)).reshape(1, -1, H * DV))

    sizes = {"a": R, "q": H * DN, "r": H * DN}
    layers = {name: nn.Linear(WIDTH, size, bias=False) for name, size in sizes.items()}
    program, _ = toy_program(body, **layers, kv=nn.Linear(R, H * (DN + DV), bias=False), o=nn.Linear(H * DV, WIDTH))
    assert absorb(program) == 2
    keys = {str(node.args[1]) for node in calls(program, ops.attention)}
    assert len(keys) == 1 and {"extra.kv.weight", "extra.kv.keys", "extra.kv.values"} <= set(program.weights)


def test_the_weights_are_cut_by_recipes_that_can_be_saved_and_read_as_formulas(tmp_path: Any) -> None:
    program, _ = latent_attention()
    absorb(program)
    whole = Take("extra.kv.weight")
    assert program.weights["extra.kv.keys"] == Slice(Reshape(whole, (H, DN + DV, R)), 1, 0, DN)
    assert "extra.kv.values: float32[4, 5, 6] = extra.kv.weight.reshape(4, 9, 6)[:, 4:9]" in str(program)
    program.save(tmp_path)
    loaded = Program.load(tmp_path)
    assert str(loaded) == str(program) and loaded.weights.recipes == program.weights.recipes
    weight = torch.arange(H * (DN + DV) * R).view(-1, R)
    moved = substitute(program.weights["extra.kv.values"], {whole.name: Take("w")})
    cut = evaluate(moved, lambda leaf: {"w": weight}[leaf.name])
    assert torch.equal(cut[2], weight[2 * (DN + DV) + DN : 3 * (DN + DV)])


@pytest.mark.parametrize("name", ["minicpm3", pytest.param("deepseek_v3_dense", marks=pytest.mark.slow)])
def test_a_token_takes_the_memory_of_its_latent_and_its_shared_key(name: str) -> None:
    model = make_model(name)
    compiled = autodeploy.compile(model)
    try:
        check_logits(model, compiled)
        tensors = compiled.runner.caches  # pyright: ignore[reportAttributeAccessIssue]
        pages, page_size = tensors[0].shape[:2]
        num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        per_token = (LATENT["kv_lora_rank"] + LATENT["qk_rope_head_dim"]) * 4 * model.config.num_hidden_layers
        assert num_bytes == per_token * pages * page_size
    finally:
        compiled.shutdown()


def test_numbers_are_kept_through_the_whole_pipeline_and_are_not_all_zero() -> None:
    program, _ = family_program("minicpm3", num_hidden_layers=1)
    verifier = NumericVerifier(leaf_types(program))
    default_pipeline().run(program, Target(), verify="numeric")
    assert {record.name: record.rewrites for record in program.history}["absorb_latent"] == 1
    assert all(logits.abs().max() > 0.1 for logits in verifier._run(program, wide=True))


INDEXER = {**LATENT, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
COMPRESSED = {
    "head_dim": 16,
    "hc_mult": 2,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 4,
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "o_groups": 2,
    "o_lora_rank": 16,
    "q_lora_rank": 32,
    "sliding_window": 8,
}
CHOSEN = r"its attention call passes \['indices'\]"


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("deepseek_v32", INDEXER, CHOSEN),
        pytest.param("glm_moe_dsa", INDEXER, CHOSEN, marks=pytest.mark.slow),
        pytest.param("deepseek_v4", COMPRESSED, "", marks=pytest.mark.slow),
    ],
)
def test_attention_that_picks_keys_by_their_content_is_refused_by_name(model_type: str, changes: Any, reason: str) -> None:
    config = CONFIG_MAPPING[model_type](**{**COMMON, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with pytest.raises(UnsupportedModelError, match=rf"modeling_{model_type}.*line \d+.*{reason}"):
        autodeploy.compile(model)
