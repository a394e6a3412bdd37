"""What capture changes in transformers and in its own copy of the model, in one table. The user's model is not touched."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from autodeploy import custom_ops as ops
from autodeploy.capture.experts import route_experts
from autodeploy.capture.mask_tags import MaskTag, count_chunks_from_zero, no_packing_by_positions, tag_masks
from autodeploy.capture.other_experts import (
    ATTENTION_EXPERTS,
    FLAT_WEIGHTS,
    IDENTITY_EXPERTS,
    INPUT_WEIGHTED,
    replace_methods,
)
from autodeploy.capture.positions import count_by_position_ids
from autodeploy.capture.recurrent import route_recurrent
from autodeploy.capture.recurrent_layers import scale_outputs, scan_lightning
from autodeploy.capture.registry import IMPLEMENTATION, registered, where_defined
from autodeploy.errors import UnsupportedModelError

NEUTRAL_KWARGS = {
    "position_ids",
    "use_cache",
    "output_attentions",
    "output_router_logits",
    "logits_to_keep",
    "is_causal",
    "dropout",
    "layer_idx",
}
"""Keyword arguments of an attention call that do not change what it computes (is_causal is checked)."""


_TRACING = threading.Lock()


@dataclass
class CaptureState:
    """What the patches learn while one model is traced."""

    masks: list[MaskTag] = field(default_factory=list)
    rope_len: Tensor | None = None
    position_ids: Tensor | None = None
    counts_itself: bool = False
    """The model makes positions of its own from `position_ids` above; those it is passed would mean something else to it."""


@dataclass(frozen=True)
class ExportPatch:
    name: str
    reason: str
    apply: Callable[[nn.Module, CaptureState], Any]
    """(capture's copy of the model, state) -> a context manager, or None when the change lives in the copy."""


@contextmanager
def applied(model: nn.Module, state: CaptureState) -> Iterator[None]:
    """All patches of the table, for as long as the model is traced; one model at a time, since some are process-wide."""
    with ExitStack() as stack:
        stack.enter_context(_TRACING)
        for patch in PATCHES:
            if (context := patch.apply(model, state)) is not None:
                stack.enter_context(context)
        yield


def _attention_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskTag | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature -> one op: q [1, H, T, Dk], k [1, Hkv, T, Dk], v [1, Hkv, T, Dv] -> [1, T, H, Dv]."""
    unknown = sorted(name for name in kwargs.keys() - NEUTRAL_KWARGS if kwargs[name] is not None)
    if unknown:
        raise UnsupportedModelError(
            f"its attention call passes {unknown}, whose meaning is not known here", source=where_defined(module)
        )
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError("its attention is not causal", source=where_defined(module))
    if not isinstance(attention_mask, MaskTag | None):
        raise UnsupportedModelError("it builds an attention mask of its own", source=where_defined(module))
    mask = -1 if attention_mask is None else attention_mask.index
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return ops.attention(query, key, value, s_aux, float(scale), sliding_window or 0, float(softcap or 0.0), mask), None


@contextmanager
def _route_attention(model: Any, state: CaptureState) -> Iterator[None]:
    with registered(AttentionInterface, _attention_call):
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # models with attention code of their own warn that they keep it; match_attention reads it
        model.set_attn_implementation(IMPLEMENTATION)
        logging.set_verbosity(verbosity)
        yield


def rotary_kinds(model: nn.Module) -> Iterator[tuple[nn.Module, str | None, str]]:
    """(rotary module, layer type or None, kind of rope) for each kind that depends on length."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if isinstance(kind, str) and kind in LENGTH_DEPENDENT_ROPE:
                yield module, layer_type, kind


def rope_thresholds(model: nn.Module) -> tuple[int, ...]:
    """Lengths at which long rope changes all of a request's frequencies."""
    found = {
        _rope_parameters(module, layer)["original_max_position_embeddings"]
        for module, layer, kind in rotary_kinds(model)
        if kind == "longrope"
    }
    return tuple(sorted(found))


def _rope_by_length(model: nn.Module, state: CaptureState) -> None:
    for module, layer_type, kind in list(rotary_kinds(model)):
        _replace_rotary_forward(module, layer_type, LENGTH_DEPENDENT_ROPE[kind], state)


def _replace_rotary_forward(module: nn.Module, layer_type: str | None, rule: Callable[..., Any], state: CaptureState) -> None:
    """Give one rotary module (for one layer type) a forward that reads the length of each token's own request."""
    before = module.forward
    traceable = rule(module, layer_type, inspect.unwrap(type(module).forward), state)

    def forward(self: nn.Module, x: Tensor, position_ids: Tensor, layer_type_: str | None = None, **kwargs: Any) -> Any:
        asked = kwargs.get("layer_type", layer_type_)
        if asked != layer_type:
            return before(x, position_ids, layer_type=asked)
        return traceable(x, position_ids)

    module.forward = MethodType(forward, module)


def _rope_parameters(module: Any, layer_type: str | None) -> dict[str, Any]:
    parameters = module.config.rope_parameters
    return parameters[layer_type] if layer_type is not None else parameters


def _long_rope(module: Any, layer_type: str | None, stock: Callable[..., Any], state: CaptureState) -> Callable[..., Any]:
    """Both frequency sets through the stock forward, and per token the one its request's length asks for."""
    threshold = _rope_parameters(module, layer_type)["original_max_position_embeddings"]
    init, prefix = ROPE_INIT_FUNCTIONS["longrope"], "" if layer_type is None else f"{layer_type}_"
    for name, seq_len in (("short", threshold), ("long", threshold + 1)):
        frequencies, _ = init(module.config, torch.device("cpu"), seq_len=seq_len, layer_type=layer_type)
        module.register_buffer(f"{prefix}{name}_frequencies", frequencies, persistent=False)

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        kwargs = {} if layer_type is None else {"layer_type": layer_type}
        results = []
        for name in ("short", "long"):
            with _shadowed(module, f"{prefix}inv_freq", getattr(module, f"{prefix}{name}_frequencies")):
                results.append(stock(module, x, position_ids, **kwargs))
        assert state.rope_len is not None
        is_long = (state.rope_len > threshold)[..., None]
        return tuple(torch.where(is_long, long, short) for short, long in zip(*results, strict=True))

    return forward


def _dynamic_rope(module: Any, layer_type: str | None, stock: Callable[..., Any], state: CaptureState) -> Callable[..., Any]:
    """The frequencies of each token's own request, [T, D/2], where the stock forward expects one set for all, [D/2]."""
    init, name = ROPE_INIT_FUNCTIONS["dynamic"], "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        assert state.rope_len is not None
        seq_len: Any = state.rope_len[0, :, None]
        frequencies, _ = init(module.config, x.device, seq_len=seq_len, layer_type=layer_type)
        with _shadowed(module, name, frequencies):
            return stock(module, x, position_ids, **({} if layer_type is None else {"layer_type": layer_type}))

    return forward


@contextmanager
def _shadowed(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """The module's buffer of that name reads as `value` inside."""
    module.__dict__[name] = value
    try:
        yield
    finally:
        del module.__dict__[name]


LENGTH_DEPENDENT_ROPE = {"longrope": _long_rope, "dynamic": _dynamic_rope}

PATCHES = (
    ExportPatch(
        "attention", "each attention call becomes one op with scale, window, softcap and sinks as arguments", _route_attention
    ),
    ExportPatch(
        "experts", "each expert layer becomes one op; stock code groups tokens by expert, which has no fixed shape", route_experts
    ),
    ExportPatch("input-weighted experts", "stock code runs all experts on all tokens", replace_methods(*INPUT_WEIGHTED)),
    ExportPatch("flat experts", "stock code loops over the experts that were hit", replace_methods(*FLAT_WEIGHTS)),
    ExportPatch("identity experts", "stock code loops over the experts that were hit", replace_methods(*IDENTITY_EXPERTS)),
    ExportPatch("attention experts", "stock code sorts the tokens of a row by expert", replace_methods(*ATTENTION_EXPERTS)),
    ExportPatch("masks", "masks stay rules, evaluated and proved causal or windowed after tracing; no mask subgraph", tag_masks),
    ExportPatch(
        "chunks", "the stock rule counts chunks from traced padding, which does not outlive tracing", count_chunks_from_zero
    ),
    ExportPatch(
        "packing", "transformers would guess packed rows from position_ids; the paged ops know them", no_packing_by_positions
    ),
    ExportPatch(
        "positions", "stock code counts the tokens of the row; position_ids counts those of a request", count_by_position_ids
    ),
    ExportPatch("recurrent", "the functions families share for scans become ops; stock code loops over tokens", route_recurrent),
    ExportPatch("lightning", "stock code loops over blocks of tokens, so the graph would know the length", scan_lightning),
    ExportPatch("rescaling", "RWKV divides its weights in place when it first runs; the graph divides outputs", scale_outputs),
    ExportPatch("rope by length", "stock code branches on max(position_ids), which mixes requests in one row", _rope_by_length),
)
