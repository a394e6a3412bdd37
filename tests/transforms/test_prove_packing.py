"""Nothing but attention may mix tokens of one row: counting is rewritten, the rest is refused by name."""

from __future__ import annotations

import pytest
import torch

from autodeploy import UnsupportedModelError, default_pipeline
from autodeploy.executor.model_runner import _executable
from autodeploy.specs import Target
from autodeploy.transforms.cleanup import Cleanup
from autodeploy.transforms.prove_packing import ProvePacking
from tests.models.families import FAMILIES
from tests.transforms.helpers import apply, family_program, toy_program


def positions_by_arange(toy, x, positions):
    return x + torch.arange(x.shape[1]).float()[:, None]


def positions_by_arange_from_two(toy, x, positions):
    return x + torch.arange(2, x.shape[1] + 2)[None, :, None].float()


def positions_by_cumsum(toy, x, positions):
    return x + torch.ones_like(positions).cumsum(-1)[..., None].float()


def positions_by_table(toy, x, positions):
    return x + toy.embed.weight[: x.shape[1]]


def positions_by_table_from_two(toy, x, positions):
    return x + toy.embed.weight[2 : x.shape[1] + 2]


BY_TABLE = [positions_by_table, positions_by_table_from_two]


@pytest.mark.parametrize("body", [*BY_TABLE, positions_by_arange, positions_by_arange_from_two, positions_by_cumsum])
def test_counting_along_the_row_becomes_position_ids(body) -> None:
    program, toy = toy_program(body)
    assert apply(program, Cleanup(), ProvePacking())[1] == 1
    assert not any("arange" in op or "cumsum" in op for op in program.op_counts())
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        first, second = toy(ids[:, :3], None or torch.arange(3)[None]).logits, toy(ids[:, 3:], torch.arange(2)[None]).logits
        packed = run(program, toy, ids, torch.tensor([[0, 1, 2, 0, 1]]))
    torch.testing.assert_close(packed, torch.cat([first, second], dim=1))


def run(program, toy, *inputs):
    tensors = dict(toy.named_parameters())
    return _executable(program, {name: tensors[name] for name in program.weights}, "cpu")(*inputs)


MIXING = {
    "mean": lambda toy, x, p: x - x.mean(1, keepdim=True),
    "running sum": lambda toy, x, p: x.cumsum(1),
    "softmax": lambda toy, x, p: x.softmax(dim=1),
    "shift": lambda toy, x, p: torch.cat([x[:, :1], x[:, :-1]], dim=1),
    "roll": lambda toy, x, p: x.roll(1, 1),
    "flip": lambda toy, x, p: x.flip(1),
    "scores": lambda toy, x, p: (x @ x.transpose(1, 2)).relu() @ x,
    "convolution": lambda toy, x, p: torch.conv1d(x.transpose(1, 2), toy.embed.weight[:16, :, None]).transpose(1, 2),
    "largest position": lambda toy, x, p: x * p.max(),
    "row length": lambda toy, x, p: x * x.shape[1],
    "last rows of a table": lambda toy, x, p: x + toy.embed.weight[-x.shape[1] :],
    "twice the row length": lambda toy, x, p: x * (2 * x.shape[1]),
    "filled with the row length": lambda toy, x, p: x + torch.full_like(x, x.shape[1]),
    "windows": lambda toy, x, p: x.unfold(1, 1, 1)[..., 0],
    "pick": lambda toy, x, p: x[:, p[0].flip(0)],
    "reshape across": lambda toy, x, p: x.reshape(4, -1, 4).transpose(0, 1).reshape(1, -1, 16),
    "einsum": lambda toy, x, p: torch.einsum("bth,bsh->bts", x, x).relu() @ x,
}


@pytest.mark.parametrize("name", MIXING)
def test_whatever_mixes_tokens_is_refused_with_its_source_line(name) -> None:
    program, _ = toy_program(MIXING[name])
    with pytest.raises(UnsupportedModelError, match=r"helpers\.py:\d+.*packed in one row"):
        apply(program, Cleanup(), ProvePacking())


KEEPING = {
    "last dim": lambda toy, x, p: x.softmax(-1) + x.mean(-1, keepdim=True) + x.cumsum(-1),
    "heads and back": lambda toy, x, p: x.view(1, -1, 4, 4).transpose(1, 2).transpose(1, 2).reshape(1, -1, 16),
    "table lookup": lambda toy, x, p: x + toy.embed.weight[p % 3],
    "flat rows": lambda toy, x, p: (x.view(-1, 16) @ toy.embed.weight[:16]).view(x.shape),
    "einsum per token": lambda toy, x, p: torch.einsum("bth,hk->btk", x, toy.embed.weight[:16]),
}


@pytest.mark.parametrize("name", KEEPING)
def test_whatever_keeps_tokens_apart_passes(name) -> None:
    program, _ = toy_program(KEEPING[name])
    assert apply(program, Cleanup(), ProvePacking())[1] == 0


@pytest.mark.parametrize("name", ["gemma3n_text", "opt", "llama_dynamic", "youtu"])
def test_families_with_unusual_graphs_pass(name) -> None:
    assert name in FAMILIES
    program, _ = family_program(name)
    default_pipeline().run(program, Target())
