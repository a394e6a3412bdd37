"""autodeploy: compile an unmodified Hugging Face model and serve it."""

import sys
from contextlib import nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any

from autodeploy.collector import collector_at_rest

if TYPE_CHECKING:
    from autodeploy import custom_ops as ops
    from autodeploy._compile import CompiledModel, compile
    from autodeploy._llm import LLM
    from autodeploy.config import CudaGraphConfig, KVCacheConfig, QuantConfig, SamplingParams
    from autodeploy.errors import (
        AutoDeployError,
        CheckpointError,
        ConfigError,
        EngineDeadError,
        ExecutionError,
        RequestError,
        TransformError,
        UnsupportedModelError,
    )
    from autodeploy.executor.outputs import CompletionOutput, RequestHandle, RequestOutput
    from autodeploy.program import Program
    from autodeploy.specs import Target
    from autodeploy.testing import check_provider, check_transform
    from autodeploy.transforms.base import Effect, Transform
    from autodeploy.transforms.default import default_pipeline
    from autodeploy.transforms.pipeline import Pipeline

__version__ = "0.1.0"

_WHERE = {
    "_compile": ("CompiledModel", "compile"),
    "_llm": ("LLM",),
    "config": ("CudaGraphConfig", "KVCacheConfig", "QuantConfig", "SamplingParams"),
    "errors": (
        "AutoDeployError",
        "CheckpointError",
        "ConfigError",
        "EngineDeadError",
        "ExecutionError",
        "RequestError",
        "TransformError",
        "UnsupportedModelError",
    ),
    "executor.outputs": ("CompletionOutput", "RequestHandle", "RequestOutput"),
    "program": ("Program",),
    "specs": ("Target",),
    "testing": ("check_provider", "check_transform"),
    "transforms.base": ("Effect", "Transform"),
    "transforms.default": ("default_pipeline",),
    "transforms.pipeline": ("Pipeline",),
}
"""Module -> public names in it. They are loaded at first use: importing autodeploy loads neither torch nor transformers."""

__all__ = [
    "LLM",
    "AutoDeployError",
    "CheckpointError",
    "CompiledModel",
    "CompletionOutput",
    "ConfigError",
    "CudaGraphConfig",
    "Effect",
    "EngineDeadError",
    "ExecutionError",
    "KVCacheConfig",
    "Pipeline",
    "Program",
    "QuantConfig",
    "RequestError",
    "RequestHandle",
    "RequestOutput",
    "SamplingParams",
    "Target",
    "Transform",
    "TransformError",
    "UnsupportedModelError",
    "check_provider",
    "check_transform",
    "compile",
    "default_pipeline",
    "ops",
]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return _module("custom_ops")
    for module, names in _WHERE.items():
        if name in names:
            return getattr(_module(module), name)
    raise AttributeError(f"module 'autodeploy' has no attribute '{name}'")


def _module(name: str) -> Any:
    full_name = f"autodeploy.{name}"
    with nullcontext() if full_name in sys.modules else collector_at_rest():
        return import_module(full_name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
