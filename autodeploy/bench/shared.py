"""The options that every command of `autodeploy bench` takes, and what follows from them."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from autodeploy.bench.measure import Task
from autodeploy.bench.peers import Engine
from autodeploy.bench.worker import Worker
from autodeploy.bench.workload import Cell
from autodeploy.cores import available_cores
from autodeploy.errors import ConfigError

WIDE = 160
"""Columns where nothing is as narrow as a terminal."""
out, err = Console(width=None if sys.stdout.isatty() else WIDE), Console(stderr=True)

Model = Annotated[str | None, typer.Argument(help="A checkpoint folder; with --random-weights the one to write and keep.")]
RandomWeights = Annotated[
    str | None,
    typer.Option(help="Random bf16 weights for a folder's config.json, a published shape (qwen3-0.6b) or a model type."),
]
Repeats = Annotated[int, typer.Option(help="Runs of each cell; medians are shown.", min=1)]
Threads = Annotated[int | None, typer.Option(help="Threads of every engine; absent, the cores it may use.", min=1)]
Options = Annotated[list[str] | None, typer.Option("--option", help="name=JSON, an option of LLM; may be given several times.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="A file for all results; - prints them.")]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="An SVG file for a picture.")]


@dataclass(frozen=True)
class Shared:
    """What to measure and where the results go."""

    model: Model = None
    random_weights: RandomWeights = None
    repeats: Repeats = 3
    threads: Threads = None
    option: Options = None
    json_file: JsonFile = None
    plot_file: PlotFile = None

    @contextmanager
    def task(
        self, cells: Sequence[Cell], peers: Sequence[Engine] = (), num_layers: int | None = None, bits: int = 16
    ) -> Iterator[Task]:
        """What the engines are to do, for as long as the checkpoint is there. num_layers: see `_checkpoint`."""
        options = dict(map(parsed, self.option or ()))
        with self._checkpoint(num_layers) as folder:
            yield Task(folder, cells, self.threads or available_cores(), self.repeats, _say, _warn, peers, options, bits)

    @contextmanager
    def _checkpoint(self, num_layers: int | None) -> Iterator[str]:
        """The folder to measure; random weights are written into it unless weights are there, and go away if it was not named.

        With a number of layers the weights are random whatever was named, and go away.
        """
        config = self.random_weights or (self.model if num_layers else None)
        if self.model is None and config is None:
            raise ConfigError("give a checkpoint folder, or --random-weights with the config to make one of")
        with tempfile.TemporaryDirectory(prefix="autodeploy-bench-") as temporary:
            folder = Path(temporary if num_layers else self.model or temporary)
            if config is not None and not any(folder.glob("*.safetensors")):
                with Worker("model") as worker:
                    worker.ask("write", config=config, folder=str(folder), num_layers=num_layers)
            yield str(folder)

    def show(self, found: dict[str, Any], table: Table, footer: str, chart: str) -> None:
        """Results as JSON, on the terminal and as a picture."""
        show(self.json_file, found, table, footer)
        if self.plot_file is not None:
            self.plot_file.write_text(chart, encoding="utf-8")


def show(json_file: Path | None, found: dict[str, Any], table: Table, footer: str) -> None:
    """Results as JSON and on the terminal. JSON on standard output stands there alone."""
    text = json.dumps(found, indent=1) + "\n"
    if json_file == Path("-"):
        print(text, end="")
        return
    out.print(table)
    out.print(footer, soft_wrap=True)
    if json_file is not None:
        json_file.write_text(text, encoding="utf-8")


def with_shared(function: Callable[..., None]) -> Callable[..., None]:
    """For a command whose first parameter is a `Shared`: on the command line it has the fields of that in its place."""
    shared = signature(Shared, eval_str=True).parameters
    parameters = [*list(signature(function, eval_str=True).parameters.values())[1:], *shared.values()]

    @wraps(function)
    def command(**given: Any) -> None:
        function(Shared(**{name: given.pop(name) for name in shared}), **given)

    command.__signature__ = Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def parsed(text: str) -> tuple[str, Any]:
    """name=value, the value as JSON or, failing that, as text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--option is '{text}', but it has the form name=value")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _warn(text: str) -> None:
    err.print(text, style="yellow", soft_wrap=True, markup=False)


def _say(text: str) -> None:
    err.print(text, style="dim", soft_wrap=True, markup=False)
