"""One model type: a small model, compiled, run, and compared with eager."""

from __future__ import annotations

import logging
import time
import traceback
import warnings
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
import transformers

import autodeploy
from autodeploy import CompiledModel, Program, UnsupportedModelError
from autodeploy.coverage.judge import TIGHT, TOLERANCE, measure_greedy, measure_logits, with_options
from autodeploy.coverage.small import NoSmallModelError, NotDecoderOnlyError, small_model

LEAST_JUDGED = 0.85


class Kind(StrEnum):
    OK = "ok"
    UNSUPPORTED = "unsupported"
    """Refused, with a reason that a user can read."""
    WRONG = "wrong"
    FAILED = "failed"
    """Any error that was not raised on purpose."""
    NOT_COUNTED = "not decoder-only"


@dataclass(frozen=True)
class Result:
    """What became of one model type."""

    model_type: str
    kind: Kind
    reason: str = ""
    caches: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    error: float | None = None
    """Largest relative error of the logits."""
    judged: float | None = None
    """Share of the greedy tokens that could be judged."""
    seconds: float = 0.0


def examine(model_type: str) -> Result:
    """Never raises: what goes wrong is the result."""
    started = time.perf_counter()
    _be_quiet()
    try:
        fields = _examine(small_model(model_type))
    except NotDecoderOnlyError as error:
        fields = {"kind": Kind.NOT_COUNTED, "reason": str(error)}
    except NoSmallModelError as error:
        fields = {"kind": Kind.FAILED, "reason": f"no small model could be built: {error}"}
    except UnsupportedModelError as error:
        fields = {"kind": Kind.UNSUPPORTED, "reason": _short(str(error))}
    except Exception as error:
        fields = {"kind": Kind.FAILED, "reason": _describe(error)}
    return Result(model_type, seconds=round(time.perf_counter() - started, 1), **fields)


def _be_quiet() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def _short(message: str) -> str:
    """Without what every such message ends with."""
    return " ".join(message.removesuffix(" backend='pytorch' runs this model uncompiled.").split())[:600]


def _describe(error: Exception) -> str:
    """Type, message and the last line of this package that was being run."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/autodeploy/" in f.filename]
    place = f" ({frames[-1].filename.split('/autodeploy/')[-1]}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}{place}"


def _examine(model: Any) -> dict[str, Any]:
    compiled = autodeploy.compile(model)
    found = mechanisms(compiled.program)
    try:
        return {**found, **compare(model, compiled)}
    finally:
        compiled.shutdown()


def mechanisms(program: Program) -> dict[str, tuple[str, ...]]:
    """Kinds of caches and semantic ops of a lowered program, but for linear layers, which every one has."""
    caches = sorted({type(spec).__name__ for spec in program.caches.values()})
    return {"caches": tuple(caches), "ops": tuple(sorted(program.providers.keys() - {"linear"}))}


def compare(model: Any, compiled: CompiledModel) -> dict[str, Any]:
    """Kind, reason and numbers of a compiled model against the eager one."""
    errors = measure_logits(model, compiled)
    measured: dict[str, Any] = {"error": errors.relative}
    if not errors.relative <= TOLERANCE:
        reason = f"logits differ from eager's: {errors.alone:.1e} alone, {errors.packed:.1e} packed"
        return {**measured, "kind": Kind.WRONG, "reason": reason}
    assert errors.num_steps == 1, "the prompts never shared a row"
    tight = with_options(compiled, **TIGHT)
    try:
        verdict = measure_greedy(model, tight, errors.absolute)
        preemptions = tight.executor.num_preemptions
    finally:
        tight.shutdown()
    measured["judged"] = verdict.share
    if verdict.wrong:
        return {**measured, "kind": Kind.WRONG, "reason": f"{verdict.wrong} of {verdict.judged} judged tokens are wrong"}
    if verdict.share < LEAST_JUDGED:
        return {**measured, "kind": Kind.WRONG, "reason": f"only {verdict.share:.0%} of the tokens could be judged"}
    assert preemptions > 0, "no request was preempted"
    return {**measured, "kind": Kind.OK}
