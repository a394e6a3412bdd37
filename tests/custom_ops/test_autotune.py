"""Timed choices: who competes, who wins by a clock put in the real one's place, and what the file of times is trusted with."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import autodeploy
from autodeploy import ConfigError, SamplingParams, default_pipeline
from autodeploy._compile import compile_observed
from autodeploy.config import LLMArgs
from autodeploy.custom_ops import autotune, linear_op, moe
from autodeploy.custom_ops.autotune import SIZES, Tuner, draw_integers, tuner_of
from autodeploy.custom_ops.op import SEMANTIC_OPS, Provider
from autodeploy.custom_ops.timings import Timings, environment_of, time_in_turns
from autodeploy.formats import SCHEMES
from autodeploy.transforms import select_kernels
from autodeploy.transforms.quantize import QuantizeWeights
from tests.custom_ops.triton_ops import CUDA
from tests.models.families import make_model
from tests.test_gpu_program import compiled_for_gpu

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
"""Matrices that are worth packing."""


class Clock:
    """seconds: of each provider; 1 where there is none. Every call is made once all the same."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.timed = seconds, []

    def __call__(self, calls: Mapping[str, Callable[[], Any]], device: str) -> dict[str, float]:
        self.timed.append(tuple(calls))
        for call in calls.values():
            assert torch.isfinite(call()).all()
        return {name: self.seconds.get(name, 1.0) for name in calls}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTODEPLOY_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("AUTODEPLOY_NO_CPP", "1")  # or the kernels would be built in that folder
    return tmp_path / "autotune"


def use(monkeypatch: pytest.MonkeyPatch, clock: Any, device: str = "cpu") -> None:
    """That clock, and the tensors on the CPU, whatever the target."""

    def tuner(target: Any) -> Tuner:
        return Tuner(Timings.of(device), device, clock)

    monkeypatch.setattr(select_kernels, "tuner_of", tuner)


def linears(compiled: Any) -> set[str]:
    return {choice.provider for choice in compiled.program.providers["linear"]}


@pytest.mark.parametrize(
    ("seconds", "taken"), [({"reference": 0.5}, "reference"), ({"reference": 0.97}, "onednn"), ({"onednn": 0.5}, "onednn")]
)
def test_the_faster_of_equals_is_taken_by_more_than_a_margin(
    seconds: dict[str, float], taken: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    use(monkeypatch, clock := Clock(**seconds))
    compiled = autodeploy.compile(make_model("llama", **WIDE), autotune=True)
    assert set(clock.timed) == {("onednn", "reference")}
    assert linears(compiled) == {taken}
    called = compiled.program.op_counts()
    assert called["linear.linear" if taken == "reference" else "linear.packed_linear"] > 0, called
    lost, ratio = (
        ("onednn", 2.0) if taken == "reference" else ("reference", seconds.get("reference", 1) / seconds.get("onednn", 1))
    )
    text = f"{ratio:.2f} times as long as {taken} for input=float32[1, T, 256], weight=float32[512, 256]"
    assert any(text in choice.against[lost][0] for choice in compiled.program.providers["linear"]), compiled.report()
    assert compiled.generate([5, 6, 7], SamplingParams(max_tokens=4, ignore_eos=True)).outputs[0].token_ids
    compiled.shutdown()


def test_nothing_is_timed_unless_asked(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    use(monkeypatch, clock := Clock(reference=0.1))
    compiled = autodeploy.compile(make_model("llama", **WIDE))
    assert linears(compiled) == {"onednn"} and not clock.timed and not folder.exists()
    compiled.shutdown()
    with pytest.raises(ConfigError, match="autotune"):
        autodeploy.compile(make_model("llama"), autotune="sometimes")
    assert LLMArgs(model="x", enable_autotuner=True).autotune


def test_another_start_reads_what_the_first_one_timed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    use(monkeypatch, clock := Clock(reference=0.5))
    first = autodeploy.compile(make_model("llama", **WIDE), autotune=True)
    (file,) = folder.iterdir()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, file)] == [0o700, 0o600]
    assert len(clock.timed) == len(json.loads(file.read_text())["calls"]) > len(SIZES)
    use(monkeypatch, again := Clock(onednn=0.1))
    second = autodeploy.compile(make_model("llama", **WIDE), autotune=True)
    assert not again.timed and str(second.program) == str(first.program)
    assert second.program.providers == first.program.providers
    for compiled in (first, second):
        compiled.shutdown()


