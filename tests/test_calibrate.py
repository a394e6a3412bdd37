"""Quantized checkpoints that we write: what is in them, that others read the same, and that GPTQ loses less than rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import autodeploy
from autodeploy import LLM, ConfigError, QuantConfig
from autodeploy.calibrate import quantize
from autodeploy.cli import DEMO_MODEL, app
from autodeploy.demo_questions import held_out_questions, training_pairs
from autodeploy.eval import answered, exact_matches, score
from autodeploy.formats import SCHEMES, Integers
from autodeploy.gptq import gptq
from tests.marks import needs_byte_kernels
from tests.models.families import make_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


def dense(made: Integers) -> torch.Tensor:
    return made.numbers * made.scales.repeat_interleave(made.numbers.shape[1] // made.scales.shape[1], 1)


@pytest.mark.parametrize(("scheme", "columns"), [("int4", 320), ("w8a8", 200)])
def test_columns_make_up_for_what_those_before_them_lost(scheme: str, columns: int) -> None:
    torch.manual_seed(0)
    form, weight = SCHEMES[scheme], torch.randn(48, columns)
    inputs = torch.randn(2000, 40) @ torch.randn(40, columns) + 0.3 * torch.randn(2000, columns)  # columns that resemble others
    products = inputs.T @ inputs / len(inputs)
    nearest = dense(form.integers((48, columns), *form.quantize(weight)))
    ours = dense(gptq(weight, products, form))
    lost, least = (float((inputs @ (weight - each).T).norm()) for each in (nearest, ours))
    assert least < 0.6 * lost
    assert (weight - ours).norm() > (weight - nearest).norm()  # it is not nearer by itself
    alike = gptq(weight, torch.eye(columns), form)  # columns that have nothing to do with each other
    assert torch.equal(dense(alike), nearest)


def test_columns_that_are_never_used_cost_nothing() -> None:
    products = torch.diag(torch.tensor([1.0, 0, 2, 0]).repeat(8))
    made = gptq(torch.randn(4, 32), products, SCHEMES["int4"])
    assert not made.numbers[:, 1].any() and made.numbers[:, 0].any() and made.scales.isfinite().all()


@pytest.mark.parametrize("scheme", ["int8", "w8a8", "int4"])
def test_what_is_written_is_what_is_read(scheme: str, tmp_path: Path) -> None:
    model = make_model("qwen3", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "dense")
    config = QuantConfig(scheme=scheme, exclude=("*.o_proj",))
    names = quantize(tmp_path / "dense", tmp_path / "out", config).names
    assert len(names) == 6 * model.config.num_hidden_layers and not [
        name for name in names if "o_proj" in name or "embed" in name
    ]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                form = SCHEMES[scheme]
                parameter.copy_(form.dequantize(tuple(parameter.shape), *form.quantize(parameter)))
        expected = model(IDS).logits
    compiled = autodeploy.compile(tmp_path / "out", dtype="float32")
    assert (compiled(IDS) - expected).abs().max() < 1e-4
    compiled.shutdown()
    small = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert small < (tmp_path / "dense" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_transformers_reads_the_same(family: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    make_model(family).save_pretrained(tmp_path / "dense")
    quantize(tmp_path / "dense", tmp_path / "out", "int4")
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    compiled = autodeploy.compile(tmp_path / "out", dtype="float32")
    head = load_file(tmp_path / "out" / "model.safetensors")
    weight = head["lm_head.weight"] * head["lm_head.weight_scale"]
    with torch.no_grad():  # their head rounds its inputs as the checkpoint says, ours where it multiplies whole numbers
        found, exact = compiled(IDS), theirs(IDS, output_hidden_states=True)
    assert (found - exact.hidden_states[-1] @ weight.T).abs().max() < 1e-4 < (found - exact.logits).abs().max() < 0.02
    compiled.shutdown()


def test_gptq_takes_the_demo_model_less_far_than_rounding(tmp_path: Path) -> None:
    questions = held_out_questions(60)
    with LLM(str(DEMO_MODEL)) as plain:
        template = plain.tokenizer.apply_chat_template
        talks = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            for prompt, answer in training_pairs(400)
        ]
        (tmp_path / "text.txt").write_text("".join(template(talk, tokenize=False) for talk in talks))
        found = {}
        for name, options in (("nearest", []), ("gptq", ["--calibration", str(tmp_path / "text.txt"), "--window", "128"])):
            arguments = ["quantize", str(DEMO_MODEL), "-o", str(tmp_path / name), "--scheme", "int4", *options]
            done = CliRunner().invoke(app, arguments, catch_exceptions=False)
            assert f"matrices in int4{' by gptq' if options else ''}" in done.stdout
            with LLM(str(tmp_path / name)) as llm:
                found[name] = score(name, llm, answered(plain, questions), questions, plain)
    assert found["gptq"].divergence < 0.7 * found["nearest"].divergence
    assert found["gptq"].right >= 58


def with_outliers(family: str, **overrides: Any) -> Any:
    """A model that computes what it did, with some inputs of its linears far larger than others."""
    model = make_model(family, **overrides)
    factors = torch.where(torch.rand(model.config.hidden_size) < 0.06, 40.0, 1.0)
    wide = torch.where(torch.rand(model.config.intermediate_size) < 0.06, 40.0, 1.0)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, linears in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                norm.weight *= factors
                for linear in linears:
                    linear.weight /= factors
            layer.mlp.up_proj.weight *= wide[:, None]
            layer.mlp.down_proj.weight /= wide
    return model


def distance(model: Any, folder: Path, dtype: str) -> float:
    """Of the logits of a folder from those of the model it was made of."""
    ids = torch.randint(0, 256, (1, 120), generator=torch.Generator().manual_seed(1))
    compiled = autodeploy.compile(folder, dtype=dtype)
    with torch.no_grad():
        exact, found = model(ids).logits, compiled(ids).float()
    compiled.shutdown()
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("scheme", "algorithm", "dtype"),
    [("int4", "awq", "float32"), pytest.param("w8a8", "smoothquant", "bfloat16", marks=needs_byte_kernels)],
)
def test_columns_that_matter_most_are_scaled_up_before_they_are_rounded(
    scheme: Any, algorithm: Any, dtype: str, tmp_path: Path
) -> None:
    model = with_outliers("qwen3", hidden_size=128, intermediate_size=256)
    model.save_pretrained(tmp_path / "dense")
    sequences = torch.randint(0, 256, (8, 64)).tolist()
    config, found = QuantConfig(scheme=scheme, algorithm=algorithm), {}
    for name, calibration in (("nearest", None), ("scaled", sequences)):
        quantize(tmp_path / "dense", tmp_path / name, config, calibration)
        found[name] = distance(model, tmp_path / name, dtype)
    assert found["scaled"] < 0.6 * found["nearest"]
    norms = {name: tensor for name, tensor in load_file(tmp_path / "scaled" / "model.safetensors").items() if "layernorm" in name}
    assert all(not torch.equal(tensor, model.get_parameter(name)) for name, tensor in norms.items())


LAYER_NORMS = {f"{name}.{part}" for name in ("self_attn_layer_norm", "final_layer_norm") for part in ("weight", "bias")}
DENSE = {f"{name}.weight" for name in ("input_layernorm", "post_attention_layernorm", "up_proj", "k_proj")}


@pytest.mark.parametrize(
    ("family", "exclude", "changed"),
    [("opt", (), LAYER_NORMS), ("llama", ("*.up_proj", "*.k_proj"), DENSE), ("gemma2", (), set())],
)
def test_factors_go_where_the_graph_has_room_for_them(
    family: str, exclude: tuple[str, ...], changed: set[str], tmp_path: Path
) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path / "dense")
    config = QuantConfig(scheme="int8", algorithm="smoothquant", exclude=exclude)
    quantize(tmp_path / "dense", tmp_path / "out", config, torch.randint(0, 250, (4, 32)).tolist())
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "out"))
    kept = {name for name in before if name in after and before[name].dtype == after[name].dtype}
    different = {name for name in kept if not torch.equal(before[name], after[name])}
    assert {".".join(name.split(".")[-2:]) for name in different} == changed
    assert distance(model, tmp_path / "out", "float32") < 0.05


def test_calibrated_while_starting() -> None:
    prompts = ["What is 12+13? 25. " * 8, [5, 6, 7, 8] * 10]
    options: dict[str, Any] = {"scheme": "int4", "algorithm": "gptq"}
    with LLM(str(DEMO_MODEL), quantization=options, calibration=prompts) as llm:
        assert "calibrate" in llm.compiled.timeline.seconds
        assert any("int4" in str(recipe) for recipe in llm.compiled.program.weights.recipes.values())
        assert llm.compiled.report()
        assert exact_matches(llm, held_out_questions(10)) >= 8
    for given, message in (
        ({"calibration": prompts}, "calibration is for quantization"),
        ({"calibration": [], "quantization": "int4"}, "no tokens"),
        ({"calibration": prompts, "quantization": "fp8"}, "cannot be written"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(str(DEMO_MODEL), **given)
    with pytest.raises(ConfigError, match="save_pretrained"):
        autodeploy.compile(make_model("qwen3"), quantization="int4", calibration=[[5, 6]])


def test_what_is_refused(tmp_path: Path) -> None:
    make_model("qwen3", num_hidden_layers=1).save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match="scheme='fp8' cannot be written"):
        quantize(tmp_path / "dense", tmp_path / "out", "fp8")
    with pytest.raises(ConfigError, match="not empty"):
        quantize(tmp_path / "dense", tmp_path / "dense")
    with pytest.raises(ConfigError, match="no tokens"):
        quantize(tmp_path / "dense", tmp_path / "out", "int8", [])
    quantize(tmp_path / "dense", tmp_path / "out", "int8")
    with pytest.raises(ConfigError, match="quantized already"):
        quantize(tmp_path / "out", tmp_path / "again", "int8")


def test_groups_that_end_within_a_block_of_columns() -> None:
    torch.manual_seed(0)
    form, weight, inputs = replace(SCHEMES["int4"], block=(1, 48)), torch.randn(8, 240), torch.randn(600, 240)
    ours = dense(gptq(weight, inputs.T @ inputs / 600, form))
    nearest = dense(form.integers((8, 240), *form.quantize(weight)))
    assert float((inputs @ (weight - ours).T).norm()) < float((inputs @ (weight - nearest).T).norm())


def moe_model(**overrides: Any) -> Any:
    """Of few directions, so that the columns of all inputs resemble each other, and with some far larger ones."""
    model = make_model("qwen3_moe", hidden_size=128, moe_intermediate_size=64, num_experts=4, vocab_size=256, **overrides)
    wide = torch.where(torch.rand(128) < 0.06, 40.0, 1.0)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.randn(256, 24) @ torch.randn(24, 128))
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight *= wide
            layer.mlp.gate.weight /= wide
            layer.mlp.experts.gate_up_proj /= wide
        model.lm_head.weight *= 4
    return model


def divergence(model: Any, folder: Path) -> float:
    """KL, in nats a token, of what a folder says from the model it was made of."""
    ids = torch.randint(0, 256, (1, 160), generator=torch.Generator().manual_seed(1))
    compiled = autodeploy.compile(folder, dtype="float32")
    with torch.no_grad():
        exact, found = model(ids).logits.log_softmax(-1), compiled(ids).log_softmax(-1)
    compiled.shutdown()
    return float((exact.exp() * (exact - found)).sum(-1).mean())


@pytest.mark.parametrize("algorithm", ["gptq", "awq", "smoothquant"])
def test_experts_and_the_head_are_calibrated_for_the_tokens_that_reach_them(algorithm: Any, tmp_path: Path) -> None:
    model, found = moe_model(), {}
    model.save_pretrained(tmp_path / "dense")
    config = QuantConfig(scheme="int4", algorithm=algorithm, exclude=("*self_attn*",))  # the rest alone
    for name, calibration in (("nearest", None), (algorithm, torch.randint(0, 256, (12, 64)).tolist())):
        done = quantize(tmp_path / "dense", tmp_path / name, config, calibration)
        assert not done.remarks and len(done.names) == 2 * 4 * 3 + 1 and "lm_head.weight" in done.names
        found[name] = divergence(model, tmp_path / name)
    assert found[algorithm] < 0.8 * found["nearest"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", algorithm))
    moved = {name for name, tensor in before.items() if name in after and not torch.equal(tensor, after[name])}
    scaled = {"post_attention_layernorm.weight", "mlp.gate.weight"} if algorithm != "gptq" else set[str]()
    assert {name.split(".", 3)[3] for name in moved if "layers" in name} == scaled


def test_experts_that_few_tokens_choose_are_rounded_and_named(tmp_path: Path) -> None:
    model = moe_model(num_hidden_layers=1)
    model.save_pretrained(tmp_path / "dense")
    nearest = quantize(tmp_path / "dense", tmp_path / "nearest", "int4")
    done = quantize(tmp_path / "dense", tmp_path / "gptq", "int4", [list(range(20, 44))])
    rounded, tuned = (load_file(tmp_path / name / "model.safetensors") for name in ("nearest", "gptq"))
    experts = {name for name in done.names if ".experts." in name}
    assert done.names == nearest.names and set(done.few) < experts and done.few
    same = {name for name in experts if torch.equal(rounded[f"{name}_packed"], tuned[f"{name}_packed"])}
    assert same == set(done.few)
    options: dict[str, Any] = {"quantization": {"scheme": "int4"}, "calibration": [list(range(20, 44))]}
    compiled = autodeploy.compile(tmp_path / "dense", dtype="float32", **options)
    assert f"{len(done.few)} ({done.few[0]}, " in " ".join(compiled.report().split())
    again = autodeploy.compile(tmp_path / "gptq", dtype="float32")
    assert torch.equal(compiled(IDS), again(IDS))
    compiled.shutdown()
    again.shutdown()


def test_a_head_that_is_to_stay_dense_and_experts_that_are_stored_in_one_piece(tmp_path: Path) -> None:
    make_model("gpt_oss").save_pretrained(tmp_path / "dense")
    done = quantize(tmp_path / "dense", tmp_path / "out", QuantConfig(scheme="int8", lm_head=False))
    assert "lm_head.weight" not in done.names and any("q_proj" in name for name in done.names)
    assert len(done.dense) == 8 and all("experts" in name for name in done.dense)
    assert "left dense: its inputs come before its outputs" in str(done)
    tied = make_model("qwen3", tie_word_embeddings=True, intermediate_size=72, num_hidden_layers=1)
    tied.save_pretrained(tmp_path / "tied")
    reasons = set(quantize(tmp_path / "tied", tmp_path / "int4", "int4").dense.values())
    assert reasons == {"it is read as a table too", "groups of 32 do not divide its columns"}
