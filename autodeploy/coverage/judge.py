"""How a compiled model is compared with eager: logits, and greedy tokens judged position by position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autodeploy import CompiledModel, SamplingParams
from autodeploy.config import LLMArgs
from autodeploy.executor.outputs import RequestHandle, RequestOutput

TOLERANCE = 1e-5
"""Largest relative error of a logit in float32."""
LOGIT_LENGTHS = (1, 13, 41)
PROMPT_LENGTHS = (1, 5, 13, 22, 34, 47)
NUM_NEW = 32
TIGHT = {"max_num_tokens": 16, "max_batch_size": 8, "kv_cache_config": {"page_size": 8, "max_tokens": 200}}
"""Every longer prompt is chunked, and the pool holds two of the requests at their full length."""
PATIENCE = 120.0
"""Seconds one request may take."""


def random_prompts(lengths: tuple[int, ...] = PROMPT_LENGTHS, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 250, (length,), generator=generator).tolist() for length in lengths]


def eager_logits(model: Any, ids: list[int], implementation: str = "eager") -> Tensor:
    """[tokens, V] in one forward, no cache."""
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    model.set_attn_implementation("eager")
    return logits


def variant_logits(model: Any, ids: list[int]) -> Tensor:
    """Eager's other attention variant, where the family has one."""
    return eager_logits(model, ids, "sdpa" if model._supports_sdpa else "eager")


def relative_error(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).abs().max() / reference.abs().max())


def context_logits(compiled: CompiledModel, prompts: list[list[int]]) -> list[Tensor]:
    """Logits of all tokens of several prompts, served at once."""
    handles = [compiled.submit(ids, SamplingParams(max_tokens=0), return_context_logits=True) for ids in prompts]
    return [handle.result(PATIENCE).context_logits for handle in handles]


def with_options(compiled: CompiledModel, **options: Any) -> CompiledModel:
    """The same weights and program behind another executor; the first one's is shut down."""
    compiled.shutdown()
    args = LLMArgs(model=compiled.args.model, **options)
    return CompiledModel(args, compiled.facts, compiled.timeline, compiled.runner, compiled._program)


@dataclass
class Verdict:
    """Greedy tokens: all, those judged, and those of them that are wrong."""

    judged: int = 0
    total: int = 0
    wrong: int = 0

    @property
    def share(self) -> float:
        return self.judged / self.total


@dataclass(frozen=True)
class LogitErrors:
    """Against eager, over all prompts."""

    alone: float
    """Largest relative error of prompts computed alone."""
    packed: float
    """And of all prompts in one row."""
    absolute: float
    num_steps: int
    """Forwards that the packed prompts took: one when they shared a row."""

    @property
    def relative(self) -> float:
        return max(self.alone, self.packed)


def measure_logits(model: Any, compiled: CompiledModel) -> LogitErrors:
    """Logits of prompts alone, and of all of them packed in one row."""
    prompts = random_prompts(LOGIT_LENGTHS, seed=2)
    references = [eager_logits(model, ids) for ids in prompts]
    alone = [compiled(torch.tensor([ids]))[0] for ids in prompts]
    packed, num_steps = _in_one_row(compiled, prompts)
    absolute = max(float((o - r).abs().max()) for o, r in zip(alone + packed, references * 2, strict=True))
    relative = [max(map(relative_error, ours, references)) for ours in (alone, packed)]
    return LogitErrors(relative[0], relative[1], absolute, num_steps)


def _in_one_row(compiled: CompiledModel, prompts: list[list[int]]) -> tuple[list[Tensor], int]:
    """Logits, and the steps they took; again where the loop took up the first prompt before the last had come."""
    for _ in range(20):
        before = compiled.executor.num_steps
        logits = context_logits(compiled, prompts)
        if (num_steps := compiled.executor.num_steps - before) == 1:
            break
    return logits, num_steps


def judge(verdict: Verdict, tokens: list[int], eager: Tensor, other: Tensor, error: float) -> None:
    """Judge tokens against eager's logits [len(tokens), V] at the positions that predict them, given our own prefix.

    A position counts when eager's lead over its second choice exceeds ten times the error and its attention variants agree.
    """
    top = eager.topk(2).values
    agree = (eager - other).abs().amax(-1) <= TOLERANCE * eager.abs().max()
    counts = ((top[:, 0] - top[:, 1]) > 10 * error) & agree
    verdict.total += len(tokens)
    verdict.judged += int(counts.sum())
    verdict.wrong += int((counts & (eager.argmax(-1) != torch.tensor(tokens))).sum())


def preempted_outputs(compiled: CompiledModel, handles: list[RequestHandle]) -> list[RequestOutput]:
    """Outputs of streaming requests, some preempted while they run: caches of windows and states never run out by themselves."""
    for num_tokens, output in enumerate(handles[0]):
        if num_tokens % 6 == 3 and not output.finished:
            compiled.executor.preempt(handles[num_tokens // 6 % len(handles)].request_id)
    return [handle.result(PATIENCE) for handle in handles]


def measure_greedy(
    model: Any, compiled: CompiledModel, error: float, lengths: tuple[int, ...] = PROMPT_LENGTHS, num_new: int = NUM_NEW
) -> Verdict:
    """Several requests at once, chunked and preempted. error: the absolute error of the logits."""
    prompts = random_prompts(lengths)
    params = SamplingParams(max_tokens=num_new, ignore_eos=True)
    handles = [compiled.submit(ids, params, streaming=True) for ids in prompts]
    outputs = preempted_outputs(compiled, handles)
    verdict = Verdict()
    for ids, output in zip(prompts, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        assert len(tokens) == num_new, output
        predicting = slice(len(ids) - 1, len(ids) + num_new - 1)
        eager = eager_logits(model, ids + tokens)[predicting]
        judge(verdict, tokens, eager, variant_logits(model, ids + tokens)[predicting], error)
    compiled.executor.scheduler.check()
    return verdict
