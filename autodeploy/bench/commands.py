"""`autodeploy bench throughput | latency | startup | growth | scheduling | compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from autodeploy.bench import tables
from autodeploy.bench.growth import STEP, Plan, Point, point_of_depth, points_of, share_limits
from autodeploy.bench.measure import measure, sizes
from autodeploy.bench.metrics import PERCENTILES, latencies
from autodeploy.bench.peers import PEERS, find
from autodeploy.bench.plot import Bars, bar_chart
from autodeploy.bench.results import Results, computer
from autodeploy.bench.shared import JsonFile, Shared, show, with_shared
from autodeploy.bench.startup import REST, TOTAL, cells_for, measure_starts, medians
from autodeploy.bench.worker import Worker
from autodeploy.bench.workload import cells_of, counts
from autodeploy.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Measure how fast a model is served here, alone or beside other engines.")

Concurrency = Annotated[str, typer.Option(help="Requests under way at once; several, separated by commas.")]
InputLen = Annotated[str, typer.Option(help="Tokens of a prompt; several, separated by commas.")]
OutputLen = Annotated[int, typer.Option(help="Tokens generated for each.", min=1)]
NumRequests = Annotated[int | None, typer.Option(help="Requests of a run; absent, as many as are under way at once.", min=1)]
PrefillLen = Annotated[str, typer.Option(help="One more cell for each: one prompt of so many tokens, one token out. 0: none.")]


@app.command()
@with_shared
def throughput(
    shared: Shared,
    concurrency: Concurrency = "1,8,32",
    input_len: InputLen = "128",
    output_len: OutputLen = 128,
    num_requests: NumRequests = None,
    prefill_len: PrefillLen = "0",
) -> None:
    """Tokens per second while decoding, end to end and of prefill, each beside this machine's ceiling."""
    with shared.task(cells_of(concurrency, input_len, output_len, num_requests, prefill_len)) as task:
        results = measure(task)
    shared.show(results.as_json(), tables.throughput_table(results), tables.footer(results), _rates_chart(results))


@app.command()
@with_shared
def latency(
    shared: Shared,
    concurrency: Concurrency = "1,8",
    input_len: InputLen = "128",
    output_len: OutputLen = 128,
    num_requests: NumRequests = None,
) -> None:
    """Time to first token, per further token (TPOT, ITL) and end to end: mean and percentiles."""
    with shared.task(cells_of(concurrency, input_len, output_len, num_requests)) as task:
        results = measure(task)
    shared.show(results.as_json(), tables.latency_table(results), tables.footer(results), _latency_chart(results))


@app.command()
@with_shared
def startup(
    shared: Shared,
    input_len: Annotated[int, typer.Option(help="Tokens of the first prompt.", min=1)] = 128,
) -> None:
    """From the start of the process to the first token, phase by phase: a start with an empty cache, and those after it."""
    with shared.task(cells_for(input_len)) as task:
        first, *later = measure_starts(task, sizes(task)["vocab_size"])
    middle = medians(later)
    found = {
        "computer": computer(),
        "threads": task.threads,
        "first": asdict(first),
        "median": asdict(middle),
        "starts": [asdict(each) for each in later],
    }
    footer = f"peak RssAnon {middle.peak_anon_bytes / 1e6:,.0f} MB; {task.threads} threads"
    bars = [Bars(name, (seconds,)) for name, seconds in middle.seconds.items() if name not in (REST, TOTAL)]
    shared.show(found, tables.startup_table(first, middle), footer, bar_chart("start-up, seconds", ["autodeploy"], bars))


