"""The judge of `autodeploy coverage`, as assertions."""

from __future__ import annotations

from typing import Any

import autodeploy
from autodeploy import CompiledModel
from autodeploy.coverage.judge import (
    TIGHT,
    TOLERANCE,
    Verdict,
    context_logits,
    eager_logits,
    judge,
    measure_greedy,
    measure_logits,
    random_prompts,
    relative_error,
    variant_logits,
    with_options,
)

__all__ = [
    "TIGHT",
    "Verdict",
    "check_greedy",
    "check_logits",
    "check_parity",
    "context_logits",
    "eager_logits",
    "judge",
    "random_prompts",
    "relative_error",
    "variant_logits",
    "with_options",
]

PROMPT_LENGTHS = (1, 5, 13, 22, 34, 47, 59, 70)


def check_logits(model: Any, compiled: CompiledModel) -> float:
    """Logits at lengths 1, 13 and 41 alone and all three packed in one row; returns the largest absolute error."""
    errors = measure_logits(model, compiled)
    assert errors.num_steps == 1
    assert errors.alone <= TOLERANCE, f"alone: relative error {errors.alone:.1e}"
    assert errors.packed <= TOLERANCE, f"packed: relative error {errors.packed:.1e}"
    return errors.absolute


def check_greedy(model: Any, compiled: CompiledModel, error: float) -> Verdict:
    """Eight requests at once, chunked and preempted."""
    verdict = measure_greedy(model, compiled, error, PROMPT_LENGTHS)
    assert compiled.executor.num_preemptions > 0
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
