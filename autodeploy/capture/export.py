"""An unmodified Hugging Face model -> a Program at the exported level."""

from __future__ import annotations

import inspect
import operator
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from torch.fx.graph import CodeGen

from autodeploy.capture.functional import functionalize, mutates
from autodeploy.capture.masks import prove_masks
from autodeploy.capture.match_attention import match_attention
from autodeploy.capture.patches import CaptureState, applied, rope_thresholds, rotary_kinds
from autodeploy.capture.registry import where_defined
from autodeploy.capture.repeats import Repeats
from autodeploy.errors import UnsupportedModelError
from autodeploy.program import Program
from autodeploy.recipes import Initial, Recipe, Take
from autodeploy.specs import INPUTS
from autodeploy.transforms.prove_packing import source_of
from autodeploy.transforms.rewrite import erase_unused
from autodeploy.weights import WeightPlan

EXAMPLE_TOKENS = 19
"""Length traced with; the graph may not depend on it (checked)."""


@dataclass(frozen=True)
class Captured:
    program: Program
    initial: Mapping[str, Tensor]
    """Values of the program's `Initial` leaves."""


class _Logits(nn.Module):
    """The calling convention of the graph: packed token ids and positions in, logits [1, T, V] out."""

    def __init__(self, model: nn.Module, state: CaptureState, inputs: list[str]) -> None:
        super().__init__()
        self.model, self.state, self.inputs = model, state, inputs
        accepted = inspect.signature(model.forward).parameters
        self.passed = [name for name in ("input_ids", "position_ids") if name in accepted or "kwargs" in accepted]

    def forward(self, *tensors: Tensor) -> Tensor:
        for tensor in tensors[1:]:
            torch._check(tensor.shape[1] == tensors[0].shape[1])  # one symbol for all
        values = dict(zip(self.inputs, tensors, strict=True))
        self.state.rope_len, self.state.position_ids = values.get("rope_len"), values["position_ids"]
        passed = [name for name in self.passed if name == "input_ids" or not self.state.counts_itself]
        return self.model(**{name: values[name] for name in passed}, use_cache=False).logits


def capture(skeleton: nn.Module, initial: Mapping[str, Tensor]) -> Captured:
    """Trace a skeleton: parameters on meta, in their final dtypes; initial: real values of its buffers, by name.

    Raises UnsupportedModelError naming the module, the source line and the reason when the model cannot be captured exactly.
    """
    state, repeats, initial = CaptureState(), Repeats(), dict(initial)
    with applied(skeleton, state):
        for name, buffer in skeleton.named_buffers():
            if buffer.device.type != "meta":  # registered by a patch just now
                initial.setdefault(name, buffer)
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        names = _make_fake(skeleton, mode)
        inputs = ["input_ids", "position_ids", *(["rope_len"] if any(rotary_kinds(skeleton)) else [])]
        with repeats.watched(skeleton):
            exported = _export(skeleton, state, inputs, mode)
    program = _to_program(exported, repeats, inputs, names, skeleton, initial)
    match_attention(program, initial)
    prove_masks(program, state.masks, skeleton)
    program.rope_thresholds = rope_thresholds(skeleton)
    return Captured(program, initial)


def _make_fake(skeleton: nn.Module, mode: FakeTensorMode) -> dict[int, str]:
    """Replace every parameter and buffer by a fake CPU tensor (no memory); id of the fake -> first name, so ties share a name."""
    fakes: dict[int, Any] = {}
    names: dict[int, str] = {}
    for path, module in skeleton.named_modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    with mode:
                        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                    fakes[id(tensor)] = fake if table is module._buffers else nn.Parameter(fake, requires_grad=False)
                table[key] = fakes[id(tensor)]
                names.setdefault(id(table[key]), f"{path}.{key}".lstrip("."))
    return names


