"""A quantized checkpoint of a dense one: rounded to the nearest numbers, or for inputs that the exported program was seen with.

GPTQ (`gptq.py`) has the columns of a matrix make up for what is lost in those before them; AWQ and SmoothQuant (`smooth.py`)
scale columns first. The program runs once, node by node over all calibration sequences at a time, so that each matrix sees what
the rounded ones before it give; an expert sees the tokens that chose it. Beside the activations there is one dense parameter at
a time (of AWQ and SmoothQuant, those that share their inputs).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx

from autodeploy import custom_ops as ops
from autodeploy.calibrate_experts import round_experts, rows_by_expert
from autodeploy.capture.export import capture
from autodeploy.capture.origin import Origin, origin_of
from autodeploy.config import QuantConfig
from autodeploy.errors import ConfigError
from autodeploy.formats import Format, Integers
from autodeploy.gptq import are_enough, dense_of, nearest, products_of, rounded
from autodeploy.program import Program
from autodeploy.quantized_folder import write_folder
from autodeploy.recipes import Cast, Cat, Part, Recipe, Stack, Take, evaluate
from autodeploy.smooth import FACTORS, divisible, readers, same_rows_as, weight_of
from autodeploy.transforms.quantize import QuantizeWeights
from autodeploy.transforms.rewrite import arguments, aten, val

WRITTEN = ("int8", "w8a8", "int4")
"""Schemes with a checkpoint format that transformers reads too (compressed-tensors)."""

Advance = Callable[[str], None]
Names = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Quantized:
    """What `quantize` did."""

    names: list[str]
    """The checkpoint's tensors that are quantized now."""
    few: list[str]
    """Those of them that calibration had too few tokens for (experts that hardly any token chose): rounded to the nearest."""
    dense: dict[str, str]
    """Parameters that the scheme is for, and that stay as they are -> why."""

    @property
    def remarks(self) -> list[str]:
        """What is not as was asked for, a sentence each."""
        found = {"rounded to the nearest, since too few calibration tokens reached them": self.few} if self.few else {}
        for name, reason in self.dense.items():
            found.setdefault(f"left dense: {reason}", []).append(name)
        return [f"{_shown(names)} {what}" for what, names in found.items()]

    def __str__(self) -> str:
        return "; ".join([f"{len(self.names)} matrices", *self.remarks])


