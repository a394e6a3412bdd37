"""Folders of MoE families load exactly as the model in memory, through recipes of our own verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import autodeploy
from autodeploy.capture.checkpoint import checkpoint_recipes
from autodeploy.capture.skeleton import build_skeleton
from autodeploy.checkpoint import CheckpointSource
from autodeploy.recipes import Cast, Cat, Convert, Stack, Take
from autodeploy.weights import LiveSource, WeightPlan, materialize
from tests.models.families import make_model
from tests.models.moe_families import MOE_FAMILIES

IDS = torch.randint(3, 256, (1, 17), generator=torch.Generator().manual_seed(0))
QUICK = {
    "dbrx",  # flat, and put together in the graph
    "gpt_oss",  # stacked and transposed as they are
    "mixtral",  # renamed, stacked and joined
}
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MOE_FAMILIES]


@pytest.mark.parametrize("name", MOE_FAMILIES)
def test_saved_tensors_reach_the_model_bit_by_bit(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    model.save_pretrained(tmp_path)
    source = CheckpointSource(tmp_path)
    recipes = checkpoint_recipes(build_skeleton(model.config, torch.float32), source)
    assert not [target for target, recipe in recipes.items() if isinstance(recipe, Convert)]
    loaded = dict(materialize(WeightPlan(recipes), source))
    expected = model.state_dict()
    assert loaded.keys() == expected.keys()
    assert [target for target in expected if not torch.equal(loaded[target], expected[target])] == []
    assert all(tensor.is_contiguous() for tensor in loaded.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_computes_what_the_model_in_memory_does(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    model.save_pretrained(tmp_path)
    logits = []
    for source in (model, str(tmp_path)):
        compiled = autodeploy.compile(source)
        logits.append(compiled(IDS))
        compiled.shutdown()
    assert torch.equal(*logits)


class _Results(TorchDispatchMode):
    """Keeps every result of every call inside."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.kept += [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and not leaf.is_meta]
        return result


def test_joining_parts_makes_nothing_but_the_result() -> None:
    parts = {f"{kind}.{i}": torch.randn(4, 6) for kind in ("gate", "up") for i in range(8)}
    gate, up = (Stack(tuple(Take(f"{kind}.{i}") for i in range(8)), 0) for kind in ("gate", "up"))
    plan = WeightPlan({"gate_up": Cast(Cat((gate, up), 1), torch.bfloat16)})
    with _Results() as results:
        ((_, made),) = materialize(plan, LiveSource(parts))
    stacked = [torch.stack([parts[f"{kind}.{i}"] for i in range(8)]) for kind in ("gate", "up")]
    assert torch.equal(made, torch.cat(stacked, 1).bfloat16())
    known = {tensor.untyped_storage().data_ptr() for tensor in (*parts.values(), made)}
    assert {tensor.untyped_storage().data_ptr() for tensor in results.kept} <= known
