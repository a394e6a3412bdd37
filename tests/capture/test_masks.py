"""A mask is believed only after its rule has been evaluated."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import and_masks, causal_mask_function, or_masks, sliding_window_causal_mask_function

from autodeploy import UnsupportedModelError
from autodeploy.capture.masks import visible_by_rule, visible_in
from autodeploy.custom_ops.attention import Visible


def chunked(size):
    return and_masks(causal_mask_function, lambda batch, head, query, key: key // size == query // size)


def test_causal_windowed_and_chunked_rules_are_recognised() -> None:
    assert visible_by_rule(causal_mask_function, 8192) == Visible()
    for size in (1, 8, 1000, 4096):
        assert visible_by_rule(sliding_window_causal_mask_function(size), 8192) == Visible(window=size)
    for size in (2, 8, 1000, 4096, 8192):
        assert visible_by_rule(chunked(size), 8192) == Visible(chunk=size)


def test_windows_and_chunks_are_read_from_a_matrix() -> None:
    query, key = torch.arange(41)[:, None], torch.arange(41)[None]
    for visible in (Visible(), Visible(window=1), Visible(window=7), Visible(chunk=7), Visible(chunk=20)):
        assert visible_in(visible.mask(query, key)) == visible
    assert visible_in(Visible(window=50, chunk=41).mask(query, key)) == Visible()
    seen = Visible(window=7).mask(query, key)
    seen[20, 16] = False
    with pytest.raises(UnsupportedModelError, match="neither causal nor a window or chunks"):
        visible_in(seen)


def prefix(batch, head, query, key):
    return key < 5


def not_far_away(batch, head, query, key):
    return query - key < 5000


NEITHER = "neither causal nor a window or chunks"
REFUSED = {
    "bidirectional": (lambda b, h, q, k: (q >= 0) & (k >= 0), "bidirectional: every token sees all others"),
    "prefix": (or_masks(causal_mask_function, prefix), "not causal: token 0 sees token 1, which comes after it"),
    "strictly causal": (lambda b, h, q, k: k < q, NEITHER),
    "two keys ahead": (lambda b, h, q, k: k <= q + 2, "token 0 sees token 1"),
    "every second key": (lambda b, h, q, k: (k <= q) & ((q - k) % 2 == 0), NEITHER),
    "changes late": (lambda b, h, q, k: (k <= q) & ((q < 4096) | (k > 7)), NEITHER),
    "chunks from the second token": (lambda b, h, q, k: (k <= q) & ((k + 1) // 8 == (q + 1) // 8), NEITHER),
}


@pytest.mark.parametrize("name", REFUSED)
def test_any_other_rule_is_refused(name: str) -> None:
    rule, reason = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=f"at here.*{reason}"):
        visible_by_rule(rule, 8192, source="here")


def test_a_rule_that_reads_data_is_refused() -> None:
    data = torch.ones(4, dtype=torch.bool)
    with pytest.raises(UnsupportedModelError, match="more than positions"):
        visible_by_rule(lambda b, h, q, k: (k <= q) & data[k], 8192)


def test_a_window_that_only_shows_beyond_the_early_tokens_is_found() -> None:
    assert visible_by_rule(and_masks(causal_mask_function, not_far_away), 8192) == Visible(window=5000)