def _shown(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def quantize(
    model: str | Path,
    output: str | Path,
    scheme: str | QuantConfig = "int4",
    calibration: Sequence[Sequence[int]] | None = None,
    advance: Advance = lambda name: None,
) -> Quantized:
    """Write a quantized copy of a checkpoint folder; returns what is quantized in it.

    calibration: token ids of some sequences, for the algorithm of the scheme's QuantConfig; absent, each number becomes the
    nearest. advance: told each parameter that is done. Raises ConfigError for a scheme without a checkpoint format, a checkpoint
    that is quantized already or has nothing to quantize, or an output that is there.
    """
    given: dict[str, Any] = {"scheme": scheme}
    config = QuantConfig(**given) if isinstance(scheme, str) else scheme
    folder, output = Path(model), Path(output)
    if config.scheme not in WRITTEN:
        raise ConfigError(f"scheme='{config.scheme}' cannot be written; choose one of {', '.join(WRITTEN)}")
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{output} is there and not empty; give another folder")
    origin = origin_of(folder, "auto", ignore_unexpected=False)
    if calibration is not None and not any(calibration):
        raise ConfigError("the calibration has no tokens; give a longer text, or none to round to the nearest numbers")
    if origin.formats:
        raise ConfigError(f"{folder} is quantized already; give the dense checkpoint")
    captured = capture(origin.skeleton, origin.buffers)
    source: Any = origin.source_with(captured.initial)
    matrices, dense = _matrices(captured.program, origin, config)
    if not matrices:
        raise ConfigError(f"{folder}: no matrix can be quantized ({config}); check 'exclude', or choose another scheme")
    walk = _Walk(captured.program, origin, source, matrices, config.algorithm, advance)
    with torch.no_grad():
        walk.round_to_nearest() if calibration is None else walk.run(calibration)
    write_folder(folder, output, source, walk.made, walk.forms, walk.changed)
    return Quantized(sorted(walk.made), sorted(walk.few), dense)


def _matrices(program: Program, origin: Origin, config: QuantConfig) -> tuple[dict[str, Format], dict[str, str]]:
    """Parameters to quantize, each with its format; those that a checkpoint cannot hold so, each with the reason."""
    tables = {
        str(node.target)
        for node in program.graph.graph.nodes
        if node.op == "get_attr" and any(user.target not in (aten.linear.default, ops.moe.overload) for user in node.users)
    }
    found, dense = dict[str, Format](), dict[str, str]()
    for name, form, is_transposed in QuantizeWeights(**config.rounding).matrices(program):
        checks = {
            "it is read as a table too": name in tables,
            "its inputs come before its outputs": is_transposed,
            f"groups of {form.block[1]} do not divide its columns": program.parameter(name).shape[-1] % max(form.block[1], 1) > 0,
            "the checkpoint does not hold its matrices one by one": not stored_names(origin, name),
        }
        reasons = [reason for reason, holds in checks.items() if holds]
        if reasons:
            dense[name] = reasons[0]
        else:
            found[name] = form
    return found, dense


def stored_names(origin: Origin, name: str) -> Names:
    """Of each matrix of a parameter, the checkpoint's tensors that its rows are, in order; empty where it is not made of such."""
    found = _names(origin.recipes[name])
    readers = Counter(leaf.name for recipe in origin.recipes.values() for leaf in set(recipe.leaves()))
    return found if all(readers[each] == 1 for names in found for each in names) else ()


def _names(recipe: Recipe) -> Names:
    match recipe:
        case Part():
            return ()
        case Take(name) if name.endswith((".weight", ".bias")):
            return ((name,),)
        case Cast(source):
            return _names(source)
        case Stack(parts, 0):
            inner = [_names(part) for part in parts]
            return tuple(names[0] for names in inner) if all(len(names) == 1 for names in inner) else ()
        case Cat(parts, dim) if dim == (1 if isinstance(parts[0], Stack) else 0):
            inner = [_names(part) for part in parts]
            same = all(inner) and len({len(names) for names in inner}) == 1
            return tuple(sum(names, ()) for names in zip(*inner, strict=True)) if same else ()
        case _:
            return ()


class _Walk:
    """A program, run node by node over several sequences; the matrices wanted are rounded before they are multiplied with."""

    def __init__(
        self,
        program: Program,
        origin: Origin,
        source: Any,
        matrices: Mapping[str, Format],
        algorithm: str,
        advance: Advance,
    ) -> None:
        self.program, self.source, self.matrices = program, source, matrices
        self.algorithm, self.advance = algorithm, advance
        self.stored = {name: stored_names(origin, name) for name in origin.recipes}
        self.weights = program.weights.substitute(origin.recipes)
        self.values: dict[fx.Node, list[Any]] = {}
        self.products: dict[fx.Node, Tensor] = {}
        self.factors: dict[fx.Node, Tensor] = {}
        self.made: dict[str, Integers] = {}
        self.forms: dict[str, Format] = {}
        self.changed: dict[str, Tensor] = {}
        self.few: list[str] = []

    def round_to_nearest(self) -> None:
        for name, form in self.matrices.items():
            for stored in sum(self.stored[name], ()):
                self.made[stored], self.forms[stored] = nearest(self.source.fetch(Take(stored)), form), form
            self.advance(name)

    def run(self, sequences: Sequence[Sequence[int]]) -> None:
        nodes = list(self.program.graph.graph.nodes)
        last = {source: node for node in nodes for source in node.all_input_nodes}
        for node in nodes:
            if node.op == "placeholder":
                self.values[node] = [_input(node.name, ids) for ids in sequences]
            elif node.op == "get_attr":
                self.values[node] = [self._parameter(str(node.target))] * len(sequences)
            elif node.op == "call_function":
                if node.target is aten.linear.default:
                    self._round(node)
                elif node.target is ops.moe.overload:
                    self._round_experts(node)
                self.values[node] = [self._call(node, i) for i in range(len(sequences))]
                if self.algorithm in FACTORS:
                    self._smooth(node)
            for source in [source for source in node.all_input_nodes if last[source] is node]:
                del self.values[source]
                self.products.pop(source, None)

    def _parameter(self, name: str) -> Tensor:
        return evaluate(self.weights[name], self.source.fetch).to(self.program.parameter(name).dtype)

    def _call(self, node: fx.Node, i: int) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: self.values[source][i])  # pyright: ignore
        return node.target(*args, **kwargs)  # pyright: ignore

    def _round(self, node: fx.Node) -> None:
        """Round the weight of a linear that is wanted, once, and let all its readers see it rounded."""
        x, weight = cast(tuple[fx.Node, fx.Node], node.args[:2])
        name, count = str(weight_of(node).target), len(self.values[x])
        if (factors := self.factors.get(same_rows_as(x))) is not None:
            self.values[weight] = [self.values[weight][0] * factors.to(val(weight).dtype)] * count
            if name not in self.matrices:
                self.changed[self.stored[name][0][0]] = self.values[weight][0]
        if name not in self.matrices or self.stored[name][0][0] in self.made:
            return
        dense, form = self.values[weight][0], self.matrices[name]
        is_known = are_enough(self._num_rows(x), dense.shape[1])
        made = rounded(dense, self._products_of(x) if self.algorithm == "gptq" and is_known else None, form)
        self._keep(self.stored[name][0], made, form, is_known)
        self.values[weight] = [dense_of(made).to(dense.dtype)] * count
        self.advance(name)

    def _round_experts(self, node: fx.Node) -> None:
        """The same of the experts of a layer."""
        call = arguments(node)
        names = [str(weight.target) for weight in (call["gate_up"], call["down"])]
        if not any(name in self.matrices for name in names):
            return
        x, index = (torch.cat([each.flatten(0, -2) for each in self.values[call[name]]]) for name in ("x", "expert_index"))
        held = {name: self.values[each][0] if isinstance(each, fx.Node) else each for name, each in call.items()}
        held |= {name: held[name].clone() for name in ("gate_up", "down")}  # they are written to, and may lie in a file
        if (factors := self.factors.get(same_rows_as(call["x"]))) is not None:
            held["gate_up"] *= factors.to(x.dtype)
        rows = rows_by_expert(x, index, len(held["down"]))
        forms = self.matrices.get(names[0]), self.matrices.get(names[1])
        for expert, made in enumerate(round_experts(held, rows, forms, self.algorithm)):
            for name, each, form in zip(names, made, forms, strict=True):
                if each is not None and form is not None:
                    num_rows = len(rows.get(expert, ()))
                    self._keep(self.stored[name][expert], each, form, are_enough(num_rows, each.numbers.shape[1]))
        for name in ("gate_up", "down"):
            self.values[call[name]] = [held[name]] * len(self.values[call["x"]])
            self.advance(str(call[name].target))

    def _keep(self, names: tuple[str, ...], made: Integers, form: Format, is_known: bool) -> None:
        """A matrix under the names of the tensors that its rows are stored as."""
        start = 0
        for name in names:
            stop = start + self.source.describe(name).shape[0]
            self.made[name], self.forms[name] = made.narrow(0, start, stop), form
            self.few += [] if is_known else [name]
            start = stop

    def _smooth(self, x: fx.Node) -> None:
        """Divide what gives the inputs of linears and experts by factors, where that can be; they are multiplied as they come."""
        reading = [weight_of(reader) for reader in readers(x)]
        names = [str(weight.target) for weight in reading]
        wanted = [name for name in names if name in self.matrices]
        dividing = divisible(x) if wanted and len(set(names)) == len(names) else []
        if not dividing or not all(map(self._can_scale, reading)) or not all(self.stored[name] for name in dividing):
            return
        rows = torch.cat([each.flatten(0, -2) for each in self.values[x]]).float()
        if not are_enough(len(rows), rows.shape[1]):
            return
        dense = [self._parameter(name).flatten(0, -2).float() for name in wanted]
        factors = FACTORS[self.algorithm](rows, dense, self.matrices[wanted[0]])
        for name in dividing:
            ((stored,),) = self.stored[name]
            if stored in self.made:
                made = self.made[stored]
                self.made[stored] = replace(made, scales=made.scales / factors[:, None])
            else:
                tensor = self.changed.get(stored, self._parameter(name))
                self.changed[stored] = (tensor / factors.reshape(-1, *[1] * (tensor.dim() - 1))).to(tensor.dtype)
        self.factors[x] = factors
        self.values[x] = [(value / factors).to(value.dtype) for value in self.values[x]]

    def _can_scale(self, weight: fx.Node) -> bool:
        """Whether the columns of a parameter may be multiplied: one reader has it, and it is to be had in the checkpoint."""
        name = str(weight.target)
        is_alone = weight.op == "get_attr" and len(weight.users) == 1
        return is_alone and (name in self.matrices or (weight.meta["val"].dim() == 2 and bool(self.stored[name])))

    def _products_of(self, x: fx.Node) -> Tensor:
        """Products of a linear's inputs, shared by all who read them."""
        if x not in self.products:
            self.products[x] = products_of(torch.cat([each.flatten(0, -2) for each in self.values[x]]))
        return self.products[x]

    def _num_rows(self, x: fx.Node) -> int:
        return sum(each.shape[:-1].numel() for each in self.values[x])


def _input(name: str, ids: Sequence[int]) -> Tensor:
    match name:
        case "input_ids":
            return torch.tensor([list(ids)])
        case "position_ids":
            return torch.arange(len(ids))[None]
        case _:
            return torch.full((1, len(ids)), len(ids))  # the length of the sequence
