"""`autodeploy bench throughput | latency | startup | compare`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from autodeploy.bench import tables
from autodeploy.bench.measure import Task, measure, sizes
from autodeploy.bench.metrics import PERCENTILES, latencies
from autodeploy.bench.peers import PEERS, Engine, find
from autodeploy.bench.plot import Bars, bar_chart
from autodeploy.bench.results import Results, available_cores, computer
from autodeploy.bench.startup import REST, TOTAL, cells_for, measure_starts, medians
from autodeploy.bench.worker import Worker
from autodeploy.bench.workload import Cell, cells_of
from autodeploy.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Measure how fast a model is served here, alone or beside other engines.")
out, err = Console(), Console(stderr=True)

Model = Annotated[str | None, typer.Argument(help="A checkpoint folder; with --random-weights the one to write and keep.")]
RandomWeights = Annotated[
    str | None,
    typer.Option(help="Random bf16 weights for a folder's config.json, a published shape (qwen3-0.6b) or a model type."),
]
Concurrency = Annotated[str, typer.Option(help="Requests under way at once; several, separated by commas.")]
InputLen = Annotated[str, typer.Option(help="Tokens of a prompt; several, separated by commas.")]
OutputLen = Annotated[int, typer.Option(help="Tokens generated for each.", min=1)]
NumRequests = Annotated[int | None, typer.Option(help="Requests of a run; absent, as many as are under way at once.", min=1)]
PrefillLen = Annotated[int, typer.Option(help="One more cell: one prompt of so many tokens, one token out. 0: none.", min=0)]
Repeats = Annotated[int, typer.Option(help="Runs of each cell; medians are shown.", min=1)]
Threads = Annotated[int | None, typer.Option(help="Threads of every engine; absent, the cores it may use.", min=1)]
Options = Annotated[list[str] | None, typer.Option("--option", help="name=JSON, an option of LLM; may be given several times.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="A file for all results; - prints them.")]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="An SVG file for a picture.")]


@app.command()
def throughput(
    model: Model = None,
    random_weights: RandomWeights = None,
    concurrency: Concurrency = "1,8,32",
    input_len: InputLen = "128",
    output_len: OutputLen = 128,
    num_requests: NumRequests = None,
    prefill_len: PrefillLen = 0,
    repeats: Repeats = 3,
    threads: Threads = None,
    option: Options = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """Tokens per second while decoding, end to end and of prefill, each beside this machine's ceiling."""
    cells = cells_of(concurrency, input_len, output_len, num_requests, prefill_len)
    results = _measured(model, random_weights, cells, repeats, threads, option)
    if not _written(json_file, results.as_json()):
        out.print(tables.throughput_table(results))
        out.print(tables.footer(results), soft_wrap=True)
    _plot(plot_file, _rates_chart(results))


