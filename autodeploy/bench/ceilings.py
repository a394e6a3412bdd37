"""What this machine could reach with a model if nothing but reading and multiplying took time."""

from __future__ import annotations

from dataclasses import dataclass

from autodeploy.bench.workload import Cell


@dataclass(frozen=True)
class Machine:
    """Measured: bytes per second of a long read, FLOP per second of a large product, in the model's dtype or another."""

    read_rate: float
    flop_rate: float
    is_noisy: bool = False
    """Others were busy each time this was measured."""
    pages: str = "huge"
    """What was read from; where the system has only small ones, the limit is too low."""
    looks: tuple[float, ...] = ()
    """The read rate each time it was measured: a host that serves others too may give less in between."""

    def best_with(self, other: Machine) -> Machine:
        """A limit is the best that was seen."""
        rates = max(self.read_rate, other.read_rate), max(self.flop_rate, other.flop_rate)
        return Machine(*rates, self.is_noisy and other.is_noisy, self.pages, self.looks + other.looks)


@dataclass(frozen=True)
class ModelSize:
    """What one step must read and compute.

    body and head: numbers in the weights every token meets (of experts, those of its own); head_numbers is the part that only
    sampled rows meet. kv: (bytes per token, window or 0) of each cache. attention_flop: per query and key of one cache.
    """

    body_numbers: int
    head_numbers: int
    weight_bytes: int
    kv: tuple[tuple[int, int], ...]
    state_bytes: int
    attention_flop: int

    def cache_bytes(self, context: float) -> float:
        """What a token at that position reads."""
        return self.state_bytes + sum(size * min(context, window or context) for size, window in self.kv)

    def pairs(self, length: int) -> float:
        """Pairs of query and key in a causal prompt, over all caches."""
        windows = [min(window or length, length) for _, window in self.kv]
        return sum(window * (length - window / 2) for window in windows)


def decode_ceiling(machine: Machine, size: ModelSize, cell: Cell) -> float:
    """Tokens per second: weights are read once per step or multiplied, whichever takes longer, and every cache is read."""
    flop = 2 * (size.body_numbers + size.head_numbers) * cell.concurrency
    products = max(size.weight_bytes / machine.read_rate, flop / machine.flop_rate)
    caches = cell.concurrency * size.cache_bytes(cell.input_len + cell.output_len / 2) / machine.read_rate
    return cell.concurrency / (products + caches)


def prefill_ceiling(machine: Machine, size: ModelSize, cell: Cell) -> float:
    """Prompt tokens per second of one request; the head is applied to the last token alone."""
    flop = 2 * size.body_numbers * cell.input_len + 2 * size.head_numbers + size.attention_flop * size.pairs(cell.input_len)
    return cell.input_len / max(flop / machine.flop_rate, size.weight_bytes / machine.read_rate)


def e2e_ceiling(machine: Machine, size: ModelSize, cell: Cell) -> float:
    """Tokens per second from first request to last token: all prompts, then all further tokens, each at its ceiling."""
    prefill = cell.concurrency * cell.input_len / prefill_ceiling(machine, size, cell)
    decode = cell.concurrency * (cell.output_len - 1) / decode_ceiling(machine, size, cell)
    return cell.concurrency * cell.output_len / (prefill + decode)
