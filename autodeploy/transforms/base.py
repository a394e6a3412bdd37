"""What a graph pass is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from autodeploy.program import Program
from autodeploy.specs import Target


class Effect(StrEnum):
    """What a pass may change beside the shape of the graph."""

    REWRITE = "rewrite"  # the same function
    FUSION = "fusion"  # the same function, rounded elsewhere
    INPUTS = "inputs"  # placeholders or outputs
    PARAMETERS = "parameters"  # names, shapes or recipes of parameters; may round elsewhere
    SHARDING = "sharding"  # parameters and values become those of ranks that together compute the same
    NUMERICS = "numerics"  # values, on purpose


@dataclass(frozen=True, kw_only=True)
class Transform(ABC):
    """A graph pass. The fields of a subclass are its options.

    Contract: a program that checks before `apply` checks after it and computes the same function within the declared effect;
    applied once more it finds nothing to do. A pass never touches weight data: what it does to a parameter it writes as a
    recipe into `program.weights`.
    """

    name: ClassVar[str]
    effect: ClassVar[Effect] = Effect.REWRITE

    def __init_subclass__(cls) -> None:
        """Raises TypeError for a pass without a name."""
        name, is_abstract = getattr(cls, "name", None), getattr(cls.apply, "__isabstractmethod__", False)
        if not is_abstract and not (isinstance(name, str) and name):
            raise TypeError(f'the pass {cls.__name__} needs a name: write name: ClassVar[str] = "what_it_does"')

    @abstractmethod
    def apply(self, program: Program, target: Target) -> int:
        """Edit the program in place; return the number of rewrites made."""
