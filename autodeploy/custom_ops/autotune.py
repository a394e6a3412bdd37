"""Which of several equal providers is the fastest here: each distinct call is timed, on drawn numbers, before it is selected.

Equal are a provider's own variants and those of its rounding (`Provider.rounding`). Nothing is timed while requests are served;
what was timed once is read from a file (`Timings`), so that starts with the same file select the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor

from autodeploy.custom_ops.op import NONE, Provider, SemanticOp, call_arguments
from autodeploy.custom_ops.timings import Seconds, Timings, is_here, time_in_turns
from autodeploy.formats import Format, Integers
from autodeploy.specs import Target

SIZES = (1, 16, 256)
"""Tokens that a call is timed with: one request that decodes, several, a prompt. Each counts alike."""
MARGIN = 1.05
"""A provider that is less than that much faster than the preferred one does not take its place: the next start might differ."""
SLOW = 0.1
"""Seconds of a call behind which larger sizes are not timed: what is fastest there is so beyond."""
BLOCK = 1 << 18
"""Numbers that are drawn; larger tensors repeat them."""


@dataclass(frozen=True)
class Verdict:
    provider: Provider
    against: Mapping[str, list[str]]
    """What was timed beside it, and how much longer it took."""


@dataclass
class Tuner:
    """clock: the shortest time of each of several calls on a device."""

    timings: Timings
    device: str
    clock: Callable[[Mapping[str, Callable[[], Any]], str], Seconds] = time_in_turns

    def judge(
        self,
        op: SemanticOp,
        chosen: Provider,
        target: Any,
        *args: Any,
        parameters: Mapping[str, Format | None] = NONE,
        **kwargs: Any,
    ) -> Verdict:
        """The fastest of a chosen provider and its equals, for a call with these fake arguments."""
        rivals = [chosen, *op.equals(chosen, target, *args, parameters=parameters, **kwargs)]
        if len(rivals) == 1:
            return Verdict(chosen, {})
        drawn = _DrawnCall(op, rivals, call_arguments(op.overload, args, kwargs), parameters, self.device)
        found: list[Seconds] = []
        for size in SIZES if drawn.is_symbolic else SIZES[:1]:
            found.append(self._seconds(drawn, size))
            if not found[-1] or min(found[-1].values()) > SLOW:
                break
        return verdict(rivals, found, drawn.text("T"))

    def _seconds(self, drawn: _DrawnCall, size: int) -> Seconds:
        """Of each provider that does not fail, from the file if it was timed before."""
        key = f"{drawn.op.name}({drawn.text(size)}) by {', '.join(rival.name for rival in drawn.rivals)}"
        if key not in self.timings.calls:
            with torch.inference_mode():
                self.timings.add(key, self.clock(_working(drawn.calls(size)), self.device))
        return self.timings.calls[key]


def tuner_of(target: Target) -> Tuner | None:
    """With the times that were kept; None where the target is not this machine."""
    return Tuner(Timings.of(target.device), target.device) if is_here(target.device) else None


def verdict(rivals: Sequence[Any], found: Sequence[Seconds], what: str) -> Verdict:
    """rivals: the preferred one first. found: times at each size. what: the call, for the report."""
    sizes = ", ".join(map(str, SIZES[: len(found)]))
    able = {rival.name: rival for rival in rivals if all(rival.name in seconds for seconds in found)}
    failed = {rival.name: ["it failed while it was timed"] for rival in rivals if rival.name not in able}
    if not able:
        return Verdict(rivals[0], {name: why for name, why in failed.items() if name != rivals[0].name})
    first = next(iter(able))
    ratios = {name: geometric_mean([seconds[name] / seconds[first] for seconds in found]) for name in able}
    winner = min(ratios, key=lambda name: ratios[name] * (1 if name == first else MARGIN))
    lost = {
        name: [f"timed with {sizes} tokens: {ratio / ratios[winner]:.2f} times as long as {winner} for {what}"]
        for name, ratio in ratios.items()
        if name != winner
    }
    return Verdict(able[winner], failed | lost)


class _DrawnCall:
    """A call whose tensors are drawn; those of a fixed shape once, and packed as each provider wants them."""

    def __init__(
        self,
        op: SemanticOp,
        rivals: Sequence[Provider],
        call: Mapping[str, Any],
        formats: Mapping[str, Format | None],
        device: str,
    ) -> None:
        self.op, self.rivals, self.call, self.formats, self.device = op, rivals, call, formats, device
        self.is_symbolic = any(_is_symbolic(value) for value in call.values())

    def text(self, size: int | str) -> str:
        """The arguments at a size; "T" is any."""
        shown = {name: _text(value, size) for name, value in self.call.items() if value is not None}
        shown |= {name: f"{form} {shown[name]}" for name, form in self.formats.items() if form is not None}
        return ", ".join(f"{name}={value}" for name, value in shown.items())

    def calls(self, size: int) -> dict[str, Callable[[], Any]]:
        """By provider."""
        free = {name: self._draw(value, size) for name, value in self.call.items() if _is_symbolic(value)}
        given = {**self.call, **self._fixed, **free}
        given |= self.op.draw(given)
        return {rival.name: self._bound(rival, {**given, **self._packed[rival.name]}) for rival in self.rivals}

    @staticmethod
    def _bound(rival: Provider, given: Mapping[str, Any]) -> Callable[[], Any]:
        return lambda: rival.function(*given.values())

    @cached_property
    def _fixed(self) -> dict[str, Tensor]:
        tensors = {name: value for name, value in self.call.items() if isinstance(value, Tensor) and not _is_symbolic(value)}
        return {name: self._draw(value, 1) for name, value in tensors.items()}

    @cached_property
    def _packed(self) -> dict[str, dict[str, Any]]:
        given = {**self.call, **self._fixed}
        return {
            rival.name: {name: pack(self._given(rival, name), given) for name, pack in rival.packs.items()}
            for rival in self.rivals
        }

    def _given(self, rival: Provider, name: str) -> Tensor | Integers:
        """What a provider packs."""
        form = self.formats.get(name)
        return self._fixed[name] if rival.against_format is None or form is None else draw_integers(self._fixed[name], form)

    def _draw(self, value: Any, size: int) -> Any:
        return draw(_shape(value, size), value.dtype, self.device) if isinstance(value, Tensor) else _at(value, size)


def draw(shape: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
    """Numbers around 0, a block of them again and again; zeros where they are whole."""
    out = torch.zeros(tuple(shape), dtype=dtype, device=device)
    if dtype.is_floating_point:
        block = torch.randn(min(max(1, out.numel()), BLOCK), device=device, generator=torch.Generator(device).manual_seed(0)).to(
            dtype
        )
        for part in out.view(-1).split(BLOCK):
            part.copy_(block[: part.numel()])
    return out


def draw_integers(matrix: Tensor, form: Format) -> Integers:
    """A matrix of small whole numbers in a format, of that shape."""
    groups = -(-matrix.shape[-1] // form.block[1]) if form.block[1] else 1
    scales = torch.ones(*matrix.shape[:-1], groups, device=matrix.device)
    numbers = matrix.to(torch.float8_e4m3fn if form.is_fp8 else torch.int8)
    order = torch.randperm(matrix.shape[-1]).to(torch.int32) if "order" in form.parts else None
    return Integers(numbers, scales, torch.zeros_like(scales) if "zeros" in form.parts else None, order)


def _working(calls: Mapping[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """Those that can be made."""
    working = {}
    for name, call in calls.items():
        try:
            call()
        except Exception:  # whatever it is, it is not this one that serves
            continue
        working[name] = call
    return working


def _is_symbolic(value: Any) -> bool:
    sizes = value.shape if isinstance(value, Tensor) else [value]
    return any(isinstance(size, torch.SymInt) for size in sizes)


def _shape(tensor: Tensor, size: int) -> list[int]:
    return [_at(dim, size) for dim in tensor.shape]


def _at(dim: Any, size: int) -> Any:
    """A size with a number in place of every symbol."""
    if not isinstance(dim, torch.SymInt):
        return dim
    expression = dim.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, size)))


def _text(value: Any, size: int | str) -> str:
    """A tensor as its dtype and shape, anything else as it is."""
    shown = [_dim(dim, size) for dim in (value.shape if isinstance(value, Tensor) else [value])]
    dtype = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else ""
    return f"{dtype}[{', '.join(shown)}]" if dtype else shown[0]


def _dim(dim: Any, size: int | str) -> str:
    if isinstance(size, str):
        return size if isinstance(dim, torch.SymInt) else str(dim)
    return str(_at(dim, size))
