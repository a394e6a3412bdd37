"""Real processes that share a model's layers give what one process gives: greedy tokens, and logits in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import autodeploy
from autodeploy import SamplingParams
from autodeploy._compile import trace
from autodeploy.calibrate import quantize
from autodeploy.checkpoint import CheckpointSource
from autodeploy.config import LLMArgs
from autodeploy.executor.distributed_runner import DistributedRunner
from autodeploy.recipes import Initial, Leaf, Take
from autodeploy.report.timeline import Timeline
from autodeploy.shards import plan_of_rank
from autodeploy.specs import Mesh
from autodeploy.weights import materialize
from tests.capture.test_quantized import BY_NAME, write
from tests.models.families import make_model

PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [13], list(range(20, 60))]
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
LIMIT = 1e-10
ROUNDS = {"deepseek_v2": 1e-8}
"""Families that compute something in float32 whatever the dtype, and what that may come to."""
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "one_kv_head": ("llama", {"num_key_value_heads": 1}),
    "phi3": ("phi3", {}),
    "gpt_neox": ("gpt_neox", {}),
    "olmo2": ("olmo2", {"num_key_value_heads": 4}),
    "gemma2": ("gemma2", {}),
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "gpt_oss": ("gpt_oss", {}),
    "deepseek_v2": ("deepseek_v2", {}),
    "deepseek_v3": ("deepseek_v3", {}),
    "bamba": ("bamba", {"mamba_n_groups": 4}),
    "qwen3_next": ("qwen3_next", {"linear_num_key_heads": 4, "linear_num_value_heads": 8}),
}
WITH_EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next")
FEW = ("llama_tied", "gpt_oss", "deepseek_v3", "qwen3_next")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def folder_of(folders: Path, name: str) -> Path:
    family, overrides = FAMILIES[name]
    if not (folders / name).exists():
        torch.manual_seed(0)
        make_model(family, **overrides).double().save_pretrained(folders / name)
    return folders / name


def answers(folder: Path, mesh: Mesh) -> tuple[list[list[int]], Tensor]:
    compiled = autodeploy.compile(
        folder,
        dtype="float64",
        program_cache=False,
        max_seq_len=128,
        tensor_parallel_size=mesh.tp,
        moe_expert_parallel_size=mesh.ep,
        pipeline_parallel_size=mesh.pp,
    )
    try:
        assert isinstance(compiled.runner, DistributedRunner) == (mesh.size > 1)
        outputs: Any = compiled.generate(PROMPTS, PARAMS)
        return [output.outputs[0].token_ids for output in outputs], compiled(torch.tensor([PROMPTS[3]]))
    finally:
        compiled.shutdown()


@cache
def alone(folder: Path) -> tuple[list[list[int]], Tensor]:
    return answers(folder, Mesh())


def check(folder: Path, mesh: Mesh) -> None:
    (tokens, logits), (expected, exact) = answers(folder, mesh), alone(folder)
    assert tokens == expected
    assert float((logits - exact).abs().max() / exact.abs().max()) <= ROUNDS.get(folder.name, LIMIT)


@pytest.mark.parametrize("name", FEW)
def test_two_ranks_give_what_one_gives(folders: Path, name: str) -> None:
    check(folder_of(folders, name), Mesh(2))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_ranks_give_what_one_gives(folders: Path, name: str, num_ranks: int) -> None:
    check(folder_of(folders, name), Mesh(num_ranks))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mesh", [Mesh(2, 2), Mesh(4, 4), Mesh(4, 2)], ids=["ep2", "ep4", "tp4-ep2"])
@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_ranks_with_experts_of_their_own(folders: Path, name: str, mesh: Mesh) -> None:
    check(folder_of(folders, name), mesh)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mesh", [Mesh(pp=2), Mesh(tp=2, pp=2)], ids=["pp2", "tp2-pp2"])
@pytest.mark.parametrize("name", FAMILIES)
def test_stages_of_ranks(folders: Path, name: str, mesh: Mesh) -> None:
    check(folder_of(folders, name), mesh)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("scheme", ["int4", "w8a8"])
def test_ranks_of_a_quantized_checkpoint(folders: Path, scheme: str) -> None:
    """Written in groups or with a scale for each row; in float64 nothing but the stored numbers is rounded."""
    folder = folders / scheme
    quantize(folder_of(folders, "llama"), folder, scheme)
    check(folder, Mesh(2))


SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 128}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["gptq act-order", "awq", "block fp8", "bitsandbytes nf4 nested"])
def test_ranks_of_what_producers_store(name: str, tmp_path: Path) -> None:
    check(write(tmp_path, BY_NAME[name], make_model("llama", **SIZES).double())[0], Mesh(2))


# What a rank reads


class Counting(CheckpointSource):
    """Notes what is asked for; what is mapped is read when it is used, and then once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked: dict[Leaf, int] = {}

    def fetch(self, leaf: Leaf) -> Tensor:
        found = super().fetch(leaf)
        self.asked[leaf] = found.nbytes
        return found