def _export(skeleton: nn.Module, state: CaptureState, inputs: list[str], mode: FakeTensorMode) -> ExportedProgram:
    with mode:
        example = tuple(torch.zeros(1, EXAMPLE_TOKENS, dtype=torch.int64) for _ in inputs)
    shapes = {"tensors": tuple({1: Dim.DYNAMIC} for _ in inputs)}
    try:
        with torch.no_grad():
            exported = torch.export.export(_Logits(skeleton, state, inputs), example, dynamic_shapes=shapes, strict=False)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"it cannot be traced: {_first_line(error)}", source=_blame(error, skeleton)) from error
    longest = getattr(skeleton.config, "max_position_embeddings", None) or 0
    for symbol, bounds in exported.range_constraints.items():  # a table of positions may end where the model does
        if bounds.lower > 2 or bounds.upper < longest:
            limit = f"at least {bounds.lower}" if bounds.lower > 2 else f"at most {bounds.upper}"
            reason = f"its graph is only right for {limit} tokens (symbol {symbol}); its code is another for other rows"
            raise UnsupportedModelError(reason, source=where_defined(skeleton))
    return exported


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _blame(error: Exception, skeleton: nn.Module) -> str:
    """The innermost line of modeling code in the traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "modeling" in frame.filename]
    if not frames:
        return where_defined(skeleton)
    return f"{frames[-1].filename.rpartition('site-packages/')[2]}, line {frames[-1].lineno} ({frames[-1].line})"


def _to_program(
    exported: ExportedProgram,
    repeats: Repeats,
    inputs: list[str],
    names: dict[int, str],
    skeleton: nn.Module,
    initial: dict[str, Tensor],
) -> Program:
    """Flat placeholders and one logits output; `get_attr` by the model's own names; constants become initial values."""
    module: Any = exported.module(check_guards=False)
    repeats.write_out(module)
    if not functionalize(module.graph):
        module = exported.run_decompositions({}).module(check_guards=False)  # functional form; other ops stay what they are
        repeats.write_out(module)
        _refuse_writes(module.graph)
    graph: fx.Graph = module.graph
    graph.set_codegen(CodeGen())
    tensors: dict[str, Any] = {}
    recipes: dict[str, Recipe] = {}
    persistent = {**skeleton.state_dict(keep_vars=True), **dict(skeleton.named_parameters())}
    for node, name in zip([node for node in graph.nodes if node.op == "placeholder"], inputs, strict=True):
        node.target = node.name = name
    last_input = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in _by_first_use(graph):
        last_input.append(node)
        last_input = node
        attribute = operator.attrgetter(str(node.target))(module)
        name = names.get(id(attribute)) or f"constants.{str(node.target).replace('.', '_')}"
        if name.startswith("constants."):
            initial[name] = attribute.detach()
        node.target = name
        recipes[name] = Take(name) if name in persistent else Initial(name)
        tensors[name] = nn.Parameter(torch.empty_like(attribute, device="meta"), requires_grad=False)
    _drop_assertions(graph)
    output = graph.output_node()
    output.args = (output.args[0][0],)  # pyright: ignore
    program = Program(fx.GraphModule(tensors, graph), {name: INPUTS[name] for name in inputs}, {}, WeightPlan(recipes))
    program.check()
    return program


def _by_first_use(graph: fx.Graph) -> list[fx.Node]:
    """What reads a tensor of the model, in the order of the calls; without what no call needs, which is erased."""
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)
    return list(dict.fromkeys(arg for node in graph.nodes for arg in node.all_input_nodes if arg.op == "get_attr"))


def _refuse_writes(graph: fx.Graph) -> None:
    """What still writes writes into the model's own tensors."""
    for node in graph.nodes:
        if mutates(node):
            what = node.args[0].target if node.args and isinstance(node.args[0], fx.Node) else node.target
            where = next((user for user in (node, *node.all_input_nodes[1:]) if user.meta.get("stack_trace")), node)
            raise UnsupportedModelError(f"it writes into its own tensor '{what}', which requests would share", **source_of(where))


def _drop_assertions(graph: fx.Graph) -> None:
    """Checks that tracing leaves behind, and what only they read. Refuses sizes that data decides, which are checked too."""
    for node in graph.nodes:
        if node.op == "call_function" and free_unbacked_symbols(node.meta.get("val")):
            raise UnsupportedModelError(
                "a size, or a number it computes with, is read from the values of a tensor", **source_of(node)
            )
    for target in (torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten._assert_scalar.default):
        for node in graph.find_nodes(op="call_function", target=target):
            graph.erase_node(node)
            erase_unused(*node.all_input_nodes)
