"""A quantized checkpoint of a dense one: rounded to the nearest numbers, or for inputs that the exported program was seen with.

GPTQ is that of Frantar et al., 2022: a column is rounded, and the columns after it make up for what that changes in the
products with those inputs. AWQ and SmoothQuant (`smooth.py`) scale columns first. The program runs once, node by node over all
calibration sequences at a time, so that each matrix sees what the rounded ones before it give. Beside the activations there is
one dense matrix at a time (of AWQ and SmoothQuant, those that share their inputs).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, fx

from autodeploy.capture.export import capture
from autodeploy.capture.origin import Origin, origin_of
from autodeploy.checkpoint import SINGLE, CheckpointSource, raw_config
from autodeploy.config import QuantConfig
from autodeploy.errors import ConfigError
from autodeploy.formats import Format, Integers
from autodeploy.program import Program
from autodeploy.recipes import Cast, Take, evaluate
from autodeploy.smooth import FACTORS, divisible, readers
from autodeploy.transforms.quantize import QuantizeWeights
from autodeploy.transforms.rewrite import aten, val

WRITTEN = ("int8", "w8a8", "int4")
"""Schemes with a checkpoint format that transformers reads too (compressed-tensors)."""
DAMPING = 0.01
"""Of the mean of the products' diagonal, added to it: what was never seen should cost something too."""
BLOCK = 128
"""Columns after which those behind them are told what was lost."""

Advance = Callable[[str], None]


def quantize(
    model: str | Path,
    output: str | Path,
    scheme: str | QuantConfig = "int4",
    calibration: Sequence[Sequence[int]] | None = None,
    advance: Advance = lambda name: None,
) -> list[str]:
    """Write a quantized copy of a checkpoint folder; returns the names of the matrices that are quantized in it.

    calibration: token ids of some sequences, for the algorithm of the scheme's QuantConfig; absent, each number becomes the
    nearest. The output head and stacked experts stay dense. advance: told each matrix that is done. Raises ConfigError for a
    scheme without a checkpoint format, a checkpoint that is quantized already, or an output that is there.
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
    matrices = _matrices(captured.program, origin, config)
    made, changed = dict[str, Integers](), dict[str, Tensor]()
    with torch.no_grad():
        if calibration is None:
            for name, form in matrices.items():
                made[name] = _nearest(evaluate(origin.recipes[name], source.fetch), form)
                advance(name)
        else:
            walk = _Walk(captured.program, origin, source, matrices, config.algorithm, advance)
            walk.run(calibration)
            made, changed = walk.made, walk.changed
    rounded = {_stored(origin, name): each for name, each in made.items()}
    _write(folder, output, source, rounded, {_stored(origin, name): each for name, each in changed.items()}, config)
    return sorted(made)


def _nearest(dense: Tensor, form: Format) -> Integers:
    return form.integers(tuple(dense.shape), *form.quantize(dense))


def _matrices(program: Program, origin: Origin, config: QuantConfig) -> dict[str, Format]:
    """Tensors of the model that a checkpoint can hold quantized: read by a linear, and stored by themselves."""
    wanted = QuantizeWeights(**{**config.rounding, "lm_head": False}).matrices(program)
    found = {name: form for name, form, is_transposed in wanted if not is_transposed and _stored(origin, name)}
    return {name: form for name, form in found.items() if program.parameter(name).shape[-1] % max(form.block[1], 1) == 0}


def _stored(origin: Origin, name: str) -> str:
    """The tensor of the checkpoint that one of the model is, but for its dtype; empty where there is none."""
    recipe = origin.recipes[name]
    recipe = recipe.source if isinstance(recipe, Cast) else recipe
    return recipe.name if isinstance(recipe, Take) and recipe.name.endswith((".weight", ".bias")) else ""


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
        self.program, self.origin, self.source, self.matrices = program, origin, source, matrices
        self.algorithm, self.advance = algorithm, advance
        self.weights = program.weights.substitute(origin.recipes)
        self.values: dict[fx.Node, list[Any]] = {}
        self.products: dict[fx.Node, Tensor] = {}
        self.factors: dict[fx.Node, Tensor] = {}
        self.made: dict[str, Integers] = {}
        self.changed: dict[str, Tensor] = {}

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
        name, count = str(weight.target), len(self.values[x])
        if x in self.factors:
            self.values[weight] = [self.values[weight][0] * self.factors[x]] * count
            if name not in self.matrices:
                self.changed[name] = self.values[weight][0]
        if name not in self.matrices or name in self.made:
            return
        dense, form = self.values[weight][0], self.matrices[name]
        made = gptq(dense, self._products_of(x), form) if self.algorithm == "gptq" else _nearest(dense, form)
        self.made[name] = made
        rounded = (made.numbers * made.scales.repeat_interleave(dense.shape[1] // made.scales.shape[1], 1)).to(dense.dtype)
        self.values[weight] = [rounded] * count
        self.advance(name)

    def _smooth(self, x: fx.Node) -> None:
        """Divide what gives the inputs of linears by factors, where that can be; they are multiplied as they come."""
        linears = readers(x)
        names = [str(cast(fx.Node, linear.args[1]).target) for linear in linears]
        dividing = divisible(x) if any(name in self.matrices for name in names) else []
        once = all(len(cast(fx.Node, linear.args[1]).users) == 1 for linear in linears)
        if not dividing or not once or not all(_stored(self.origin, name) for name in (*names, *dividing)):
            return
        rows = torch.cat([each.flatten(0, -2) for each in self.values[x]]).float()
        form = next(self.matrices[name] for name in names if name in self.matrices)
        factors = FACTORS[self.algorithm](rows, [self._parameter(name).float() for name in names], form)
        for name in dividing:
            if name in self.made:
                made = self.made[name]
                self.made[name] = replace(made, scales=made.scales / factors[:, None])
            else:
                tensor = self.changed.get(name, self._parameter(name))
                self.changed[name] = (tensor / factors.reshape(-1, *[1] * (tensor.dim() - 1))).to(tensor.dtype)
        self.factors[x] = factors.to(val(x).dtype)
        self.values[x] = [(value / factors).to(value.dtype) for value in self.values[x]]

    def _products_of(self, x: Any) -> Tensor:
        """Sums of products of each two columns of a linear's inputs [K, K], shared by all who read them."""
        if x not in self.products:
            rows = torch.cat([each.flatten(0, -2) for each in self.values[x]]).float()
            self.products[x] = rows.T @ rows / len(rows)
        return self.products[x]


