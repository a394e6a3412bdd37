"""torch without the third of its import that a start with a cached program has no use for.

torch ends its import with `torch._meta_registrations`, which brings `torch._decomp`, `torch._prims` and `torch._refs`: what
operators do to tensors without data (device meta), written in Python. Tracing needs it, running a traced program does not. Here
it comes with the first of: an import of one of these modules or of torch's tracer, a look at one of them or at `torch.ops.prims`,
a tensor without data. From then on nothing differs from a plain `import torch`.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

LAST = "torch._meta_registrations"
LATER = (LAST, "torch._decomp", "torch._prims", "torch._refs")
PLACES = (*LATER, "torch.ops.prims")
TRACER = "torch._dynamo"
_shapes_alone: ContextVar[bool] = ContextVar("shapes_alone", default=False)


@contextmanager
def light_torch() -> Iterator[None]:
    """What imports torch first in here imports less of it. Nothing happens where torch is there already."""
    if "torch" in sys.modules:
        yield
        return
    placeholder = sys.modules[LAST] = ModuleType(LAST)
    try:
        yield
    finally:
        if sys.modules.get(LAST) is placeholder:
            del sys.modules[LAST]
        if "torch" in sys.modules:
            _put_off()


@contextmanager
def for_shapes_alone() -> Iterator[None]:
    """Tensors without data that are made in here meet views, casts and copies alone: nothing is loaded for them."""
    token = _shapes_alone.set(True)
    try:
        yield
    finally:
        _shapes_alone.reset(token)


class _Later(ModuleType):
    """Stands for a module, or a namespace of operators, that is not loaded yet."""

    def __getattr__(self, name: str) -> Any:
        _load()
        return getattr(_look_up(self.__name__), name)


def _look_up(name: str) -> Any:
    found: Any = sys.modules["torch"]
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    return found


def _parent_and_last(name: str) -> tuple[Any, str]:
    parent, _, last = name.rpartition(".")
    return _look_up(parent), last


def _put_off() -> None:
    torch: Any = sys.modules["torch"]
    if any(name in sys.modules for name in LATER) or not hasattr(torch.library, "get_kernel"):  # another torch
        _load()
        return
    for name in PLACES:
        parent, last = _parent_and_last(name)
        setattr(parent, last, _Later(name))
    library = _hooked_factories()
    sys.meta_path.insert(0, _Finder(library))


def _hooked_factories() -> Any:
    """The two operators that every tensor on device meta begins with load first what its operators need."""
    torch: Any = sys.modules["torch"]
    library = torch.library.Library("aten", "IMPL", "Meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an override
        for name in ("empty.memory_format", "empty_strided"):
            library.impl(name, partial(_first_tensor, torch.library.get_kernel(f"aten::{name}", "Meta")), with_keyset=True)
    return library


def _first_tensor(kernel: Any, keys: Any, *args: Any, **kwargs: Any) -> Any:
    """It stays until the tracer comes, since a kernel must not be removed while it runs."""
    if not _shapes_alone.get():
        _load()
    return kernel.call_boxed(keys, *args, **kwargs)


def _load() -> None:
    for name in PLACES:
        parent, last = _parent_and_last(name)
        if isinstance(vars(parent).get(last), _Later):
            delattr(parent, last)
    importlib.import_module(LAST)


class _Finder(MetaPathFinder):
    def __init__(self, library: Any) -> None:
        self.library = library

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if ".".join(name.split(".")[:2]) not in (*LATER, TRACER) or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        _load()
        self.library._destroy()
        if name not in sys.modules:
            return None
        return _Loaded.spec(sys.modules[name])


class _Loaded(Loader):
    """Of a module that came with another while it was looked for: importlib must not run it again."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.its_spec = module, module.__spec__

    @classmethod
    def spec(cls, module: ModuleType) -> ModuleSpec | None:
        """In its own place too: that is the one importlib goes by, whatever a finder returns."""
        module.__spec__ = spec_from_loader(module.__name__, cls(module))
        return module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.its_spec
