"""select_kernels: what was chosen, and why, is kept for every call, saved, and shown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import autodeploy
from autodeploy import ExecutionError
from autodeploy import custom_ops as ops
from autodeploy.custom_ops.cpp import against_cpp
from autodeploy.program import Choice, Program
from autodeploy.report.html import Before, Settings, page
from autodeploy.report.tables import provider_table
from autodeploy.report.timeline import Timeline
from autodeploy.specs import Target
from autodeploy.transforms.select_kernels import SelectKernels
from tests.models.families import make_model
from tests.transforms.helpers import apply, toy_program


def picky_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, weight_in_float: bool) -> Tensor:
    return ops.rms_norm.reference(x, weight, eps, offset, weight_in_float)


def against_picky(target: Any, x: Tensor, weight: Tensor | None, eps: float, **rest: Any) -> list[str]:
    return [] if eps == 0.5 else [f"eps is {eps}", "it is picky [really]"]


@pytest.fixture
def program() -> Iterator[Program]:
    """Three norms, the last two of which suit a provider that is preferred to the reference."""
    provider = ops.Provider("picky", picky_norm, against_picky)
    ops.rms_norm.register(provider)

    def body(toy: Any, x: Tensor, positions: Tensor) -> Tensor:
        for eps in (0.25, 0.5, 0.5):
            x = ops.rms_norm(x, None, eps, 0.0, False)
        return x

    program, _ = toy_program(body)
    assert apply(program, SelectKernels()) == [5]  # an embedding, and the head is a linear
    yield program
    ops.rms_norm.providers.remove(provider)
    del ops.PROVIDED[picky_norm]


def failing(x: Tensor, *rest: Any) -> Tensor:
    raise ArithmeticError("out of registers")


def test_a_provider_that_raises_is_named_in_the_error() -> None:
    provider = ops.Provider("failing", failing)
    ops.rms_norm.register(provider)
    compiled = autodeploy.compile(make_model("llama", num_hidden_layers=1))
    try:
        with pytest.raises(ExecutionError, match="forward failed: provider 'failing' of op rms_norm: ArithmeticError: out of"):
            compiled(torch.ones(1, 3, dtype=torch.int64))
    finally:
        compiled.shutdown()
        ops.rms_norm.providers.remove(provider)
        del ops.PROVIDED[failing]


FALLBACK = ops.rms_norm.providers[0].name if not against_cpp(Target()) else "reference"
"""Of norms that `picky` does not take."""
REFUSED = Choice(FALLBACK, {"picky": ("eps is 0.25", "it is picky [really]")})


def test_every_different_choice_is_kept_once(program: Program) -> None:
    assert program.providers["rms_norm"] == (REFUSED, Choice("picky"))


def test_choices_are_saved(program: Program, tmp_path: Path) -> None:
    program.save(tmp_path / "first")
    loaded = Program.load(tmp_path / "first")
    loaded.save(tmp_path / "second")
    assert loaded.providers == program.providers
    first, second = ((tmp_path / folder / "program.json").read_bytes() for folder in ("first", "second"))
    assert first == second


def test_tables_show_each_choice_and_the_reasons_against_others(program: Program) -> None:
    op, provider, refused = (list(column.cells) for column in provider_table(program).columns)
    assert op == ["embedding", "rms_norm", "", "linear"]
    assert list(map(str, provider)) == ["reference", FALLBACK, "picky", "reference"]
    assert list(map(str, refused)) == [
        "cpp: it has no float32",
        "picky: eps is 0.25, it is picky [really]",
        "",
        "cpp: it has no float32\nonednn: the weight is too small to gain by it",
    ]
    settings = Settings(page_size=32, pools={"pages": 9}, max_batch_size=1, max_num_tokens=64, max_seq_len=256)
    shown = page("toy", program, Before(), Timeline(), settings)
    assert f"<td><code>{FALLBACK}</code></td><td><div><code>picky</code>: eps is 0.25, it is picky [really]</div></td>" in shown
    assert '<td></td><td class="number"></td><td><code>picky</code></td><td><span class="chip none">' in shown
