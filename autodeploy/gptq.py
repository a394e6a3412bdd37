"""GPTQ (Frantar et al., 2022): a column is rounded, and the columns after it make up for what that changes in the products."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from autodeploy.formats import Format, Integers

DAMPING = 0.01
"""Of the mean of the products' diagonal, added to it: what was never seen should cost something too."""
BLOCK = 128
"""Columns after which those behind them are told what was lost."""
COLUMNS_A_ROW = 8
"""Columns of a matrix for each row of inputs that is needed: what fewer have in common is chance (docs/log.md)."""


def are_enough(num_rows: int, num_columns: int) -> bool:
    """Whether so many rows of inputs say how a matrix of so many columns should be rounded."""
    return num_rows * COLUMNS_A_ROW >= num_columns


def nearest(dense: Tensor, form: Format) -> Integers:
    return form.integers(tuple(dense.shape), *form.quantize(dense))


def rounded(dense: Tensor, products: Tensor | None, form: Format) -> Integers:
    """By GPTQ for inputs whose columns have these products [K, K]; without, to the nearest numbers."""
    return nearest(dense, form) if products is None else gptq(dense, products, form)


def products_of(rows: Tensor) -> Tensor:
    """Mean products of each two columns [K, K]."""
    rows = rows.float()
    return rows.T @ rows / len(rows)


def dense_of(made: Integers) -> Tensor:
    return made.numbers * made.scales.repeat_interleave(made.numbers.shape[1] // made.scales.shape[1], 1)


def gptq(weight: Tensor, products: Tensor, form: Format) -> Integers:
    """weight [N, K] in whole numbers, so that what it gives for the inputs changes least. products [K, K]: of their columns."""
    weight, products, (rows, columns) = weight.float().clone(), products.clone(), weight.shape
    size = form.block[1] or columns
    never = products.diagonal() == 0
    products.diagonal()[never] = 1
    weight[:, never] = 0
    products.diagonal().add_(DAMPING * products.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(products)), upper=True)
    whole, limits = replace(form, block=(1, 0)), (-(1 << (form.bits - 1)), (1 << (form.bits - 1)) - 1)
    numbers, scales = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows, columns // size)
    scale = torch.empty(0)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        lost = torch.empty(rows, stop - start)
        for i in range(start, stop):
            if i % size == 0:
                scale = whole.quantize(weight[:, i : i + size])[1].float()
                scales[:, i // size] = scale[:, 0]
            codes = (weight[:, i : i + 1] / scale).round_().clamp_(*limits)
            numbers[:, i] = codes[:, 0].to(torch.int8)
            lost[:, i - start] = ((weight[:, i : i + 1] - codes * scale) / factor[i, i])[:, 0]
            weight[:, i + 1 : stop] -= lost[:, i - start, None] * factor[i, i + 1 : stop]
        weight[:, stop:] -= lost @ factor[start:stop, stop:]
    return Integers(numbers, scales, None)
