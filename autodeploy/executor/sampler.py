"""The next token of each request, from the logits of its newest one."""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from autodeploy.config import SamplingParams
from autodeploy.custom_ops import triton_sampling
from autodeploy.custom_ops.cpp_sampling import at_least, finite_argmax, largest_of_rows
from autodeploy.errors import ExecutionError
from autodeploy.executor.request import Request

COLUMNS = 512
LEAST_TOP_P = 1e-6
"""Less keeps the most likely token alone, as this does; some of it is no number of 32 bits."""


class _History:
    """Which tokens one request has seen, kept up to date by its new output only."""

    def __init__(self, prompt_token_ids: list[int], vocab_size: int, device: torch.device) -> None:
        self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)  # in prompt or output
        self.counts = torch.zeros(vocab_size, device=device)  # how often in the output
        self._num_counted = 0
        self.seen[torch.tensor(prompt_token_ids, device=device)] = True

    def update(self, output_token_ids: list[int]) -> None:
        new = torch.tensor(output_token_ids[self._num_counted :], dtype=torch.long, device=self.seen.device)
        self.seen[new] = True
        self.counts.index_add_(0, new, torch.ones(len(new), device=new.device))
        self._num_counted = len(output_token_ids)


class Sampler:
    """Chooses tokens as each request's `SamplingParams` say.

    What a request draws depends on its own logits, parameters and seed alone, not on the batch it is in: every request has a
    generator of its own, on the CPU, which gives one number per token. `vocab_size` is the number of token ids; further
    columns of the logits are padding. `seed` is for requests that bring none: they draw from it and their id.
    """

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self.vocab_size = vocab_size
        self.seed = seed
        self._generators: dict[int, torch.Generator] = {}
        self._histories: dict[int, _History] = {}

    def __call__(self, logits: Tensor, requests: list[Request]) -> list[int | ExecutionError]:
        """One token per row of `logits` [num_requests, vocab], of any float dtype; an error for a row that is not finite."""
        logits = logits[:, : self.vocab_size]
        largest, tokens = largest_of_rows(logits)
        drawn = self._draw_together(logits, largest, tokens, requests)
        found = _side_by_side(largest, tokens).cpu().numpy()
        result = [choice_of(request, row) for request, row in zip(requests, found, strict=True)]
        for row, request in enumerate(requests):
            if isinstance(result[row], int) and not (request.sampling_params.is_plain_argmax or row in drawn):
                result[row] = self._sample(logits[row].float(), request)
        return result

    def greedy(self, logits: Tensor) -> Tensor:
        """The largest logit of each row and its token, [N, 2] float64: one tensor comes to the host in one copy."""
        return _side_by_side(*largest_of_rows(logits[:, : self.vocab_size]))

    def largest(self, logits: Tensor) -> np.ndarray | None:
        """The token of the largest logit of each row, as for requests that want no more; None when one is not finite."""
        if logits.device.type != "cpu":
            return tokens_of(self.greedy(logits).cpu().numpy())
        return finite_argmax(logits, self.vocab_size)

    def forget(self, request: Request) -> None:
        """Drop what is remembered of a request that has ended; no harm when there is nothing."""
        self._generators.pop(request.request_id, None)
        self._histories.pop(request.request_id, None)

    def _draw_together(self, logits: Tensor, largest: Tensor, tokens: Tensor, requests: list[Request]) -> set[int]:
        """Put into `tokens` what requests draw from their logits as they are, all by one launch on a GPU; the rows of these."""
        if not triton_sampling.fits(logits):
            return set()
        rows = [row for row, request in enumerate(requests) if _draws_plainly(request)]
        if rows:
            settings = [(row, *_settings(requests[row].sampling_params), self._uniform(requests[row])) for row in rows]
            columns = torch.tensor(settings, dtype=torch.float64).T.contiguous()
            triton_sampling.draw(logits, largest, columns.to(logits.device), tokens)
        return set(rows)

    def _sample(self, scores: Tensor, request: Request) -> int | ExecutionError:
        """A token from one row of logits [vocab] float32."""
        params = request.sampling_params
        if params.has_penalties:
            scores = self._penalised(scores, request)
        if not request.may_stop:
            banned = [token for token in request.stop_ids if token < self.vocab_size]
            scores = scores.index_fill(0, torch.tensor(banned, dtype=torch.long, device=scores.device), -math.inf)
        highest, best = (found.item() for found in largest_of_rows(scores[None]))
        if not math.isfinite(highest):
            return _not_finite(request, highest)
        if params.greedy:
            return int(best)
        tokens, probabilities = distribution(scores, params)
        return int(tokens[_draw(probabilities, self._uniform(request))])

    def _penalised(self, scores: Tensor, request: Request) -> Tensor:
        """Scores less the penalties for tokens seen: repetition over prompt and output, the others over the output."""
        history = self._histories.get(request.request_id)
        if history is None:
            history = _History(request.prompt_token_ids, self.vocab_size, scores.device)
            self._histories[request.request_id] = history
        history.update(request.output_token_ids)
        params = request.sampling_params
        factor = params.repetition_penalty
        scores = torch.where(history.seen, torch.where(scores < 0, scores * factor, scores / factor), scores)
        return scores - params.frequency_penalty * history.counts - params.presence_penalty * (history.counts > 0)

    def _uniform(self, request: Request) -> float:
        """The request's next number in [0, 1)."""
        generator = self._generators.get(request.request_id)
        if generator is None:
            seed = request.sampling_params.seed
            generator = torch.Generator().manual_seed(self._derived_seed(request) if seed is None else seed)
            self._generators[request.request_id] = generator
        return torch.rand((), generator=generator, dtype=torch.float64).item()

    def _derived_seed(self, request: Request) -> int:
        digest = hashlib.blake2b(f"{self.seed}/{request.request_id}".encode(), digest_size=7).digest()
        return int.from_bytes(digest)


