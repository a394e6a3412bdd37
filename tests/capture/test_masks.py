"""A mask is believed only after its rule has been evaluated."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import and_masks, causal_mask_function, or_masks, sliding_window_causal_mask_function

from autodeploy import UnsupportedModelError
from autodeploy.capture.masks import window_of


def test_causal_and_windowed_rules_are_recognised() -> None:
    assert window_of(causal_mask_function, 8192, "here") == 0
    for window in (1, 8, 1000, 4096):
        assert window_of(sliding_window_causal_mask_function(window), 8192, "here") == window


def prefix(batch, head, query, key):
    return key < 5


def chunked(batch, head, query, key):
    return (key // 64) == (query // 64)


def not_far_away(batch, head, query, key):
    return query - key < 5000


REFUSED = {
    "bidirectional": lambda b, h, q, k: (q >= 0) & (k >= 0),
    "prefix": or_masks(causal_mask_function, prefix),
    "chunked": and_masks(causal_mask_function, chunked),
    "strictly causal": lambda b, h, q, k: k < q,
    "two keys ahead": lambda b, h, q, k: k <= q + 2,
    "every second key": lambda b, h, q, k: (k <= q) & ((q - k) % 2 == 0),
    "changes late": lambda b, h, q, k: (k <= q) & ((q < 4096) | (k > 7)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_any_other_rule_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="neither causal nor a sliding window"):
        window_of(REFUSED[name], 8192, "here")


def test_a_rule_that_reads_data_is_refused() -> None:
    data = torch.ones(4, dtype=torch.bool)
    with pytest.raises(UnsupportedModelError, match="more than positions"):
        window_of(lambda b, h, q, k: (k <= q) & data[k], 8192, "here")


def test_a_window_that_only_shows_beyond_the_early_tokens_is_found() -> None:
    assert window_of(and_masks(causal_mask_function, not_far_away), 8192, "here") == 5000
