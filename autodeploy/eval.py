"""How good a model's answers are, and how far quantization takes it from what it was: `autodeploy eval`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autodeploy import LLM, RequestOutput, SamplingParams
from autodeploy.demo_questions import Question, check
from autodeploy.errors import ConfigError

MAX_ANSWER = 32
"""Tokens of an answer."""


@dataclass(frozen=True)
class Score:
    """What was found of one model; None where it was not asked for."""

    name: str
    right: int | None = None
    """Questions answered exactly."""
    questions: int = 0
    perplexity: float | None = None
    """exp of the mean negative log probability of the tokens of a text."""
    tokens: int = 0
    """That were looked at for perplexity and divergence."""
    divergence: float | None = None
    """Mean over tokens of KL(reference || this), in nats."""
    agreement: float | None = None
    """Share of tokens at which the most likely next token is the reference's."""


def score(
    name: str, llm: LLM, texts: Sequence[list[int]], questions: Sequence[Question] = (), reference: LLM | None = None
) -> Score:
    """texts: token ids, each looked at by itself, at least two. reference: what `llm` is compared with on them."""
    right = exact_matches(llm, questions) if questions else None
    loss = divergence = agreeing = 0.0
    count = 0
    for ids in texts:
        mine, following = log_probabilities(llm, ids), torch.tensor(ids[1:])
        loss -= float(mine.gather(1, following[:, None]).sum())
        count += len(following)
        if reference is not None:
            theirs = log_probabilities(reference, ids)
            divergence += float((theirs.exp() * (theirs - mine)).sum())
            agreeing += float((theirs.argmax(1) == mine.argmax(1)).sum())
    perplexity = math.exp(loss / count) if count else None
    if reference is None or not count:
        return Score(name, right, len(questions), perplexity, count)
    return Score(name, right, len(questions), perplexity, count, divergence / count, agreeing / count)


def exact_matches(llm: LLM, questions: Sequence[Question]) -> int:
    """How many questions are answered exactly, through the chat template and greedily."""
    outputs = llm.chat([_talk(question)[:1] for question in questions], SamplingParams(max_tokens=MAX_ANSWER))
    assert isinstance(outputs, list)
    answers = [_text(output) for output in outputs]
    return sum(check(question, answer) for question, answer in zip(questions, answers, strict=True))


def _text(output: RequestOutput) -> str:
    if output.error is not None:
        raise output.error
    return output.outputs[0].text


def log_probabilities(llm: LLM, ids: list[int]) -> Tensor:
    """Of each next token after those before it, [len(ids) - 1, V], in float64."""
    return llm.compiled(torch.tensor([ids]))[0, :-1].double().log_softmax(-1)


def windows(llm: LLM, text: str, length: int) -> list[list[int]]:
    """A text's tokens in pieces of that length, the last one shorter. Raises ConfigError for less than two tokens."""
    ids: list[int] = llm.tokenizer.encode(text, verbose=False)
    pieces = [piece for piece in _pieces(ids, min(length, llm.compiled.max_seq_len)) if len(piece) > 1]
    if not pieces:
        raise ConfigError("the text has less than two tokens; give a longer one")
    return pieces


def _pieces(ids: list[int], length: int) -> Iterator[list[int]]:
    return (ids[start : start + length] for start in range(0, len(ids), length))


def answered(llm: LLM, questions: Iterable[Question]) -> list[list[int]]:
    """The questions with their right answers, as the chat template puts them."""
    template: Any = llm.tokenizer.apply_chat_template
    texts = [template(_talk(question), tokenize=False) for question in questions]
    return [llm.tokenizer.encode(text, add_special_tokens=False) for text in texts]


def _talk(question: Question) -> list[dict[str, str]]:
    return [{"role": "user", "content": question.prompt}, {"role": "assistant", "content": question.answer}]
