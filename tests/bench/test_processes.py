"""Workers, watches and where peers are: real processes."""

import json
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import Gemma3TextConfig

import autodeploy
from autodeploy.bench.metrics import RequestTimes, RunTimes
from autodeploy.bench.peers import Engine, find, variable
from autodeploy.bench.plot import Bars, bar_chart
from autodeploy.bench.startup import REST, TOTAL, seconds_of
from autodeploy.bench.watch import Watch
from autodeploy.bench.worker import WORKERS, Worker, WorkerError
from autodeploy.errors import ConfigError

DEMO = Path(autodeploy.__file__).parent / "demo_model"
BUSY = "import time\nuntil = time.monotonic() + 60\nwhile time.monotonic() < until: pass"
LARGE = "print(end='', flush=True); held = bytearray(b'x') * 200_000_000; print(len(held), flush=True); input()"


@pytest.fixture
def busy() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    yield process.pid
    process.kill()
    process.wait()


def test_the_work_of_others_is_told_from_that_of_the_measured_process(busy: int) -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with Watch(busy) as own, Watch(other.pid) as foreign:
        other_wait(1.5)
    other.communicate(b"\n")
    assert foreign.foreign_cores - own.foreign_cores > 0.1  # the busy process, whatever else runs here


def other_wait(seconds: float) -> None:
    subprocess.run([sys.executable, "-c", f"import time; time.sleep({seconds})"], check=True)


def test_peak_memory_is_that_of_the_process_and_its_children() -> None:
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {LARGE!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with Watch(process.pid) as watch:
        assert process.stdout is not None and process.stdout.readline().strip() == "200000000"
        other_wait(0.7)
    process.communicate("\n")
    assert 200e6 < watch.peak_anon_bytes < 300e6


def test_a_worker_answers_and_says_what_went_wrong() -> None:
    with Worker("limits") as worker:
        found = worker.ask("measure", threads=1, dtype="float32", seconds=0.01)
        assert 1e8 < found["read_rate"] < 1e13 and 1e9 < found["flop_rate"] < 1e15
        assert worker.started < found["begun"] < found["imported"] < found["at"]
        with pytest.raises(WorkerError, match=r"limits: AttributeError: .*no_dtype"):
            worker.ask("measure", threads=1, dtype="no_dtype", seconds=0.01)
        worker.ask("measure", threads=1, dtype="float32", seconds=0.01)


def test_a_worker_that_dies_is_an_error_with_its_last_words() -> None:
    with Worker("hf", python="/bin/false") as worker, pytest.raises(WorkerError, match="hf: its process ended with code 1"):
        worker.ask("load")


def test_workers_find_modules_compiled_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is installed editable would else be compiled in each of their processes."""
    seen, python = tmp_path / "seen", tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'import sys; print(sys.dont_write_bytecode)' > {seen}\n")
    python.chmod(0o755)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    with Worker("hf", python=str(python)) as worker, pytest.raises(WorkerError):
        worker.ask("load")
    assert seen.read_text() == "False\n"


def test_a_worker_that_does_not_answer_is_ended(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    with Worker("hf", python=str(python)) as worker:
        worker.patience = 0.3
        with pytest.raises(WorkerError, match="hf: its process ended with code -9"):
            worker.ask("load")


def test_engines_that_are_not_there_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vllm", "openvino", "ort", "llamacpp"):
        monkeypatch.delenv(variable(name), raising=False)
    found, absent = find("hf,hf-cb,vllm,openvino,ort,llamacpp", ["vllm=/nowhere/python", "ort=/no", "llamacpp=/nowhere"])
    assert [engine.name for engine in found][:2] == ["hf", "hf-cb"]
    assert absent["vllm"] == "not installed: there is no /nowhere/python"
    assert absent["ort"] == "not installed: there is no /no"
    assert variable("llamacpp") in absent["llamacpp"]
    with pytest.raises(ConfigError, match="Did you mean 'vllm'"):
        find("vlm", [])
    with pytest.raises(ConfigError, match="NAME=PATH"):
        find("hf", ["vllm"])


def test_the_environment_names_another_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    monkeypatch.setenv("AUTODEPLOY_BENCH_HF_CB", str(python))
    found, absent = find("hf-cb", [])
    assert not found and "named" not in absent  # a bare link has no packages, so nothing can be imported there
    assert str(python) in absent["hf-cb"]
    monkeypatch.setenv("AUTODEPLOY_BENCH_HF_CB", sys.executable)
    assert find("hf-cb", []) == ([Engine("hf-cb", sys.executable)], {})


def test_phases_of_a_start_add_up() -> None:
    loaded = {"begun": 100.1, "imported": 102.0}
    seconds = seconds_of(100.0, loaded, {"export": 3.0, "passes": 1.0}, RequestTimes(107.0, (107.5,)))
    assert list(seconds) == ["start of Python", "imports", "export", "passes", "first token", REST, TOTAL]
    assert seconds[TOTAL] == 7.5
    assert sum(value for name, value in seconds.items() if name != TOTAL) == pytest.approx(7.5)
    assert seconds[REST] == pytest.approx(1.0)


def test_the_read_rate_is_that_of_huge_pages_where_there_are_any() -> None:
    settings = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    has_them = settings.exists() and "[never]" not in settings.read_text()
    with Worker("limits") as worker:
        assert worker.ask("read_rate", seconds=0.01)["pages"] == ("huge" if has_them else "small")


def test_a_step_of_64_requests_that_are_waited_for_costs_hardly_more_than_that_of_one() -> None:
    measure = runpy.run_path(str(WORKERS / "worker_scheduling.py"))["measure"]
    turns = [[measure(num_requests, 40, 60)["seconds"] for num_requests in (1, 64)] for _ in range(3)]  # others are at work too
    one, many = ({what: min(run[what] for run in runs) for what in runs[0]} for runs in zip(*turns, strict=True))
    assert 0 < many["waited for"] < 3 * one["waited for"]
    assert many["waited for"] < many["streamed"]


def test_lists_with_an_entry_per_layer_follow_the_number_of_layers() -> None:
    set_depth = runpy.run_path(str(WORKERS / "worker_model.py"))["set_depth"]
    config = Gemma3TextConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    set_depth(config, 3)
    assert config.num_hidden_layers == 3
    assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]


def test_vllm_preloads_what_its_environment_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = runpy.run_path(str(WORKERS / "worker_vllm.py"))["library"]
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert library("iomp5") == str(tmp_path / "lib" / "libiomp5.so")
    assert library("no_such_library") is None


def test_llamacpps_two_times_become_the_rates_it_prints() -> None:
    spread = runpy.run_path(str(WORKERS / "worker_llamacpp.py"))["spread"]
    request = spread(100.0, 0.5, 12.7, 128)
    times = RunTimes((RequestTimes(request["submitted"], tuple(request["tokens"])),))
    assert times.decode_rate == pytest.approx(127 / 12.7)
    assert times.prefill_rate(128) == pytest.approx(256)


LLAMACPP = """#!/bin/sh
case "$*" in
    *--version*) echo "version: 7" ;;
    *) if [ -e "$0.once" ]; then echo '{"t_pp": 0.5, "t_tg": 2.0}'; else touch "$0.once"; fi ;;