def _input(name: str, ids: Sequence[int]) -> Tensor:
    match name:
        case "input_ids":
            return torch.tensor([list(ids)])
        case "position_ids":
            return torch.arange(len(ids))[None]
        case _:
            return torch.full((1, len(ids)), len(ids))  # the length of the sequence


def gptq(weight: Tensor, products: Tensor, form: Format) -> Integers:
    """weight [N, K] in whole numbers, so that what it gives for the inputs changes least. products [K, K]: of their columns."""
    weight, products, (rows, columns) = weight.float().clone(), products.clone(), weight.shape
    size = form.block[1] or columns
    never = products.diagonal() == 0
    products.diagonal()[never] = 1
    weight[:, never] = 0
    products.diagonal().add_(DAMPING * products.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(products)), upper=True)
    whole, limits = replace(form, block=(1, 0)), (-(1 << (form.bits - 1)), (1 << (form.bits - 1)) - 1)
    numbers, scales = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows, columns // size)
    scale = torch.empty(0)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        lost = torch.empty(rows, stop - start)
        for i in range(start, stop):
            if i % size == 0:
                scale = whole.quantize(weight[:, i : i + size])[1].float()
                scales[:, i // size] = scale[:, 0]
            codes = (weight[:, i : i + 1] / scale).round_().clamp_(*limits)
            numbers[:, i] = codes[:, 0].to(torch.int8)
            lost[:, i - start] = ((weight[:, i : i + 1] - codes * scale) / factor[i, i])[:, 0]
            weight[:, i + 1 : stop] -= lost[:, i - start, None] * factor[i, i + 1 : stop]
        weight[:, stop:] -= lost @ factor[start:stop, stop:]
    return Integers(numbers, scales, None)


def _write(
    folder: Path,
    output: Path,
    source: CheckpointSource,
    made: Mapping[str, Integers],
    changed: Mapping[str, Tensor],
    config: QuantConfig,
) -> None:
    """The checkpoint, in the format of compressed-tensors; whatever else lies in the folder comes along."""
    tensors = {name: source.fetch(Take(name)).clone() for name in source.names() if name not in made}
    tensors |= {name: tensor.to(tensors[name].dtype) for name, tensor in changed.items() if name in tensors}
    for name, each in made.items():
        prefix, dtype = name.removesuffix(".weight"), source.describe(name).dtype
        scales = each.scales.to(dtype) if torch.equal(each.scales.to(dtype).float(), each.scales) else each.scales
        if config.scheme == "int4":
            tensors |= {
                f"{prefix}.weight_packed": _words(each.numbers),
                f"{prefix}.weight_shape": torch.tensor(each.numbers.shape),
            }
            tensors[f"{prefix}.weight_scale"] = scales.contiguous()
        else:
            tensors |= {name: each.numbers.contiguous(), f"{prefix}.weight_scale": scales.contiguous()}
    output.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_file() and not path.name.endswith((".safetensors", ".index.json")):
            shutil.copy(path, output)
    save_file(tensors, output / SINGLE, {"format": "pt"})
    kept = sorted({name.removesuffix(".weight") for name in tensors if name.endswith(".weight") and tensors[name].dim() == 2})
    settings = _settings(config, [name for name in kept if f"{name}.weight" not in made])
    (output / "config.json").write_text(json.dumps({**raw_config(folder), "quantization_config": settings}, indent=2))


def _words(numbers: Tensor) -> Tensor:
    """Numbers of 4 bits [N, K] -> words of 32 bits [N, K / 8], eight to a word, the first lowest, 8 too much each."""
    eights = (numbers.long() + 8).unflatten(-1, (-1, 8)) << (4 * torch.arange(8))
    words = eights.sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _settings(config: QuantConfig, kept: list[str]) -> dict[str, Any]:
    """`quantization_config` as compressed-tensors writes it."""
    bits = 4 if config.scheme == "int4" else 8
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
    weights |= {"strategy": "group", "group_size": config.group_size or 32} if bits == 4 else {"strategy": "channel"}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs if config.scheme == "w8a8" else None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if bits == 4 else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": kept,
    }
