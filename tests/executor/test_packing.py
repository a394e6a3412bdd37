"""Weights are laid out once, while loading, in panels or for oneDNN; what is read as it is stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import autodeploy
from autodeploy import SamplingParams
from autodeploy.custom_ops import linear as linear_module
from autodeploy.custom_ops.linear import against_packing, linear_op, onednn_multiplies_bfloat16, pack_onednn, packed_linear
from autodeploy.executor import model_runner
from autodeploy.specs import Target
from autodeploy.weights import materialize
from tests.marks import needs_cpp_kernels
from tests.models.families import make_model
from tests.models.parity import check_logits

WIDE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "head_dim": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with weights large enough to pack, embedding and head tied."""
    path = tmp_path_factory.mktemp("model")
    make_model("qwen3", tie_word_embeddings=True, **WIDE).save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, *([torch.bfloat16] if onednn_multiplies_bfloat16() else [])])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7, 64])
def test_a_packed_weight_gives_what_linear_gives(dtype: torch.dtype, bias: bool, rows: int) -> None:
    x, weight = torch.randn(1, rows, 96, dtype=dtype), torch.randn(160, 96, dtype=dtype)
    offset = torch.randn(160, dtype=dtype) if bias else None
    ours, expected = packed_linear(x, pack_onednn(weight), offset), F.linear(x, weight, offset)
    assert ours.shape == expected.shape and ours.dtype == dtype
    assert rows == 0 or float((ours - expected).abs().max() / expected.abs().max()) <= (1e-6 if dtype == torch.float32 else 2**-8)


def test_bfloat16_is_packed_where_onednn_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(1, 4, 512).bfloat16(), torch.randn(512, 512).bfloat16()
    if not against_packing(Target(), x, weight, None):
        assert packed_linear(x, pack_onednn(weight), None).shape == (1, 4, 512)
    for has_it, reasons in ((True, []), (False, ["it has no bfloat16 on this CPU"])):
        monkeypatch.setattr(linear_module, "onednn_multiplies_bfloat16", lambda has_it=has_it: has_it)
        assert against_packing(Target(), x, weight, None) == reasons
    assert against_packing(Target(), x.float(), weight.float(), None) == []


def test_reasons_against_packing() -> None:
    x, weight = torch.randn(1, 4, 512), torch.randn(512, 512)
    assert linear_op.choose(Target(), x, weight, parameters={"weight": None})[0].name == "onednn"
    against = {
        "computed in the graph": linear_op.choose(Target(), x, weight),
        "not on cuda": linear_op.choose(Target(device="cuda"), x, weight, parameters={"weight": None}),
        "float16": linear_op.choose(Target(), x.half(), weight.half(), parameters={"weight": None}),
        "too small": linear_op.choose(Target(), x[..., :8], weight[:, :8], parameters={"weight": None}),
    }
    for reason, (provider, reasons) in against.items():
        assert provider.name == "reference" and reason in " ".join(reasons["onednn"]), reason


def test_what_is_packed_is_read_straight_from_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is joined of parts first; what stays as it is has memory of its own."""
    in_file: dict[str, bool] = {}

    def watched(*args: Any, **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in materialize(*args, **options):
            in_file[name] = is_mapped(tensor, folder / "model.safetensors")
            yield name, tensor

    monkeypatch.setattr(model_runner, "materialize", watched)
    compiled = autodeploy.compile(folder, pipeline=lambda passes: passes.without("fuse_linears"))
    packed = {name for name in in_file if any(name.endswith(f"{part}_proj.weight") for part in ("q", "o", "gate", "up", "down"))}
    assert len(packed) == 10 and {name for name, found in in_file.items() if found} >= packed
    assert not any(found for name, found in in_file.items() if "norm" in name)
    compiled.shutdown()


@needs_cpp_kernels
def test_parts_that_are_packed_are_read_straight_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing joins the weights of q, k and v, or of gate and up, before they are laid out in panels."""
    make_model("qwen3", **WIDE).bfloat16().save_pretrained(tmp_path)
    in_file: dict[str, list[bool]] = {}

    def watched(*args: Any, **options: Any) -> Iterator[tuple[str, Any]]:
        for name, made in materialize(*args, **options):
            parts = made if isinstance(made, list) else [made]
            in_file[name] = [is_mapped(part, tmp_path / "model.safetensors") for part in parts]
            yield name, made

    monkeypatch.setattr(model_runner, "materialize", watched)
    joined = autodeploy.compile(tmp_path)
    assert sorted(map(len, in_file.values()))[-4:] == [2, 2, 3, 3]
    assert all(all(found) for found in in_file.values() if len(found) > 1)
    tokens = joined.generate([5, 6, 7], SamplingParams(max_tokens=8, ignore_eos=True)).outputs[0].token_ids
    joined.shutdown()
    parts = autodeploy.compile(tmp_path, pipeline=lambda passes: passes.without("fuse_linears"))
    assert parts.generate([5, 6, 7], SamplingParams(max_tokens=8, ignore_eos=True)).outputs[0].token_ids == tokens
    parts.shutdown()


def is_mapped(tensor: torch.Tensor, file: Path) -> bool:
    """Whether a tensor lies in the pages of a file."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    bounds = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    return any(low <= tensor.data_ptr() < high for low, high in bounds)


def test_a_model_is_packed_when_it_is_loaded_and_computes_the_same(folder: Path) -> None:
    plain = autodeploy.compile(folder, pipeline=lambda passes: passes.configure("select_kernels", pack=False))
    packed = autodeploy.compile(folder)
    assert packed.program.op_counts()["linear.packed_linear"] == 8 and packed.program.op_counts()["linear.linear"] == 1
    tensors = tensors_of(packed)
    assert sum(name.startswith("packed_onednn_") for name in tensors) == 8
    assert not [
        name
        for name, tensor in tensors.items()
        if not name.startswith("packed") and tensor.dim() > 1 and not name.startswith("model.embed")
    ]
    prompts, params = [[5, 6, 7], [9] * 40], SamplingParams(max_tokens=12, ignore_eos=True)
    handles = [[compiled.submit(ids, params) for ids in prompts] for compiled in (plain, packed)]
    first, second = ([handle.result().outputs[0].token_ids for handle in each] for each in handles)
    assert first == second
    plain.shutdown()
    packed.shutdown()


def test_a_tied_embedding_is_not_packed_for_the_head_so_that_no_second_copy_stays(folder: Path) -> None:
    compiled = autodeploy.compile(folder)
    names = tensors_of(compiled)
    assert "model.embed_tokens.weight" in names and not [name for name in names if "packed" in name and "embed" in name]
    assert "read as it is elsewhere" in compiled.report()
    compiled.shutdown()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_are_packed_each_by_itself(family: str) -> None:
    model = make_model(family, hidden_size=256, intermediate_size=256, num_local_experts=4)
    compiled = autodeploy.compile(model)
    assert {choice.provider for choice in compiled.program.providers["moe"]} == {"onednn"}
    check_logits(model, compiled)
    packed = [value for name, value in tensors_of(compiled).items() if name.startswith("packed_experts_") and "down" in name]
    compiled.shutdown()
    assert packed and all(isinstance(value, list) and len(value) == 4 for value in packed)


def tensors_of(compiled: autodeploy.CompiledModel) -> dict[str, Any]:
    """Everything that the executable graph reads, by the name it has there."""
    module: Any = compiled.runner.module  # pyright: ignore[reportAttributeAccessIssue]
    found: dict[str, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            found[str(node.target)] = value
    return found
