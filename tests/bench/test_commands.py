"""`autodeploy bench` as a user runs it."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

import autodeploy

ROOT = Path(autodeploy.__file__).parents[1]
DEMO = str(ROOT / "autodeploy" / "demo_model")
ENVIRONMENT = {**os.environ, "COLUMNS": "160", "PYTHONPATH": str(ROOT)}
SMALL = ["--concurrency", "1,3", "--input-len", "16", "--output-len", "8", "--repeats", "1", "--threads", "1"]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "autodeploy.cli", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)


def figures(done: subprocess.CompletedProcess[str], engine: int = 0) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["engines"][engine]["cells"]


def test_throughput_of_more_requests_than_run_at_once(tmp_path: Path) -> None:
    picture = tmp_path / "rates.svg"
    done = bench("throughput", DEMO, *SMALL, "--num-requests", "4", "--json", "-", "--plot", str(picture))
    one, three = figures(done)
    found = json.loads(done.stdout)
    assert (one["concurrency"], three["concurrency"]) == (1, 3)
    for cell in (one, three):
        assert cell["e2e_rate"] > 0 and cell["decode_rate"] > 0
        assert cell["latency_seconds"]["TTFT"]["mean"] <= cell["latency_seconds"]["E2E"]["mean"]
        assert cell["runs"][0]["foreign_cores"] >= 0
    assert found["limits"]["read_rate"] > 0 and found["ceilings"][0]["decode"] > one["decode_rate"]
    assert found["engines"][0]["peak_anon_bytes"] > found["weight_bytes"]
    assert found["pool_bytes"] > 0 and found["threads"] == 1
    assert found["engines"][0]["first_token_seconds"] > found["engines"][0]["load_seconds"] > 0
    ElementTree.fromstring(picture.read_text())


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, autodeploy.cli; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_scheduling_prints_each_kind_of_step() -> None:
    done = bench("scheduling", "--concurrency", "1,5", "--input-len", "8", "--steps", "5", "--json", "-")
    assert done.returncode == 0, done.stderr
    costs = json.loads(done.stdout)["seconds"]
    assert list(costs) == ["1", "5"] and costs["5"].keys() == {"waited for", "streamed"}


def test_wrong_options_are_one_line() -> None:
    for arguments, reason in (
        (["throughput"], "--random-weights"),
        (["latency", DEMO, "--concurrency", "0"], "--concurrency is '0'"),
        (["compare", DEMO, "--against", "lamacpp"], "Did you mean 'llamacpp'"),
        (["compare", DEMO, "--bits", "5"], "it is 16, 8 or 4"),
        (["throughput", DEMO, "--option", "x"], "name=value"),
        (["growth", DEMO, "--input-len", "16", "--concurrency", "1"], "nothing grows"),
    ):
        done = bench(*arguments)
        assert done.returncode == 1 and "ConfigError" in done.stderr and reason in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fewer_bits_are_for_engines_that_round() -> None:
    options = ["--bits", "8", "--against", "hf", "--prefill-len", "0", "--option", 'dtype="bfloat16"', "--json", "-"]
    found, dense = (
        json.loads(bench("compare", DEMO, *SMALL, *more).stdout) for more in (options, ["--against", "", "--json", "-"])
    )
    assert found["engines"][0]["cells"][0]["decode_rate"] > 0 and "no means of its own" in found["engines"][1]["error"]
    assert found["size"]["weight_bytes"] == dense["size"]["weight_bytes"] // 4  # the checkpoint is float32


def test_latency_prints_percentiles() -> None:
    done = bench("latency", DEMO, *SMALL)
    assert done.returncode == 0, done.stderr
    for text in ("TTFT", "TPOT", "ITL", "E2E", "p50", "p90", "p99", "1 threads", "GB/s", "torch"):
        assert text in done.stdout
    assert "run 1 of 1" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_startup_lists_the_phases_of_a_new_process() -> None:
    done = bench("startup", DEMO, "--repeats", "2", "--input-len", "16", "--json", "-")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["starts"]) == 2
    phases = {"imports", "import torch", "import transformers", "export", "passes", "load weights", "first token"}
    assert phases <= found["first"]["seconds"].keys()
    assert found["first"]["cpu_seconds"]["export"] > 0
    assert "load weights" in found["median"]["seconds"] and "export" not in found["median"]["seconds"]
    for start in (found["first"], *found["starts"]):
        total = start["seconds"].pop("process start to first token")
        assert sum(start["seconds"].values()) == pytest.approx(total)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_growth_with_context_requests_and_layers(tmp_path: Path) -> None:
    """The demo model has two layers; the others get random weights."""
    picture = tmp_path / "growth.svg"
    sizes = ["--input-len", "16,32", "--concurrency", "1,3", "--layers", "1,3", "--output-len", "8"]
    done = bench("growth", DEMO, *sizes, "--repeats", "1", "--threads", "1", "--json", "-", "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    names = [(point["value"], point["unit"]) for point in found["points"]]
    assert names == [(16, "token"), (32, "token"), (1, "request"), (3, "request"), (1, "layer"), (3, "layer")]
    for point in found["points"]:
        for figure in point["figures"]:
            assert figure["seconds"] > figure["floor_seconds"] > 0
    one, three = (each["size"]["body_numbers"] for each in found["measured"][1:])
    assert three > 2 * one
    assert "3 layers" in picture.read_text() and "floor of this machine" in picture.read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_random_weights_are_compared_with_hugging_face(tmp_path: Path) -> None:
    """The config of the demo model, other weights, kept; its own end of sequence must not shorten anyone's output."""
    model, file = tmp_path / "model", tmp_path / "found.json"
    others = ["--against", "hf,hf-cb,llamacpp", "--peer-path", "llamacpp=/nowhere", "--prefill-len", "40"]
    done = bench("compare", str(model), "--random-weights", DEMO, *SMALL, *others, "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert (model / "model.safetensors").exists() and (model / "tokenizer.json").exists()
    found = json.loads(file.read_text())
    assert [engine["name"] for engine in found["engines"]] == ["autodeploy", "hf", "hf-cb"]
    assert found["engines"][0]["first_start_seconds"] > found["engines"][0]["first_token_seconds"]
    for engine in found["engines"]:
        assert not engine["error"]
        assert [(cell["concurrency"], cell["output_len"]) for cell in engine["cells"]] == [(1, 8), (3, 8), (1, 1)]
        assert engine["cells"][0]["decode_rate"] > 0 and engine["cells"][2]["prefill_rate"] > 0
        assert engine["versions"]["transformers"]
    assert found["not_installed"]["llamacpp"].startswith("not installed")
    assert found["size"]["weight_bytes"] == pytest.approx(found["weight_bytes"], rel=1e-3)  # tied, so all is read in each step
    for text in ("ours / best peer", "ceiling", "hf-cb", "prefill 40", "not installed"):
        assert text in done.stdout
    turns = [line.split(":")[0] for line in done.stderr.splitlines() if "cell 1)" in line]
    assert turns == ["autodeploy", "hf", "hf-cb"]
