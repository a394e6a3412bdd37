"""Edits of the pipeline from outside: plugins, applied only when they are asked for by name, and settings as text.

A plugin is a function from Pipeline to Pipeline. A package offers one under a name in its entry-point group
`autodeploy.plugins`; a plugin in no package is named "module:attribute". Nothing is imported that was not asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from autodeploy.errors import AutoDeployError, ConfigError, did_you_mean
from autodeploy.transforms.pipeline import Pipeline

GROUP = "autodeploy.plugins"
Plugin = Callable[[Pipeline], Pipeline]


def apply_plugins(pipeline: Pipeline, names: Sequence[str]) -> Pipeline:
    """The pipeline as these plugins leave it, each given what the one before it made. Raises ConfigError."""
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"plugin '{name}' is asked for {names.count(name)} times; name it once")
        pipeline = _apply(name, load_plugin(name), pipeline)
    return pipeline


def load_plugin(name: str) -> Plugin:
    """The plugin of that name: "module:attribute", or what an installed package calls so. Raises ConfigError."""
    try:
        plugin = _attribute(name) if ":" in name else _entry_point(name).load()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"plugin '{name}' cannot be imported: {_cause(error)}. Repair it, or leave its name out.") from error
    if not callable(plugin):
        raise ConfigError(f"plugin '{name}' is a {type(plugin).__name__}, not a function from Pipeline to Pipeline")
    return plugin


def apply_settings(pipeline: Pipeline, settings: Sequence[str]) -> Pipeline:
    """The pipeline with options of its passes set, each given as "pass.option=value", the value in JSON or a bare word."""
    for text in settings:
        name, dot, rest = text.partition(".")
        option, equals, value = rest.partition("=")
        if not (dot and equals and name and option):
            raise ConfigError(f"'{text}' is not of the form pass.option=value")
        given, now = _value(value), getattr(pipeline.passes[pipeline.index(name)], option, None)
        if isinstance(now, float) and type(given) is int:
            given = float(given)
        edited = pipeline.configure(name, **{option: given})  # refuses an unknown option
        if now is not None and type(given) is not type(now):
            raise ConfigError(f"'{text}': option '{option}' of pass '{name}' is a {type(now).__name__}, like {json.dumps(now)}")
        pipeline = edited
    return pipeline


def foreign_passes(pipeline: Pipeline) -> list[str]:
    """The passes that are not autodeploy's own, each with the module it comes from."""
    modules = [(item.name, type(item).__module__) for item in pipeline]
    return [f"{name} ({module})" for name, module in modules if module.partition(".")[0] != "autodeploy"]


def _apply(name: str, plugin: Plugin, pipeline: Pipeline) -> Pipeline:
    try:
        edited = plugin(pipeline)
    except Exception as error:
        cause = str(error) if isinstance(error, AutoDeployError) else _cause(error)
        raise ConfigError(f"plugin '{name}' failed: {cause}") from error
    if not isinstance(edited, Pipeline):
        raise ConfigError(f"plugin '{name}' returned a {type(edited).__name__}, but it must return the edited Pipeline")
    return edited


def _entry_point(name: str) -> EntryPoint:
    points = entry_points(group=GROUP)
    found = {_package(point): point for point in points if point.name == name}  # one per package, however often it is on the path
    if len(found) > 1:
        raise ConfigError(
            f"several packages have a plugin named '{name}': {', '.join(sorted(found))}. "
            "Uninstall all but one, or name the one you mean as module:attribute"
        )
    if not found:
        names = sorted({point.name for point in points})
        installed = ", ".join(names) or "none"
        raise ConfigError(f"no plugin named '{name}' is installed.{did_you_mean(name, names)} Installed: {installed}")
    return next(iter(found.values()))


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _attribute(name: str) -> Any:
    module, _, path = name.partition(":")
    value: Any = import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"