@app.command()
def latency(
    model: Model = None,
    random_weights: RandomWeights = None,
    concurrency: Concurrency = "1,8",
    input_len: InputLen = "128",
    output_len: OutputLen = 128,
    num_requests: NumRequests = None,
    repeats: Repeats = 3,
    threads: Threads = None,
    option: Options = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """Time to first token, per further token (TPOT, ITL) and end to end: mean and percentiles."""
    results = _measured(
        model, random_weights, cells_of(concurrency, input_len, output_len, num_requests), repeats, threads, option
    )
    if not _written(json_file, results.as_json()):
        out.print(tables.latency_table(results))
        out.print(tables.footer(results), soft_wrap=True)
    _plot(plot_file, _latency_chart(results))


@app.command()
def startup(
    model: Model = None,
    random_weights: RandomWeights = None,
    input_len: Annotated[int, typer.Option(help="Tokens of the first prompt.", min=1)] = 128,
    repeats: Repeats = 3,
    threads: Threads = None,
    option: Options = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """From the start of the process to the first token, phase by phase, in a new process each time."""
    with _checkpoint(model, random_weights) as folder:
        task = _task(folder, cells_for(input_len), repeats, threads, option)
        starts = measure_starts(task, sizes(task)["vocab_size"])
    middle = medians(starts)
    found = {
        "computer": computer(),
        "threads": task.threads,
        "median": asdict(middle),
        "starts": [asdict(each) for each in starts],
    }
    if not _written(json_file, found):
        out.print(tables.startup_table(middle))
        out.print(f"peak RssAnon {middle.peak_anon_bytes / 1e6:,.0f} MB; {task.threads} threads")
    bars = [Bars(name, (seconds,)) for name, seconds in middle.seconds.items() if name not in (REST, TOTAL)]
    _plot(plot_file, bar_chart("start-up, seconds", ["autodeploy"], bars))


@app.command()
def compare(
    model: Model = None,
    against: Annotated[str, typer.Option(help="Engines, separated by commas; those not installed are listed.")] = ",".join(PEERS),
    random_weights: RandomWeights = None,
    concurrency: Concurrency = "1,8,32",
    input_len: InputLen = "128",
    output_len: OutputLen = 128,
    num_requests: NumRequests = None,
    prefill_len: PrefillLen = 1024,
    repeats: Repeats = 3,
    threads: Threads = None,
    option: Options = None,
    peer_path: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH: an engine's Python, or llama.cpp's folder; also AUTODEPLOY_BENCH_NAME in the environment."),
    ] = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """The same requests to other engines, each in its own process, taking turns; medians beside this machine's ceiling."""
    peers, absent = find(against, peer_path or ())
    cells = cells_of(concurrency, input_len, output_len, num_requests, prefill_len)
    results = _measured(model, random_weights, cells, repeats, threads, option, peers)
    results.not_installed = absent
    if not _written(json_file, results.as_json()):
        out.print(tables.compare_table(results))
        out.print(tables.footer(results), soft_wrap=True)
    _plot(plot_file, _rates_chart(results))


def _measured(
    model: str | None,
    random_weights: str | None,
    cells: Sequence[Cell],
    repeats: int,
    threads: int | None,
    options: list[str] | None,
    peers: Sequence[Engine] = (),
) -> Results:
    with _checkpoint(model, random_weights) as folder:
        return measure(_task(folder, cells, repeats, threads, options, peers))


def _task(
    folder: str,
    cells: Sequence[Cell],
    repeats: int,
    threads: int | None,
    options: list[str] | None,
    peers: Sequence[Engine] = (),
) -> Task:
    def warn(text: str) -> None:
        err.print(text, style="yellow", soft_wrap=True, markup=False)

    def say(text: str) -> None:
        err.print(text, style="dim", soft_wrap=True, markup=False)

    return Task(folder, cells, threads or available_cores(), repeats, say, warn, peers, _parsed(options or ()))


def _parsed(options: Sequence[str]) -> dict[str, Any]:
    """name=value, the value as JSON or, failing that, as text."""
    parsed: dict[str, Any] = {}
    for text in options:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--option is '{text}', but it has the form name=value")
        try:
            parsed[name] = json.loads(value)
        except json.JSONDecodeError:
            parsed[name] = value
    return parsed


@contextmanager
def _checkpoint(model: str | None, random_weights: str | None) -> Iterator[str]:
    """The folder to measure; random weights are written into it unless weights are there, and go away if it was not named."""
    if model is None and random_weights is None:
        raise ConfigError("give a checkpoint folder, or --random-weights with the config to make one of")
    with tempfile.TemporaryDirectory(prefix="autodeploy-bench-") as temporary:
        folder = Path(model or temporary)
        if random_weights is not None and not any(folder.glob("*.safetensors")):
            with Worker("model") as worker:
                worker.ask("write", config=random_weights, folder=str(folder))
        yield str(folder)


def _written(file: Path | None, found: dict[str, Any]) -> bool:
    """Whether the results went to standard output, which then holds nothing else."""
    if file is None:
        return False
    text = json.dumps(found, indent=1) + "\n"
    if file == Path("-"):
        print(text, end="")
        return True
    file.write_text(text, encoding="utf-8")
    return False


def _plot(file: Path | None, chart: str) -> None:
    if file is not None:
        file.write_text(chart, encoding="utf-8")


def _rates_chart(results: Results) -> str:
    groups = []
    for kind, cell in tables.columns_of(results):
        values = tuple(tables.KINDS[kind](engine, cell) for engine in results.engines)
        label = cell.name if kind == "prefill" else f"{kind}, {cell.name}"
        groups.append(Bars(label, values, results.ceiling(kind, cell)))
    return bar_chart("tokens per second", [engine.name for engine in results.engines], groups)


def _latency_chart(results: Results) -> str:
    spreads = [(cell, latencies([run.times for run in results.ours.runs[cell]])) for cell in results.cells]
    groups = [
        Bars(f"{name}, {cell.name}", tuple(1000 * value for value in spread.percentiles.values()))
        for cell, found in spreads
        for name in ("TTFT", "ITL")
        if (spread := found[name]) is not None
    ]
    return bar_chart("milliseconds", [f"p{at}" for at in PERCENTILES], groups)
