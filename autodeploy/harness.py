"""A served model for lm-eval, the Language Model Evaluation Harness: `autodeploy eval --task FILE`, with `autodeploy[eval]`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from autodeploy import LLM, SamplingParams
from autodeploy.errors import ConfigError

MAX_TOKENS = 256
"""Of an answer, where the task does not say."""


class ServedModel(LM):
    """An LLM as lm-eval asks it. Requests of a kind are submitted together, so that they are served as one batch."""

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self.llm = llm

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """(log probability of the continuation, whether greedy decoding would give it) of each (context, continuation)."""
        return self._scored([self._split(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """The log probability of each whole text, in pieces that fit into the model, each token seen once."""
        return [sum(score for score, _ in self._scored(self._pieces(request.args[0]))) for request in requests]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The text that follows each context, up to one of the strings that end it."""
        contexts, ways = zip(*(request.args for request in requests), strict=True)
        outputs = self.llm.generate(list(contexts), list(map(_params, ways)))
        failed = next((output.error for output in outputs if output.error is not None), None)
        if failed is not None:
            raise failed
        return [output.outputs[0].text for output in outputs]

    def _split(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Token ids of both, and where the continuation starts; blanks between them belong to it, as its tokens do."""
        blanks = len(context) - len(context.rstrip())
        if blanks:
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        both, before = self._encode(context + continuation), self._encode(context)
        return self._kept(both, max(1, len(before)))

    def _pieces(self, text: str) -> list[tuple[list[int], int]]:
        ids, size = self._encode(text), self.llm.compiled.max_seq_len - 1
        starts = range(1, len(ids), size)
        return [(ids[max(0, start - 1) : start + size], 1) for start in starts]

    def _kept(self, ids: list[int], start: int) -> tuple[list[int], int]:
        """The last tokens that fit into the model."""
        lost = max(0, len(ids) - self.llm.compiled.max_seq_len)
        return ids[lost:], max(1, start - lost)

    def _encode(self, text: str) -> list[int]:
        return self.llm.tokenizer.encode(text, verbose=False)

    def _scored(self, parts: Iterable[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Of each (token ids, first token that is scored)."""
        params, parts = SamplingParams(max_tokens=0), list(parts)
        handles = [self.llm.compiled.submit(ids, params, return_context_logits=True) for ids, _ in parts]
        return [_score(handle.result().context_logits, ids, start) for handle, (ids, start) in zip(handles, parts, strict=True)]


def _score(logits: Any, ids: list[int], start: int) -> tuple[float, bool]:
    """logits [len(ids), V]: those of row i are for token i + 1."""
    wanted = torch.tensor(ids[start:])
    rows = logits[start - 1 : -1].double().log_softmax(-1)
    return float(rows.gather(1, wanted[:, None]).sum()), bool((rows.argmax(1) == wanted).all())


def _params(how: dict[str, Any]) -> SamplingParams:
    stop = how.get("until") or ()
    is_drawn = bool(how.get("do_sample")) and how.get("temperature", 1.0) > 0
    return SamplingParams(
        max_tokens=how.get("max_gen_toks", MAX_TOKENS),
        stop=[stop] if isinstance(stop, str) else list(stop),
        temperature=how.get("temperature", 1.0) if is_drawn else None,
        top_p=how.get("top_p") if is_drawn else None,
    )


def run_task(llm: LLM, task: str, limit: int | None = None) -> dict[str, dict[str, Any]]:
    """Results by task name, metric by metric. task: a YAML file, or the name of one that lm-eval has. limit: of its questions."""
    file = Path(task)
    if file.suffix in (".yaml", ".yml") and not file.exists():
        raise ConfigError(f"{file}: there is no such task file")
    manager = TaskManager(include_path=str(file.parent), include_defaults=False) if file.exists() else TaskManager()
    name = file.stem if file.exists() else task
    if name not in manager.all_tasks:
        raise ConfigError(f"lm-eval knows no task '{name}'; the `task:` of a YAML file must be the file's own name")
    evaluate: Any = simple_evaluate  # its decorator hides its parameters
    found = evaluate(model=ServedModel(llm), tasks=[name], task_manager=manager, limit=limit, bootstrap_iters=0)
    return found["results"]
