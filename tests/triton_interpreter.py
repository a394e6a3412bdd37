"""Makes Triton's interpreter right for numbers of 8 and 16 bits, which it keeps as bit patterns and calculates with as such.

Upstream leaves it so. Here every operation on them is done in float32 and rounded by torch, to nearest with ties to even; floats
of 8 bits saturate, as the hardware's conversion does. Tested with triton 3.7.1.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

NARROW = {
    tl.bfloat16: (torch.bfloat16, torch.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
    tl.float8e5: (torch.float8_e5m2, torch.uint8),
}
PLAIN = {tl.float16: torch.float16, tl.float32: torch.float32, tl.float64: torch.float64}


def widened(data: np.ndarray, kind: Any) -> np.ndarray:
    """The numbers that an interpreter's array of that type stands for, as float32 where it holds patterns."""
    if kind not in NARROW:
        return data
    dtype, bits = NARROW[kind]
    return torch.from_numpy(np.ascontiguousarray(data).copy()).view(bits).view(dtype).float().numpy().reshape(data.shape)


def narrowed(data: np.ndarray, kind: Any) -> np.ndarray:
    """The interpreter's array of a type for these numbers."""
    if kind in PLAIN:
        return torch.from_numpy(np.ascontiguousarray(data).copy()).to(PLAIN[kind]).numpy().reshape(data.shape)
    dtype, bits = NARROW[kind]
    numbers = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32).copy())
    if kind is tl.float8e4nv:
        numbers = numbers.clamp(-448, 448)
    return numbers.to(dtype).view(bits).numpy().reshape(data.shape)


@cache
def install() -> None:
    """Replace what the interpreter does with such numbers; once is enough."""
    builder: Any = interpreter.InterpreterBuilder
    handle: Any = interpreter.TensorHandle
    plain = {name: getattr(builder, name) for name in ("binary_op", "unary_op", "cast_impl")}
    convert, reductions = interpreter._convert_float, interpreter.ReduceOps
    plain_sum = reductions.sum

    def convert_float(data: Any, source: Any, goal: Any, rounding: Any) -> Any:
        source, goal = source.scalar, goal.scalar
        if {source, goal} <= NARROW.keys() | PLAIN.keys():
            return narrowed(widened(data, source), goal)
        return convert(data, source, goal, rounding)

    def binary_op(self: Any, a: Any, b: Any, op: Any) -> Any:
        kind = a.dtype.scalar
        if kind not in NARROW:
            return plain["binary_op"](self, a, b, op)
        found = op(widened(a.data, kind), widened(b.data, kind))
        return handle(found, tl.int1) if found.dtype == np.bool_ else handle(narrowed(found, kind), kind)

    def unary_op(self: Any, a: Any, op: Any) -> Any:
        kind = a.dtype.scalar
        if kind not in NARROW:
            return plain["unary_op"](self, a, op)
        return handle(narrowed(op(widened(a.data, kind)), kind), kind)

    def create_dot(self: Any, a: Any, b: Any, total: Any, *_: Any) -> Any:
        product = np.matmul(widened(a.data, a.dtype.scalar), widened(b.data, b.dtype.scalar), dtype=total.data.dtype)
        return handle(product + total.data, total.dtype.scalar)

    def cast_impl(self: Any, source: Any, goal: Any) -> Any:
        before, after = source.dtype.scalar, goal.scalar
        if before not in NARROW and after not in NARROW:
            return plain["cast_impl"](self, source, goal)
        numbers = widened(source.data, before)
        is_float = after in NARROW or after in PLAIN
        return handle(narrowed(numbers, after) if is_float else numbers.astype(interpreter._get_np_dtype(goal)), after)

    def total(self: Any, numbers: Any) -> Any:
        kind = numbers.dtype.scalar
        if kind not in NARROW:
            return plain_sum(self, numbers)
        found = np.sum(widened(numbers.handle.data, kind), axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(narrowed(np.asarray(found), kind), numbers.dtype)

    interpreter._convert_float = convert_float
    builder.binary_op, builder.unary_op, builder.create_dot, builder.cast_impl = binary_op, unary_op, create_dot, cast_impl
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(builder, f"create_{name}", lambda self, source, goal: self.cast_impl(source, goal))
    reductions.sum = total
