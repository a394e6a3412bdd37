"""What decides a program, as named facts: two starts with the same facts have the same program.

A fact too many costs a capture; one too few would serve a wrong program. So every option counts that is not known to be without
influence, and what cannot be described (a pass of the script that runs, an option that is no plain data) is not stored.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from autodeploy.checkpoint import MODELOPT_FILE, SETTINGS, CheckpointSource, raw_config, read_json
from autodeploy.config import LLMArgs
from autodeploy.custom_ops import SEMANTIC_OPS
from autodeploy.custom_ops.attention_backend import ATTENTION_BACKENDS
from autodeploy.custom_ops.timings import environment_of, kernel_packages, key_of
from autodeploy.program_store import Facts
from autodeploy.recipes import Take
from autodeploy.specs import Target

WITHOUT_INFLUENCE = {
    *("model", "backend", "program_cache", "tokenizer", "skip_tokenizer_init", "seed"),
    *("max_seq_len", "max_num_tokens", "max_batch_size", "enable_chunked_prefill"),
    *("cuda_graph_config", "enforce_eager", "disable_overlap_scheduler", "distributed_executor_backend", "distributed_timeout"),
    *("device", "kv_cache_config", "pipeline", "plugins"),  # they are in other facts
    *("tensor_parallel_size", "moe_expert_parallel_size", "pipeline_parallel_size"),  # in the target
}
"""Options that do not change the program."""
POOL_SIZE = {"max_tokens", "max_bytes", "free_memory_fraction", "page_size"}
"""Of `kv_cache_config`: how many pages there are; the size of one is the target's."""
OWN = {"autodeploy", "torch"}
"""Packages whose code is told by facts of their own."""


class NotCacheable(Exception):
    """A program that cannot be known again; the text says why."""


def facts_of(args: LLMArgs, target: Target, passes: Iterable[Any] | None, source: CheckpointSource) -> Facts:
    """What decides the program of a checkpoint folder. passes: those of an edited pipeline; None for the default one.

    Raises NotCacheable, or CheckpointError for a folder that cannot be read.
    """
    passes = None if passes is None else list(passes)
    tensors = sorted((name, source.kind(name)) for name in source.names())
    facts = {
        "config.json": _hash(raw_config(source.folder)),
        "tensors of the checkpoint": _hash(tensors),
        "quantization settings": _hash(_quantization(source)),
        "eos_token_id of generation_config.json": json.dumps(_eos(source.folder)),
        "autodeploy": _hash(_code([Path(__file__).parent])),
        "Python": platform.python_version(),
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "transformers": version("transformers"),
        "machine": _machine(target.device),
        "packages of kernels": json.dumps(kernel_packages(), sort_keys=True),
        "environment": json.dumps(_environment(), sort_keys=True),
        "passes": "default" if passes is None else json.dumps([_describe_pass(item) for item in passes], sort_keys=True),
        "plugins": json.dumps(args.plugins),
        "providers": _hash({op.name: [item.name for item in op.providers] for op in SEMANTIC_OPS.values()}),
        "attention backends": json.dumps([backend.name for backend in ATTENTION_BACKENDS]),
    }
    if args.autotune:
        facts["what was timed"] = key_of(environment_of(target.device))
    facts |= {f"target.{name}": _plain(value, f"the target's {name}") for name, value in asdict(target).items()}
    return facts | _options(args) | dict(_foreign_code(args.plugins, passes or ()))


def _options(args: LLMArgs) -> dict[str, str]:
    values = {name: getattr(args, name) for name in type(args).model_fields if name not in WITHOUT_INFLUENCE}
    pool = args.kv_cache_config
    values |= {f"kv_cache_config.{name}": getattr(pool, name) for name in type(pool).model_fields if name not in POOL_SIZE}
    values |= {name: value.model_dump() for name, value in values.items() if isinstance(value, BaseModel)}
    return {name: _plain(value, f"the option '{name}'") for name, value in values.items()}


def _describe_pass(item: Any) -> list[str]:
    kind = type(item)
    if kind.__module__ == "__main__" or "<locals>" in kind.__qualname__:
        raise NotCacheable(f"the pass '{item.name}' is defined in a script or inside a function")
    options = {field.name: getattr(item, field.name) for field in fields(item)}
    return [item.name, f"{kind.__module__}.{kind.__qualname__}", _plain(options, f"an option of the pass '{item.name}'")]


def _plain(value: Any, what: str) -> str:
    def refuse(other: Any) -> Any:
        if isinstance(other, torch.dtype):
            return str(other)
        if isinstance(other, set | frozenset):
            return sorted(other)
        raise NotCacheable(f"{what} is a {type(other).__name__}, which is no plain data")

    return json.dumps(value, sort_keys=True, default=refuse)


def _quantization(source: CheckpointSource) -> list[Any]:
    """What is known of a quantized checkpoint beside config.json, and decides recipes."""
    path, names = source.folder / MODELOPT_FILE, sorted(filter(SETTINGS.search, source.names()))
    return [read_json(path) if path.exists() else None, *((name, source.fetch(Take(name)).tolist()) for name in names)]


def _eos(folder: Path) -> Any:
    path = folder / "generation_config.json"
    return read_json(path).get("eos_token_id") if path.exists() else None


def _machine(device: str) -> str:
    """What providers may ask of the machine: instructions of the CPU, compilers, the GPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    compilers = [shutil.which(name) for name in (os.environ.get("CXX", "c++"), "c++", "g++", "clang++")]
    gpu = [torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)] if device.startswith("cuda") else []
    return _hash([platform.machine(), torch.backends.cpu.get_cpu_capability(), flags, compilers, gpu])


def _environment() -> dict[str, str]:
    named = ("AUTODEPLOY_", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
    return {key: value for key, value in os.environ.items() if key.startswith(named) and key != "AUTODEPLOY_CACHE_DIR"}


def _foreign_code(plugins: Iterable[str], passes: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Version and source of each package, beside this one, that has a say in the program."""
    functions = [provider.function for op in SEMANTIC_OPS.values() for provider in op.providers]
    modules = [getattr(function, "__module__", None) or "torch" for function in functions]
    modules += [type(item).__module__ for item in (*passes, *ATTENTION_BACKENDS)]
    modules += [name.partition(":")[0] for name in plugins if ":" in name]
    packages = {name.partition(".")[0] for name in modules} - OWN
    for name in sorted(packages):
        yield f"code of {name}", f"{_version(name)} {_hash(_code(_places(name)))}"


def _places(package: str) -> list[Path]:
    module = sys.modules.get(package)
    file = getattr(module, "__file__", None)
    folders = [Path(folder) for folder in getattr(module, "__path__", ())]
    if package == "__main__" or not (folders or file):
        raise NotCacheable(f"it uses code of '{package}', which has no file that other starts could find")
    return folders or [Path(str(file))]


def _version(package: str) -> str:
    return " ".join(f"{name} {version(name)}" for name in sorted(set(packages_distributions().get(package, ()))))


def _code(places: Iterable[Path]) -> list[tuple[str, str]]:
    """(name, hash) of every source file."""
    return [
        (str(path.relative_to(place)), hashlib.sha256(path.read_bytes()).hexdigest())
        for place in places
        for path in (sorted(place.rglob("*")) if place.is_dir() else [place])
        if path.suffix in {".py", ".cpp", ".h", ".cu"}
    ]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
