"""What callers hand in: one prompt or several, as token ids, with parameters for each."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from autodeploy.config import SamplingParams
from autodeploy.errors import ConfigError, RequestError


def is_single(prompts: Any) -> bool:
    """One prompt, not a list of them (an empty list is an empty prompt)."""
    is_list = isinstance(prompts, Sequence) and not isinstance(prompts, str)
    return not is_list or not prompts or isinstance(prompts[0], Integral)


def token_ids(prompt: Any) -> list[int]:
    """A prompt of token ids as ints. Raises RequestError for anything else."""
    if isinstance(prompt, Sequence) and all(isinstance(token, Integral) for token in prompt):
        return [int(token) for token in prompt]
    kinds = sorted({type(token).__name__ for token in prompt}) if isinstance(prompt, Sequence) else []
    what = f"{type(prompt).__name__}{' of ' if kinds else ''}{' and '.join(kinds)}"
    raise RequestError(f"a prompt is text or a list of token ids, not {what}; a tensor or an array has tolist()")


def spread(params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int) -> list[SamplingParams]:
    """One SamplingParams per prompt, from none, one, or one each."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if not isinstance(params, Sequence) or not all(isinstance(item, SamplingParams) for item in params):
        raise ConfigError(f"sampling_params is a {type(params).__name__}; give a SamplingParams, or a list of one per prompt")
    if len(params) != num_prompts:
        raise ConfigError(f"{len(params)} sampling_params for {num_prompts} prompts; give one, or one for each")
    return list(params)
