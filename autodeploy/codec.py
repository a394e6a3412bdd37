"""A program's parts as JSON: call targets, arguments, values and recipes. No pickle, no code."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from autodeploy.custom_ops import PROVIDED, SEMANTIC_OPS
from autodeploy.formats import Format
from autodeploy.recipes import (
    Cast,
    Cat,
    Dequantize,
    Initial,
    Numbers,
    Permute,
    Quantize,
    Recipe,
    Reshape,
    Shard,
    Slice,
    Stack,
    Take,
)
from autodeploy.specs import InputSpec

TORCH_CONSTANTS = (torch.dtype, torch.memory_format, torch.layout)
SIZE_ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.neg)
FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"operator.{function.__name__}": function for function in (operator.getitem, *SIZE_ARITHMETIC)
}
"""What a graph may call beside ops: parts of a result, and arithmetic on sizes."""
HINTS = {"T": 19, "B": 3, "B+1": 4, "P": 5, "N": 7}
"""Example sizes of the symbolic dims, all different."""


# Targets


def encode_target(target: Any) -> str:
    """aten.linear.default, autodeploy.rms_norm.default, operator.getitem, or autodeploy.rms_norm@provider."""
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._opname}.{target._overloadname}"
    if target in PROVIDED:
        op, provider = PROVIDED[target]
        return f"autodeploy.{op.name}@{provider.name}"
    name = f"{target.__module__.lstrip('_')}.{target.__name__}"
    assert FUNCTIONS.get(name) is target, f"a call of {name} cannot be saved; make it a semantic op"
    return name


def decode_target(text: str) -> Any:
    if text in FUNCTIONS:
        return FUNCTIONS[text]
    name, _, provider = text.partition("@")
    namespace, opname, *overload = name.split(".")
    if provider:
        op = next(op for op in SEMANTIC_OPS.values() if op.name == opname)
        return op.named(provider).function
    return getattr(getattr(getattr(torch.ops, namespace), opname), overload[0])


# Arguments


def encode(value: Any) -> Any:
    """Nodes by name, torch constants by theirs; lists, numbers, text and None as they are."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, TORCH_CONSTANTS):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return {"float": str(value)}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return {"dict": {key: encode(item) for key, item in value.items()}}
    assert value is None or isinstance(value, bool | int | float | str), f"{value!r} cannot be saved"
    return value


def decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    match kind:
        case "node":
            return nodes[content]
        case "torch":
            return getattr(torch, content)
        case "device":
            return torch.device(content)
        case "float":
            return float(content)
        case _:
            return {key: decode(item, nodes) for key, item in content.items()}


# Recipes


def encode_recipe(recipe: Recipe) -> dict[str, Any]:
    match recipe:
        case Take(name):
            return {"take": name}
        case Initial(name):
            return {"initial": name}
        case Cast(source, dtype):
            return {"cast": encode_recipe(source), "dtype": str(dtype).removeprefix("torch.")}
        case Cat(parts, dim):
            return {"cat": [encode_recipe(part) for part in parts], "dim": dim}
        case Stack(parts, dim):
            return {"stack": [encode_recipe(part) for part in parts], "dim": dim}
        case Permute(source, dims):
            return {"permute": encode_recipe(source), "dims": dims}
        case Reshape(source, shape):
            return {"reshape": encode_recipe(source), "shape": shape}
        case Slice(source, dim, start, stop):
            return {"slice": encode_recipe(source), "dim": dim, "start": start, "stop": stop}
        case Numbers(values):
            return {"numbers": values}
        case Shard(source, dim, ranges):
            return {"shard": encode_recipe(source), "dim": dim, "ranges": ranges}
        case Quantize(source, form):
            return {"quantize": encode_recipe(source), "format": asdict(form)}
        case Dequantize(parts, form, shape):
            return {"dequantize": [encode_recipe(part) for part in parts], "format": asdict(form), "shape": shape}
    raise AssertionError(f"{recipe} cannot be saved")


def decode_recipe(data: Mapping[str, Any]) -> Recipe:
    match data:
        case {"take": name}:
            return Take(name)
        case {"initial": name}:
            return Initial(name)
        case {"cast": source, "dtype": dtype}:
            return Cast(decode_recipe(source), getattr(torch, dtype))
        case {"cat": parts, "dim": dim}:
            return Cat(tuple(decode_recipe(part) for part in parts), dim)
        case {"stack": parts, "dim": dim}:
            return Stack(tuple(decode_recipe(part) for part in parts), dim)
        case {"permute": source, "dims": dims}:
            return Permute(decode_recipe(source), tuple(dims))
        case {"reshape": source, "shape": shape}:
            return Reshape(decode_recipe(source), tuple(shape))
        case {"slice": source, "dim": dim, "start": start, "stop": stop}:
            return Slice(decode_recipe(source), dim, start, stop)
        case {"numbers": values}:
            return Numbers(tuple(values))
        case {"shard": source, "dim": dim, "ranges": ranges}:
            return Shard(decode_recipe(source), dim, tuple(tuple((start, stop) for start, stop in own) for own in ranges))
        case {"dequantize": parts, "format": form, "shape": shape}:
            return Dequantize(tuple(decode_recipe(part) for part in parts), decode_format(form), tuple(shape))
        case {"quantize": source, "format": form}:
            return Quantize(decode_recipe(source), decode_format(form))
    raise AssertionError(f"not a recipe: {data}")


def decode_format(data: Mapping[str, Any]) -> Format:
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    return Format(**fields)


# Values


def describe(value: Any, names: Mapping[Any, str]) -> Any:
    """dtype[shape] of a tensor, an expression of a size, a list of these; names: what the symbolic dims are called."""
    if isinstance(value, Tensor):
        shape = ", ".join(describe(size, names) for size in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{shape}]"
    if isinstance(value, list | tuple):
        return [describe(item, names) for item in value]
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        from sympy import Symbol  # late: to run a program that was read, no value is described

        expression = value.node.expr
        known = {symbol: names[symbol] for symbol in expression.free_symbols if symbol in names}
        # given N as text, sympy takes it for its function of that name
        return str(expression.subs({symbol: Symbol(name) if name.isalpha() else name for symbol, name in known.items()}))
    return str(value)


def fake_input(mode: FakeTensorMode, spec: InputSpec, known: dict[str, Any]) -> Tensor:
    """A fake tensor of an input's shape; symbolic dims not yet in `known` are made and put there."""
    for dim in spec.shape:
        if isinstance(dim, str) and dim not in known:
            known[dim] = _symbol(mode, dim)
    with mode:
        return torch.empty([dim if isinstance(dim, int) else known[dim] for dim in spec.shape], dtype=getattr(torch, spec.dtype))


def _symbol(mode: FakeTensorMode, name: str) -> Any:
    from torch._dynamo.source import ConstantSource  # late, and with it most of dynamo: see `describe`
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])  # pyright: ignore
    return mode.from_tensor(torch.zeros(HINTS[name]), symbolic_context=context, source=ConstantSource(name)).shape[0]
