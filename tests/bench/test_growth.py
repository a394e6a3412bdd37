"""Floors and what stands beside them, worked out by hand."""

import io

import pytest
from rich.console import Console

from autodeploy.bench.ceilings import Machine, ModelSize
from autodeploy.bench.growth import Figure, Plan, Point, point_of_depth, points_of, share_limits
from autodeploy.bench.metrics import RequestTimes, RunTimes
from autodeploy.bench.results import EngineResult, Results, Run
from autodeploy.bench.tables import growth_table, scheduling_table
from autodeploy.bench.workload import Cell

SIZE = ModelSize(500, 100, 1000, ((2, 0),), 0, 4)
MACHINE = Machine(1000.0, 1e9)
PLAN = Plan([10, 30], [1, 4], 3)


def results(cells: list[Cell], machine: Machine = MACHINE) -> Results:
    """Every request has its first token after 2 seconds and a further one every 3."""
    requests = {cell: tuple(RequestTimes(0.0, (2.0, 5.0, 8.0)) for _ in range(cell.concurrency)) for cell in cells}
    runs = {cell: [Run(RunTimes(times), 0.0)] for cell, times in requests.items()}
    engine = EngineResult("autodeploy", first_token_seconds=7.0, runs=runs)
    return Results("model", cells, 1, machine, SIZE, [engine], weight_bytes=3000, pool_bytes=0)


def test_one_thing_grows_at_a_time() -> None:
    assert PLAN.cells() == [Cell(1, 10, 3, 1), Cell(1, 30, 3, 1), Cell(4, 10, 3, 4)]
    assert Plan([10], [2], 3).cells() == []
    assert Plan([10], [2], 3).cell() == Cell(2, 10, 3, 2)


def test_each_figure_has_its_floor() -> None:
    points = points_of(PLAN, results(PLAN.cells()))
    assert [point.name for point in points] == ["10 tokens", "30 tokens", "1 request", "4 requests"]
    steps = [point.figures[0] for point in points]
    assert [figure.seconds for figure in steps] == pytest.approx([3.0] * 4)
    # weights take 1 s to read; the cache 2 bytes for each of input + output / 2 tokens of each request
    assert [figure.floor_seconds for figure in steps] == pytest.approx([1.023, 1.063, 1.023, 1.092])
    prompts = [figure for point in points for figure in point.figures[1:]]
    assert [(figure.name, figure.seconds) for figure in prompts] == [("prompt", 2.0)] * 3  # none of four at once
    assert prompts[0].floor_seconds == pytest.approx(1.0)


def test_a_depth_has_its_start_beside_one_reading_of_the_weights() -> None:
    point = point_of_depth(PLAN, 7, results([PLAN.cell()]))
    assert point.name == "7 layers"
    assert point.figures[-1] == Figure("process start to first token", 7.0, 3.0, False)


def test_floors_of_several_models_follow_from_the_same_limits() -> None:
    slow, fast = results([PLAN.cell()], Machine(500.0, 1e9, True)), results([PLAN.cell()])
    share_limits([slow, fast])
    assert slow.machine == fast.machine == MACHINE


def test_tables_name_figure_floor_and_how_many_times_it_is() -> None:
    points = [Point(1, "layer", (Figure("step", 0.003, 0.002, True),)), Point(1500, "token", (Figure("step", 0.5, 0.1, False),))]
    text = io.StringIO()
    console = Console(file=text, width=120)
    console.print(growth_table(points))
    console.print(scheduling_table({1: {"streamed": 5e-6}, 4: {"streamed": 2.5e-6}}))
    for words in ("1 layer ", "3.00*", "1.50x", "1,500 tokens", "500", "5.00x", "streamed, us", "2.50"):
        assert words in text.getvalue()
