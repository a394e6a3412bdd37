"""Every error that autodeploy raises on purpose.

    AutoDeployError
    ├── ConfigError            (ValueError)  an option or sampling parameter is unknown, out of range or not supported
    ├── RequestError           (ValueError)  one request cannot be served: empty, too long, token id out of range
    ├── CheckpointError        (ValueError)  the checkpoint folder cannot be used: missing, unsafe, corrupt or misshaped
    ├── UnsupportedModelError  (ValueError)  the model does something that cannot be compiled faithfully
    ├── ProgramFileError       (ValueError)  a saved program cannot be read back
    ├── TransformError                       a graph pass failed or broke its contract
    ├── ExecutionError                       a forward pass failed, or its logits are not finite
    └── EngineDeadError                      the engine loop has ended; nothing more can be served

What a caller can put right is also a `ValueError`; the rest is not. A message names the object, the reason and the remedy.
"""

import difflib
from collections.abc import Iterable


class AutoDeployError(Exception):
    """Root of all errors above."""


class ConfigError(AutoDeployError, ValueError):
    """An option is unknown, has a bad value, contradicts another one, or is not supported yet."""


class RequestError(AutoDeployError, ValueError):
    """A single request is refused at the door; other requests are not affected."""


class CheckpointError(AutoDeployError, ValueError):
    """A checkpoint folder, one of its files or one of its tensors cannot be used."""


class UnsupportedModelError(AutoDeployError, ValueError):
    """A construct of the model cannot be compiled faithfully.

    `module_path` is the dotted path of the submodule and `source` the "file:line" of the construct; both may be empty. Where
    one is given the model itself is fine, and the message says that eager runs it.
    """

    def __init__(self, reason: str, *, module_path: str = "", source: str = "") -> None:
        where = [part for part in (module_path and f"in module '{module_path}'", source and f"at {source}") if part]
        super().__init__(f"{' '.join(where)}: {reason}. backend='pytorch' runs this model uncompiled." if where else reason)
        self.reason = reason
        self.module_path = module_path
        self.source = source


class ProgramFileError(AutoDeployError, ValueError):
    """A saved program is missing, broken, of another version, or no longer means what it did."""


class TransformError(AutoDeployError):
    """A graph pass failed; `transform` is its name."""

    def __init__(self, reason: str, *, transform: str = "") -> None:
        super().__init__(f"transform '{transform}': {reason}" if transform else reason)
        self.reason = reason
        self.transform = transform


class ExecutionError(AutoDeployError):
    """The forward pass of one request failed; only that request ends."""


class EngineDeadError(AutoDeployError):
    """The engine loop has ended, by `shutdown()` or by an error that is then the `__cause__`."""


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Suggest the candidate nearest to `name`, as text to append to a message; empty when none is near."""
    near = difflib.get_close_matches(name, list(candidates), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def with_article(noun: str) -> str:
    """a str, an int"""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
