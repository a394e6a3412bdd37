"""How a compiled model is compared with eager: logits, and greedy tokens judged position by position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import autodeploy
from autodeploy import CompiledModel, SamplingParams
from autodeploy.config import LLMArgs

PROMPT_LENGTHS = (1, 5, 13, 22, 34, 47, 59, 70)
NUM_NEW = 32
TIGHT = {"max_num_tokens": 16, "max_batch_size": 8, "kv_cache_config": {"page_size": 8, "max_tokens": 200}}
"""Every longer prompt is chunked, and the pool holds two of the eight requests at their full length."""


def random_prompts(lengths: tuple[int, ...] = PROMPT_LENGTHS, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 256, (length,), generator=generator).tolist() for length in lengths]


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
    return [handle.result(60).context_logits for handle in handles]


def with_options(compiled: CompiledModel, **options: Any) -> CompiledModel:
    """The same weights and program behind another executor; the first one's is shut down."""
    compiled.shutdown()
    args = LLMArgs(model=compiled.args.model, **options)
    return CompiledModel(args, compiled.facts, compiled.timeline, compiled.runner, compiled._program)


@dataclass
class Verdict:
    judged: int = 0
    total: int = 0
    wrong: int = 0

    @property
    def share(self) -> float:
        return self.judged / self.total


def judge(verdict: Verdict, tokens: list[int], eager: Tensor, other: Tensor, error: float) -> None:
    """Judge tokens against eager's logits [len(tokens), V] at the positions that predict them, given our own prefix.

    A position counts when eager's lead over its second choice exceeds ten times the error and its attention variants agree.
    """
    top = eager.topk(2).values
    counts = ((top[:, 0] - top[:, 1]) > 10 * error) & (eager.argmax(-1) == other.argmax(-1))
    verdict.total += len(tokens)
    verdict.judged += int(counts.sum())
    verdict.wrong += int((counts & (eager.argmax(-1) != torch.tensor(tokens))).sum())


def check_logits(model: Any, compiled: CompiledModel) -> float:
    """Logits at lengths 1, 13 and 41 alone and all three packed in one row; returns the largest absolute error."""
    prompts = random_prompts((1, 13, 41), seed=2)
    references = [eager_logits(model, ids) for ids in prompts]
    alone = [compiled(torch.tensor([ids]))[0] for ids in prompts]
    steps = compiled.executor.num_steps
    packed = context_logits(compiled, prompts)
    assert compiled.executor.num_steps - steps <= 3
    for name, results in (("alone", alone), ("packed", packed)):
        for ours, reference in zip(results, references, strict=True):
            assert ours.shape == reference.shape
            error = relative_error(ours, reference)
            assert error <= 1e-5, f"{len(ours)} tokens {name}: relative error {error:.1e}"
    return max(float((o - r).abs().max()) for o, r in zip(alone + packed, references * 2, strict=True))


def check_greedy(model: Any, compiled: CompiledModel, error: float) -> Verdict:
    """Eight requests at once, chunked and preempted."""
    prompts = random_prompts()
    outputs = compiled.generate(prompts, SamplingParams(max_tokens=NUM_NEW, ignore_eos=True))
    assert isinstance(outputs, list)
    assert compiled.executor.num_preemptions > 0, "the pool was meant to be too small"
    verdict = Verdict()
    for ids, output in zip(prompts, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        assert len(tokens) == NUM_NEW, output
        predicting = slice(len(ids) - 1, len(ids) + NUM_NEW - 1)
        eager = eager_logits(model, ids + tokens)[predicting]
        judge(verdict, tokens, eager, variant_logits(model, ids + tokens)[predicting], error)
    compiled.executor.scheduler.check()
    assert compiled.executor.scheduler.kv.num_free_pages == compiled.executor.scheduler.kv.num_usable_pages
    return verdict


def check_parity(model: Any) -> Verdict:
    compiled = autodeploy.compile(model)
    try:
        error = check_logits(model, compiled)
        compiled = with_options(compiled, **TIGHT)
        verdict = check_greedy(model, compiled, error)
    finally:
        compiled.shutdown()
    assert verdict.wrong == 0, verdict
    assert verdict.share >= 0.95, verdict
    return verdict
