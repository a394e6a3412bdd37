"""Semantic ops: the reference PyTorch function *is* the op, providers are faster implementations of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from traceback import walk_tb
from types import MappingProxyType
from typing import Any

import torch
from torch.fx.node import has_side_effect

from autodeploy.errors import TransformError
from autodeploy.formats import Format
from autodeploy.specs import BatchMetadata

LIBRARY = torch.library.Library("autodeploy", "DEF")
NONE: Mapping[str, Any] = MappingProxyType({})
SEMANTIC_OPS: dict[Any, SemanticOp] = {}
"""torch overload -> the semantic op behind it."""
PROVIDED: dict[Any, tuple[SemanticOp, Provider]] = {}
"""A provider's function -> the op it implements, and the provider."""


@dataclass(frozen=True)
class Provider:
    """One implementation of a semantic op.

    `supports(target, **arguments)` gets the call's arguments by name, tensors as fake ones, and lists the reasons against.
    """

    name: str
    function: Callable[..., Any]
    supports: Callable[..., list[str]] = field(default=lambda target, **_: [])
    packs: Mapping[str, Callable[[Any, Mapping[str, Any]], Any]] = field(default_factory=dict)
    """Arguments that must be parameters, and what lays each out once, while loading: (parameter, the call's arguments by name)
    -> what `function` is given in its place."""
    against_format: Callable[[Format], list[str]] | None = None
    """The reasons against a format that is stored as numbers of few bits. A provider that has this packs `Integers`, where others
    pack tensors."""
    packs_parts: bool = False
    """Whether what it packs may also be the list of matrices whose rows, one after the other, are those of the parameter."""
    rounding: str = ""
    """What is rounded where, in words. Providers of an op that say the same may take each other's place where one is faster."""
    variants: tuple[Provider, ...] = ()
    """The same in other configurations, such as sizes of tiles, which are taken only where they were timed and are faster."""
    plan: Callable[[BatchMetadata], None] | None = None
    """Host work before each forward pass (or replay) that calls `function`, from the step's arrays."""
    is_asked_for: bool = False
    """Whether it serves only where it is asked for by name, or was timed beside others of its rounding and is faster."""


@dataclass(eq=False)
class SemanticOp:
    """A named op of the graph: `reference` is its meaning, `overload` what a graph node calls until a provider is chosen."""

    name: str
    reference: Callable[..., Any]
    overload: Any
    mutates: tuple[str, ...]
    providers: list[Provider]
    draw: Callable[[dict[str, Any]], dict[str, Any]] = field(default=lambda call: {})
    """For timing a call: of its arguments by name, what to put in place of zeros where whole numbers decide how much is done."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.overload(*args, **kwargs)

    def register(self, provider: Provider) -> None:
        """Put `provider` first: later registrations are preferred over earlier ones."""
        if self.mutates:
            has_side_effect(provider.function)
        self.providers.insert(0, provider)
        for each in (provider, *provider.variants):
            PROVIDED[each.function] = self, each

    def named(self, name: str) -> Provider:
        """The provider of that name, or the variant of one."""
        return next(each for provider in self.providers for each in (provider, *provider.variants) if each.name == name)

    def choose(
        self, target: Any, *args: Any, parameters: Mapping[str, Format | None] = NONE, **kwargs: Any
    ) -> tuple[Provider, dict[str, list[str]]]:
        """The first provider with nothing against it, and the reasons against those before it.

        parameters: the arguments that are parameters as they are, and so can be packed, each with its format (None: dense).
        """
        against: dict[str, list[str]] = {}
        for provider, reasons in self._judged(target, args, kwargs, parameters):
            if provider.is_asked_for:
                continue
            if not reasons:
                return provider, against
            against[provider.name] = reasons
        raise AssertionError(f"the reference of {self.name} supports everything")

    def equals(
        self, chosen: Provider, target: Any, *args: Any, parameters: Mapping[str, Format | None] = NONE, **kwargs: Any
    ) -> list[Provider]:
        """What may take the place of a chosen provider: its variants, and those of its rounding with nothing against them."""
        behind = self.providers[self.providers.index(chosen) + 1 :] if chosen.rounding else []
        same = [provider for provider in behind if provider.rounding == chosen.rounding]
        judged = self._judged(target, args, kwargs, parameters) if same else ()
        return [*chosen.variants, *(provider for provider, reasons in judged if provider in same and not reasons)]

    def _judged(
        self, target: Any, args: Any, kwargs: Any, parameters: Mapping[str, Format | None]
    ) -> Iterator[tuple[Provider, list[str]]]:
        """Each provider that could come into question, and the reasons against it."""
        for provider in self.providers:
            if provider.against_format is not None and not any(parameters.get(name) for name in provider.packs):
                continue  # nothing is quantized
            reasons = [reason for name in provider.packs for reason in _against_packing(provider, name, parameters)]
            yield provider, reasons or self.reasons_against(provider, target, *args, **kwargs)

    def reasons_against(self, provider: Provider, target: Any, *args: Any, **kwargs: Any) -> list[str]:
        """What speaks against the call; an error in `supports` is the provider's, not that of the pass that asks."""
        blamed = f"provider '{provider.name}' of op {self.name}: supports()"
        try:
            reasons: Any = provider.supports(target, **call_arguments(self.overload, args, kwargs))
        except Exception as error:
            first = (str(error).splitlines() or ["no reason given"])[0]
            raise TransformError(f"{blamed} raised {type(error).__name__}: {first}") from error
        if not isinstance(reasons, list | tuple):
            raise TransformError(f"{blamed} returned {reasons!r}; it must return the list of reasons against, empty for none")
        return list(reasons)


