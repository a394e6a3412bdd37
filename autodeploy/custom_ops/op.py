"""Semantic ops: the reference PyTorch function *is* the op, providers are faster implementations of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx.node import has_side_effect

LIBRARY = torch.library.Library("autodeploy", "DEF")
SEMANTIC_OPS: dict[Any, SemanticOp] = {}
"""torch overload -> the semantic op behind it."""
PROVIDED: dict[Any, tuple[SemanticOp, Provider]] = {}
"""A provider's function -> the op it implements, and the provider."""


@dataclass(frozen=True)
class Provider:
    """One implementation of a semantic op.

    `supports(target, *args, **kwargs)` gets the call's arguments as fake tensors and lists the reasons against; empty is yes.
    """

    name: str
    function: Callable[..., Any]
    supports: Callable[..., list[str]] = field(default=lambda *_, **__: [])


@dataclass(eq=False)
class SemanticOp:
    """A named op of the graph: `reference` is its meaning, `overload` what a graph node calls until a provider is chosen."""

    name: str
    reference: Callable[..., Any]
    overload: Any
    mutates: tuple[str, ...]
    providers: list[Provider]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.overload(*args, **kwargs)

    def register(self, provider: Provider) -> None:
        """Put `provider` first: later registrations are preferred over earlier ones."""
        if self.mutates:
            has_side_effect(provider.function)
        self.providers.insert(0, provider)
        PROVIDED[provider.function] = self, provider

    def choose(self, target: Any, *args: Any, **kwargs: Any) -> tuple[Provider, dict[str, list[str]]]:
        """The first provider with nothing against it, and the reasons against those before it."""
        against: dict[str, list[str]] = {}
        for provider in self.providers:
            if not (reasons := provider.supports(target, *args, **kwargs)):
                return provider, against
            against[provider.name] = reasons
        raise AssertionError(f"the reference of {self.name} supports everything")


def symbolic(target: Any) -> Any:
    """What to call on fake tensors in place of a graph's call target: an op's shape rule instead of a provider's code."""
    return PROVIDED[target][0].overload if target in PROVIDED else target


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