@pytest.mark.parametrize(("name", "quantization"), [("llama", None), ("llama", "int4"), ("qwen3_moe", None)])
def test_a_rank_asks_for_its_share_and_no_more(folders: Path, name: str, quantization: str | None) -> None:
    folder = folder_of(folders, name)
    args = LLMArgs(model=folder, program_cache=False, tensor_parallel_size=2, quantization=quantization)
    program = trace(args, Timeline())
    whole = trace(args.model_copy(update={"tensor_parallel_size": 1}), Timeline()).weight_bytes
    for rank in range(2):
        source = Counting(folder)
        read = {each: recipe for each, recipe in program.weights.recipes.items() if list(recipe.leaves())}
        initial = {each for each, recipe in read.items() if any(isinstance(leaf, Initial) for leaf in recipe.leaves())}
        own = sum(program.parameter(each).nbytes for each in read.keys() - initial)
        plan = plan_of_rank(replace(program.weights, recipes=read).without(initial), rank, source.describe_leaf)
        for each, tensor in materialize(plan, source):
            assert tensor.shape == program.parameter(each).shape  # pyright: ignore[reportAttributeAccessIssue]
        assert own < 0.6 * whole
        assert own <= sum(source.asked.values()) <= 1.01 * own


@pytest.mark.parametrize(
    "name",
    [
        "gptq",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("awq", "block fp8", "compressed-tensors w4a16 asymmetric")),
    ],
)
def test_ranks_of_a_quantized_checkpoint_ask_for_their_shares(name: str, tmp_path: Path) -> None:
    """Both together ask for what one process does, once more what each has all of, and no more than 1 % beside."""
    folder, _ = write(tmp_path, BY_NAME[name], make_model("llama", **SIZES))
    args = LLMArgs(model=folder, dtype="bfloat16", program_cache=False, tensor_parallel_size=2)
    program = trace(args, Timeline())
    read = {each: made for each, made in program.weights.recipes.items() if any(type(leaf) is Take for leaf in made.leaves())}
    shared = {leaf.name for recipe in read.values() if "shard(" in str(recipe) for leaf in recipe.leaves()}
    leaves, whole = {leaf for recipe in read.values() for leaf in recipe.leaves()}, CheckpointSource(folder)
    sizes = {leaf.name: whole.describe_leaf(leaf).nbytes for leaf in leaves}
    asked = 0
    for rank in range(2):
        source = Counting(folder)
        for _ in materialize(plan_of_rank(replace(program.weights, recipes=read), rank, source.describe_leaf), source):
            pass
        asked += sum(source.asked.values())
    own = sum(size * (1 if each in shared else 2) for each, size in sizes.items())
    assert len(shared) > 15 and own <= asked <= 1.01 * own