def _against_packing(provider: Provider, name: str, parameters: Mapping[str, Format | None]) -> list[str]:
    """The reasons against packing an argument."""
    if name not in parameters:
        return [f"its {name} is computed in the graph, or read as it is elsewhere"]
    stored = parameters[name]
    if provider.against_format is None:
        return []
    return [f"its {name} is dense"] if stored is None else provider.against_format(stored)


def provider_at_work(error: BaseException) -> str:
    """Which provider raised an error, as the start of a message; empty when none did."""
    codes = {getattr(function, "__code__", None): found for function, found in PROVIDED.items()}
    frames = [frame.f_code for frame, _ in walk_tb(error.__traceback__)]
    for op, provider in (codes[code] for code in reversed(frames) if code in codes):
        return f"provider '{provider.name}' of op {op.name}: "
    return ""


def symbolic(target: Any) -> Any:
    """What to call on fake tensors in place of a graph's call target: an op's shape rule instead of a provider's code."""
    return PROVIDED[target][0].overload if target in PROVIDED else target


def call_arguments(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names, defaults included. target: an op, a provider's function or one of `operator`."""
    defaults = argument_defaults(target)
    return defaults | dict(zip(defaults, args, strict=False)) | dict(kwargs)


def argument_defaults(target: Any) -> dict[str, Any]:
    """The names of the arguments that a call of `target` takes, with their defaults (None where there is none)."""
    return _defaults(symbolic(target))


@cache
def _defaults(function: Any) -> dict[str, Any]:
    if not hasattr(function, "_schema"):
        return dict.fromkeys(signature(function).parameters)
    return {argument.name: argument.default_value for argument in function._schema.arguments}


def adopted_op(overload: Any, reference: Callable[..., Any], rounding: str = "") -> SemanticOp:
    """An aten op for which providers can be registered; graphs call it as ever until one is chosen."""
    op = SemanticOp(reference.__name__, reference, overload, (), [])
    op.register(Provider("reference", reference, rounding=rounding))
    SEMANTIC_OPS[overload] = op
    return op


def semantic_op(*, mutates: Sequence[str] = (), fake: Callable[..., Any] | None = None) -> Callable[..., SemanticOp]:
    """Register a reference function as an op of the graph.

    mutates: names of the tensors written in place. fake: shape rule; by default the reference itself runs on fake tensors.
    """

    def register(reference: Callable[..., Any]) -> SemanticOp:
        name = reference.__name__
        LIBRARY.define(name + torch.library.infer_schema(reference, mutates_args=tuple(mutates)))
        LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"autodeploy::{name}", fake or reference, lib=LIBRARY)
        overload = getattr(torch.ops.autodeploy, name).default
        op = SemanticOp(name, reference, overload, tuple(mutates), [])
        op.register(Provider("reference", reference))
        SEMANTIC_OPS[overload] = op
        return op

    return register
