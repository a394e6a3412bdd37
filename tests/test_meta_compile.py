"""Published shapes compile from their configs alone, in bounded time and memory, with one semantic op per layer."""

from __future__ import annotations

import pytest

from benchmarks.meta_compile import COUNTS, LIMITS, MAX_BYTES, in_own_process


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LIMITS)
def test_a_published_shape_compiles_in_time(name: str) -> None:
    figures = in_own_process(name)
    assert figures["ops"] == COUNTS[name]
    assert figures["total"] <= LIMITS[name], figures
    assert figures["peak_bytes"] < MAX_BYTES, figures