esac
"""
"""Prints nothing the first time it is asked to measure."""


def test_llamacpp_is_asked_again_when_its_output_is_lost_and_waves_follow_each_other(tmp_path: Path) -> None:
    program = tmp_path / "llama-batched-bench"
    program.write_text(LLAMACPP)
    program.chmod(0o755)
    with Worker("llamacpp", environment={variable("llamacpp"): str(tmp_path)}) as worker:
        assert worker.ask("load", model="", threads=1, options={"bits": 16})["versions"] == {"llama.cpp": "version: 7"}
        requests = worker.ask("run", prompts=[[1, 2]] * 3, output_len=3, concurrency=2)["requests"]
    since = requests[0]["submitted"]
    times = [[round(time - since, 6) for time in (request["submitted"], *request["tokens"])] for request in requests]
    assert times == [[0.0, 0.5, 1.5, 2.5]] * 2 + [[2.5, 3.0, 4.0, 5.0]]


def test_a_command_that_fails_is_reported_by_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "convert_hf_to_gguf.py").write_text("import sys\nsys.exit('many words\\nnot this model')")
    failed = pytest.raises(WorkerError, match=r"llamacpp: python\S* ended with code 1: not this model")
    with Worker("llamacpp", environment={variable("llamacpp"): str(tmp_path)}) as worker, failed:
        worker.ask("prepare", model=str(tmp_path), bits=16)


def test_ort_without_its_builder_says_so(tmp_path: Path) -> None:
    failed = pytest.raises(WorkerError, match=r"ort: python\S* ended with code 1: .*onnxruntime_genai")
    with Worker("ort", environment={"PYTHONPATH": ""}) as worker, failed:
        worker.ask("prepare", model=str(tmp_path), bits=4)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("bits", [16, 4])
def test_ort_serves_waves_past_the_end_of_sequence(bits: int, tmp_path: Path) -> None:
    """Where it is installed. The head is tied, so random weights say the last token again: the end of sequence."""
    engines, absent = find("ort", [])
    if not engines:
        pytest.skip(absent["ort"])
    end = json.loads((DEMO / "config.json").read_text())["vocab_size"] - 1
    with Worker("model") as writer:
        writer.ask("write", config=str(DEMO), folder=str(tmp_path), num_layers=1)
    with Worker("ort", engines[0].python) as worker:
        worker.ask("prepare", model=str(tmp_path), bits=bits)
        assert worker.ask("load", model=str(tmp_path), threads=1, options={"bits": bits})["versions"].keys() == {
            "onnxruntime",
            "onnxruntime_genai",
        }
        requests = worker.ask("run", prompts=[[3, 4, end]] * 3, output_len=5, concurrency=2)["requests"]
    assert [len(request["tokens"]) for request in requests] == [5, 5, 5]
    assert requests[0] == requests[1] and requests[1]["tokens"][-1] <= requests[2]["submitted"] < requests[2]["tokens"][0]
    assert all(request["tokens"] == sorted(request["tokens"]) for request in requests)


def test_a_picture_has_a_bar_per_value_and_a_line_per_limit() -> None:
    text = bar_chart("tokens & seconds", ["a", "b"], [Bars("one", (1.0, None), 3.0), Bars("two", (2.0, 2.5))])
    tree = ElementTree.fromstring(text)
    kinds = [element.tag.rpartition("}")[2] for element in tree]
    assert kinds.count("rect") == 1 + 2 + 3  # the back, two keys, three bars
    assert kinds.count("line") == 2  # a limit and its key
    bars = [float(element.attrib["height"]) for element in tree if element.attrib.get("width") == "30"]
    assert bars == pytest.approx([80.0, 160.0, 200.0])
