"""The small value of a number in a config, by the name of its field."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

VOCAB, POSITIONS = 256, 256
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a shrunk model measures."""

    hidden: int = 64
    heads: int = 4
    head_dim: int = 16
    rope_dim: int = 8
    intermediate: int = 128
    expert: int = 32
    window: int = 8
    rank: int = 32
    layers: int = 2
    """The fewest layers."""
    repeats: int = 1
    """Layers of each kind."""
    fill: bool = False
    """Give counts and head sizes to fields that are None, for classes whose own defaults build nothing."""
    narrow: bool = True
    """Narrow the layers; else only layers and vocabulary are cut."""


@dataclass(frozen=True)
class Context:
    """What a rule may look at besides the field itself."""

    old: Mapping[str, Any]
    sizes: Sizes
    hidden: int
    """Width of the large model."""
    widths: frozenset[int]
    """And of the models inside it or around it."""


def _at_most(most: int) -> Callable[[int, str, Context], int]:
    return lambda value, name, context: min(value, most)


def _size(field: str) -> Callable[[int, str, Context], int]:
    return lambda value, name, context: min(value, getattr(context.sizes, field))


def _keep(value: int, name: str, context: Context) -> int:
    return value


def _token_id(value: int, name: str, context: Context) -> int:
    return value if value < VOCAB // 16 else VOCAB - 1


def _head_dim(value: int, name: str, context: Context) -> int:
    """One size for all heads, but where it counts a rotated part as well."""
    plain, rotated = (context.old.get(f"qk_{part}_head_dim") for part in ("nope", "rope"))
    if not isinstance(plain, int) or not isinstance(rotated, int) or value not in (rotated, plain + rotated):
        return min(value, context.sizes.head_dim)
    if name.startswith(("v_", "qk_nope")):
        return min(value, context.sizes.head_dim)
    return context.sizes.rope_dim + (context.sizes.head_dim if value == plain + rotated else 0)


def _num_heads(value: int, name: str, context: Context) -> int:
    """Heads of attention, or of a recurrent layer as wide as its expansion of the hidden size."""
    widths = [width for field, width in context.old.items() if re.search(HEAD_DIM, field) and isinstance(width, int)]
    expand = next((v for field, v in context.old.items() if "expand" in field and isinstance(v, int)), 1)
    fills = any(value * width == expand * context.hidden for width in widths)
    return min(value, expand * context.sizes.hidden // context.sizes.head_dim if fills else context.sizes.heads)


def _num_kv_heads(value: int, name: str, context: Context) -> int:
    """As many as heads, half of them, or one."""
    counterparts = [re.sub("key_value|key", other, name) for other in ("attention", "value")]
    names = [*counterparts, *HEADS]
    heads = next((context.old[other] for other in names if isinstance(context.old.get(other), int) and other != name), value)
    return min(value, context.sizes.heads if value >= heads else context.sizes.heads // 2)


def _scaled(value: int, name: str, context: Context) -> int:
    """A width in the proportion of the hidden size, a multiple of 8; a hidden size stays one."""
    if value in context.widths:
        return min(value, context.sizes.hidden)
    if value < context.sizes.hidden or not context.hidden:
        return value
    return max(8, min(value, -(-value * context.sizes.hidden // (8 * context.hidden)) * 8))


def small_number(name: str, value: int, context: Context) -> int:
    """By the first rule whose pattern is in the name; unchanged when there is none."""
    rules = RULES if context.sizes.narrow else CUTS
    return next((rule(value, name, context) for pattern, rule in rules if re.search(pattern, name)), value)


HEAD_DIM = r"head_?dim|d_head|dim_head|d_kv$|kv_channels|head_size"
CUTS: list[tuple[str, Callable[[int, str, Context], int]]] = [
    (r"token_(id|index|ids)$|^lang_id$|_index$", _token_id),
    (r"vocab", _at_most(VOCAB)),
    (r"(num|n)_(\w+_)?(layers?|blocks)$|^(en|de)coder_layers$|^depth$", _at_most(2)),
]
RULES: list[tuple[str, Callable[[int, str, Context], int]]] = [
    (r"image|patch|kernel|crop|pool|time|sampling|stride|position_bias", _keep),
    *CUTS,
    (r"max_.*position|max_seq|max_.*length|n_positions|n_ctx|context_length|max_distance", _at_most(POSITIONS)),
    (r"period|interval|every|_step$|layer_group_size|pattern|layers_per", _at_most(2)),
    (r"offset$", _at_most(1)),
    (r"kv_?(n_)?heads|key_value_heads|key_heads", _num_kv_heads),
    (r"rope_head_dim|rotary_dim", _size("rope_dim")),
    (HEAD_DIM, _head_dim),
    (r"heads|n_head$", _num_heads),
    (r"n_?groups$", _at_most(2)),
    (r"n_group$|expert_group$|expert_num$", _at_most(4)),
    (r"topk_group$", _at_most(2)),
    (r"index_top_?k$", _size("window")),
    (r"per_tok|top_?k|moe_k$", _at_most(2)),
    (r"shared_experts$", _at_most(2)),
    (r"experts", _at_most(8)),
    (r"window|chunk|block_size|local_attention", _size("window")),
    (r"(moe|expert|shared).*(intermediate|hidden|ffn)", _size("expert")),
    (r"intermediate|ffn|d_ff|^dff$|dim_ff|d_inner|feed_forward", _size("intermediate")),
    (r"state", _size("head_dim")),
    (r"rank", _size("rank")),
    (r"^hidden_size", _size("hidden")),
    (r"_(size|dim|width|channels?)$|^d_\w+$|n_embd|dim_\w+$|scalar$", _scaled),
]
"""Pattern in a field's name -> its small value; the first that matches."""
BLANKS = [
    (HEAD_DIM, "head_dim"),
    (r"kv_?(n_)?heads|key_value_heads", 2),
    (r"per_tok", 2),
    (r"shared_experts", 1),
    (r"experts", 8),
]
"""Pattern in the name of a field that is None -> its value, or the size that gives it."""
