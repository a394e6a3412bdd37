"""Linear layers in panels: what linear gives, the same bits for a row alone and in company, no second copy of anything."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import autodeploy
from autodeploy import Effect, Program, SamplingParams, Target, Transform
from autodeploy.custom_ops import cpp, cpp_attention, cpp_linear, cpp_pointwise, embedding_op, linear_op, moe
from autodeploy.transforms.rewrite import aten, calls, insert_call
from tests.executor.test_packing import WIDE, tensors_of
from tests.marks import needs_cpp_kernels
from tests.models.families import make_model


@needs_cpp_kernels
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 6, 7, 33, 200])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(64, 8), (130, 96), (1, 600), (70, 514)])
def test_panels_give_what_linear_gives(rows: int, num_outputs: int, num_inputs: int, bias: bool) -> None:
    x, weight = torch.randn(1, rows, num_inputs).bfloat16(), torch.randn(num_outputs, num_inputs).bfloat16()
    offset = torch.randn(num_outputs).bfloat16() if bias else None
    ours = cpp_linear.panel_linear(x, cpp_linear.pack_panels(weight), offset)
    exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    assert ours.shape == exact.shape and ours.dtype == torch.bfloat16
    assert rows == 0 or float((ours - exact).norm() / exact.norm()) < 2**-8


@needs_cpp_kernels
def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    x, panels = torch.randn(300, 1030).bfloat16(), cpp_linear.pack_panels(torch.randn(650, 1030).bfloat16())
    together = cpp_linear.panel_linear(x, panels)
    for rows in (slice(0, 1), slice(5, 8), slice(100, 132), slice(1, 300)):
        assert torch.equal(cpp_linear.panel_linear(x[rows], panels), together[rows])


@needs_cpp_kernels
def test_strided_rows_and_not_a_number() -> None:
    x, panels = torch.randn(8, 256).bfloat16(), cpp_linear.pack_panels(torch.randn(64, 128).bfloat16())
    assert torch.equal(cpp_linear.panel_linear(x[:, :128], panels), cpp_linear.panel_linear(x[:, :128].contiguous(), panels))
    x[3] = float("nan")
    assert cpp_linear.panel_linear(x[:, :128], panels).isnan().any(1).tolist() == [i == 3 for i in range(8)]


@needs_cpp_kernels
@pytest.mark.parametrize("sizes", [(64, 128, 64), (64, 30), (30, 64, 1), (5,)])
def test_parts_of_the_rows_give_the_panels_of_the_whole(sizes: tuple[int, ...]) -> None:
    weight = torch.randn(sum(sizes), 96).bfloat16()
    whole, parts = cpp_linear.pack_panels(weight), cpp_linear.pack_panels([part.contiguous() for part in weight.split(sizes)])
    assert torch.equal(whole.data, parts.data)
    assert (whole.num_outputs, whole.num_inputs) == (parts.num_outputs, parts.num_inputs) == weight.shape


@needs_cpp_kernels
def test_rows_of_a_table_in_panels() -> None:
    table, ids = torch.randn(130, 96).bfloat16(), torch.randint(0, 130, (1, 20))
    assert torch.equal(cpp_linear.panel_embedding(cpp_linear.pack_panels(table), ids), F.embedding(ids, table))


@needs_cpp_kernels
@pytest.mark.parametrize("isa", [isa for isa in cpp.isas()[1:] if isa != "avx512_vnni"])  # linear layers need no VNNI
def test_linear_layers_of_lesser_cpus(isa: str) -> None:
    chosen = "(linear_gives and (130 or 514)) or beside_it or not_a_number or rows_of_a_table or experts_in_panels or made_again"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    found = subprocess.run(command, env={**os.environ, "AUTODEPLOY_CPP_ISA": isa}, capture_output=True, text=True, check=False)
    assert found.returncode == 0 and "skipped" not in found.stdout, found.stdout[-2000:]


def test_reasons_against_panels() -> None:
    x, weight = torch.randn(1, 4, 512).bfloat16(), torch.randn(512, 512).bfloat16()
    against = {
        "it has no float32": (Target(), x.float(), weight.float()),
        "no float32": (Target(), x.float(), weight),
        "not on cuda": (Target(device="cuda"), x, weight),
        "odd number": (Target(), x[..., :511], weight[:, :511]),
    }
    for reason, (target, *tensors) in against.items():
        reasons = linear_op.choose(target, *tensors, parameters={"weight": None})[1]["cpp"]
        assert reason in " ".join(reasons), reason
    assert "computed in the graph" in embedding_op.choose(Target(), weight, torch.ones(1, 4))[1]["cpp"][0]


@needs_cpp_kernels
@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_table_is_read_from_the_panels_of_the_head(tied: bool, tmp_path: Path) -> None:
    model = make_model("qwen3", tie_word_embeddings=tied, **WIDE).bfloat16()
    model.save_pretrained(tmp_path)
    compiled = autodeploy.compile(tmp_path)
    tensors = tensors_of(compiled)
    wide = {name for name, value in tensors.items() if not isinstance(value, cpp_linear.Panels) and value.dim() > 1}
    assert not wide  # whatever is wide is in panels
    tables = [name for name in tensors if "embed_tokens" in name or "lm_head" in name]
    assert len(tables) == (1 if tied else 2)
    ids = torch.randint(0, 512, (2, 30))
    with torch.no_grad():
        expected = model(ids).logits
    assert float((compiled(ids) - expected).float().norm() / expected.float().norm()) < 0.02
    prompt, params = ids[0, :9].tolist(), SamplingParams(max_tokens=8, ignore_eos=True)
    alone = compiled.generate([prompt], params)[0].outputs[0].token_ids
    together = compiled.generate([prompt, [7] * 3, prompt[:5]], params)[0].outputs[0].token_ids
    compiled.shutdown()
    assert alone == together


@dataclass(frozen=True, kw_only=True)
class ReadTableOnceMore(Transform):
    """Adds the first row of the table to what was looked up."""

    name: ClassVar[str] = "read_table_once_more"
    effect: ClassVar[Effect] = Effect.NUMERICS

    def apply(self, program: Program, target: Target) -> int:
        (node,) = calls(program, aten.embedding.default)
        users = list(node.users)
        row = insert_call(program, node.next, aten.select.int, node.args[0], 0, 0)
        more = insert_call(program, row.next, aten.add.Tensor, node, row)
        for user in users:
            user.replace_input_with(node, more)
        return len(users)


@needs_cpp_kernels
def test_one_reader_that_cannot_have_it_packed_keeps_a_parameter_as_it_is() -> None:
    model = make_model("qwen3", tie_word_embeddings=True, **WIDE).bfloat16()
    compiled = autodeploy.compile(model, pipeline=lambda passes: passes.insert_after("match_mlp", ReadTableOnceMore()))
    names = tensors_of(compiled)
    assert "model.embed_tokens.weight" in names and not [name for name in names if "packed" in name and "embed" in name]
    assert "read as it is elsewhere" in compiled.report()
    compiled.shutdown()


@needs_cpp_kernels
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_in_panels(transposed: bool) -> None:
    x, index, weights = torch.randn(9, 64).bfloat16(), torch.randint(0, 4, (9, 2)), torch.rand(9, 2).bfloat16()
    gate_up, down = (torch.randn(shape).bfloat16() / 8 for shape in ((4, 192, 64), (4, 64, 96)))
    if transposed:
        gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    rest = (None, None, transposed, "halves", "silu", 1.0, 0.0, 0.0)
    call = {"transposed": transposed}
    packed = (cpp_linear.pack_expert_panels(part, call) for part in (gate_up, down))
    ours = cpp_linear.panel_moe(x, index, weights, *packed, *rest)
    exact = moe.reference(x.double(), index, weights.double(), gate_up.double(), down.double(), *rest)
    assert float((ours - exact).norm() / exact.norm()) < 2**-7


@needs_cpp_kernels
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_model_has_its_experts_in_panels(family: str) -> None:
    compiled = autodeploy.compile(make_model(family, hidden_size=256, intermediate_size=256, num_local_experts=4).bfloat16())
    assert {choice.provider for choice in compiled.program.providers["moe"]} == {"cpp"}
    assert compiled(torch.randint(0, 90, (2, 30))).isfinite().all()
    compiled.shutdown()


class KeepAll(TorchDispatchMode):
    """Memory that is allocated meanwhile stays where it is, that to work in too."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[object] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.kept.append(func(*args, **(kwargs or {})))
        return self.kept[-1]


