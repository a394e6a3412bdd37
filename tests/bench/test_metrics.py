"""Each figure from recorded times of tokens, worked out by hand."""

import pytest

from autodeploy.bench.ceilings import Machine, ModelSize, decode_ceiling, e2e_ceiling, prefill_ceiling
from autodeploy.bench.metrics import RequestTimes, RunTimes, latencies, percentile
from autodeploy.bench.results import EngineResult, Run
from autodeploy.bench.workload import Cell, cells_of, longest, most_tokens
from autodeploy.errors import ConfigError

FIRST = RequestTimes(10.0, (10.5, 11.0, 12.0, 12.5))
SECOND = RequestTimes(10.0, (11.0, 12.0, 12.5, 13.0))
BOTH = RunTimes((FIRST, SECOND))


def test_times_of_one_request() -> None:
    assert FIRST.ttft == 0.5
    assert FIRST.e2e == 2.5
    assert FIRST.gaps == [0.5, 1.0, 0.5]
    assert FIRST.tpot == pytest.approx(2.0 / 3)
    assert RequestTimes(1.0, (2.0,)).tpot is None


def test_rates_of_a_run() -> None:
    assert BOTH.e2e_rate == pytest.approx(8 / 3.0)
    # since 11.0, when the second has its first token: 2 of the first and 3 of the second, until 13.0
    assert BOTH.decode_rate == pytest.approx(5 / 2.0)
    assert BOTH.prefill_rate(128) is None
    assert RunTimes((FIRST,)).prefill_rate(128) == 256.0
    assert RunTimes((FIRST,)).decode_rate == pytest.approx(3 / 2.0)
    assert RunTimes((RequestTimes(0.0, (1.0,)),)).decode_rate is None


def test_latencies_are_taken_over_requests_and_over_gaps() -> None:
    found = latencies([BOTH])
    assert found["TTFT"] and found["TTFT"].mean == 0.75
    assert found["TTFT"].percentiles == pytest.approx({50: 0.75, 90: 0.95, 99: 0.995})
    assert found["ITL"] and found["ITL"].mean == pytest.approx(4.0 / 6)
    assert found["ITL"].percentiles[50] == 0.5
    assert found["E2E"] and found["E2E"].mean == 2.75
    assert latencies([RunTimes((RequestTimes(0.0, (1.0,)),))])["ITL"] is None


def test_percentiles_lie_on_straight_lines_between_the_ranks() -> None:
    assert [percentile([3.0, 1.0, 2.0], at) for at in (0, 25, 50, 100)] == [1.0, 1.5, 2.0, 3.0]
    assert percentile([7.0], 99) == 7.0


def test_medians_and_marks_of_several_runs() -> None:
    cell = Cell(1, 128, 4, 1)
    runs = [Run(RunTimes((RequestTimes(0.0, (at, at + 1)),)), foreign) for at, foreign in ((1.0, 0.0), (4.0, 0.1), (2.0, 0.3))]
    engine = EngineResult("x", runs={cell: runs})
    assert engine.prefill_rate(cell) == 64.0
    assert engine.is_noisy(cell)
    assert not EngineResult("x", runs={cell: runs[:2]}).is_noisy(cell)
    assert engine.as_json()["cells"][0]["prefill_rate"] == 64.0


QWEN = ModelSize(440_400_000, 155_600_000, 1_192_000_000, ((4096, 0),) * 28, 0, 4 * 16 * 128)
HERE = Machine(37.6e9, 440e9)


def test_ceilings_of_qwen3_are_those_worked_out_for_the_reference_machine() -> None:
    """31, 220, 303 tokens/s and 441 of prefill: the ceilings of the machine that the first figures were measured on."""
    for many, ceiling in ((1, 31), (8, 220), (32, 303)):
        assert decode_ceiling(HERE, QWEN, Cell(many, 128, 128, many)) == pytest.approx(ceiling, rel=0.01)
    assert prefill_ceiling(HERE, QWEN, Cell(1, 1024, 1, 1)) == pytest.approx(441, rel=0.01)


def test_a_limit_is_the_best_that_was_seen_and_is_marked_when_it_was_never_quiet() -> None:
    assert Machine(3.0, 1.0, True).best_with(Machine(2.0, 4.0)) == Machine(3.0, 4.0)
    assert Machine(3.0, 1.0, True).best_with(Machine(2.0, 4.0, True)).is_noisy


def test_the_ceiling_end_to_end_lies_below_that_of_decoding() -> None:
    cell = Cell(32, 128, 128, 32)
    decode = 32 * 127 / decode_ceiling(HERE, QWEN, cell)
    prefill = 32 * 128 / prefill_ceiling(HERE, QWEN, Cell(1, 128, 1, 1))
    assert e2e_ceiling(HERE, QWEN, cell) == pytest.approx(32 * 128 / (decode + prefill))


def test_a_window_bounds_what_is_read_and_multiplied() -> None:
    size = ModelSize(1, 1, 1, ((10, 4), (10, 0)), 7, 1)
    assert size.cache_bytes(100) == 7 + 40 + 1000
    assert size.pairs(100) == 4 * 98 + 100 * 50


def test_cells_are_every_length_with_every_number_of_requests() -> None:
    cells = cells_of("1,8", "128,512", 16, None, "1024,4096")
    assert [(cell.concurrency, cell.input_len, cell.num_requests) for cell in cells] == [
        (1, 128, 1),
        (8, 128, 8),
        (1, 512, 1),
        (8, 512, 8),
        (1, 1024, 1),
        (1, 4096, 1),
    ]
    assert (longest(cells), most_tokens(cells)) == (4097, 8 * 528)
    with pytest.raises(ConfigError, match="--concurrency is '1,x'"):
        cells_of("1,x", "128", 16, None)
    with pytest.raises(ConfigError, match="less than --concurrency"):
        cells_of("8", "128", 16, 4)


def test_prompts_are_the_same_for_every_engine_and_new_for_every_run() -> None:
    cell = Cell(2, 5, 1, 3)
    assert cell.prompts(100, 0) == cell.prompts(100, 0) != cell.prompts(100, 1)
    assert [len(prompt) for prompt in cell.prompts(100, 0)] == [5, 5, 5]
    assert 0 <= min(map(min, cell.prompts(7, 0))) <= max(map(max, cell.prompts(7, 0))) < 7
