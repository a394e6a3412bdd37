"""Recurrent ops: a function over sequences and states becomes an op over a whole row, and one over requests with state slots."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from autodeploy.custom_ops.op import SemanticOp, semantic_op
from autodeploy.specs import RecurrentState

RECURRENT_OPS: dict[Any, RecurrentOp] = {}
"""torch overload of the op over a whole sequence -> what is known of it."""
REQUESTS = {"state_cache": Tensor, "state_slots": Tensor, "cu_seqlens_q": Tensor, "seq_lens": Tensor}
"""Arguments of the op over requests behind those of the op over one sequence."""


@dataclass(frozen=True)
class RecurrentOp:
    """A recurrence: `run(*args, state)` maps sequences [N, S, ...] and states [N, ...] to (outputs [N, S, ...], states)."""

    run: Callable[..., tuple[Tensor, Tensor]]
    whole: SemanticOp
    """The op over one sequence from its first token: token arguments [1, T, ...] -> [1, T, ...]."""
    cached: SemanticOp
    """The op over the requests of a row, each going on from the state in its slot, or from zero at its first token."""
    state: Callable[..., tuple[tuple[int, ...], torch.dtype]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.whole(*args, **kwargs)

    def cache_spec(self, *args: Any) -> RecurrentState:
        shape, dtype = self.state(*args)
        return RecurrentState(tuple(int(size) for size in shape), str(dtype).removeprefix("torch."))


def state_dtype(x: Tensor) -> torch.dtype:
    """States are kept in float32, or better when the values are."""
    return torch.promote_types(x.dtype, torch.float32)


def recurrent_op(
    *,
    tokens: Sequence[str],
    state: Callable[..., tuple[tuple[int, ...], torch.dtype]],
    output: Callable[..., Tensor] = lambda x, *_: torch.empty_like(x),
) -> Callable[[Callable[..., tuple[Tensor, Tensor]]], RecurrentOp]:
    """Register a recurrence under its function's name, and under `<name>_cached`. Its last parameter is the state.

    tokens: names of the arguments that have one row per token. state: arguments -> (shape of one request's state, dtype).
    output: arguments -> an empty tensor of the output's shape and dtype, never touching values or branching on T.
    """

    def register(run: Callable[..., tuple[Tensor, Tensor]]) -> RecurrentOp:
        parameters = list(inspect.signature(run, eval_str=True).parameters.values())[:-1]
        where = [i for i, parameter in enumerate(parameters) if parameter.name in tokens]
        assert len(where) == len(tokens), f"{run.__name__} has no parameters {tokens}"

        def whole(*args: Any) -> Tensor:
            shape, dtype = state(*args)
            return run(*args, args[where[0]].new_zeros(1, *shape, dtype=dtype))[0]

        def cached(*args: Any) -> Tensor:
            return _run_requests(run, where, output, args[:-4], *args[-4:])

        def shape_rule(*args: Any) -> Tensor:
            return output(*args[: len(parameters)])

        op = RecurrentOp(
            run,
            semantic_op(fake=shape_rule)(_signed(whole, run.__name__, parameters)),
            semantic_op(fake=shape_rule, mutates=["state_cache"])(
                _signed(cached, f"{run.__name__}_cached", [*map(_required, parameters), *_request_parameters()])
            ),
            state,
        )
        RECURRENT_OPS[op.whole.overload] = op
        return op

    return register


def _run_requests(
    run: Callable[..., tuple[Tensor, Tensor]],
    where: list[int],
    output: Callable[..., Tensor],
    args: tuple[Any, ...],
    state_cache: Tensor,
    state_slots: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
) -> Tensor:
    """Requests with equally many new tokens are computed together: all decodes of a step in one call."""
    result = output(*args)
    bounds, lengths = cu_seqlens_q.tolist(), seq_lens.tolist()
    groups = defaultdict[int, list[int]](list)
    for i, (start, stop) in enumerate(pairwise(bounds)):
        groups[stop - start].append(i)
    for num_new, members in groups.items():
        rows = torch.tensor([list(range(bounds[i], bounds[i] + num_new)) for i in members], device=result.device)
        slots = state_slots[members]
        states = state_cache[slots]
        states[[lengths[i] == num_new for i in members]] = 0
        own = [arg[0, rows] if i in where and arg is not None else arg for i, arg in enumerate(args)]
        result[0, rows], state_cache[slots] = run(*own, states)
    return result


def _signed(function: Callable[..., Tensor], name: str, parameters: list[inspect.Parameter]) -> Any:
    """The function under a name and a signature of its own, from which its schema is derived."""
    function.__name__ = name
    function.__signature__ = inspect.Signature(parameters, return_annotation=Tensor)  # pyright: ignore[reportFunctionMemberAccess]
    return function


def _required(parameter: inspect.Parameter) -> inspect.Parameter:
    return parameter.replace(default=inspect.Parameter.empty)


def _request_parameters() -> list[inspect.Parameter]:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in REQUESTS.items()]
