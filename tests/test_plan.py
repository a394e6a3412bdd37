"""`autodeploy plan`: bytes against a runner's, bounds against sums done by hand, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from typer.testing import CliRunner

import autodeploy
from autodeploy import SamplingParams, default_pipeline
from autodeploy._compile import trace
from autodeploy._lower import lower
from autodeploy.cli import app
from autodeploy.config import LLMArgs
from autodeploy.errors import ConfigError, UnsupportedModelError
from autodeploy.executor.model_runner import ModelRunner
from autodeploy.executor.packing import parameter_uses
from autodeploy.plan.devices import COLLECTIVE_SECONDS, DEVICES, device_named
from autodeploy.plan.estimate import collective_seconds
from autodeploy.plan.plan import Plan, lower_for, plan_program, plan_stages, refuse_what_does_not_fit
from autodeploy.plan.weights import stored_bytes
from autodeploy.plan.work import Step
from autodeploy.plan.workspace import workspace_bytes
from autodeploy.report.timeline import Timeline
from autodeploy.shards import plan_of_rank
from autodeploy.specs import Mesh, Target
from benchmarks.meta_compile import make_config
from tests.capture.test_quantized import BY_NAME, write
from tests.models.families import make_model

DEMO = str(Path(autodeploy.__file__).parent / "demo_model")
H200 = DEVICES["h200"]


def written(config: Any, folder: Path, dtype: str = "bfloat16") -> Path:
    config.dtype = dtype
    config.save_pretrained(folder)
    return folder


def plan_of(folder: Path | str, mesh: Mesh = Mesh(), context: int = 128, **options: Any) -> Plan:  # noqa: B008, it is frozen
    args = LLMArgs(model=folder, device="cuda", max_batch_size=64, **options)
    return plan_stages(lower_for(args, mesh, Timeline(show=False)).program, args, H200, mesh, context)


def test_llama_of_8b_by_hand(tmp_path: Path) -> None:
    plan = plan_of(written(make_config("llama-3.1-8b"), tmp_path), context=8192)
    num_layers, width, heads, kv_heads, dim, inner, words = 32, 4096, 32, 8, 128, 14336, 128256
    layer = width * dim * (2 * heads + 2 * kv_heads) + 3 * width * inner
    parameters = num_layers * (layer + 2 * width) + 2 * words * width + width
    assert parameters == 8_030_261_248
    assert plan.weight_bytes == 2 * parameters + 4 * dim // 2  # inv_freq, in float32
    assert plan.cache_bytes_per_token == 2 * num_layers * kv_heads * dim * 2
    assert plan.cache_tokens == pytest.approx(plan.left_bytes / plan.cache_bytes_per_token, rel=1e-3)

    alone, _, many = plan.decode
    read = plan.weight_bytes - 2 * words * width + 2 * width  # one row of the embedding table
    read_of_all = read + 63 * 2 * width + 64 * 8192 * plan.cache_bytes_per_token
    assert alone.read_bytes == read + 8192 * plan.cache_bytes_per_token
    assert alone.seconds == alone.read_bytes / 4.8e12 and alone.limit == "memory"
    assert many.read_bytes == read_of_all and many.fits
    attention = 2 * 2 * 8192 * num_layers * heads * dim
    assert alone.flop == {"bfloat16": 2 * (num_layers * layer + words * width) + attention}
    pairs = 8192 * 8193 // 2
    behind = width * dim * heads + 3 * width * inner  # the last attention: of the last token of each chunk, as is the head
    of_all, of_last = 8192 * 2 * (num_layers * layer - behind), 4 * 2 * (behind + words * width)
    assert plan.prefill.flop == {"bfloat16": of_all + of_last + pairs * 4 * num_layers * heads * dim}
    assert plan.prefill.seconds == pytest.approx(plan.prefill.flop["bfloat16"] / 989.5e12) and plan.prefill.limit == "products"
    assert not plan.collectives and not plan.notes


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [("float32", None), ("bfloat16", None), ("bfloat16", "w8a8"), ("bfloat16", "int8"), ("bfloat16", "int4")],
)
def test_bytes_are_those_that_a_runner_takes(dtype: str, quantization: Any) -> None:
    options = {"model": DEMO, "dtype": dtype, "quantization": quantization, "max_batch_size": 4, "program_cache": False}
    planned = trace(LLMArgs(**options), Timeline(show=False), meta=True)
    compiled = autodeploy.compile(**options)
    compiled.generate([1, 2, 3], SamplingParams(max_tokens=1))
    runner = compiled.runner
    assert isinstance(runner, ModelRunner)
    plan = plan_program(planned, compiled.args, H200, Mesh(), compiled.max_seq_len, (4,))
    tokens = compiled.num_pool_tokens + compiled.args.kv_cache_config.page_size  # a scratch page
    compiled.shutdown()
    assert plan.weight_bytes == pytest.approx(runner.weight_bytes, rel=0.03)
    assert plan.cache_bytes_per_token * tokens == pytest.approx(sum(cache.nbytes for cache in runner.caches), rel=0.03)


class Watching(fx.Interpreter):
    """Runs a graph, dropping values when nobody reads them any more."""

    most = 0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        alive = [result] * (n.op == "call_function") + [self.env[node] for node in self.env if node.op == "call_function"]
        tensors = [each for value in alive for each in (value if isinstance(value, list | tuple) else [value])]
        storages = [each.untyped_storage() for each in tensors if isinstance(each, torch.Tensor)]
        self.most = max(self.most, sum({each.data_ptr(): each.nbytes() for each in storages}.values()))
        return result


@pytest.mark.parametrize("family", ["llama", "qwen3_next", "deepseek_v3"])
def test_workspace_is_what_values_take(family: str) -> None:
    model = make_model(family)
    compiled = autodeploy.compile(model, pipeline=lambda pipeline: pipeline.configure("select_kernels", pack=False))
    runner, seen = compiled.runner, list[int]()
    assert isinstance(runner, ModelRunner)

    def watched(inputs: list[torch.Tensor]) -> torch.Tensor:
        watching = Watching(runner.module)
        logits = watching.run(*inputs, *runner.caches)[0]
        seen.append(watching.most)
        return logits

    runner._compute = watched  # pyright: ignore[reportAttributeAccessIssue]
    compiled.generate(list(range(1, 65)), SamplingParams(max_tokens=1))
    compiled.shutdown()
    inside = workspace_bytes(compiled.program, 64, 1)
    assert inside == pytest.approx(seen[0], rel=0.15)


@pytest.mark.parametrize("window", [0, 1, 7, 32, 64])
@pytest.mark.parametrize(("tokens", "context"), [(1, 1), (1, 40), (16, 16), (16, 40), (40, 40)])
def test_what_queries_see(window: int, tokens: int, context: int) -> None:
    visible = [set(range(max(0, at + 1 - window) if window else 0, at + 1)) for at in range(context - tokens, context)]
    assert Step(1, tokens, context).seen(window) == (len(set.union(*visible)), sum(map(len, visible)))


def test_ranks_of_a_model_with_experts(tmp_path: Path) -> None:
    config = make_model("qwen3_moe").config
    folder, mesh = written(config, tmp_path), Mesh(tp=2, ep=2)
    experts, chosen, width, num_layers = (
        config.num_experts,
        config.num_experts_per_tok,
        config.hidden_size,
        config.num_hidden_layers,
    )
    whole, rank = plan_of(folder), plan_of(folder, mesh)
    whole_experts, rank_experts = (
        sum(group.num_bytes for group in plan.groups if group.readers == "moe") for plan in (whole, rank)
    )
    assert whole_experts == 2 * rank_experts > 0
    assert whole.cache_bytes_per_token == 2 * rank.cache_bytes_per_token
    cuts = {group.name.rpartition("*.")[2]: group.cut for group in rank.groups}
    assert cuts["mlp.experts.down_proj"] == "matrices / 2" and cuts["self_attn.o_proj.weight"] == "columns / 2"
    assert cuts["mlp.gate.weight"] == "" and cuts["lm_head.weight"] == "rows / 2"

    for plan, num_bytes in ((whole, whole_experts), (rank, rank_experts)):
        few, some = (num_bytes * (1 - (1 - chosen / experts) ** count) for count in (1, 8))
        others = 7 * (128 * plan.cache_bytes_per_token + 2 * width)  # caches of 7 more requests, rows of the embedding table
        assert plan.decode[1].read_bytes - plan.decode[0].read_bytes == pytest.approx(some - few + others)
    routers = 2 * num_layers * width * experts  # every rank has them
    assert 2 * rank.decode[0].flop["bfloat16"] == whole.decode[0].flop["bfloat16"] + routers
    sums, gathers = 2 * num_layers + 1, 1
    assert {(each.op, each.count, each.num_bytes) for each in rank.collectives} == {
        ("all_reduce", sums, 2 * width),
        ("all_gather", gathers, 2 * config.vocab_size),
    }
    parts = (("all_reduce", sums, width), ("all_gather", gathers, config.vocab_size))
    seconds = sum(count * collective_seconds(op, 8 * 2 * size, 2, H200) for op, count, size in parts)
    assert rank.decode[1].collective_seconds == pytest.approx(seconds)
    assert not whole.collectives and not rank.notes


def test_stages_divide_what_is_held_but_not_what_a_token_goes_through(tmp_path: Path) -> None:
    folder = written(make_model("llama", num_hidden_layers=4).config, tmp_path)
    whole, stage = plan_of(folder), plan_of(folder, Mesh(pp=2))
    assert 0.5 <= stage.weight_bytes / whole.weight_bytes < 0.6
    assert stage.cache_bytes_per_token == whole.cache_bytes_per_token / 2
    assert stage.decode[0].flop == whole.decode[0].flop
    assert stage.decode[0].read_bytes == pytest.approx(whole.decode[0].read_bytes, rel=0.01)
    assert "of 2, which needs most" in stage.notes[-1]
    with pytest.raises(UnsupportedModelError, match="Use pipeline_parallel_size"):
        plan_of(folder, Mesh(pp=64))


def test_ranks_that_nothing_divides_are_noted(tmp_path: Path) -> None:
    folder = written(make_model("llama").config, tmp_path)
    plan = plan_of(folder, Mesh(tp=2), pipeline=lambda pipeline: pipeline.without("shard"))
    assert plan.notes == ("no pass divided this program: each of the 2 ranks holds all of it",)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss"])
def test_bytes_are_those_of_each_of_two_ranks(family: str) -> None:
    model, target = make_model(family), Target("cpu", mesh=Mesh(tp=2))
    args = LLMArgs(model=model)
    lowered, _ = lower(args, default_pipeline(target), target, Timeline(show=False))
    program, planned = lowered.program, sum(stored_bytes(lowered.program).values())
    shared = program.weights
    for rank in range(2):
        program.weights = plan_of_rank(shared, rank, lowered.source.fetch)
        assert planned == pytest.approx(ModelRunner(program, lowered.source, "cpu").weight_bytes, rel=0.03)


def test_seconds_of_collectives() -> None:
    base, gigabyte = COLLECTIVE_SECONDS, 10**9
    summed, gathered = (collective_seconds(op, gigabyte, 8, H200) for op in ("all_reduce", "all_gather"))
    assert summed - base == pytest.approx(2 * (gathered - base))
    assert gathered == pytest.approx(7 / 8 * gigabyte / 450e9, rel=0.01)


def invoke(*options: str) -> str:
    done = CliRunner().invoke(app, ["plan", *options], catch_exceptions=False, env={"COLUMNS": "160"})
    assert done.exit_code == 0
    return done.stdout


def test_the_command(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_bytes((Path(DEMO) / "config.json").read_bytes())
    shown = invoke(str(config), "--gpu", "H100", "--context", "64", "--requests", "2", "--json", str(tmp_path / "plan.json"))
    assert "at the least, with 64 tokens of context: bounds, not forecasts" in shown
    assert "NVIDIA H100 Tensor Core GPU data sheet" in shown and "collectives: none" in shown
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data == json.loads(invoke(DEMO, "--gpu", "h100", "--context", "64", "--requests", "2", "--json", "-")) | {
        "model": data["model"]
    }
    assert sum(group["num_bytes"] for group in data["groups"]) == data["weight_bytes"]
    assert [step["requests"] for step in data["decode"]] == [2]


def test_formats_that_kernels_keep(tmp_path: Path) -> None:
    folder = written(make_model("qwen3_moe", hidden_size=128, moe_intermediate_size=64).config, tmp_path)
    dense, few = plan_of(folder), plan_of(folder, quantization="fp8", kv_cache_config={"dtype": "fp8"})
    stored = {group.name.rpartition("*.")[2]: group.stored for group in few.groups}
    assert stored["self_attn.o_proj.weight"] == "fp8"
    assert stored["mlp.experts.down_proj"] == "fp8"
    assert few.weight_bytes < dense.weight_bytes and few.cache_bytes_per_token < dense.cache_bytes_per_token


def test_a_layout_that_does_not_fit_is_refused_with_what_takes_most(tmp_path: Path) -> None:
    folder = written(make_model("llama", vocab_size=8192, hidden_size=1024).config, tmp_path)
    args = LLMArgs(model=folder, device="cuda", max_batch_size=64)
    lowered = lower_for(args, Mesh(), Timeline(show=False))

    def refused(memory: int, context: int) -> str:
        device = type(H200)("small", memory, 1.0, H200.flop_rates, H200.link, "")
        plan = plan_program(lowered.program, args, device, Mesh(), context)
        assert plan.cache_tokens == 0 and not any(step.fits for step in plan.decode)
        with pytest.raises(ConfigError) as caught:
            refuse_what_does_not_fit(plan)
        return str(caught.value)

    message = refused(10**7, 128)
    assert "does not fit: a rank of tp=1 ep=1 pp=1 needs 47.72 MB for weights" in message and "but small has 10.00 MB" in message
    assert "Largest: model.embed_tokens.weight 16.78 MB" in message and "more ranks (--tp;" in message
    assert "--context" not in message and "--quantization" not in message
    assert "a shorter --context than 1000000" in refused(10**9, 10**6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpu", "h20"), r"--gpu h20: no such GPU in the table\. Did you mean 'h200'\? Known: h100, h200"),
        (("--tp", "8", "--ep", "3"), "--ep 3 does not divide --tp 8"),
        (("--quantization", "int3"), "it is none of int8, w8a8, int4"),
    ],
)
def test_what_is_refused_before_anything_is_compiled(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, ["plan", DEMO, *options], catch_exceptions=False)


QUICK = [("gptq", 2), ("compressed-tensors int8", 1)]
LONG = [("gptq", 1), ("compressed-tensors int8", 2)] + [
    (name, tp) for name in ("awq", "block fp8", "compressed-tensors w4a16 asymmetric") for tp in (1, 2)
]


@pytest.mark.parametrize(("name", "tp"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG)])
def test_bytes_of_a_quantized_checkpoint_are_those_of_each_rank(name: str, tp: int, tmp_path: Path) -> None:
    """The plan sees config.json alone."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 64}
    folder, _ = write(tmp_path, BY_NAME[name], make_model("llama", **sizes))
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_bytes((folder / "config.json").read_bytes())
    target, show = Target("cpu", mesh=Mesh(tp=tp)), Timeline(show=False)
    planned = lower(LLMArgs(model=alone, dtype="bfloat16"), default_pipeline(target), target, show, meta=True)[0].program
    lowered, _ = lower(LLMArgs(model=folder, dtype="bfloat16"), default_pipeline(target), target, show)
    program, shared = lowered.program, lowered.program.weights
    for rank in range(tp):
        program.weights = plan_of_rank(shared, rank, lowered.source.fetch)
        taken = ModelRunner(program, lowered.source, "cpu").weight_bytes
        assert sum(stored_bytes(planned).values()) == pytest.approx(taken, rel=0.03)


