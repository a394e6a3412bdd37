"""A failed pass in a folder: the program before it and what was still to run. No weights, no pickle; `replay` runs it again."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from autodeploy.errors import ProgramFileError
from autodeploy.program import Program
from autodeploy.specs import Target
from autodeploy.transforms.base import Transform

FILE_NAME = "reproducer.json"


def write_reproducer(program: Program, remaining: tuple[Transform, ...], target: Target, verify: str, error: Exception) -> Path:
    """Save a program and the passes that were to run on it, the failing one first. Returns the folder."""
    folder = Path(tempfile.mkdtemp(prefix="autodeploy-"))
    program.save(folder)
    data = {
        "passes": [_describe(item) for item in remaining],
        "target": asdict(target),
        "verify": verify,
        "seed": 0,
        "error": f"{type(error).__name__}: {error}",
    }
    (folder / FILE_NAME).write_text(json.dumps(data, indent=1, default=repr))
    return folder


def read_reproducer(folder: Path) -> tuple[Program, tuple[Transform, ...], Target, str, str]:
    """(program, passes, target, verify, the error that was). Raises ProgramFileError."""
    try:
        data = json.loads((folder / FILE_NAME).read_text())
    except (OSError, ValueError) as error:
        raise ProgramFileError(
            f"{folder} holds no readable {FILE_NAME} ({error}). Give the folder named in the error."
        ) from error
    passes = tuple(_build(item) for item in data["passes"])
    return Program.load(folder), passes, Target(**data["target"]), data["verify"], data["error"]


def is_importable(item: Transform) -> bool:
    """Whether another process can find the pass: its class stands in a module, not in the script that ran or in a function."""
    return _importable(type(item).__module__, type(item).__qualname__)


def _importable(module: str, name: str) -> bool:
    return module != "__main__" and "<locals>" not in name


def _describe(item: Transform) -> dict[str, Any]:
    options = {field.name: getattr(item, field.name) for field in fields(item)}
    return {"module": type(item).__module__, "class": type(item).__qualname__, "options": options}


def _build(data: dict[str, Any]) -> Transform:
    name = f"{data['module']}.{data['class']}"
    if not _importable(data["module"], data["class"]):
        raise ProgramFileError(
            f"pass {name} was defined in a script or inside a function, where it cannot be imported from. "
            "Move it to a module of its own, and let it fail there."
        )
    try:
        kind: Any = import_module(data["module"])
        for part in data["class"].split("."):
            kind = getattr(kind, part)
    except (ImportError, AttributeError) as error:
        raise ProgramFileError(f"pass {name} cannot be found ({error}). Put its module on the path.") from error
    if not isinstance(kind, type) or not issubclass(kind, Transform):
        raise ProgramFileError(f"{name} is not a Transform")
    return kind(**data["options"])
