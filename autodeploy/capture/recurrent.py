"""Recurrent layers: the functions and methods that transformers' families share for them lead to semantic ops while tracing.

They are found by name where the model's own classes are defined; one whose parameters are not those that we know is refused
when it is called. An adapter does what is pointwise around the recurrence in the order of the original and refuses the rest
(states given or asked for, rows packed another way). Convolutions are matched in the graph.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autodeploy import custom_ops as ops
from autodeploy.capture.registry import replaced
from autodeploy.errors import UnsupportedModelError

Adapter = Callable[..., Any]


@contextmanager
def route_recurrent(model: nn.Module, state: Any) -> Iterator[None]:
    """The shared functions of the model's modeling modules, and methods of its classes, are our adapters inside."""
    classes = {type(module) for module in model.modules()}
    spaces = [*classes, *{id(space): space for space in map(inspect.getmodule, classes) if space}.values()]
    with ExitStack() as stack:
        for space in spaces:
            for name in SEAMS.keys() & vars(space).keys():
                stack.enter_context(replaced(space, name, _routed(vars(space)[name], SEAMS[name])))
        yield


def _routed(original: Adapter, adapter: Adapter) -> Adapter:
    """`original`, with its calls from this thread going to the adapter, every argument by name."""
    plain, thread = inspect.unwrap(original), threading.get_ident()
    signature = inspect.signature(plain)
    known = inspect.signature(adapter).parameters
    strange = [name for name in signature.parameters if name not in known and name != "kwargs"]

    def call(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return original(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        if strange:
            _refuse(plain, dict.fromkeys(strange, True))
        return adapter(plain, **{**given.pop("kwargs", {}), **given})

    return call


def _refuse(original: Any, given: dict[str, Any]) -> None:
    """Refuse a call with any of these arguments set."""
    names = sorted(name for name, value in given.items() if value is not None and value is not False)
    if names:
        reason = f"{original.__name__} is called with {names}, which its op does not model"
        raise UnsupportedModelError(reason, source=f"{original.__module__}, line {original.__code__.co_firstlineno}")


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _time_step(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return F.softplus(dt) if softplus else dt


def _selective_scan(
    original: Any,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
    seq_idx: Any = None,
    **_: Any,
) -> Tensor:
    """Mamba 1: hidden_states, dt and z [N, C, T], B and C [N, Ds, T] -> [N, C, T]. The last two flags choose between equals."""
    _refuse(original, {"return_last_state": return_last_state, "seq_idx": seq_idx})
    dt = _time_step(dt, None if delta_bias is None else delta_bias[..., None], delta_softplus)
    tokens_first = [tensor.transpose(1, 2) for tensor in (hidden_states, dt, B, C)]
    y = ops.selective_scan(*tokens_first[:2], A, *tokens_first[2:]).transpose(1, 2)
    y = y if D is None else y + hidden_states * D[None, :, None]
    return y if z is None else y * F.silu(z)


def _chunk_scan(
    original: Any,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 0,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Any = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    z: Any = None,
    seq_idx: Any = None,
    **_: Any,
) -> Tensor:
    """Mamba 2: hidden_states [N, T, H, P], dt [N, T, H], B and C [N, T, G, Ds] -> [N, T, H, P]."""
    given = {"initial_states": initial_states, "return_final_states": return_final_states, "z": z, "seq_idx": seq_idx}
    _refuse(original, given)
    dt = _time_step(dt, dt_bias, dt_softplus)
    if not dt_softplus or tuple(dt_limit) != (0.0, float("inf")):
        dt = torch.clamp(dt, *dt_limit)
    y = ops.ssd(hidden_states, dt, A, B, C)
    return y if D is None else y + D[..., None] * hidden_states.to(y.dtype)


def _gated_delta_rule(
    original: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 0,
    initial_state: Any = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Gated delta nets and Kimi's: query, key [N, T, Hk, Dk], value [N, T, H, Dv] -> [N, T, H, Dv]; g is per head or channel."""
    given = {"initial_state": initial_state, "output_final_state": output_final_state, "cu_seqlens": cu_seqlens}
    _refuse(original, given)
    q, k = _float(query), _float(key)
    if use_qk_l2norm_in_kernel:
        normed = original.__globals__["l2norm"]
        q, k = normed(q), normed(k)
    return ops.gated_delta_rule(q * q.shape[-1] ** -0.5, k, value, g, beta).to(query.dtype), None


def _rwkv(
    original: Any,
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: Any = None,
    return_state: bool = False,
) -> tuple[Tensor, None]:
    """RWKV 4: key and value [N, T, C]."""
    _refuse(original, {"state": state, "return_state": return_state})
    return ops.wkv(key, value, -torch.exp(time_decay), time_first).to(key.dtype), None


def _rnn_scan(
    original: Any,
    self: nn.Module,
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: Any = None,
    acc_dtype: Any = None,
) -> tuple[Tensor, None]:
    """RG-LRU: everything [N, T, C]; a token at position 0 forgets what was before."""
    _refuse(original, {"recurrent_states": recurrent_states})
    return ops.linear_scan(hidden_states, recurrent_gate * ~reset).to(hidden_states.dtype), None


SEAMS: dict[str, Adapter] = {
    "mamba_selective_scan": _selective_scan,
    "mamba2_chunk_scan": _chunk_scan,
    "torch_chunk_gated_delta_rule": _gated_delta_rule,
    "chunk_kimi_delta_attention": _gated_delta_rule,
    "rwkv_linear_attention": _rwkv,
    "_rnn_scan": _rnn_scan,
}
"""Function of a modeling module, or method of a model's class -> what it does while tracing."""
