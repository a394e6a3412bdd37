"""The public names and signatures are those of tests/goldens/public_api.txt. After a change made on purpose, update the file:

python -m tests.test_public_api --update
"""

import inspect
import subprocess
import sys
from collections.abc import Iterator
from difflib import unified_diff
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel
from typer.models import ArgumentInfo

import autodeploy
from autodeploy.cli import app
from autodeploy.config import LLMArgs

GOLDEN = Path(__file__).parent / "goldens" / "public_api.txt"
MADE_FOR_THE_USER = {"CompiledModel", "RequestHandle", "Program"}
"""Classes whose constructors users do not call."""


def public_api() -> str:
    names = sorted(autodeploy.__all__)
    lines = [f"autodeploy: {', '.join(names)}", ""]
    for name in [*names, "LLMArgs"]:
        lines += [*describe(name, LLMArgs if name == "LLMArgs" else getattr(autodeploy, name)), ""]
    return "\n".join([*lines, *describe_commands()]) + "\n"


def describe(name: str, thing: Any) -> Iterator[str]:
    if not inspect.isclass(thing):
        yield name if inspect.ismodule(thing) else f"{name}{inspect.signature(thing)}"
        return
    yield f"class {name}({', '.join(base.__name__ for base in thing.__bases__)})"
    for line in members(name, thing):
        yield f"    {line}"


SPECIAL = {"__call__", "__iter__", "__aiter__", "__await__", "__enter__", "__exit__", "__str__"}


def members(name: str, cls: type) -> Iterator[str]:
    if issubclass(cls, Enum):
        yield from (f"{item.name} = {item.value!r}" for item in cls)
    elif issubclass(cls, BaseModel):
        yield from (f"{key}: {annotation(field.annotation)}{default(field)}" for key, field in cls.model_fields.items())
        yield from (f"{alias} means {key}" for alias, key in cls._ALIASES.items())
    elif "__init__" in vars(cls) and name not in MADE_FOR_THE_USER:
        yield f"__init__{inspect.signature(cls.__init__)}"
    for key, member in vars(cls).items():
        if key.startswith("_") and key not in SPECIAL:
            continue
        if isinstance(member, property | cached_property):
            yield f"{key} (property)"
        elif inspect.isfunction(member):
            yield f"{'async ' if inspect.iscoroutinefunction(member) else ''}{key}{inspect.signature(member)}"


def annotation(kind: Any) -> str:
    return inspect.formatannotation(kind).replace("collections.abc.", "")


def default(field: Any) -> str:
    if field.is_required():
        return ""
    return " = (computed)" if field.default_factory is not None else f" = {field.default!r}"


def describe_commands() -> Iterator[str]:
    groups = [(f"{group.name} ", group.typer_instance) for group in app.registered_groups]
    for prefix, command in ((prefix, command) for prefix, group in [("", app), *groups] for command in group.registered_commands):
        assert command.callback is not None
        yield f"$ autodeploy {prefix}{command.name or command.callback.__name__}"
        hints = get_type_hints(command.callback, include_extras=True)
        for parameter in inspect.signature(command.callback).parameters.values():
            kind, info = get_args(hints[parameter.name])
            named = info.default if isinstance(info.default, str) else "--" + parameter.name.replace("_", "-")
            spelling = parameter.name.upper() if isinstance(info, ArgumentInfo) else named
            value = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
            yield f"    {spelling}: {annotation(kind)}{value}"


def test_public_names_and_signatures_are_those_agreed_on() -> None:
    changes = list(unified_diff(GOLDEN.read_text().splitlines(), public_api().splitlines(), "agreed on", "now", lineterm="", n=1))
    assert not changes, "\n".join(["run `python -m tests.test_public_api --update` if this is meant", *changes])


def test_import_is_quick_and_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, time; start = time.perf_counter(); import autodeploy; print(time.perf_counter() - start, *sys.modules)"
    root = Path(autodeploy.__file__).parents[1]
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    seconds, *modules = output.split()
    assert float(seconds) < 0.5
    assert "autodeploy" in modules
    assert not {"torch", "transformers", "pydantic", "numpy"} & set(modules)


def test_every_public_name_is_there_and_documented() -> None:
    assert set(dir(autodeploy)) >= {*autodeploy.__all__, "__version__"}
    undocumented = [name for name in autodeploy.__all__ if not inspect.getdoc(getattr(autodeploy, name))]
    assert not undocumented


if __name__ == "__main__" and sys.argv[1:] == ["--update"]:
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(public_api())
