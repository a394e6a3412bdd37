"""select_kernels: every semantic op becomes a direct call of one provider's function."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from autodeploy.custom_ops import SEMANTIC_OPS, Provider, paged_attention
from autodeploy.custom_ops.attention_backend import PagedBackend
from autodeploy.custom_ops.autotune import Tuner, tuner_of
from autodeploy.errors import ConfigError, did_you_mean
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
    attention: str = "auto"
    """The provider of `paged_attention` that must serve it (torch: the reference); auto: as for other ops."""

    def apply(self, program: Program, target: Target) -> int:
        _refuse_other_backends(program, self.attention)
        calls = [node for node in program.graph.graph.nodes if node.op == "call_function" and node.target in SEMANTIC_OPS]
        packable = {name: program.weights.format_of(name) for name in program.weights} if self.pack else {}
        tuner = tuner_of(target) if self.autotune else None
        chosen = _choose(calls, target, packable, tuner, self.attention)
        if contested := _contested(program, chosen):
            rest = {name: form for name, form in packable.items() if name not in contested}
            chosen = _choose(calls, target, rest, tuner, self.attention)
        if tuner is not None:
            tuner.timings.save()
        for node in calls:
            op = SEMANTIC_OPS[node.target]
            provider, against = chosen[node]
            node.target = provider.function
            note_choice(program, op.name, Choice(provider.name, {name: tuple(why) for name, why in against.items()}))
        return len(calls)


Chosen = dict[fx.Node, tuple[Provider, dict[str, list[str]]]]


def _choose(
    calls: list[fx.Node], target: Target, packable: dict[str, Format | None], tuner: Tuner | None, attention: str
) -> Chosen:
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
        if op is paged_attention and attention != "auto":
            chosen[node] = asked_attention(attention, target, *args, **kwargs), {}
            continue
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


ATTENTION = {"flashinfer": "flashinfer", "triton": "triton", "cpp": "cpp", "torch": "reference"}
"""Name for users -> provider of `paged_attention`."""


def asked_attention(name: str, target: Target, *args: Any, **kwargs: Any) -> Provider:
    """The provider of that name for a call of `paged_attention`. Raises ConfigError when it has something against the call."""
    if name not in ATTENTION:
        raise ConfigError(f"attention_backend='{name}' is none of {', '.join(ATTENTION)}.{did_you_mean(name, ATTENTION)}")
    named = {each: paged_attention.named(provider) for each, provider in ATTENTION.items()}
    against = {each: paged_attention.reasons_against(named[each], target, *args, **kwargs) for each in named}
    if against[name]:
        others = " or ".join(f"'{each}'" for each, reasons in against.items() if not reasons)
        raise ConfigError(
            f"attention_backend='{name}' cannot serve this model here: {', '.join(against[name])}. "
            f"Leave attention_backend out, or use {others}."
        )
    return named[name]


def refuse_attention(name: str, target: Target) -> None:
    """Raises ConfigError where a backend has something against the plainest call of `paged_attention`, which no model changes."""
    sizes = {"q": (1, 8, 1, 128), "cache": (1, target.page_size, 8, 256)}
    q, cache = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in sizes.values())
    table = torch.empty(1, 1, dtype=torch.int64, device="meta")
    bounds, lengths = (torch.empty(size, dtype=torch.int32, device="meta") for size in (2, 1))
    asked_attention(name, target, q, cache, table, bounds, lengths, None, 1.0, 0, 0.0, 128)


def _refuse_other_backends(program: Program, attention: str) -> None:
    """An attention backend of a plugin has ops of its own, which no provider of `paged_attention` serves."""
    others = {choice.provider for choice in program.providers.get("attention", ())} - {PagedBackend.name}
    if others and attention != "auto":
        raise ConfigError(f"attention_backend='{attention}', but a plugin's '{others.pop()}' serves attention; leave one out")
