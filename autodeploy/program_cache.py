"""The program cache: a second start of a checkpoint folder with the same options runs the lowered program of the first one.

Stored are the program (JSON, its recipes over the names of the checkpoint), the initial values that it reads (safetensors) and
what serving must know of the model. What is read back is what was written, by its checksum, so nothing is derived again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor, nn

from autodeploy.checkpoint import CheckpointSource, raw_config
from autodeploy.collector import collector_at_rest
from autodeploy.config import LLMArgs
from autodeploy.custom_ops.attention_backend import backend_named
from autodeploy.errors import CheckpointError
from autodeploy.program import FILE_NAME as PROGRAM
from autodeploy.program import Program, decode_program
from autodeploy.program_key import NotCacheable, facts_of
from autodeploy.program_store import Facts, Store, model_name, store_of
from autodeploy.recipes import Convert, Initial, Recipe
from autodeploy.specs import ModelFacts, Target
from autodeploy.weights import TensorSource

INITIAL, MODEL = "initial.safetensors", "model.json"


@dataclass(frozen=True)
class Lowered:
    """What a start needs to run: the program, where its weights come from, and the model's facts."""

    program: Program
    source: TensorSource
    facts: ModelFacts
    text: bytes = b""
    """The program as it is stored, where it was read; `as_json` needs values that such a program has not got."""
    place: Place | None = None
    """Where it is stored, if it may be."""

    @property
    def as_json(self) -> bytes:
        return self.text or self.program.as_json().encode()


@dataclass(frozen=True)
class Place:
    """Where the program of one start is, or will be stored."""

    store: Store
    facts: Facts
    source: CheckpointSource

    @property
    def model(self) -> str:
        return model_name(self.source.folder)

    @collector_at_rest()
    def find(self) -> Lowered:
        """The stored program. Raises Miss."""
        files = self.store.read(self.facts, self.model)
        try:
            program, initial, model = decode_program(files[PROGRAM]), load(files[INITIAL]), json.loads(files[MODEL])
            facts = ModelFacts(frozenset(model["eos_token_ids"]), model["max_seq_len"], model["vocab_size"])
            for choice in program.providers.get("attention", ()):
                backend_named(choice.provider)
        except Exception as error:  # whatever it is, the program can be built again
            raise self.store.damaged(self.facts, f"{type(error).__name__}: {error}") from error
        self.source.initial = initial
        return Lowered(program, self.source, facts, files[PROGRAM], self)

    def keep(self, lowered: Lowered, initial: Mapping[str, Tensor]) -> str:
        """Store a program; empty, or why it is not stored. initial: the values of at least the leaves that it reads."""
        recipes = lowered.program.weights.recipes.values()
        if any(map(is_code, recipes)):
            return "its weights need a conversion that is code of transformers"
        read = {leaf.name for recipe in recipes for leaf in recipe.leaves() if isinstance(leaf, Initial)}
        values = {name: initial[name].detach().clone().contiguous() for name in sorted(read)}
        facts = lowered.facts
        model = {
            "eos_token_ids": sorted(facts.eos_token_ids),
            "max_seq_len": facts.max_seq_len,
            "vocab_size": facts.vocab_size,
        }

        def write_files(folder: Path) -> None:
            lowered.program.save(folder)
            decode_program((folder / PROGRAM).read_bytes())  # what cannot be read back is not stored
            (folder / INITIAL).write_bytes(save(values))
            (folder / MODEL).write_text(json.dumps(model))

        try:
            self.store.write(self.facts, self.model, write_files)
        except Exception as error:  # the start goes on without
            return str(error) or type(error).__name__
        return ""

    def note_memory(self, num_bytes: int) -> None:
        """Tell later starts what the weights take in memory."""
        self.store.note_memory(self.facts, num_bytes)


def place_of(args: LLMArgs, target: Target, passes: Iterable[Any] | None, *, is_watched: bool = False) -> Place | str:
    """Where the program of this start is stored, or why it is not. passes: those of an edited pipeline.

    is_watched: somebody wants to see the program after each pass.
    """
    store = store_of(args.program_cache)
    if store is None:
        return "switched off"
    if isinstance(args.model, nn.Module):
        return "the model is in memory"
    if args.verify == "numeric":
        return "verify='numeric' needs the passes"
    if is_watched:
        return "the passes are watched"
    try:
        raw_config(Path(args.model))
        source = CheckpointSource(Path(args.model))
        return Place(store, facts_of(args, target, passes, source), source)
    except (NotCacheable, CheckpointError, OSError) as error:  # what is wrong with a folder, the capture says again
        return str(error)


def is_code(recipe: Recipe) -> bool:
    """Whether a recipe has a step that is code of transformers, and so cannot be written down."""
    return isinstance(recipe, Convert) or any(map(is_code, recipe.sources))
