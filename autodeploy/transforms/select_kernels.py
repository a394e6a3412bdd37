"""select_kernels: every semantic op becomes a direct call of one provider's function."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from autodeploy.custom_ops import SEMANTIC_OPS, Provider
from autodeploy.custom_ops.autotune import Tuner, tuner_of
from autodeploy.formats import Format
from autodeploy.program import Choice, Program
from autodeploy.specs import Target
from autodeploy.transforms.base import Transform
from autodeploy.transforms.rewrite import arguments, note_choice, val


@dataclass(frozen=True, kw_only=True)
class SelectKernels(Transform):
    """Take the first provider that has nothing against the call, or the fastest of its equals; write down which, and why.

    before:  autodeploy.rms_norm(x, weight, eps, 0.0, False)
    after:   pointwise.rms_norm(x, weight, eps, 0.0, False)
    """

    name: ClassVar[str] = "select_kernels"
    pack: bool = True
    """Whether a provider may lay out weights anew, which a model in memory then no longer shares."""
    autotune: bool = False
    """Whether providers of equal numerics are timed, where the target is this machine, and the fastest is taken."""

    def apply(self, program: Program, target: Target) -> int:
        calls = [node for node in program.graph.graph.nodes if node.op == "call_function" and node.target in SEMANTIC_OPS]
        packable = {name: program.weights.format_of(name) for name in program.weights} if self.pack else {}
        tuner = tuner_of(target) if self.autotune else None
        chosen = _choose(calls, target, packable, tuner)
        if contested := _contested(program, chosen):
            rest = {name: form for name, form in packable.items() if name not in contested}
            chosen = _choose(calls, target, rest, tuner)
        if tuner is not None:
            tuner.timings.save()
        for node in calls:
            op = SEMANTIC_OPS[node.target]
            provider, against = chosen[node]
            node.target = provider.function
            note_choice(program, op.name, Choice(provider.name, {name: tuple(why) for name, why in against.items()}))
        return len(calls)


Chosen = dict[fx.Node, tuple[Provider, dict[str, list[str]]]]


def _choose(calls: list[fx.Node], target: Target, packable: dict[str, Format | None], tuner: Tuner | None) -> Chosen:
    """The provider of each call when these parameters, of these formats, may be packed, and the reasons against others."""
    chosen: Chosen = {}
    for node in calls:
        args, kwargs = fx.map_arg((node.args, node.kwargs), val)  # pyright: ignore
        parameters = {
            name: packable[str(value.target)]
            for name, value in arguments(node).items()
            if isinstance(value, fx.Node) and value.op == "get_attr" and value.target in packable
        }
        op = SEMANTIC_OPS[node.target]
        provider, against = op.choose(target, *args, parameters=parameters, **kwargs)
        if tuner is not None:
            found = tuner.judge(op, provider, target, *args, parameters=parameters, **kwargs)
            provider, against = found.provider, {**against, **found.against}
        chosen[node] = provider, against
    return chosen


def _contested(program: Program, chosen: Chosen) -> set[str]:
    """Parameters that their readers want in several forms (None: as they are): packed for one, a second copy would stay."""
    wanted: dict[str, set[Any]] = defaultdict(set)
    for node in program.graph.graph.nodes:
        for user in node.users if node.op == "get_attr" else ():
            packs = chosen[user][0].packs if user in chosen else {}
            names = [name for name, value in arguments(user).items() if value is node] if packs else []
            wanted[str(node.target)] |= {packs.get(name) for name in names} or {None}
    return {name for name, forms in wanted.items() if len(forms) > 1}
