"""Experts: transformers' registry of expert layers leads to one op; how a layer gates is found by probing it, not by its name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from itertools import chain, product
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from autodeploy import custom_ops as ops
from autodeploy.capture.registry import IMPLEMENTATION, registered, where_defined
from autodeploy.custom_ops.moe import EXPERT_ACTIVATIONS, gate_experts
from autodeploy.errors import UnsupportedModelError

QUICK_GELU = 1.702
AGREES = 1e-6
"""Largest relative difference in float64; some gates compute in float32."""


@dataclass(frozen=True)
class Gate:
    """How experts go from their first to their second matrix: the last arguments of `ops.moe`."""

    layout: str
    activation: str
    alpha: float = 1.0
    limit: float = 0.0
    offset: float = 0.0


@contextmanager
def route_experts(model: Any, state: Any) -> Iterator[None]:
    """Every expert layer that dispatches through transformers' registry becomes one op inside."""
    gates = _gates(model)
    if not gates:
        yield
        return

    def call(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return _experts_call(module, gates[module], hidden, top_k_index, top_k_weights)

    with registered(ExpertsInterface, call):
        model.set_experts_implementation(IMPLEMENTATION)
        for module in gates:
            if module.config._experts_implementation != IMPLEMENTATION:
                raise UnsupportedModelError("its experts cannot be replaced by an op", source=where_defined(module))
        yield


def _gates(model: nn.Module) -> dict[Any, Gate]:
    """Of every expert layer that dispatches through the registry."""
    gates: dict[Any, Gate] = {}
    for path, module in model.named_modules():
        if _is_registered(module):
            gates[module] = gate_of(module, path, gates.values())
    return gates


def _is_registered(module: nn.Module) -> bool:
    """What transformers' decorator leaves behind."""
    return all(hasattr(module, name) for name in ("_apply_gate", "has_gate", "is_transposed", "down_proj"))


def _experts_call(module: Any, gate: Gate, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' signature of expert layers -> one op: hidden [T, C], index and weights [T, k] -> [T, C]."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    biases = [getattr(module, f"{name}_bias") if module.has_bias else None for name in (first, "down_proj")]
    weights = getattr(module, first), module.down_proj
    return ops.moe(hidden, top_k_index, top_k_weights, *weights, *biases, module.is_transposed, *astuple(gate))


def gate_of(module: Any, path: str = "", likely: Iterable[Gate] = ()) -> Gate:
    """The gate of an expert layer: run on drawn numbers, it is compared with every gate the op knows, likely ones first."""
    if getattr(module, "has_post_expert_norm", False):
        reason = "its experts have a norm of their own behind them"
        raise UnsupportedModelError(reason, module_path=path, source=where_defined(module))
    name = "_apply_gate" if module.has_gate else "act_fn"
    numbers = numbers_of(module, getattr(module, "act_fn", None))
    return find_gate(getattr(module, name), numbers, likely, gated=module.has_gate) or refuse_gate(module, name, path)


def refuse_gate(module: nn.Module, name: str, path: str = "") -> NoReturn:
    reason = f"{name} of its experts is no gate that is known here"
    raise UnsupportedModelError(reason, module_path=path, source=where_defined(module))


def find_gate(function: Any, numbers: list[float], likely: Iterable[Gate] = (), *, gated: bool) -> Gate | None:
    """The first candidate that equals function [S, 2 * I] -> [S, I]; numbers: what its limits and factors may be."""
    data = _probe(numbers)
    try:
        wanted = function(data)
    except (RuntimeError, TypeError, ValueError, AttributeError):  # reads weights, or takes something else
        return None
    candidates = chain(dict.fromkeys(likely), _candidates(numbers, gated))
    return next((gate for gate in candidates if _equal(gate_experts(data, *astuple(gate)), wanted)), None)


def _probe(numbers: list[float]) -> Tensor:
    """[256, 16], rows of very different sizes, so that every limit among the numbers is passed in both directions."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(256, 16, generator=generator, dtype=torch.float64)
    sizes = torch.tensor([1.0, 10.0, 1e2, 1e4, *numbers], dtype=torch.float64)
    return data * sizes[torch.arange(256) % len(sizes), None] * 2


def numbers_of(*holders: Any) -> list[float]:
    """Positive numbers that a layer, its activation or its config holds: what a limit or a factor can be."""
    tables = [vars(holder) for holder in holders if hasattr(holder, "__dict__")]
    own = {float(value) for table in tables for value in table.values() if _is_number(value)}
    configs = [vars(table["config"]) for table in tables if "config" in table]
    named = {value for config in configs for value in config.values() if isinstance(value, float)}
    return sorted(number for number in own | named if 0 < number < 1e4)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _candidates(numbers: list[float], gated: bool) -> Iterator[Gate]:
    """Plain forms first."""
    kinds = [(name, 1.0) for name in EXPERT_ACTIVATIONS] + [("swish", alpha) for alpha in (QUICK_GELU, *numbers)]
    if not gated:
        yield from (Gate("plain", name, alpha) for name, alpha in kinds)
        return
    for limit, offset, (name, alpha), layout in product((0.0, *numbers), (0.0, 1.0), kinds, ("halves", "pairs")):
        yield Gate(layout, name, alpha, limit, offset)


def _equal(ours: Tensor, wanted: Any) -> bool:
    if not isinstance(wanted, Tensor) or wanted.is_meta or wanted.shape != ours.shape:
        return False
    wanted = wanted.double()
    scale = wanted.abs().amax(-1, keepdim=True).clamp_min(1.0)
    return bool(((ours - wanted).abs() <= AGREES * scale).all())