@needs_cpp_kernels
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_calls_made_again_by_a_team_give_the_same_bits(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(1, 9, 512).bfloat16()
    matrices = [cpp_linear.pack_panels(torch.randn(512, 512, generator=generator).bfloat16() / 22) for _ in range(6)]
    cache, table = torch.empty(9, 300, 4, 128).bfloat16(), torch.arange(9)[:, None]
    cache.normal_(generator=generator)
    lengths, bounds = torch.arange(40, 310, 30, dtype=torch.int32), torch.arange(10, dtype=torch.int32)

    def chain() -> list[torch.Tensor]:
        values = [x]
        for matrix in matrices:
            values.append(cpp_linear.panel_linear(values[-1], matrix))
            values.append(cpp_pointwise.rms_norm(values[-1], None, 1e-6, 0.0, False))
            heads = values[-1].view(1, 9, 8, 64).transpose(1, 2)
            attended = cpp_attention.cpp_paged_attention(heads, cache, table, bounds, lengths, None, 0.1, 0, 0.0, 64)
            values.append(attended.flatten(2))
            values.append(cpp_pointwise.gated_activation(values[-1], values[-1], "silu"))
        return values

    try:
        memory = KeepAll()
        with memory, cpp.record_kernels() as calls:
            ours = chain()
        again = cpp.KernelCalls(calls)
        for _ in range(50):
            x.normal_(generator=generator)
            again()
            assert all(map(torch.equal, ours, chain()))
    finally:
        torch.set_num_threads(before)
