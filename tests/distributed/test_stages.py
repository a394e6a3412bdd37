"""Stages of a model, each on ranks of their own, which are processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

import autodeploy
from autodeploy import LLM, CompiledModel, SamplingParams, UnsupportedModelError
from autodeploy.executor.distributed_runner import DistributedRunner
from tests.models.families import make_model

PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [13], list(range(20, 100)), list(range(3, 60))]
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
FAMILIES = ["llama", "qwen3_moe", "gpt_oss", "qwen3_next", "bamba", "deepseek_v3", "gemma2", "gemma3_text", "gemma3n_text"]
WHOLE = ["gemma3n_text"]
"""Families that tensor parallelism does not share yet."""


def behave(compiled: CompiledModel) -> tuple[list[list[int]], Tensor]:
    """Greedy tokens, of prompts with enough tokens for steps to go through in parts, and logits."""
    try:
        outputs = compiled.generate(PROMPTS, GREEDY)
        logits = compiled(torch.tensor([list(range(40, 80)), list(range(60, 100)), list(range(20, 60))]))
    finally:
        compiled.shutdown()
    return [output.outputs[0].token_ids for output in outputs], logits


def check(folder: Path, cache: Path, tolerance: float, **options: Any) -> CompiledModel:
    tokens, logits = behave(autodeploy.compile(folder, program_cache=cache, max_seq_len=128))
    compiled = autodeploy.compile(folder, program_cache=cache, max_seq_len=128, **options)
    ours, found = behave(compiled)
    assert ours == tokens
    assert (found - logits).abs().max() <= tolerance * logits.abs().max()
    return compiled


def test_two_stages_give_the_tokens_of_one_process(folder: Path, cache: Path) -> None:
    """Twice: with a new program, and with the stored one, which is cut all the same."""
    for _ in range(2):
        before = set(psutil.Process().children())
        compiled = check(folder, cache, 1e-6, pipeline_parallel_size=2)
        assert set(psutil.Process().children()) == before
    assert compiled.timeline.notes["program cache"] == "hit"
    assert isinstance(compiled.runner, DistributedRunner)
    (other,) = compiled.runner.ranks.ready.values()
    assert min(other.weight_bytes, compiled.runner.local.weight_bytes) > 0
    assert other.weight_bytes + compiled.runner.local.weight_bytes < 1.01 * compiled.program.weight_bytes
    assert len(compiled.program.caches) == sum(map(len, compiled.runner.stage_caches))
    assert compiled.runner.local.recorded


def test_pages_are_counted_for_the_stage_with_the_most_caches(folder: Path, cache: Path) -> None:
    with LLM(folder, pipeline_parallel_size=2, skip_tokenizer_init=True, program_cache=cache) as llm:
        sizes = llm.compiled._pool_sizes()
    assert sizes.num_bytes(100) == replace(sizes, shares=()).num_bytes(100)  # one layer, so one stage has it


def test_more_stages_than_places_to_cut(folder: Path, cache: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"Use pipeline_parallel_size=\d+, or less"):
        autodeploy.compile(folder, pipeline_parallel_size=100, program_cache=cache)
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 2), (1, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_stages(family: str, tp: int, pp: int, tmp_path: Path) -> None:
    if tp > 1 and family in WHOLE:
        pytest.skip("ranks cannot share its layers")
    make_model(family).double().save_pretrained(tmp_path / "model")
    check(tmp_path / "model", tmp_path / "cache", 1e-10, tensor_parallel_size=tp, pipeline_parallel_size=pp)
