"""A program cut into stages, which run one after the other in this process, does what the whole does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import autodeploy
from autodeploy import CompiledModel, Program, SamplingParams, UnsupportedModelError
from autodeploy.custom_ops.stages import set_link
from autodeploy.executor.model_runner import ModelRunner
from autodeploy.executor.parts import parts_of
from autodeploy.program import decode_program
from autodeploy.specs import INPUTS
from autodeploy.transforms.split_stages import split_stages
from tests.models.families import make_model

FEW = ["llama", "qwen3_next"]
MANY = ["gemma2", "gemma3n_text", "gemma4_text", "gpt_oss", "bamba", "deepseek_v3", "bloom", "gpt2", "mamba2", "rwkv", "mixtral"]
PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [13], list(range(20, 60))]
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


class Handed:
    """What stages of one process give each other."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def send(self, x: Tensor) -> None:
        self.values.append(x.clone())

    def receive(self, into: Tensor) -> None:
        value = self.values.pop(0)
        assert (value.shape, value.dtype, into.is_contiguous()) == (into.shape, into.dtype, True)
        into.copy_(value)


class InTurn:
    """Runs the stages of a program one after the other, each step in as many parts as there are stages."""

    can_chunk, reads_entries = True, False

    def __init__(self, stages: list[Program], source: Any) -> None:
        self.runners = [ModelRunner(stage, source, "cpu") for stage in stages]
        self.rope_thresholds = self.runners[-1].rope_thresholds
        self.largest = 0

    def allocate(self, num_units: Mapping[str, int], page_size: int) -> None:
        for runner in self.runners:
            runner.allocate(num_units, page_size)

    def forward(self, batch: Any, rows: Any) -> Tensor:
        logits, link = list[Tensor](), Handed()
        parts = parts_of(batch, len(self.runners), min_tokens=1)
        self.largest = max(self.largest, len(parts))
        set_link(link)
        for part in parts:
            for runner in self.runners:
                result = runner.forward(part, [])
                assert not self.is_before_the_last(runner) or result.numel() == 0
            logits.append(result.clone())
            assert not link.values
        set_link(None)
        return torch.cat(logits)

    def is_before_the_last(self, runner: ModelRunner) -> bool:
        return runner is not self.runners[-1]

    def forget(self, request: Any) -> None:
        pass


def behave(compiled: CompiledModel) -> tuple[list[list[int]], Tensor]:
    """Greedy tokens, twice so that steps are recorded, and logits."""
    outputs = [*compiled.generate(PROMPTS, GREEDY), *compiled.generate(PROMPTS, GREEDY)]
    logits = compiled(torch.tensor([list(range(30, 50)), list(range(60, 80)), list(range(90, 110))]))
    compiled.shutdown()
    return [output.outputs[0].token_ids for output in outputs], logits


def check(family: str, num_stages: int) -> None:
    compiled = autodeploy.compile(make_model(family).double())
    tokens, logits = behave(compiled)
    stages = [decode_program(stage.as_json()) for stage in split_stages(compiled.program, num_stages)]
    check_shares(compiled.program, stages)
    runner = InTurn(stages, compiled.runner.source)  # pyright: ignore[reportAttributeAccessIssue]
    ours, found = behave(CompiledModel(compiled.args, compiled.facts, compiled.timeline, runner, compiled.program))
    assert ours == tokens
    assert (found - logits).abs().max() <= 1e-10 * logits.abs().max()
    assert runner.largest == num_stages
    assert all(stage.recorded for stage in runner.runners)


def check_shares(program: Program, stages: list[Program]) -> None:
    """Every call that reads a parameter of a layer is in one stage, with the parameter; every cache is in one."""
    for stage in stages:
        stage.derive_values()
        stage.check()
    assert sorted(name for stage in stages for name in stage.caches) == sorted(program.caches)
    assert {name for stage in stages for name in stage.weights} == set(program.weights)
    assert sum(map(reads_of_layers, stages), Counter()) == reads_of_layers(program)


def reads_of_layers(program: Program) -> Counter[str]:
    """How many calls read each parameter of a layer."""
    nodes = program.graph.graph.find_nodes(op="get_attr")
    return Counter({str(node.target): len(node.users) for node in nodes if ".layers." in str(node.target)})