def test_a_quantized_config_on_a_gpu(tmp_path: Path) -> None:
    """What kernels for GPUs read in few bits is counted so, and so is what stays dense."""
    raw = json.loads((written(make_model("llama", hidden_size=256).config, tmp_path) / "config.json").read_text())

    def planned(**settings: Any) -> Plan:
        (tmp_path / "config.json").write_text(json.dumps({**raw, "quantization_config": settings} if settings else raw))
        return plan_of(tmp_path)

    left_out = ["model.layers.0.mlp.down_proj", "lm_head"]
    plan = planned(quant_method="fp8", weight_block_size=[128, 128], modules_to_not_convert=left_out)
    stored = {group.name: group.stored for group in plan.groups}
    assert stored["model.layers.*.self_attn.o_proj.weight"] == "fp8" and stored["lm_head.weight"] == "bfloat16"
    down = [group for group in plan.groups if "down_proj" in group.name]
    assert {(group.count, group.stored) for group in down} == {(1, "bfloat16"), (1, "fp8")}
    assert not plan.notes and plan.weight_bytes < planned().weight_bytes
    with pytest.raises(UnsupportedModelError, match=r"'fp9' is not read\. Did you mean 'fp8'"):
        planned(quant_method="fp9")


def test_experts_of_gpt_oss_are_counted_as_their_provider_holds_them(tmp_path: Path) -> None:
    raw = json.loads((written(make_model("gpt_oss").config, tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "mxfp4"}}))
    args, target = LLMArgs(model=tmp_path, device="cuda"), Target("cuda")
    program = lower(args, default_pipeline(target), target, Timeline(show=False), meta=True)[0].program
    experts = [name for name in program.weights if name.endswith("experts.down_proj")]
    leaves = {leaf.name for name in experts for leaf in program.weights[name].leaves()}
    assert leaves == {f"{name}.{part}" for name in experts for part in ("codes", "scales")}
    uses, sizes = parameter_uses(program), stored_bytes(program)
    for name in experts:
        assert not uses[name].dense and sizes[name] < program.parameter(name).nbytes / 3


def test_devices_name_their_sources_and_read_in_order() -> None:
    assert device_named("RTX 4090") is DEVICES["rtx4090"] and device_named("A100_80GB") is DEVICES["a100-80gb"]
    for device in DEVICES.values():
        assert device.source and device.flop_rate("float32") < device.flop_rate("bfloat16") < device.flop_rate("int8")
    assert device_named("a100-80gb").flop_rate("float8_e4m3fn") == 312e12  # it has none
