"""What the patches share: replacing functions while a model is traced, and where a module's code stands."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

IMPLEMENTATION = "autodeploy"
"""Name under which attention, its masks and experts are registered with transformers."""


@contextmanager
def registered(interface: Any, function: Callable[..., Any]) -> Iterator[None]:
    """One of transformers' registries holds the function under our name inside."""
    interface.register(IMPLEMENTATION, function)
    try:
        yield
    finally:
        del interface._global_mapping[IMPLEMENTATION]


@contextmanager
def replaced(space: Any, name: str, value: Any) -> Iterator[None]:
    """A module's or a class's attribute of that name is `value` inside."""
    before = vars(space)[name]
    setattr(space, name, value)
    try:
        yield
    finally:
        setattr(space, name, before)


def where_defined(module: nn.Module) -> str:
    """module.path:line of the code that a module's forward runs."""
    forward = inspect.unwrap(type(module).forward)
    return f"{type(module).__module__}.{type(module).__name__}, line {forward.__code__.co_firstlineno}"