@pytest.mark.parametrize("family", FEW)
def test_stages_do_what_the_whole_does(family: str) -> None:
    check(family, 2)


@pytest.mark.slow
@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("family", MANY)
def test_stages_of_other_families(family: str, num_stages: int) -> None:
    check(family, num_stages)


def test_stages_are_balanced_and_what_crosses_is_the_residual() -> None:
    compiled = autodeploy.compile(make_model("llama", num_hidden_layers=6))
    compiled.shutdown()
    for num_stages in (2, 3, 4):
        stages = split_stages(compiled.program, num_stages)
        share = compiled.program.weight_bytes / num_stages
        layer = sum(compiled.program.parameter(name).nbytes for name in compiled.program.weights if ".layers.0." in name)
        assert all(abs(stage.weight_bytes - share) <= layer for stage in stages)
        for stage in stages[1:]:
            received = [node for node in stage.graph.graph.nodes if node.name.startswith("received")]
            assert [str(node.meta["val"].shape[2]) for node in received] == ["64", "64"]  # the sum, and its norm
    with pytest.raises(UnsupportedModelError, match=r"can be cut at \d+ places, and 500 stages need 499. Use pipeline_parallel"):
        split_stages(compiled.program, 500)


# Parts of a batch


@given(
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from(["none", "last", "all"])), min_size=1, max_size=9), st.integers(1, 4)
)
def test_parts_have_the_requests_of_the_batch(requests: list[tuple[int, str]], num_parts: int) -> None:
    batch = batch_of(requests)
    parts = parts_of(batch, num_parts, min_tokens=1)
    assert 1 <= len(parts) <= min(num_parts, len(requests))
    found = [request for part in parts for request in requests_of(part)]
    assert found == requests_of(batch)
    if {length for length, _ in requests} == {1}:
        sizes = [len(part["seq_lens"]) for part in parts]
        assert (len(parts), max(sizes) - min(sizes) <= 1) == (min(num_parts, len(requests)), True)


def test_few_tokens_are_one_part() -> None:
    batch = batch_of([(1, "last")] * 63)
    assert parts_of(batch, 2) == [batch]
    assert len(parts_of(batch_of([(1, "last")] * 64), 2)) == 2


def batch_of(requests: list[tuple[int, str]]) -> dict[str, np.ndarray]:
    """A batch of numbers that are all different. requests: how many tokens, and which of their logits are wanted."""
    ends = np.cumsum([0, *(length for length, _ in requests)])
    rows = [
        list(range(first, last))[{"none": last, "last": -1, "all": 0}[wanted] :]
        for first, last, (_, wanted) in zip(ends, ends[1:], requests, strict=False)
    ]
    sizes = {"T": int(ends[-1]), "B": len(requests), "P": 3}
    shapes = {name: [sizes.get(dim, dim) for dim in INPUTS[name].shape] for name in INPUTS if name not in COUNTED}  # pyright: ignore
    batch = {name: np.arange(np.prod(shape)).reshape(shape) for name, shape in shapes.items()}
    batch["page_table_window_8"] = batch["page_table"] + 1000
    return {**batch, "cu_seqlens_q": ends.astype(np.int32), "logits_indices": np.array(list(chain(*rows)), dtype=np.int64)}


COUNTED = {"cu_seqlens_q", "logits_indices"}


def requests_of(batch: Any) -> list[Any]:
    """Of each request what the batch says of it, the tokens whose logits are wanted counted from its own first one."""
    found = []
    for i, (first, last) in enumerate(zip(batch["cu_seqlens_q"], batch["cu_seqlens_q"][1:], strict=False)):
        tokens = [batch[name][..., first:last].tolist() for name in ("input_ids", "position_ids", "rope_len", "slot_mapping")]
        others = [batch[name][i].tolist() for name in ("page_table", "page_table_window_8", "seq_lens", "state_slots")]
        rows = batch["logits_indices"]
        found.append((tokens, others, (rows[(rows >= first) & (rows < last)] - first).tolist()))
    return found