@app.command()
@with_shared
def growth(
    shared: Shared,
    input_len: InputLen = "128,1024,8192",
    concurrency: Concurrency = "1,2,4,8,16,32,64",
    layers: Annotated[
        str | None, typer.Option(help="Numbers of layers, separated by commas: random weights, the config with this many layers.")
    ] = None,
    output_len: OutputLen = 32,
) -> None:
    """The time of a step and of a prompt as context, requests and layers grow, one at a time, each beside its floor."""
    plan = Plan(counts(input_len, "--input-len"), counts(concurrency, "--concurrency"), output_len)
    tasks = [(plan.cells(), None)] if plan.cells() else []
    tasks += [([plan.cell()], depth) for depth in counts(layers, "--layers")] if layers else []
    if not tasks:
        raise ConfigError("nothing grows: give several values for --input-len or --concurrency, or --layers")
    measured: list[Results] = []
    for cells, num_layers in tasks:
        with shared.task(cells, num_layers=num_layers) as task:
            measured.append(measure(task))
    share_limits(measured)
    points: list[Point] = []
    for (_, num_layers), results in zip(tasks, measured, strict=True):
        points += points_of(plan, results) if num_layers is None else [point_of_depth(plan, num_layers, results)]
    found = {"points": [asdict(point) for point in points], "measured": [results.as_json() for results in measured]}
    shared.show(found, tables.growth_table(points), tables.footer(measured[-1]), _growth_chart(points))


@app.command()
def scheduling(
    concurrency: Concurrency = "1,2,4,8,16,32,64,128,256",
    input_len: Annotated[int, typer.Option(help="Tokens of each request's context.", min=1)] = 128,
    steps: Annotated[int, typer.Option(help="Steps of each number of requests; medians are shown.", min=2)] = 200,
    json_file: JsonFile = None,
) -> None:
    """What a decode step costs besides the model: scheduling, building the batch, and what follows the forward pass."""
    with Worker("scheduling", environment={"OMP_NUM_THREADS": "1"}) as worker:
        costs = {
            many: worker.ask("measure", num_requests=many, input_len=input_len, steps=steps)["seconds"]
            for many in counts(concurrency, "--concurrency")
        }
    found = {"computer": computer(), "input_len": input_len, "seconds": costs}
    show(json_file, found, tables.scheduling_table(costs), "CPU time of the executor's thread, no model; vocabulary of 32")


@app.command()
@with_shared
def compare(
    shared: Shared,
    against: Annotated[str, typer.Option(help="Engines, separated by commas; those not installed are listed.")] = ",".join(PEERS),
    concurrency: Concurrency = "1,8,32",
    input_len: InputLen = "128",
    output_len: OutputLen = 128,
    num_requests: NumRequests = None,
    prefill_len: PrefillLen = "1024",
    bits: Annotated[
        str, typer.Option(help="Of a weight: 16, or 8 or 4, to which each engine rounds by means of its own.")
    ] = "16",
    peer_path: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH: an engine's Python, or llama.cpp's folder; also AUTODEPLOY_BENCH_NAME in the environment."),
    ] = None,
) -> None:
    """The same requests to other engines, each in its own process, taking turns; medians beside this machine's ceiling."""
    peers, absent = find(against, peer_path or ())
    if bits not in ("16", "8", "4"):
        raise ConfigError(f"--bits is '{bits}'; it is 16, 8 or 4")
    with shared.task(cells_of(concurrency, input_len, output_len, num_requests, prefill_len), peers, bits=int(bits)) as task:
        results = measure(task)
    results.not_installed = absent
    shared.show(results.as_json(), tables.compare_table(results), tables.footer(results), _rates_chart(results))


def _rates_chart(results: Results) -> str:
    groups = []
    for kind, cell in tables.columns_of(results):
        values = tuple(tables.KINDS[kind](engine, cell) for engine in results.engines)
        label = cell.name if kind == "prefill" else f"{kind}, {cell.name}"
        groups.append(Bars(label, values, results.ceiling(kind, cell)))
    return bar_chart("tokens per second", [engine.name for engine in results.engines], groups)


def _growth_chart(points: Sequence[Point]) -> str:
    steps = [(point.name, figure) for point in points for figure in point.figures if figure.name == STEP]
    bars = [Bars(name, (1000 * figure.seconds,), 1000 * figure.floor_seconds) for name, figure in steps]
    return bar_chart("milliseconds of a step", ["autodeploy"], bars, limit="floor of this machine")


def _latency_chart(results: Results) -> str:
    spreads = [(cell, latencies([run.times for run in results.ours.runs[cell]])) for cell in results.cells]
    groups = [
        Bars(f"{name}, {cell.name}", tuple(1000 * value for value in spread.percentiles.values()))
        for cell, found in spreads
        for name in ("TTFT", "ITL")
        if (spread := found[name]) is not None
    ]
    return bar_chart("milliseconds", [f"p{at}" for at in PERCENTILES], groups)
