"""The one-call tests of what a plugin is made of: check_transform for a pass, check_provider for a provider."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from autodeploy.capture.export import capture
from autodeploy.capture.skeleton import skeleton_of
from autodeploy.custom_ops import Provider, SemanticOp
from autodeploy.errors import ConfigError, did_you_mean
from autodeploy.program import Program, op_name
from autodeploy.specs import Target
from autodeploy.transforms.base import Transform
from autodeploy.transforms.default import default_pipeline
from autodeploy.transforms.pipeline import Pipeline
from autodeploy.transforms.rewrite import calls
from autodeploy.transforms.verify_numeric import difference


def check_transform(
    model: nn.Module, item: Transform, *, rewrites: int, contains: Any = None, after: str = "match_mlp"
) -> Program:
    """Run the pass on the model's program and check all that is asked of a pass; returns the program after it.

    The model, a small one of transformers, is exported; the default passes up to `after` run, then `item`; after each of them
    the program's structure and its numbers in float64 are compared with those before. `item` must make that many `rewrites`, a
    call of `contains` (a semantic op or a torch overload) must be in the graph then, and `item` once more must change nothing.
    What is compared is the references of the ops; their providers have `check_provider`.
    Raises AssertionError; TransformError when a pass fails or changes the numbers; ConfigError when `after` is no pass.
    """
    default = default_pipeline()
    passes = default.passes[: default.index(after) + 1]
    program = capture(skeleton_of(model), dict(model.named_buffers())).program
    Pipeline((*passes, item)).run(program, Target(), verify="numeric")
    made = program.history[-1].rewrites
    _require(made == rewrites, f"{item.name} made {made} rewrites, not {rewrites}")
    if contains is not None:
        there, wanted = ", ".join(sorted(program.op_counts())), op_name(getattr(contains, "overload", contains))
        _require(calls(program, contains), f"after {item.name} there is no call of {wanted}; there are {there}")
    text = str(program)
    again = item.apply(program, Target())
    _require(again == 0, f"{item.name}, applied once more, made {again} rewrites; a pass must find nothing left to do")
    _require(str(program) == text, f"{item.name}, applied once more, reported no rewrite but changed the program")
    return program


def check_provider(op: SemanticOp, name: str, *args: Any, target: Target | None = None, limit: float | None = None) -> None:
    """Run the provider of that name on these arguments and compare dtypes, shapes and numbers with the op's reference.

    The provider must have nothing against them (`supports` is asked about `target`, a CPU when absent) and may write only into
    what the op says it mutates; the op's shape rule must give the reference's dtypes and shapes. limit: the largest error
    max|a - b| / max|b| from the reference in float64; when absent, three times what the reference itself has in these dtypes.
    Raises AssertionError; ConfigError when there is no such provider; TransformError when `supports` fails.
    """
    provider, who = _provider_named(op, name), f"provider '{name}' of op {op.name}"
    symbolic_args = _fake(args)
    reasons = op.reasons_against(provider, target or Target(), *symbolic_args)
    _require(not reasons, f"{who} has something against these arguments: {', '.join(reasons)}")
    with torch.no_grad():
        made, plain = _Run.of(op, provider.function, args), _Run.of(op, op.reference, args)
        exact = _Run.of(op, op.reference, tree_map_only(Tensor, _wide, args))
        shapes = _kinds(tree_leaves(op(*symbolic_args)))
    _compare(f"the shape rule of op {op.name}", shapes, _kinds(plain.results))
    _compare(who, _kinds(made.results), _kinds(plain.results))
    _require(not made.spoilt, f"{who} writes into its argument {', '.join(map(repr, made.spoilt))}")
    for what, mine, theirs, right in zip(made.names, made.tensors, plain.tensors, exact.tensors, strict=True):
        error, allowed = difference([mine], [right]), limit
        if allowed is None:
            allowed = 3 * difference([theirs], [right]) + (torch.finfo(mine.dtype).eps if mine.is_floating_point() else 0)
        _require(error <= allowed, f"{who}: {what} differs from the reference in float64 by {error:.1e} (limit {allowed:.1e})")


@dataclass(frozen=True)
class _Run:
    """What a function made of copies of some arguments."""

    results: list[Tensor]
    mutated: dict[str, Tensor]
    spoilt: list[str]
    """Arguments that are changed and may not be."""

    @classmethod
    def of(cls, op: SemanticOp, function: Callable[..., Any], args: Any) -> _Run:
        given = tree_map_only(Tensor, torch.clone, args)
        results = [leaf for leaf in tree_leaves(function(*given)) if isinstance(leaf, Tensor)]
        named = list(zip((argument.name for argument in op.overload._schema.arguments), args, given, strict=False))
        mutated = {name: after for name, _, after in named if name in op.mutates}
        spoilt = [name for name, before, after in named if name not in op.mutates and not _same(before, after)]
        return cls(results, mutated, spoilt)

    @property
    def names(self) -> list[str]:
        return [f"result {i}" for i in range(len(self.results))] + [f"what is left in '{name}'" for name in self.mutated]

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.results, *self.mutated.values()]


def _same(before: Any, after: Any) -> bool:
    pairs = zip(tree_leaves(before), tree_leaves(after), strict=True)
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs if isinstance(a, Tensor))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _provider_named(op: SemanticOp, name: str) -> Provider:
    providers = {provider.name: provider for provider in op.providers}
    if name not in providers:
        near = did_you_mean(name, providers)
        raise ConfigError(f"op {op.name} has no provider named '{name}'.{near} It has: {', '.join(providers)}")
    return providers[name]


def _fake(args: Any) -> Any:
    mode = FakeTensorMode()
    return tree_map_only(Tensor, mode.from_tensor, args)


def _kinds(results: list[Any]) -> list[str]:
    """dtype and shape of each result."""
    return [f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in results if isinstance(x, Tensor)]


def _compare(who: str, made: list[str], wanted: list[str]) -> None:
    shown, reference = ", ".join(made) or "nothing", ", ".join(wanted) or "nothing"
    _require(made == wanted, f"{who} gives {shown}, but the reference gives {reference}")


def _require(holds: object, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)
