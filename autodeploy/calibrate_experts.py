"""Experts of one layer, rounded one by one: each for the tokens that chose it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from autodeploy.custom_ops.moe import by_expert, gate_experts
from autodeploy.formats import Format, Integers
from autodeploy.gptq import are_enough, dense_of, products_of, rounded
from autodeploy.smooth import FACTORS

GATING = ("layout", "activation", "alpha", "limit", "offset")


def rows_by_expert(x: Tensor, expert_index: Tensor, num_experts: int) -> dict[int, Tensor]:
    """x [T, C], expert_index [T, k] -> the rows of those experts that any token chose."""
    chosen = by_expert(expert_index.flatten(), num_experts)
    return {expert: x[places // expert_index.shape[1]] for expert, places in chosen}


def round_experts(
    call: Mapping[str, Any], rows: Mapping[int, Tensor], forms: tuple[Format | None, Format | None], algorithm: str
) -> Iterator[tuple[Integers | None, Integers | None]]:
    """Both matrices of each expert in their formats (None: dense); what `call` holds of them becomes what they stand for.

    call: the arguments of a `moe` by name, inputs last in its matrices. rows: what each expert was given.
    """
    for expert, (gate_up, down) in enumerate(zip(call["gate_up"], call["down"], strict=True)):
        x = rows.get(expert, gate_up.new_empty(0, gate_up.shape[-1]))
        wide = _rounded(gate_up, x, forms[0], algorithm)
        bias = None if call["gate_up_bias"] is None else call["gate_up_bias"][expert]
        hidden = gate_experts(F.linear(x, gate_up, bias), *(call[name] for name in GATING))
        if algorithm in FACTORS and wide is not None and forms[1] is not None and _passes_factors(call):
            hidden = _scale(wide, gate_up, down, hidden, forms[1], algorithm)
        yield wide, _rounded(down, hidden, forms[1], algorithm)


def _rounded(dense: Tensor, rows: Tensor, form: Format | None, algorithm: str) -> Integers | None:
    """The matrix in its format, which the dense one then stands for."""
    if form is None:
        return None
    is_gptq = algorithm == "gptq" and are_enough(len(rows), dense.shape[1])
    made = rounded(dense, products_of(rows) if is_gptq else None, form)
    dense.copy_(dense_of(made))
    return made


def _passes_factors(call: Mapping[str, Any]) -> bool:
    """Whether what an expert's up projection is divided by comes out as if its gated product were."""
    return call["layout"] == "halves" and not call["limit"] and not call["offset"] and call["gate_up_bias"] is None


def _scale(wide: Integers, gate_up: Tensor, down: Tensor, hidden: Tensor, form: Format, algorithm: str) -> Tensor:
    """Divide the rows of the up projection by factors, and multiply the columns of `down`; what comes between them then."""
    if not are_enough(len(hidden), down.shape[1]):
        return hidden
    factors, size = FACTORS[algorithm](hidden.float(), [down.float()], form), down.shape[1]
    wide.scales[size:] /= factors[:, None]
    gate_up[size:] = dense_of(wide)[size:].to(gate_up.dtype)
    down *= factors
    return (hidden / factors).to(hidden.dtype)
