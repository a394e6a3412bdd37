"""A start without a stored program: capture and passes. transformers' modeling code is imported here and nowhere upstream."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from autodeploy.capture.export import capture
from autodeploy.capture.origin import Origin, origin_of, origin_of_config
from autodeploy.capture.patches import rope_thresholds
from autodeploy.capture.quantized import quantization_settings
from autodeploy.capture.skeleton import read_config
from autodeploy.capture.twin import capture_twin
from autodeploy.checkpoint import raw_config
from autodeploy.config import LLMArgs
from autodeploy.custom_ops.cpp import build_ahead
from autodeploy.errors import ConfigError, UnsupportedModelError
from autodeploy.executor.model_runner import EagerRunner
from autodeploy.program import PassRecord, Program, Twin
from autodeploy.program_cache import Lowered
from autodeploy.report.timeline import Timeline
from autodeploy.specs import ModelFacts, Target
from autodeploy.transforms.pipeline import Observer, Pipeline
from autodeploy.transforms.verify_numeric import MAX_BYTES, float64_bytes


def lower(
    args: LLMArgs, pipeline: Pipeline, target: Target, timeline: Timeline, *observers: Observer, meta: bool = False
) -> tuple[Lowered, Mapping[str, Tensor]]:
    """The lowered program, its weights as recipes over the source; and the values of its `Initial` leaves.

    meta: read nothing but config.json.
    """
    if target.device == "cpu":
        build_ahead()
    if meta:
        origin = origin_of_config(Path(args.model), args.dtype)
    else:
        origin = origin_of(args.model, args.dtype, args.ignore_unexpected_weights)
    with timeline.phase("export"):
        captured = capture(origin.skeleton, origin.buffers)
    captured.program.remarks |= origin.remarks
    captured.program.weights = replace(captured.program.weights, formats=origin.formats)
    if "shard" in pipeline.names() and (hints := getattr(origin.skeleton, "tp_plan", None)):
        pipeline = pipeline.configure("shard", hints=hints)
    for observe in observers:
        observe(captured.program, PassRecord("export", 0, timeline.seconds["export"], {}))
    verify = args.verify
    if verify == "numeric" and float64_bytes(captured.program) > MAX_BYTES:
        with timeline.phase("verify on a small twin"):
            captured.program.twin = _verify_on_twin(captured.program, origin, pipeline, target)
        verify = "structure"
    with timeline.phase("passes", len(pipeline.passes)) as advance:
        program = pipeline.run(captured.program, target, advance, *observers, verify=verify)
    program.weights = program.weights.substitute(origin.recipes)
    return Lowered(program, origin.source_with(captured.initial), origin.facts), captured.initial


def _verify_on_twin(program: Program, origin: Origin, pipeline: Pipeline, target: Target) -> Twin:
    """Run the passes, verified numerically, on a small model like this one. Raises ConfigError when none can be made."""
    small = capture_twin(origin.config, next(origin.skeleton.parameters()).dtype, MAX_BYTES).program
    twin = Twin(small.op_counts()["autodeploy.attention"], float64_bytes(small), float64_bytes(program), MAX_BYTES)
    pipeline.run(small, target, verify="numeric")
    return twin


def refuse(model: Any) -> None:
    """Raises ConfigError for what is neither a folder nor a causal language model, CheckpointError for a folder without one."""
    what = type(model).__name__
    if isinstance(model, nn.Module):
        if not isinstance(model, PreTrainedModel) or not model.can_generate():
            raise ConfigError(f"'model' is a {what}, not a causal language model of transformers; use AutoModelForCausalLM")
    elif isinstance(model, str | Path):
        read_config(Path(model))
    else:
        raise ConfigError(f"'model' is a {what}; give a checkpoint folder or a causal language model of transformers")


def eager(args: LLMArgs, timeline: Timeline) -> tuple[ModelFacts, EagerRunner]:
    """The model itself, for `backend="pytorch"`."""
    model: Any = args.model
    with timeline.phase("load weights"):
        if not isinstance(model, nn.Module):
            read_config(Path(model))
            _refuse_quantized(Path(model))
            model = AutoModelForCausalLM.from_pretrained(model, dtype=args.dtype, trust_remote_code=False, use_safetensors=True)
        own = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})  # shared
    return ModelFacts.of(model.config, model.generation_config), EagerRunner(own.eval(), rope_thresholds(own))


def _refuse_quantized(folder: Path) -> None:
    if quantization_settings(raw_config(folder), folder) is not None:
        raise UnsupportedModelError(
            f"{folder}: backend='pytorch' reads no quantized checkpoint: transformers reads some wrongly, others not at all. "
            "Use backend='autodeploy', or the unquantized checkpoint."
        )