def _side_by_side(largest: Tensor, tokens: Tensor) -> Tensor:
    return torch.stack((largest.double(), tokens.double()), dim=1)


def tokens_of(found: np.ndarray) -> np.ndarray | None:
    """The tokens [N] of what `greedy` gives; None when a logit is not finite."""
    return found[:, 1].astype(np.int64) if np.isfinite(found[:, 0]).all() else None


def choice_of(request: Request, found: np.ndarray) -> int | ExecutionError:
    """The token of one row of what `greedy` gives, or why there is none."""
    return int(found[1]) if math.isfinite(found[0]) else _not_finite(request, float(found[0]))


def _draws_plainly(request: Request) -> bool:
    """Whether a token is drawn, and nothing changes the logits before."""
    params = request.sampling_params
    return request.may_stop and not (params.greedy or params.has_penalties)


def _settings(params: SamplingParams) -> tuple[float, int, float, float]:
    """temperature, top_k, top_p and min_p as numbers, those that take nothing away where none is given."""
    temperature = 1.0 if params.temperature is None else params.temperature
    return temperature, params.top_k or 0, 1.0 if params.top_p is None else max(params.top_p, LEAST_TOP_P), params.min_p or 0.0


def distribution(scores: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Token ids [kept] and their probabilities [kept] float32 after temperature, top_k, top_p and min_p, in this order.

    `scores` is [vocab] float32 with a finite maximum. All tokens that tie with the last of the top k are kept.
    """
    temperature, top_k, top_p, min_p = _settings(params)
    scores = (scores - scores.max()) / temperature
    if 0 < top_k < len(scores):
        tokens = _largest(scores, top_k)
        probabilities = scores[tokens].softmax(dim=-1)
    else:
        tokens = torch.arange(len(scores), device=scores.device)
        probabilities = scores.softmax(dim=-1)
    if top_p < 1.0:
        likely = at_least(probabilities, (1.0 - top_p) / len(probabilities))  # all others together weigh less than 1 - top_p
        probabilities, order = probabilities[likely].sort(descending=True, stable=True)
        mass_before = probabilities.cumsum(dim=-1) - probabilities
        num_kept = int((mass_before < top_p).sum())
        tokens, probabilities = tokens[likely[order[:num_kept]]], probabilities[:num_kept]
    if min_p:
        kept = at_least(probabilities, float(min_p * probabilities.max()))
        tokens, probabilities = tokens[kept], probabilities[kept]
    return tokens, probabilities / probabilities.sum()


def _largest(scores: Tensor, count: int) -> Tensor:
    """Where the largest numbers of `scores` [vocab] are, that many and all that tie with the last of them, in ascending order.

    The largest numbers of as many columns are a bound that few others reach: only those are compared with each other.
    """
    columns = scores[: len(scores) // COLUMNS * COLUMNS].view(-1, COLUMNS)
    if count > COLUMNS // 2 or not len(columns):
        return at_least(scores, float(scores.topk(count).values[-1]))
    places = at_least(scores, float(columns.amax(dim=0).topk(count).values[-1]))
    candidates = scores[places]
    return places[candidates >= candidates.topk(count).values[-1]]


def _draw(probabilities: Tensor, uniform: float) -> int:
    """Index of the interval of the running sum of `probabilities` that holds `uniform`, a number in [0, 1)."""
    bounds = probabilities.double().cumsum(dim=-1)
    total = float(bounds[-1])
    target = min(uniform * total, math.nextafter(total, 0.0))  # the product may round up to the total
    return int(torch.searchsorted(bounds, target, right=True))


def _not_finite(request: Request, highest: float) -> ExecutionError:
    return ExecutionError(
        f"Request {request.request_id}: the largest logit after {request.num_tokens} tokens is {highest}, not a finite number. "
        "The weights or the element type overflow; try dtype='float32'."
    )
