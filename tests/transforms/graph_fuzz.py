"""Random small models of what the passes look for and what nearly is it; and the smallest part of one that still fails.

A model is a list of steps, each from earlier values [1, T, 16] to a new one. Most steps are what a pass takes, in any of its
forms; the others miss that in one or two ways. An option's first value is the plainest: what a failing model is reduced to.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autodeploy import Pipeline, Program, Target, Transform, default_pipeline
from tests.transforms.helpers import WIDTH, Toy, toy_program

PASSES = default_pipeline().passes[: default_pipeline().index("fuse_add_norm") + 1]
SIDE_BY_SIDE = 25
"""Models in one captured graph."""
SHAPES: dict[str, tuple[int, ...]] = {
    **{f"matrix{i}": (WIDTH, WIDTH) for i in range(3)},
    **{f"narrow{i}": (WIDTH // 2, WIDTH) for i in range(2)},
    **{f"vector{i}": (WIDTH,) for i in range(3)},
    **{f"bias{i}": (WIDTH,) for i in range(2)},
    **{f"short{i}": (WIDTH // 2,) for i in range(2)},
    "column": (1, WIDTH),
    "single": (1,),
    "scalar": (),
    "quarter": (4,),
    "by_head": (4, 4),
    **{f"angles{size}": (size,) for size in (4, 8, 16)},
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


@dataclass(frozen=True)
class Option:
    taken: tuple[Any, ...]
    """Values with which a pass takes the step, the plainest first; or any, where no pass looks at it."""
    missed: tuple[Any, ...] = ()
    """Values with which it nearly would."""


Model = tuple[Step, ...]
Weights = Mapping[str, Tensor]


def norm(step: Step, x: Tensor, other: Tensor, weights: Weights, positions: Tensor) -> Tensor:
    if step.heads:
        x, other = x.unflatten(-1, (4, 4)), other.unflatten(-1, (4, 4))
        weights = {**weights, "vector0": weights["quarter"], "vector1": weights["by_head"], "column": weights["by_head"][:1]}
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
    result = normed.to(x.dtype) + mean.to(x.dtype) if step.second_user else normed.to(x.dtype)
    return result.flatten(-2) if step.heads else result


def residual(step: Step, x: Tensor, other: Tensor, weights: Weights, positions: Tensor) -> Tensor:
    """A sum, its norm, and the sum once more."""
    added: Any = {
        "another value": lambda: other,
        "itself": lambda: x,
        "vector": lambda: weights["vector1"],
        "first": lambda: other[..., :1],
        "wide": lambda: other.to(torch.float64),
        "number": lambda: 1.5,
        "turned": lambda: other.transpose(1, 2).contiguous().transpose(1, 2),
    }[step.added]()
    total = torch.add(x, added, alpha=step.alpha)
    before = total.sin() if step.second_user == "before" else total
    normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6)
    normed = weights["vector0"] * normed if step.weight else normed
    return normed if step.second_user == "none" else before * normed


def layer_norm(step: Step, x: Tensor, other: Tensor, weights: Weights, positions: Tensor) -> Tensor:
    if step.heads:
        quarter = weights["quarter" if step.heads == "one dim" else "by_head"] if step.weight else None
        return F.layer_norm(
            x.unflatten(-1, (4, 4)), (4,) if step.heads == "one dim" else (4, 4), quarter, None, step.eps
        ).flatten(-2)
    weight, bias = (weights[name] if name else None for name in (step.weight, step.bias))
    return F.layer_norm(x, (WIDTH,), weight, bias, step.eps)


def rope(step: Step, x: Tensor, other: Tensor, weights: Weights, positions: Tensor) -> Tensor:
    heads = x.unflatten(-1, (step.heads, -1)).transpose(1, 2)
    of = other.unflatten(-1, (step.heads, -1)).transpose(1, 2) if step.of == "another value" else heads
    size = heads.shape[-1]
    angles = positions[:, None, :, None].to(step.angles) * weights["single" if step.broadcast == "dim" else f"angles{size}"]
    cos, sin = angles.cos(), angles.sin()
    if step.broadcast == "heads":
        heads, of = heads[:, :1], of[:, :1]
        cos, sin = (torch.cat([value] * step.heads, 1) for value in (cos, sin))
    cut = {"halves": size // 2, "thirds": size // 3}.get(step.cut, 0)
    if step.cut == "pairs":
        turned = torch.stack([of[..., 0::2], -of[..., 1::2]] if step.reverse else [-of[..., 1::2], of[..., 0::2]], -1).flatten(-2)
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
        "wide": lambda: other.to(torch.float64),
        "number": lambda: 1.5,
    }[step.up]()
    result = up * activated if step.up_first else activated * up
    return result + activated if step.second_user else result


def linears(step: Step, x: Tensor, other: Tensor, weights: Weights, positions: Tensor) -> Tensor:
    """Two linears of one input, or nearly."""
    second = other if step.two_inputs else x
    first_name, second_name = ("narrow0", step.narrow) if step.narrow else ("matrix0", step.weight)
    bias = [weights[f"short{name[-1]}" if step.narrow else name] if name else None for name in step.biases]
    weight = weights[second_name].t() if step.transposed and not step.narrow else weights[second_name]
    halves = [F.linear(x, weights[first_name], bias[0]), F.linear(second, weight, bias[1])]
    if step.regroup:
        halves = [half.view(1, -1, 4).sin().view(1, -1, half.shape[-1]) for half in halves]
    return torch.cat(halves, -1) if step.narrow else halves[0] * 0.5 + halves[1]


def reshaped(step: Step, x: Tensor, other: Tensor, weights: Weights, positions: Tensor) -> Tensor:
    forms: dict[str, Callable[[], Tensor]] = {
        "nothing": lambda: F.dropout(x.contiguous().to(x.dtype)[..., :WIDTH], 0.5, False),
        "ones": lambda: x.unsqueeze(0).squeeze(0).expand(1, -1, WIDTH),
        "expanded": lambda: x[..., :1].expand(-1, -1, WIDTH),
        "heads": lambda: x.view(1, -1, 4, 4).transpose(2, 3).reshape(1, -1, WIDTH),
        "tokens": lambda: x.reshape(-1, WIDTH).unsqueeze(0),
        "regrouped": lambda: (x.view(1, -1, 4) if x.is_contiguous() else x.reshape(1, -1, 4)).sin().view(1, -1, WIDTH),
        "transposed": lambda: x.transpose(1, 2).contiguous().transpose(1, 2),
        "one part": lambda: x.split(WIDTH, -1)[0],
        "halves": lambda: torch.cat(x.split([4, 12], -1)[::-1], -1),
        "double": lambda: x.to(torch.float64).sin().to(x.dtype),
        "written": lambda: (x * 1.0).add_(other),
        "cast": lambda: x.to(torch.float64).to(x.dtype),
    }
    return forms[step.form]()


def mixed(step: Step, x: Tensor, other: Tensor, weights: Weights, positions: Tensor) -> Tensor:
    return {"add": torch.add, "mul": torch.mul, "sub": torch.sub}[step.op](x, other)


FLAG, NEVER = Option((False, True)), Option((False,), (True,))
KINDS: dict[str, tuple[Any, dict[str, Option]]] = {
    "norm": (
        norm,
        {
            "cast": Option((None, torch.float32, torch.float64)),
            "heads": FLAG,
            "centred": FLAG,
            "square": Option(("pow",), ("mul", "fourth")),
            "dim": Option((-1,), (2, 0)),
            "eps": Option((1e-6, 1e-2), (1,)),
            "root": Option(("rsqrt", "pow"), ("other",)),
            "back": Option(("after", "before")),
            "weight": Option(("vector0", None), ("vector1", "column", "single", "scalar", "another value", "computed")),
            "offset": Option((0, 1.0), (0.5,)),
            "second_user": NEVER,
        },
    ),
    "residual": (
        residual,
        {
            "added": Option(("another value", "itself"), ("vector", "first", "wide", "number", "turned")),
            "alpha": Option((1,), (2,)),
            "weight": FLAG,
            "second_user": Option(("after", "before"), ("none",)),
        },
    ),
    "layer_norm": (
        layer_norm,
        {
            "weight": Option(("vector0", None, "vector1")),
            "bias": Option((None, "vector1", "vector2")),
            "eps": Option((1e-5, 1e-2)),
            "heads": Option((None, "one dim"), ("two dims",)),
        },
    ),
    "rope": (
        rope,
        {
            "heads": Option((4, 1, 2)),
            "cut": Option(("halves", "pairs"), ("thirds",)),
            "angles": Option((torch.float32,), (torch.float64,)),
            "broadcast": Option((None, "dim"), ("heads",)),
            "of": Option(("itself",), ("another value",)),
            "reverse": NEVER,
            "signed": Option((True,), (False,)),
            "same": FLAG,
            "second_user": FLAG,
        },
    ),
    "gated": (
        gated,
        {
            "activation": Option(("silu", "gelu", "gelu_tanh", "relu", "sigmoid"), ("tanh",)),
            "up": Option(("another value", "itself", "activated"), ("vector", "scalar", "first", "wide", "number")),
            "up_first": FLAG,
            "second_user": NEVER,
        },
    ),
    "linears": (
        linears,
        {
            "narrow": Option((None, "narrow1"), ("narrow0",)),
            "weight": Option(("matrix1", "matrix2"), ("matrix0",)),
            "transposed": NEVER,
            "biases": Option(((None, None), ("bias0", "bias1")), (("bias0", None), (None, "bias1"), ("bias0", "bias0"))),
            "two_inputs": NEVER,
            "regroup": FLAG,
        },
    ),
    "reshaped": (
        reshaped,
        {
            "form": Option(
                (
                    "nothing",
                    "ones",
                    "expanded",
                    "heads",
                    "tokens",
                    "regrouped",
                    "transposed",
                    "halves",
                    "one part",
                    "double",
                    "written",
                    "cast",
                )
            )
        },
    ),
    "mixed": (mixed, {"op": Option(("add", "mul", "sub"))}),
}


DRAWN = [kind for kind in KINDS for _ in range(1 if kind in ("layer_norm", "mixed") else 2)]


def random_model(seed: int, num_steps: int = 4) -> Model:
    draw = random.Random(seed)
    steps = []
    for i in range(num_steps):
        kind = draw.choice(DRAWN)
        options = _random_options(draw, KINDS[kind][1])
        steps.append(Step(kind, (draw.randint(0, i), draw.randint(0, i)), tuple(options.items())))
    return tuple(steps)


def _random_options(draw: random.Random, options: Mapping[str, Option]) -> dict[str, Any]:
    """No, one or two of them missed."""
    may_miss = [name for name, option in options.items() if option.missed]
    missed = draw.sample(may_miss, min(draw.choice((0, 0, 0, 1, 2)), len(may_miss)))
    return {name: draw.choice(option.missed if name in missed else option.taken) for name, option in options.items()}


def side_by_side(seeds: Sequence[int]) -> list[list[int]]:
    """Batches of seeds; models that write in place by themselves, since for them alone the whole graph is traced once more."""
    writes = {seed: any(dict(step.options).get("form") == "written" for step in random_model(seed)) for seed in seeds}
    groups = [[seed for seed in seeds if writes[seed] is kind] for kind in (False, True)]
    return [group[i : i + SIDE_BY_SIDE] for group in groups for i in range(0, len(group), SIDE_BY_SIDE)]


def build(*models: Model) -> Program:
    """One program of several models side by side, each with weights of its own: capture costs more than the rest."""

    def body(toy: Toy, x: Tensor, positions: Tensor) -> Tensor:
        weights = [dict(toy.extra[f"weights{i}"].named_parameters()) for i in range(len(models))]
        ends = [end for i, model in enumerate(models) for end in run(model, x, weights[i], positions)]
        return sum((end.asinh() for end in ends[1:]), ends[0].asinh())  # none drowns the others

    tables = [nn.ParameterDict({name: nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}) for _ in models]
    return toy_program(body, **{f"weights{i}": table for i, table in enumerate(tables)})[0]


def run(model: Model, x: Tensor, weights: Weights, positions: Tensor) -> list[Tensor]:
    """The values that no step reads."""
    values = [x]
    for step in model:
        value = KINDS[step.kind][0](step, *(values[i] for i in step.inputs), weights, positions)
        values.append(value if value.dtype == x.dtype else value.to(x.dtype))
    read = {i for step in model for i in step.inputs}
    return [values[i] for i in range(len(values)) if i not in read]


@dataclass(frozen=True)
class Outcome:
    failure: str
    """Why the passes are wrong, the one that is by name; empty when all are right."""
    rewrites: Counter[str]
    """Of each pass."""


def outcome(*models: Model, passes: tuple[Transform, ...] = PASSES) -> Outcome:
    """Run each pass on these models and then once more; the numbers are compared after each."""
    program = build(*models)
    states: list[Any] = []
    try:
        twice = Pipeline(tuple(item for item in passes for _ in range(2)))
        twice.run(program, Target(), lambda program, record: states.append(_state(program)), verify="numeric")
    except Exception as error:
        return Outcome(f"{type(error).__name__}: {error}", Counter())
    first, second = program.history[::2], program.history[1::2]
    changed = [record.name for i, record in enumerate(second) if record.rewrites or states[2 * i] != states[2 * i + 1]]
    failure = f"a second application of {', '.join(changed)} changed the program" if changed else ""
    return Outcome(failure, Counter({record.name: record.rewrites for record in first}))


def _state(program: Program) -> Any:
    nodes = [(node, node.target, node.args, node.kwargs) for node in program.graph.graph.nodes]
    return nodes, dict(program.weights.recipes), [*program.inputs, *program.caches]


def failure(*models: Model, passes: tuple[Transform, ...] = PASSES) -> str:
    return outcome(*models, passes=passes).failure


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
        (*model[:i], replace(step, options=tuple({**dict(step.options), name: option.taken[0]}.items())), *model[i + 1 :])
        for i, step in enumerate(model)
        for name, option in KINDS[step.kind][1].items()
        if dict(step.options)[name] != option.taken[0]
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


def report(seeds: Sequence[int], passes: tuple[Transform, ...] = PASSES) -> Outcome:
    """Of models side by side; for each that fails, its smallest failing part, the reason and the program."""
    models = {seed: random_model(seed) for seed in seeds}
    together = outcome(*models.values(), passes=passes)
    if not together.failure:
        return together
    found = [_smallest(seed, model, passes) for seed, model in models.items() if failure(model, passes=passes)]
    return Outcome("\n\n".join(found) or f"{seeds}, only together: {together.failure}", together.rewrites)


def _smallest(seed: int, model: Model, passes: tuple[Transform, ...]) -> str:
    model = minimise(model, lambda smaller: bool(failure(smaller, passes=passes)))
    reason = failure(model, passes=passes)
    return "\n".join([f"seed {seed}, {num_nodes(model)} nodes: {reason}", *map(str, model), str(build(model))])