DAMAGES: dict[str, Callable[[str], str]] = {
    "no JSON": lambda text: text[: len(text) // 2],
    "other data": lambda text: "[1, 2]",
    "a time that is none": lambda text: text.replace("1.0", '"soon"'),
    "another environment": lambda text: text.replace('"threads": "', '"threads": "1'),
    "another format": lambda text: text.replace('"format": 1', '"format": 0'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_cannot_be_used_is_written_anew(damage: str, folder: Path) -> None:
    kept = Timings.of("cpu")
    kept.add("a call", {"one": 1.0, "other": 2.0})
    kept.save()
    assert Timings.of("cpu").calls == kept.calls
    assert kept.path is not None
    intact = kept.path.read_text()
    kept.path.write_text(DAMAGES[damage](intact))
    again = Timings.of("cpu")
    assert again.calls == {}
    again.add("a call", {"one": 1.0, "other": 2.0})
    again.save()
    assert kept.path.read_text() == intact


def test_a_file_that_others_can_write_is_not_read(folder: Path) -> None:
    kept = Timings.of("cpu")
    kept.add("a call", {"one": 1.0})
    kept.save()
    assert kept.path is not None
    kept.path.chmod(0o622)
    assert Timings.of("cpu").calls == {}


def test_no_file_where_nothing_is_to_be_stored(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("AUTODEPLOY_CACHE_DIR", "off")
    times = Timings.of("cpu")
    times.add("a call", {"one": 1.0})
    times.save()
    assert times.path is None and not folder.exists()


def test_what_times_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    before = environment_of("cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert environment_of("cpu") != before
    finally:
        torch.set_num_threads(threads)
    assert environment_of("cpu") == before
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert environment_of("cpu") != before


def _judge(op: Any, clock: Clock, *args: Any, **parameters: Any) -> autotune.Verdict:
    chosen, _ = op.choose(CUDA, *args, parameters=parameters)
    return Tuner(Timings(None, {}), "cpu", clock).judge(op, chosen, CUDA, *args, parameters=parameters)


def rows(count: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(1, count, width, dtype=dtype)


@pytest.mark.parametrize(("scheme", "name"), [("int8", "triton_w8a16"), ("w8a8", "triton_w8a8"), ("int4", "triton_w4a16")])
def test_tiles_of_a_triton_kernel_are_timed_too(scheme: str, name: str) -> None:
    weight = torch.zeros(64, 64, dtype=torch.bfloat16)
    clock = Clock(**{f"{name}_large": 0.5})
    found = _judge(linear_op, clock, rows(3, 64), weight, weight=SCHEMES[scheme])
    assert clock.timed == [(name, f"{name}_small", f"{name}_large")]
    assert found.provider.name == f"{name}_large"
    assert "2.00 times as long" in found.against[name][0] and f"weight={SCHEMES[scheme]} bfloat16" in found.against[name][0]


def test_tiles_of_experts_are_timed_with_experts_that_are_chosen_alike() -> None:
    seen = []

    class Looking(Clock):
        def __call__(self, calls: Any, device: str) -> dict[str, float]:
            seen.extend(calls)
            return super().__call__(calls, device)

    x, index, weights = rows(4, 32)[0], torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2, dtype=torch.bfloat16)
    gate_up, down = torch.zeros(8, 32, 32, dtype=torch.bfloat16), torch.zeros(8, 32, 16, dtype=torch.bfloat16)
    args = (x, index, weights, gate_up, down, None, None, False, "halves", "silu", 1.0, 0.0, 0.0)
    found = _judge(moe, Looking(triton_small=0.5), *args)
    assert found.provider.name == "triton_small" and seen == ["triton", "triton_small", "triton_large"]
    drawn = moe.draw({"expert_index": torch.zeros(100, 2, dtype=torch.int64), "down": down})["expert_index"]
    assert len(drawn.unique()) == 8


def test_a_program_for_a_gpu_runs_the_tiles_that_won(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Clock(triton_w8a16_large=0.5))
    pipeline = default_pipeline(CUDA, QuantizeWeights(scheme="int8")).configure("select_kernels", autotune=True)
    model = make_model("llama", num_hidden_layers=1).bfloat16()
    compiled = compiled_for_gpu(model, pipeline)
    assert "triton_w8a16_large" in linears(compiled)
    again = autodeploy.program.decode_program(compiled.program.as_json().encode())
    assert again.op_counts() == compiled.program.op_counts()
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = compiled_for_gpu(model, default_pipeline(CUDA, QuantizeWeights(scheme="int8")))
    assert (compiled(ids) - plain(ids)).norm() <= 0.01 * plain(ids).norm()
    for each in (compiled, plain):
        each.shutdown()


def test_every_tile_that_timing_can_take_is_compiled_ahead() -> None:
    for module, op in (("quantized_gemm", linear_op), ("grouped_gemm", moe)):
        variants = import_module(f"autodeploy.custom_ops.kernels.{module}").VARIANTS
        compiled = {(v.constants.get("BLOCK_M"), v.constants.get("BLOCK_N"), v.num_warps) for v in variants}
        others = [variant for provider in op.providers for variant in provider.variants]
        tiles = {tile for variant in others for tile in variant.function.__closure__[1].cell_contents}
        assert len(tiles) >= 3
        assert {(tile.rows, tile.columns, tile.warps) for tile in tiles} <= compiled


def test_who_rounds_otherwise_competes_with_nobody() -> None:
    x, weight = rows(3, 512, torch.float32), torch.zeros(256, 512)
    chosen, _ = linear_op.choose(autodeploy.Target(), x, weight, None, parameters={"weight": None})
    assert [rival.name for rival in linear_op.equals(chosen, autodeploy.Target(), x, weight, None)] == ["reference"]
    for op in SEMANTIC_OPS.values():
        claimed = [provider for provider in op.providers if provider.rounding]
        assert all(provider.against_format is None for provider in claimed)


def test_who_fails_while_it_is_timed_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Tensor:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(linear_op, "providers", list(linear_op.providers))
    rounding = linear_op.named("reference").rounding
    monkeypatch.setattr(autotune, "SIZES", (1,))
    broken_one = Provider("broken", broken, rounding=rounding)
    linear_op.providers.insert(0, broken_one)
    x, weight = rows(3, 8, torch.float32), torch.zeros(8, 8)
    tuner = Tuner(Timings(None, {}), "cpu", Clock())
    found = tuner.judge(linear_op, broken_one, autodeploy.Target(), x, weight, None)
    assert found.provider.name == "reference" and found.against == {"broken": ["it failed while it was timed"]}


def test_a_machine_that_is_not_the_target_times_nothing() -> None:
    assert tuner_of(autodeploy.Target()) is not None
    assert torch.cuda.is_available() or tuner_of(CUDA) is None


def test_the_clock_takes_turns_and_the_shortest_time() -> None:
    order = []
    seconds = time_in_turns({"a": lambda: order.append("a"), "b": lambda: (order.append("b"), time.sleep(0.005))}, "cpu")
    assert order[:6] == ["a", "b"] * 3 and 0 < seconds["a"] < 0.005 <= seconds["b"]


def test_drawn_matrices_have_the_scales_of_their_format() -> None:
    made = draw_integers(torch.ones(4, 64), SCHEMES["int4"])
    assert (made.numbers.dtype, made.scales.shape) == (torch.int8, (4, 2))
    assert draw_integers(torch.ones(4, 64), SCHEMES["fp8"]).numbers.dtype == torch.float8_e4m3fn


def test_timed_by_the_real_clock_and_stored_with_the_program(folder: Path, tmp_path: Path) -> None:
    make_model("llama", **WIDE).save_pretrained(tmp_path / "model")
    args = LLMArgs(model=str(tmp_path / "model"), autotune=True)
    found = []
    for _ in range(2):
        compiled = compile_observed(args)
        assert any(
            "times as long" in why for choice in compiled.program.providers["linear"] for (why,) in choice.against.values()
        )
        found.append((compiled(torch.tensor([[5, 6, 7]])), compiled.timeline.notes["program cache"], str(compiled.program)))
        compiled.shutdown()
    assert torch.equal(found[0][0], found[1][0]) and found[1][1] == "hit" and found[0][2] == found[1][2]
    plain = compile_observed(args.model_copy(update={"autotune": False}))
    assert "changed: autotune, what was timed" in plain.timeline.notes["program cache"]
    plain.shutdown()
