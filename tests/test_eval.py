"""What `autodeploy eval` says is what Hugging Face's own model gives, and rounding shows in it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from autodeploy import LLM, ConfigError
from autodeploy.cli import DEMO_MODEL, app
from autodeploy.demo_questions import Question, held_out_questions
from autodeploy.eval import answered, exact_matches, score, windows


def test_perplexity_and_divergence_by_another_way() -> None:
    questions = held_out_questions(20)
    with LLM(str(DEMO_MODEL)) as plain, LLM(str(DEMO_MODEL), quantization="int4") as rounded:
        texts = answered(plain, questions)
        one, other, same = (
            score("plain", plain, texts),
            score("int4", rounded, texts, (), plain),
            score("", plain, texts, (), plain),
        )
        stored = {name: rounded.compiled.program.weights[name] for name in rounded.compiled.program.weights}
    assert any("int4" in str(recipe) for recipe in stored.values())
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    with torch.no_grad():
        losses = [float(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss) * (len(ids) - 1) for ids in texts]
    tokens = sum(len(ids) - 1 for ids in texts)
    assert one.perplexity == pytest.approx(math.exp(sum(losses) / tokens), rel=1e-4) and one.tokens == other.tokens == tokens
    assert same.divergence == pytest.approx(0, abs=1e-9) and same.agreement == 1
    assert other.divergence is not None and other.divergence > 1e-4 and one.divergence is None


def test_answers_are_checked_and_the_talk_is_the_chat_templates() -> None:
    questions = held_out_questions(12)
    wrong = [Question(each.prompt, each.answer + "?", each.key) for each in questions[:5]]
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    with LLM(str(DEMO_MODEL)) as llm:
        assert exact_matches(llm, questions) >= 11 and exact_matches(llm, wrong) == 0
        assert all(
            question.answer in tokenizer.decode(ids) for question, ids in zip(questions, answered(llm, questions), strict=True)
        )
        pieces = windows(llm, "What is 12+13? " * 40, 16)
        assert {len(piece) for piece in pieces[:-1]} == {16} and 2 <= len(pieces[-1]) <= 16
        with pytest.raises(ConfigError, match="less than two tokens"):
            windows(llm, "", 16)


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("What is 100+200? 300. Reverse: abc. cba. " * 3)
    options = ["eval", "--quantization", "w8a8", "--questions", "10", "--text", str(file), "--window", "32", "--json"]
    done = CliRunner().invoke(app, options, catch_exceptions=False)
    reference, rounded = json.loads(done.stdout)
    assert (reference["name"], rounded["name"]) == ("reference", "w8a8") and reference["questions"] == 10
    assert reference["divergence"] is None and 0 < rounded["divergence"] < 0.01 and rounded["agreement"] > 0.95
    shown = CliRunner().invoke(app, ["eval", "--questions", "5"], catch_exceptions=False).stdout
    assert "of 5 (" in shown and "perplexity" in shown
