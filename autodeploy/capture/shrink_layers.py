"""Which layers of a large model a small one keeps: the first of each kind, in their order."""

from __future__ import annotations

import re
from typing import Any

MOST_LAYERS = 8
COUNT_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "depth", "decoder_layers")


def layer_fields(config: Any, fewest: int, repeats: int) -> dict[str, Any]:
    """Fields that speak of single layers -> their values once only one layer of each kind is left."""
    count = _count_name(config)
    if count is None:
        return {}
    kept = _kept(config, getattr(config, count), fewest, repeats)
    fields: dict[str, Any] = {name: [value[i] for i in kept] for name, value in _lists(config, getattr(config, count)).items()}
    fields |= {name: [kept.index(i) for i in value if i in kept] for name, value in _index_sets(config, count).items()}
    fields |= {name: sum(i < value for i in kept) for name, value in _prefixes(config).items()}
    fields |= {name: sum(i >= getattr(config, count) - value for i in kept) for name, value in _suffixes(config).items()}
    if overrides := _overrides(config):
        fields["per_layer_config"] = {kept.index(i): entry for i, entry in overrides.items() if i in kept}
    return {**fields, count: len(kept)}


def _count_name(config: Any) -> str | None:
    """The field that holds the number of layers."""
    own = config.attribute_map.get("num_hidden_layers")
    return next((name for name in (own, *COUNT_NAMES) if name and isinstance(vars(config).get(name), int)), None)


def _kept(config: Any, total: int, fewest: int, repeats: int) -> list[int]:
    """Indices of the first layers of each kind, and of more layers where these are too few."""
    seen: dict[Any, list[int]] = {}
    for i, kind in enumerate(_kinds(config, total)):
        seen.setdefault(kind, []).append(i)
    kept = sorted(i for places in seen.values() for i in places[:repeats])[: MOST_LAYERS * repeats]
    more = [i for i in range(total) if i not in kept]
    return sorted(kept + more[: max(fewest - len(kept), 0)])


def _kinds(config: Any, total: int) -> list[Any]:
    """All that the config says about each layer."""
    sets = [set(value) for value in _index_sets(config, _count_name(config) or "").values()]
    lists, overrides = list(_lists(config, total).values()), _overrides(config)
    prefixes, suffixes = list(_prefixes(config).values()), [total - k for k in _suffixes(config).values()]
    marks = [[i in members for members in sets] + [i < k for k in prefixes + suffixes] for i in range(total)]
    return [(repr([value[i] for value in lists]), repr(overrides.get(i)), *marks[i]) for i in range(total)]


def _overrides(config: Any) -> dict[int, dict[str, Any]]:
    """Layer -> fields that are other there than the config says in common."""
    found = config.to_dict().get("per_layer_config") if getattr(config, "is_heterogeneous", False) else None
    return {int(i): dict(entry) for i, entry in (found or {}).items()}


def _lists(config: Any, total: int) -> dict[str, list[Any]]:
    """One entry per layer."""
    found = {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == total > 1}
    return {name: value for name, value in found.items() if name not in _index_sets(config, _count_name(config) or "")}


def _index_sets(config: Any, count: str) -> dict[str, list[int]]:
    """Indices of layers, rising."""
    total = getattr(config, count, 0)
    named = {name: v for name, v in vars(config).items() if re.search(r"layers$|ids$|idxs$|ind(ic|ex)es$", name)}
    return {name: value for name, value in named.items() if isinstance(value, list) and _are_indices(value, total)}


def _are_indices(value: list[Any], total: int) -> bool:
    return all(isinstance(i, int) and 0 <= i < total for i in value) and value == sorted(set(value)) and bool(value)


def _prefixes(config: Any) -> dict[str, int]:
    """How many of the first layers differ from the rest."""
    return _ints(config, r"first_k|dense_layers$|start_index$|max_window_layers")


def _suffixes(config: Any) -> dict[str, int]:
    """How many of the last layers do."""
    return _ints(config, r"kv_shared_layers$")


def _ints(config: Any, pattern: str) -> dict[str, int]:
    return {name: v for name, v in vars(config).items() if isinstance(v, int) and re.search(pattern, name)}
