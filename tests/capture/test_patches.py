"""Every patch of the table is short, says why it is there, and is still needed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import autodeploy
from autodeploy.capture import patches
from autodeploy.errors import UnsupportedModelError
from tests.models.families import make_model
from tests.models.parity import check_logits

NEEDED_BY = {
    "attention": "granite_swa",
    "experts": "mixtral",
    "input-weighted experts": "llama4_text_moe",
    "flat experts": "dbrx",
    "identity experts": "longcat_flash",
    "attention experts": "jetmoe",
    "masks": "phimoe",
    "chunks": "llama4_text",
    "packing": "gemma2",
    "positions": "roberta",
    "recurrent": "mamba",
    "lightning": "minimax",
    "rescaling": "rwkv",
    "rope by length": "phi3_longrope",
}
"""Patch -> a family that is refused, or wrong, without it."""
MAX_PATCHES, MAX_LINES = 20, 15


def works(family: str) -> bool:
    model = make_model(family)
    try:
        compiled = autodeploy.compile(model)
    except UnsupportedModelError:
        return False
    try:
        check_logits(model, compiled)
    except AssertionError as error:
        assert "relative error" in str(error)
        return False
    finally:
        compiled.shutdown()
    return True


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDED_BY)
def test_a_patch_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert works(NEEDED_BY[name])
    others = tuple(patch for patch in patches.PATCHES if patch.name != name)
    monkeypatch.setattr(patches, "PATCHES", others)
    assert not works(NEEDED_BY[name]), f"{NEEDED_BY[name]} is right without the patch '{name}': take it out"


def test_the_table_names_them_all_and_is_short() -> None:
    assert {patch.name for patch in patches.PATCHES} == NEEDED_BY.keys()
    assert len(patches.PATCHES) <= MAX_PATCHES
    assert all(len(patch.reason) > 20 for patch in patches.PATCHES)


@pytest.mark.parametrize("patch", patches.PATCHES, ids=lambda patch: patch.name)
def test_what_a_patch_puts_in_place_is_short(patch: patches.ExportPatch) -> None:
    for function in functions_of(patch.apply):
        lines = [line for line in inspect.getsource(function).splitlines() if line.strip()]
        assert len(lines) <= MAX_LINES, f"{function.__qualname__} has {len(lines)} lines"


def functions_of(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The function that a patch calls, and those it closes over."""
    function = inspect.unwrap(function)
    yield function
    for cell in function.__closure__ or ():
        values = cell.cell_contents if isinstance(cell.cell_contents, tuple) else (cell.cell_contents,)
        for value in values:
            if inspect.isfunction(value):
                yield from functions_of(value)
