"""Edits of the pipeline from outside: plugins, applied only when they are asked for by name, and settings as text.

A plugin is a function from Pipeline to Pipeline. A package offers one under a name in its entry-point group
`autodeploy.plugins`; a plugin in no package is named "module:attribute". Nothing is imported that was not asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, cast

import yaml

from autodeploy.config import QuantConfig
from autodeploy.errors import AutoDeployError, ConfigError, did_you_mean, with_article
from autodeploy.specs import Target
from autodeploy.transforms.default import default_pipeline
from autodeploy.transforms.pipeline import Pipeline
from autodeploy.transforms.quantize import QuantizeWeights
from autodeploy.transforms.quantize_cache import QuantizeCache
from autodeploy.transforms.select_kernels import refuse_attention

GROUP = "autodeploy.plugins"
Plugin = Callable[[Pipeline], Pipeline]


def edited_pipeline(
    given: Any,
    plugins: Sequence[str],
    target: Target,
    quantization: QuantConfig | None = None,
    cache_dtype: str = "auto",
    shard_plan: Mapping[str, str] | None = None,
    autotune: bool = False,
    attention: str = "auto",
) -> Pipeline:
    """The default pipeline or the one given, as the plugins and then the function given edit it. Raises ConfigError."""
    quantize = None if quantization is None else QuantizeWeights(**quantization.rounding)
    quantize_cache = None if cache_dtype == "auto" else QuantizeCache(dtype=cache_dtype)
    asked = {"'quantization'": quantize, "the cache's dtype": quantize_cache}
    for what, item in asked.items():
        if isinstance(given, Pipeline) and item is not None:
            reason = f"{what} edits the default pipeline; put a {type(item).__name__} pass into the one that is given"
            raise ConfigError(reason)
    default = given if isinstance(given, Pipeline) else default_pipeline(target, quantize, quantize_cache)
    if shard_plan is not None:
        default = default.configure("shard", rules=shard_plan)
    if autotune:
        default = default.configure("select_kernels", autotune=True)
    if attention != "auto":
        refuse_attention(attention, target)  # before a model is traced
        default = default.configure("select_kernels", attention=attention)
    edited = apply_plugins(default, plugins)
    if given is None or isinstance(given, Pipeline):
        return edited
    if not callable(given) or not isinstance(edited := given(edited), Pipeline):
        raise ConfigError("'pipeline' must be a Pipeline or a function from Pipeline to Pipeline")
    return edited


def apply_plugins(pipeline: Pipeline, names: Sequence[str]) -> Pipeline:
    """The pipeline as these plugins leave it, each given what the one before it made. Raises ConfigError."""
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"plugin '{name}' is asked for {names.count(name)} times; name it once")
        pipeline = _apply(name, load_plugin(name), pipeline)
    return pipeline


def load_plugin(name: str) -> Plugin:
    """The plugin of that name: "module:attribute", or what an installed package calls so. Raises ConfigError."""
    load = partial(_attribute, name) if ":" in name else _entry_point(name).load
    try:
        plugin: Any = load()
    except Exception as error:
        raise ConfigError(f"plugin '{name}' cannot be imported: {_cause(error)}. Repair it, or leave its name out.") from error
    if not callable(plugin):
        raise ConfigError(f"plugin '{name}' is {with_article(type(plugin).__name__)}, not a function from Pipeline to Pipeline")
    return cast(Plugin, plugin)


def apply_settings(pipeline: Pipeline, settings: Sequence[str]) -> Pipeline:
    """The pipeline with options of its passes set, each given as "pass.option=value", the value in JSON or a bare word."""
    for text in settings:
        name, dot, rest = text.partition(".")
        option, equals, value = rest.partition("=")
        if not (dot and equals and name and option):
            raise ConfigError(f"'{text}' is not of the form pass.option=value")
        pipeline = _configured(pipeline, name, option, _value(value))
    return pipeline


def apply_file(pipeline: Pipeline, path: Path) -> Pipeline:
    """The pipeline as a YAML file edits it. Its keys, all optional, in the order in which they are applied:

    plugins: names, as for `apply_plugins`; without: names of passes to leave out; configure: pass -> option -> value.
    """
    edits = _read_edits(path)
    pipeline = apply_plugins(pipeline, edits.get("plugins", ())).without(*map(str, edits.get("without", ())))
    for name, options in edits.get("configure", {}).items():
        for option, value in options.items():
            pipeline = _configured(pipeline, name, option, value)
    return pipeline


def _read_edits(path: Path) -> dict[str, Any]:
    try:
        edits = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {_cause(error)}") from error
    kinds = {"plugins": list, "without": list, "configure": dict}
    if not isinstance(edits, dict):
        raise ConfigError(
            f"{path} is {with_article(type(edits).__name__)}, but a mapping with the keys {', '.join(kinds)} is needed"
        )
    for key, value in edits.items():
        if key not in kinds:
            raise ConfigError(f"{path} has a key '{key}'.{did_you_mean(str(key), kinds)} It may have: {', '.join(kinds)}")
        inner = value.values() if key == "configure" and isinstance(value, dict) else ()
        if not isinstance(value, kinds[key]) or not all(isinstance(options, dict) for options in inner):
            shown = "pass: {option: value}" if key == "configure" else "[name, ...]"
            raise ConfigError(f"{path}: '{key}' must be of the form {shown}")
    return edits


def foreign_passes(pipeline: Pipeline) -> list[tuple[str, str]]:
    """(pass, module) of each pass that is not autodeploy's own, in order."""
    modules = [(item.name, type(item).__module__) for item in pipeline]
    return [(name, module) for name, module in modules if module.partition(".")[0] != "autodeploy"]


def foreign_text(pipeline: Pipeline) -> str:
    """A line that names the passes that are not autodeploy's own and their modules; empty when there are none."""
    foreign = [f"{name} ({module})" for name, module in foreign_passes(pipeline)]
    return f"passes from elsewhere: {', '.join(foreign)}\n" if foreign else ""


def _apply(name: str, plugin: Plugin, pipeline: Pipeline) -> Pipeline:
    try:
        edited = plugin(pipeline)
    except Exception as error:
        cause = str(error) if isinstance(error, AutoDeployError) else _cause(error)
        raise ConfigError(f"plugin '{name}' failed: {cause}") from error
    if not isinstance(edited, Pipeline):
        what = "nothing" if edited is None else with_article(type(edited).__name__)
        raise ConfigError(f"plugin '{name}' returned {what}, but it must return the edited Pipeline")
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
        raise ConfigError(
            f"no plugin named '{name}' is installed.{did_you_mean(name, names)} Installed: {installed}. "
            "One that is not installed is named as module:attribute."
        )
    return next(iter(found.values()))


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _attribute(name: str) -> Any:
    module, _, path = name.partition(":")
    value: Any = import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _configured(pipeline: Pipeline, name: str, option: str, given: Any) -> Pipeline:
    """One option set; the value must be of the type that it has now."""
    now = getattr(pipeline.passes[pipeline.index(name)], option, None)
    if isinstance(now, float) and type(given) is int:
        given = float(given)
    edited = pipeline.configure(name, **{option: given})  # refuses an unknown option
    if now is not None and type(given) is not type(now):
        is_now, wanted = with_article(type(given).__name__), with_article(type(now).__name__)
        raise ConfigError(f"pass '{name}': {option}={given!r} is {is_now}, but {wanted} is needed")
    return edited


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"
