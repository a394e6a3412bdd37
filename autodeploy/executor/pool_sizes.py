"""How many pages and state slots the caches get: all pools of a model are sized together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from autodeploy.errors import ConfigError
from autodeploy.executor.kv_cache import CacheManager, KVCacheManager, StateManager
from autodeploy.specs import PAGES, STATES, CacheSpec, window_of_pool


@dataclass(frozen=True)
class PoolSizes:
    """What bounds the caches of a model. One number decides: how many pages a pool has that keeps every token."""

    specs: Collection[CacheSpec]
    max_batch_size: int
    max_seq_len: int
    page_size: int
    max_step: int
    """The most tokens of one request that one step computes."""
    shares: Sequence[Collection[CacheSpec]] = ()
    """What of `specs` each stage has; empty where there is one."""

    def units(self, num_pages: int) -> dict[str, int]:
        """Pages of each pool and slots of the states, their scratch units included."""
        pools = sorted({spec.pool for spec in self.specs} or {PAGES})
        return {pool: 1 + self._usable(pool, num_pages) for pool in pools}

    def _usable(self, pool: str, num_pages: int) -> int:
        """A window pool never needs more than its requests can hold at once."""
        if pool == STATES:
            return self.max_batch_size
        if window := window_of_pool(pool):
            one = KVCacheManager(2, self.page_size, window, self.max_step)
            return min(num_pages, self.max_batch_size * one.num_pages_held(self.max_seq_len))
        return num_pages

    def num_bytes(self, num_pages: int) -> int:
        """On a rank of the stage with the most."""
        units = self.units(num_pages)
        return max(
            sum(spec.bytes_per_unit(self.page_size) * units[spec.pool] for spec in own) for own in self.shares or [self.specs]
        )

    def num_pages(self, max_tokens: int | None, max_bytes: int) -> int:
        """Pages for all requests at full length, or what tokens and bytes allow. Raises ConfigError when that is none."""
        wanted = self.max_batch_size * -(-self.max_seq_len // self.page_size)
        if max_tokens is not None:
            wanted = -(-max_tokens // self.page_size)
        if self.num_bytes(wanted) <= max_bytes:
            return wanted
        low, high = 0, wanted  # low fits (or nothing does), high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.num_bytes(middle) <= max_bytes else (low, middle)
        if low == 0:
            raise ConfigError(
                f"kv_cache_config leaves room for no page of {self.page_size} tokens: the smallest caches take "
                f"{self.num_bytes(1)} bytes, and {max_bytes} may be used. Raise max_bytes or lower max_batch_size."
            )
        return low

    def manager(self, units: Mapping[str, int]) -> CacheManager:
        """Who hands the units out."""
        pools = {
            pool: KVCacheManager(count, self.page_size, window_of_pool(pool), self.max_step)
            for pool, count in units.items()
            if pool != STATES
        }
        return CacheManager(pools, StateManager(units[STATES]) if STATES in units else None)
