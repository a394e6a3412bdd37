"""Random small models of what the passes look for and what nearly is it; and the smallest part of one that still fails.

A model is a list of steps, each from earlier values [1, T, 16] to a new one. An option's first choice is the plainest: it is
drawn half the time, and what a failing model is reduced to.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autodeploy import Effect, Pipeline, Program, Target, Transform, default_pipeline
from autodeploy.transforms.verify_numeric import NumericVerifier, leaf_types
from tests.transforms.helpers import WIDTH, Toy, toy_program

PASSES = default_pipeline().passes[: default_pipeline().index("fuse_linears") + 1]
SHAPES: dict[str, tuple[int, ...]] = {
    **{f"matrix{i}": (WIDTH, WIDTH) for i in range(3)},
    **{f"narrow{i}": (WIDTH // 2, WIDTH) for i in range(2)},
    **{f"vector{i}": (WIDTH,) for i in range(3)},
    "short": (WIDTH // 2,),
    "column": (1, WIDTH),
    "single": (1,),
    "scalar": (),
    "quarter": (4,),
}


@dataclass(frozen=True)
class Step:
    kind: str
    inputs: tuple[int, int]
    """Indices of earlier values; 0 is the embedding."""
    options: tuple[tuple[str, Any], ...]

    def __getattr__(self, name: str) -> Any:
        try:
            return dict(self.options)[name]
        except KeyError:
            raise AttributeError(name) from None


Model = tuple[Step, ...]
Weights = Mapping[str, Tensor]


def norm(step: Step, x: Tensor, other: Tensor, weights: Weights, positions: Tensor) -> Tensor:
    wide = x.to(step.cast) if step.cast else x
    if step.centred:
        wide = wide - wide.mean(-1, keepdim=True)
    square = {"pow": lambda: wide.pow(2), "mul": lambda: wide * wide, "fourth": lambda: wide.pow(4)}[step.square]()
    mean = square.mean(step.dim, keepdim=True) + step.eps
    root = {"rsqrt": torch.rsqrt, "pow": lambda m: m.pow(-0.5), "other": lambda m: m.pow(-0.25)}[step.root](mean)
    normed = wide * root
    if step.back == "before":
        normed = normed.to(x.dtype)
    if step.weight == "another value":
        normed = other * normed
    elif step.weight == "computed":
        normed = torch.sigmoid(weights["vector0"]) * normed
    elif step.weight:
        normed = (weights[step.weight] + step.offset if step.offset else weights[step.weight]) * normed
    return normed.to(x.dtype) + (mean.to(x.dtype) if step.second_user else 0)


def layer_norm(step: Step, x: Tensor, other: Tensor, weights: Weights, positions: Tensor) -> Tensor:
    if step.heads:
        quarter = weights["quarter"] if step.weight else None
        return F.layer_norm(x.unflatten(-1, (4, 4)), (4,), quarter, None, step.eps).flatten(-2)
    weight, bias = (weights[name] if name else None for name in (step.weight, step.bias))
    return F.layer_norm(x, (WIDTH,), weight, bias, step.eps)


def rope(step: Step, x: Tensor, other: Tensor, weights: Weights, positions: Tensor) -> Tensor:
    heads, source = (value.unflatten(-1, (step.heads, -1)).transpose(1, 2) for value in (x, other))
    size = heads.shape[-1]
    angles = positions[..., None].to(torch.float32) * weights["quarter"][:2].repeat(size // 4)
    angles = torch.cat([angles, angles], -1) if step.whole else angles.repeat_interleave(2, -1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    cut = {"halves": size // 2, "thirds": size // 3}.get(step.cut, 0)
    of = source if step.of == "another value" else heads
    if step.cut == "pairs":
        turned = torch.stack([-of[..., 1::2], of[..., 0::2]], -1).flatten(-2)
    else:
        parts = [-of[..., cut:], of[..., :cut]]
        turned = torch.cat(parts[::-1] if step.reverse else parts, -1)
    turned = turned if step.signed else -turned
    result = heads * cos + turned * (cos if step.same else sin)
    return (result + turned if step.second_user else result).transpose(1, 2).flatten(-2)


def gated(step: Step, x: Tensor, other: Tensor, weights: Weights, positions: Tensor) -> Tensor:
    function: Any = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda value: F.gelu(value, approximate="tanh"),
        "relu": F.relu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
    }[step.activation]
    activated = function(x)
    up: Any = {
        "another value": lambda: other,
        "itself": lambda: x,
        "activated": lambda: function(other),
        "vector": lambda: weights["vector1"],
        "scalar": lambda: weights["scalar"],
        "first": lambda: other[..., :1],
        "number": lambda: 1.5,
    }[step.up]()
    result = up * activated if step.up_first else activated * up
    return result + activated if step.second_user else result


def linears(step: Step, x: Tensor, other: Tensor, weights: Weights, positions: Tensor) -> Tensor:
    """Two linears of one input, or nearly."""
    second = other if step.two_inputs else x
    if step.narrow:
        bias = weights["short"] if step.bias else None
        halves = [F.linear(x, weights["narrow0"], bias), F.linear(second, weights[step.narrow], bias)]
        if step.regroup:
            halves = [half.view(1, -1, 4).sin().view(1, -1, WIDTH // 2) for half in halves]
        return torch.cat(halves, -1)
    biases = [weights[name] if name else None for name in (step.bias, step.second_bias)]
    first = F.linear(x, weights["matrix0"], biases[0])
    weight = weights[step.weight].t() if step.transposed else weights[step.weight]
    result = F.linear(second, weight, biases[1])
    return first.view(1, -1, 4).sin().view(1, -1, WIDTH) + result if step.regroup else first * 0.5 + result


def reshaped(step: Step, x: Tensor, other: Tensor, weights: Weights, positions: Tensor) -> Tensor:
    forms: dict[str, Callable[[], Tensor]] = {
        "nothing": lambda: F.dropout(x.contiguous().to(x.dtype)[..., :WIDTH], 0.5, False),
        "ones": lambda: x.unsqueeze(0).squeeze(0).expand(1, -1, WIDTH),
        "expanded": lambda: x[..., :1].expand(-1, -1, WIDTH),
        "heads": lambda: x.view(1, -1, 4, 4).transpose(2, 3).reshape(1, -1, WIDTH),
        "tokens": lambda: x.reshape(-1, WIDTH).unsqueeze(0),
        "transposed": lambda: x.transpose(1, 2).contiguous().transpose(1, 2),
        "halves": lambda: torch.cat(x.split([4, 12], -1)[::-1], -1),
        "double": lambda: x.to(torch.float64).sin().to(x.dtype),
        "written": lambda: (x * 1.0).add_(other),
        "cast": lambda: x.to(torch.float64).to(x.dtype),
    }
    return forms[step.form]()


def mixed(step: Step, x: Tensor, other: Tensor, weights: Weights, positions: Tensor) -> Tensor:
    return {"add": torch.add, "mul": torch.mul, "sub": torch.sub}[step.op](x, other)


KINDS: dict[str, tuple[Any, dict[str, tuple[Any, ...]]]] = {
    "norm": (
        norm,
        {
            "cast": (None, torch.float32, torch.float64),
            "centred": (False, True),
            "square": ("pow", "mul", "fourth"),
            "dim": (-1, 2, 0),
            "eps": (1e-6, 1e-2, 1),
            "root": ("rsqrt", "pow", "other"),
            "back": ("after", "before"),
            "weight": ("vector0", None, "vector1", "column", "single", "scalar", "another value", "computed"),
            "offset": (0, 1.0, 0.5),
            "second_user": (False, True),
        },
    ),
    "layer_norm": (
        layer_norm,
        {
            "weight": ("vector0", None, "vector1"),
            "bias": (None, "vector1", "vector2"),
            "eps": (1e-5, 1e-2),
            "heads": (False, True),
        },
    ),
    "rope": (
        rope,
        {
            "heads": (4, 1, 2),
            "cut": ("halves", "pairs", "thirds"),
            "whole": (True, False),
            "of": ("itself", "another value"),
            "reverse": (False, True),
            "signed": (True, False),
            "same": (False, True),
            "second_user": (False, True),
        },
    ),
    "gated": (
        gated,
        {
            "activation": ("silu", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh"),
            "up": ("another value", "itself", "activated", "vector", "scalar", "first", "number"),
            "up_first": (False, True),
            "second_user": (False, True),
        },
    ),
    "linears": (
        linears,
        {
            "narrow": (None, "narrow1", "narrow0"),
            "weight": ("matrix1", "matrix2", "matrix0"),
            "transposed": (False, True),
            "bias": (None, "vector0"),
            "second_bias": (None, "vector0", "vector2"),
            "two_inputs": (False, True),
            "regroup": (False, True),
        },
    ),
    "reshaped": (
        reshaped,
        {
            "form": (
                "nothing",
                "ones",
                "expanded",
                "heads",
                "tokens",
                "transposed",
                "halves",
                "double",
                "written",
                "cast",
            )
        },
    ),
    "mixed": (mixed, {"op": ("add", "mul", "sub")}),
}


def random_model(seed: int, num_steps: int = 4) -> Model:
    draw = random.Random(seed)
    steps = []
    for i in range(num_steps):
        kind = draw.choice(list(KINDS))
        options = {name: draw.choice(values[: draw.choice((1, len(values)))]) for name, values in KINDS[kind][1].items()}
        steps.append(Step(kind, (draw.randint(0, i), draw.randint(0, i)), tuple(options.items())))
    return tuple(steps)


def build(*models: Model) -> Program:
    """One program of several models side by side, each with weights of its own: capture costs more than the rest."""

    def body(toy: Toy, x: Tensor, positions: Tensor) -> Tensor:
        weights = [dict(toy.extra[f"weights{i}"].named_parameters()) for i in range(len(models))]
        ends = [end for i, model in enumerate(models) for end in run(model, x, weights[i], positions)]
        return sum((end.asinh() for end in ends[1:]), ends[0])  # pyright: ignore

    tables = [nn.ParameterDict({name: nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}) for _ in models]
    return toy_program(body, **{f"weights{i}": table for i, table in enumerate(tables)})[0]


def run(model: Model, x: Tensor, weights: Weights, positions: Tensor) -> list[Tensor]:
    """The values that no step reads."""
    values = [x]
    for step in model:
        values.append(KINDS[step.kind][0](step, *(values[i] for i in step.inputs), weights, positions))
    read = {i for step in model for i in step.inputs}
    return [values[i] for i in range(len(values)) if i not in read]


def failure(*models: Model, passes: tuple[Transform, ...] = PASSES) -> str:
    """Why the passes are wrong about these models; empty when they are right."""
    program = build(*models)
    before, verifier = program.snapshot().as_program(), NumericVerifier(leaf_types(program))
    try:
        Pipeline(passes).run(program, Target())
        verifier.compare(before, program, Effect.FUSION)
        text = str(program).split("inputs:")[1]
        passes = tuple(item for item in passes if item.name != "prove_packing")  # it is for graphs without semantic ops
        again = [item.name for item in passes if Pipeline((item,)).run(program, Target()).history[-1].rewrites]
        if again or str(program).split("inputs:")[1] != text:
            return f"a second application of {', '.join(again)} changed the program"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def minimise(model: Model, fails: Callable[[Model], bool]) -> Model:
    """Drop steps and set options to their plainest while it still fails."""
    changed = True
    while changed:
        changed = False
        for smaller in _smaller(model):
            if fails(smaller):
                model, changed = smaller, True
                break
    return model


def _smaller(model: Model) -> list[Model]:
    dropped = [_without(model, i) for i in reversed(range(len(model)))]
    read_less = [
        (*model[:i], replace(step, inputs=inputs), *model[i + 1 :])
        for i, step in enumerate(model)
        for inputs in {(0, step.inputs[1]), (step.inputs[0], 0)} - {step.inputs}
    ]
    plainer = [
        (*model[:i], replace(step, options=tuple({**dict(step.options), name: values[0]}.items())), *model[i + 1 :])
        for i, step in enumerate(model)
        for name, values in KINDS[step.kind][1].items()
        if dict(step.options)[name] != values[0]
    ]
    return [*dropped, *read_less, *plainer]


def _without(model: Model, i: int) -> Model:
    """Readers of step i read its first input instead."""

    def moved(j: int) -> int:
        j = model[i].inputs[0] if j == i + 1 else j
        return j - (j > i + 1)

    return (*model[:i], *(replace(step, inputs=tuple(map(moved, step.inputs))) for step in model[i + 1 :]))


def num_nodes(model: Model) -> int:
    return sum(build(model).op_counts().values())


def report(seeds: range, passes: tuple[Transform, ...] = PASSES) -> str:
    """Empty, or for each failing model its smallest failing part, the reason and the program."""
    models = {seed: random_model(seed) for seed in seeds}
    if not (together := failure(*models.values(), passes=passes)):
        return ""
    found = [_smallest(seed, model, passes) for seed, model in models.items() if failure(model, passes=passes)]
    return "\n\n".join(found) or f"{seeds}, only together: {together}"


def _smallest(seed: int, model: Model, passes: tuple[Transform, ...]) -> str:
    model = minimise(model, lambda smaller: bool(failure(smaller, passes=passes)))
    reason = failure(model, passes=passes)
    return "\n".join([f"seed {seed}, {num_nodes(model)} nodes: {reason}", *map(str, model), str(build(model))])
