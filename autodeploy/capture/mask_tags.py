"""Masks while tracing: a tag that knows the rule of the mask, and turns into the tensor only where a model computes with it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import masking_utils

from autodeploy.capture.registry import registered, replaced


@dataclass(eq=False)
class MaskTag:
    """Stands for an attention mask: an attention call takes it as the rule it follows, anything else as the mask of eager.

    A slice of a mask follows the same rule.
    """

    index: int
    rule: Callable[..., Any]
    build: Callable[[], Tensor]

    @cached_property
    def tensor(self) -> Tensor:
        """[1, 1, T, T]: 0 where a key is seen, the lowest number elsewhere."""
        return self.build()

    def __getitem__(self, item: Any) -> MaskTag:
        return MaskTag(self.index, self.rule, lambda: self.tensor[item])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor, name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_as_tensor, (args, kwargs or {}))
        return function(*args, **kwargs)


def _as_tensor(value: Any) -> Any:
    return value.tensor if isinstance(value, MaskTag) else value


def _operator(name: str) -> Callable[..., Any]:
    return lambda tag, *others: getattr(operator, name)(tag.tensor, *map(_as_tensor, others))


for _name in ("add", "sub", "mul", "truediv", "lt", "le", "gt", "ge", "eq", "ne", "neg", "invert", "and_", "or_"):
    setattr(MaskTag, f"__{_name.removesuffix('_')}__", _operator(_name))


def tag_masks(model: nn.Module, state: Any) -> AbstractContextManager[None]:
    def tag(*args: Any, mask_function: Callable[..., Any], **kwargs: Any) -> MaskTag:
        def build() -> Tensor:
            return masking_utils.eager_mask(*args, mask_function=mask_function, **kwargs)

        state.masks.append(MaskTag(len(state.masks), mask_function, build))
        return state.masks[-1]

    return registered(masking_utils.AttentionMaskInterface, tag)


def count_chunks_from_zero(model: nn.Module, state: Any) -> AbstractContextManager[None]:
    def same_chunk(size: int, left_padding: Any) -> Callable[..., Any]:
        return lambda batch, head, query, key: key // size == query // size

    return replaced(masking_utils, "chunked_overlay", same_chunk)


def no_packing_by_positions(model: nn.Module, state: Any) -> AbstractContextManager[None]:
    return replaced(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
