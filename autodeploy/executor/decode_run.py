"""Requests that all decode, advanced together: while nobody comes, ends or asks, a step costs the same for 1 and for 256.

Their tokens are columns of one array, which reach the requests when the run ends, or at once when one of them streams.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autodeploy.executor.batch import BatchBuilder, WantedRows
from autodeploy.executor.cuda_graphs import LaunchedStep
from autodeploy.executor.outputs import RequestHandle
from autodeploy.executor.request import Request
from autodeploy.specs import BatchMetadata


class DecodeRun:
    """Goes on from the step that `batches` has built last, a decode of each of these requests, whose tokens they have."""

    def __init__(
        self, rows: Sequence[WantedRows], batches: BatchBuilder, vocab_size: int, streams: Sequence[RequestHandle] = ()
    ) -> None:
        self.rows = list(rows)
        self.requests = [row.entry.request for row in rows]
        self._batches, self._streams = batches, streams
        self._inputs = np.array([request.output_token_ids[-1] for request in self.requests], dtype=np.int64)
        self._sampled: list[np.ndarray] = []
        self.under_way: list[LaunchedStep] = []
        """Steps whose tokens are not taken yet, in order."""
        self._steps_left = min(request.max_new_tokens - len(request.output_token_ids) for request in self.requests) - 1
        self._stops = np.zeros(vocab_size, dtype=np.bool_)
        for request in self.requests:
            self._stops[[token for token in request.stop_ids if token < vocab_size]] = True

    @classmethod
    def suits(cls, request: Request) -> bool:
        """Whether nothing but its stop ids and its length needs to be looked at after each token."""
        params = request.sampling_params
        return params.is_plain_argmax and not (params.stop_strings or request.return_context_logits or request.is_finished)

    def advance(self) -> BatchMetadata | None:
        """The arrays of the next step; None when the scheduler is to decide, since a request may end or needs a page.

        With a step under way, it goes on with the tokens of that one, and those in the arrays are old.
        """
        return self._batches.advance(self._inputs, self.requests) if self._steps_left > len(self.under_way) else None

    def take(self, tokens: np.ndarray) -> bool:
        """Keep the tokens [num_requests] of the step, unless one of them may end its request; whether they are kept."""
        if self._stops[tokens].any():
            return False
        self._inputs = tokens
        self._sampled.append(tokens)
        self._steps_left -= 1
        if self._streams:
            self.hand_over()
        return True

    def hand_over(self) -> None:
        """Give the requests the tokens that they have not got yet, as at the end of the run."""
        if not self._sampled:
            return
        for request, tokens in zip(self.requests, np.stack(self._sampled, axis=1).tolist(), strict=True):
            request.extend(tokens)
            request.num_computed_tokens = request.num_tokens - 1
            self._batches.kv.update(request)
        self._sampled.clear()
        for handle in self._streams:
            handle.publish()
