"""quantize_cache: keys and values are kept in 8 bits, each head of a token as multiples of a scale of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from autodeploy.errors import ConfigError
from autodeploy.program import Program
from autodeploy.specs import SCALED_DTYPES, PagedKV, Target
from autodeploy.transforms.base import Effect, Transform
from autodeploy.transforms.rewrite import set_cache


@dataclass(frozen=True, kw_only=True)
class QuantizeCache(Transform):
    """Every paged cache becomes one of 8 bits; states of recurrent layers stay as they are.

    Scales are those of the numbers themselves, found as they are written, so that nothing is calibrated and a request's numbers
    depend on the request alone.

    before:  kv_cache_0: bfloat16 [pages, page, 8, 256]
    after:   kv_cache_0: int8 [pages, page, 8, 264]
    """

    name: ClassVar[str] = "quantize_cache"
    effect: ClassVar[Effect] = Effect.NUMERICS
    dtype: str = "int8"
    """Or float8_e4m3fn."""

    def apply(self, program: Program, target: Target) -> int:
        found = [(name, spec) for name, spec in program.caches.items() if isinstance(spec, PagedKV)]
        wide = {name: spec for name, spec in found if spec.dtype not in SCALED_DTYPES}
        for name, spec in wide.items():
            if spec.numbers % 4:
                raise ConfigError(
                    f"kv_cache_config: dtype={self.dtype!r} needs heads whose key and value have a multiple of 4 numbers, and "
                    f"{name} has {spec.numbers}. Leave 'dtype' out"
                )
            set_cache(program, name, replace(spec, dtype=self.dtype))
        return len(wide)
