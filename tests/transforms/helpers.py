"""Tiny programs for pass tests: any module with (input_ids, position_ids) -> logits, captured as a model would be."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from autodeploy.capture.export import capture
from autodeploy.capture.skeleton import skeleton_of
from autodeploy.program import Program
from autodeploy.specs import Target
from autodeploy.transforms.base import Transform
from autodeploy.transforms.pipeline import Pipeline
from tests.models.families import make_model

VOCAB, WIDTH = 64, 16


class Toy(nn.Module):
    """Embedding, one body, a head: the least that capture accepts."""

    def __init__(self, body: Callable[[Toy, Tensor, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.config: Any = SimpleNamespace(max_position_embeddings=60)
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.extra, self.body = nn.ModuleDict(modules), body

    def set_attn_implementation(self, name: str) -> None:
        self.config.implementation = name

    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.head(self.body(self, self.embed(input_ids), position_ids)))


def toy_program(body: Callable[[Toy, Tensor, Tensor], Tensor], **modules: nn.Module) -> tuple[Program, Toy]:
    torch.manual_seed(0)
    toy = Toy(body, **modules).eval()
    return capture(skeleton_of(toy), dict(toy.named_buffers())).program, toy


def family_program(name: str, **overrides: Any) -> tuple[Program, Any]:
    model = make_model(name, **overrides)
    return capture(skeleton_of(model), dict(model.named_buffers())).program, model


def apply(program: Program, *passes: Transform) -> list[int]:
    """Rewrites of each pass; the program checks after each."""
    Pipeline(passes).run(program, Target())
    return [record.rewrites for record in program.history[-len(passes) :]]
