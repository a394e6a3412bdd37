"""A small config from a large one, by rules on the names and values of its fields. No family is known here.

What a config class computes from other fields is left to it. One layer of each kind is kept: `shrink_layers.py` says which. The
rules for numbers are in `shrink_rules.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from autodeploy.capture.shrink_layers import layer_fields
from autodeploy.capture.shrink_rules import BLANKS, HEADS, POSITIONS, Context, Sizes, small_number

LADDER = (
    Sizes(),
    Sizes(fill=True),
    Sizes(rope_dim=16),
    Sizes(repeats=2),
    Sizes(rope_dim=16, repeats=2, fill=True),
    Sizes(repeats=4),
    Sizes(hidden=128, head_dim=32, intermediate=256),
    Sizes(narrow=False),
)
"""What to try, in this order, until a model can be built."""


def shrink(config: Any, sizes: Sizes | None = None, hints: Mapping[str, Any] | None = None) -> Any:
    """A config of the same class that builds a small model. hints: fields that get exactly these values."""
    outer = Context({}, sizes or Sizes(), 0, frozenset(_widths(config)))
    return _shrink(config, dict(hints or {}), outer)


def _shrink(config: Any, hints: dict[str, Any], outer: Context) -> Any:
    given, sizes = given_fields(config), outer.sizes
    context = Context({**vars(config), **given}, sizes, _width(config) or outer.hidden, outer.widths)
    per_layer = {name: v for name, v in layer_fields(config, sizes.layers, sizes.repeats).items() if name in _accepted(config)}
    hints = {name: _sub_hint(vars(config).get(name), value, context) for name, value in hints.items()}
    small = {name: _value(name, value, context) for name, value in {**given, **per_layer}.items() if name not in hints}
    small |= {name: value for name, value in per_layer.items() if isinstance(value, int) and name in small}
    if sizes.fill:
        small |= {name: value for name, value in _fillings(config, sizes).items() if name not in hints}
    return type(config)(**{**small, **hints})


def _sub_hint(value: Any, hint: Any, context: Context) -> Any:
    """A hint for a config inside the config speaks of that one's fields."""
    return _shrink(value, hint, context) if isinstance(value, PreTrainedConfig) else hint


def _accepted(config: Any) -> set[str]:
    return {"per_layer_config", *(field.name for field in dataclasses.fields(config))}


def _fillings(config: Any, sizes: Sizes) -> dict[str, int]:
    """Values for fields that are None and count something."""
    empty = [
        field for field in dataclasses.fields(config) if vars(config).get(field.name, 0) is None and "int" in str(field.type)
    ]
    rules = [(pattern, getattr(sizes, value) if isinstance(value, str) else value) for pattern, value in BLANKS]
    found = {field.name: [value for pattern, value in rules if re.search(pattern, field.name)] for field in empty}
    return {name: values[0] for name, values in found.items() if values}


def given_fields(config: Any) -> dict[str, Any]:
    """The fields a config was given, its class's own defaults included; not those it computed from others."""
    fields = [field for field in dataclasses.fields(config) if field.name in vars(config) and field.name not in BASE_FIELDS]
    own = {field.name: vars(config)[field.name] for field in fields}
    computed = {field.name for field in fields if isinstance(_declared(field), str | None)}
    plain = {name: value for name, value in own.items() if name not in computed or isinstance(value, PreTrainedConfig | str)}
    again = vars(type(config)(**plain))
    unknown = {name: v for name, v in vars(config).items() if name not in again and name not in own and name[0] != "_"}
    return {name: v for name, v in own.items() if name in plain or v != again.get(name)} | unknown


def _declared(field: Any) -> Any:
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


BASE_FIELDS = {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"dtype", "is_encoder_decoder"}


def _width(config: Any) -> int:
    """Hidden size; 0 when the config has none."""
    names = (config.attribute_map.get("hidden_size"), "hidden_size", "d_model", "embed_dim")
    found = [vars(config).get(name) for name in names]
    return next((value for value in found if isinstance(value, int) and value > 0), 0)


def _widths(config: Any) -> set[int]:
    """Of a config and of all configs in it."""
    inside = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return {_width(config)}.union(*map(_widths, inside)) - {0}


def _value(name: str, value: Any, context: Context) -> Any:
    """A field's value in the small config; lists and dicts entry by entry."""
    if isinstance(value, PreTrainedConfig):
        return _shrink(value, {}, context)
    if name == "per_layer_config":
        return {i: _overrides(entry, context) for i, entry in value.items()}
    if isinstance(value, dict):
        return _entries(name, value, context)
    if isinstance(value, list | tuple):
        return type(value)(_value(name, item, context) for item in value)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return value
    return small_number(name, value, context)


def _overrides(entry: dict[str, Any], context: Context) -> dict[str, Any]:
    """What single layers have in place of the common values: it stays in proportion to those."""
    own = dataclasses.replace(context, old={**context.old, **entry})
    excess = {name: _excess(value, context.old.get(name)) if own.sizes.narrow else 1 for name, value in entry.items()}
    return {name: _value(name, value, own) * excess[name] for name, value in entry.items()}


def _excess(value: Any, common: Any) -> int:
    return value // common if isinstance(value, int) and isinstance(common, int) and value > common > 0 else 1


def _entries(name: str, value: dict[Any, Any], context: Context) -> dict[Any, Any]:
    """Rope parameters keep their kind; the lists in them follow the head size."""
    if not name.startswith("rope") or not context.sizes.narrow:
        return {key: _value(name if isinstance(item, int) else key, item, context) for key, item in value.items()}
    return {key: _rope_entry(key, item, context) for key, item in value.items()}


def _rope_entry(key: Any, value: Any, context: Context) -> Any:
    if isinstance(value, dict):
        return {inner: _rope_entry(inner, item, context) for inner, item in value.items()}
    if key == "original_max_position_embeddings":
        return min(value, POSITIONS)
    if key == "mrope_section":
        return _section(value, _rope_ratio(context))
    return value[: round(len(value) * _rope_ratio(context))] if isinstance(value, list) else value


def _rope_ratio(context: Context) -> float:
    """By how much rotated heads shrink."""
    if isinstance(rotated := context.old.get("qk_rope_head_dim"), int):
        return context.sizes.rope_dim / rotated
    heads = next((context.old[name] for name in HEADS if isinstance(context.old.get(name), int)), 1)
    return context.sizes.head_dim / (context.old.get("head_dim") or context.hidden // heads)


def _section(value: list[int], ratio: float) -> list[int]:
    """Parts of half a head, in the proportion of the large one."""
    half = max(1, round(sum(value) * ratio))
    parts = [part * half // sum(value) for part in value]
    return [parts[0] + half - sum(parts), *parts[1:]]
