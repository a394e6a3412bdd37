"""lm-eval over a served model: log probabilities and answers are those that Hugging Face's own model gives."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from autodeploy import LLM, ConfigError
from autodeploy.cli import DEMO_MODEL, app
from autodeploy.demo_questions import held_out_questions
from autodeploy.harness import ServedModel, run_task

PAIRS = [("What is 12+13?", " 25"), ("Reverse: abc. ", "cba"), ("", "What is"), ("1+1=", "2")]


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


@torch.no_grad()
def test_log_probabilities_by_another_way() -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(DEMO_MODEL), AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    with LLM(str(DEMO_MODEL), max_seq_len=40) as llm:
        served = ServedModel(llm)
        found = served.loglikelihood([request(*pair) for pair in PAIRS])
        (rolling,) = served.loglikelihood_rolling([request("What is 12+13? 25. " * 8)])
    for (score, is_greedy), (context, continuation) in zip(found, PAIRS, strict=True):
        both, first = tokenizer.encode(context + continuation), len(tokenizer.encode(context.rstrip()))
        logits = model(torch.tensor([both])).logits[0].double().log_softmax(-1)
        rows = range(max(first, 1), len(both))
        assert score == pytest.approx(sum(float(logits[i - 1, both[i]]) for i in rows), abs=1e-3)
        assert is_greedy == all(int(logits[i - 1].argmax()) == both[i] for i in rows)
    ids = tokenizer.encode("What is 12+13? 25. " * 8)
    pieces = [ids[max(0, start - 1) : start + 39] for start in range(1, len(ids), 39)]
    expected = sum(-float(model(torch.tensor([piece]), labels=torch.tensor([piece])).loss) * (len(piece) - 1) for piece in pieces)
    assert len(pieces) > 1 and rolling == pytest.approx(expected, rel=1e-4)


def test_a_local_task_by_the_command(tmp_path: Path) -> None:
    template: Any = AutoTokenizer.from_pretrained(DEMO_MODEL).apply_chat_template
    rows = [
        {
            "question": template([{"role": "user", "content": each.prompt}], tokenize=False, add_generation_prompt=True),
            "answer": each.answer,
        }
        for each in held_out_questions(12)
    ]
    rows[3]["answer"] += "?"
    (tmp_path / "sums.json").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sums.json")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["<"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "sums.yaml").write_text(json.dumps(task))
    command = ["eval", "--task", str(tmp_path / "sums.yaml")]
    done = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    found = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert found["sums"]["exact_match,none"] == pytest.approx(11 / 12)
    assert "1.0000" in CliRunner().invoke(app, [*command, "--limit", "3"], catch_exceptions=False).stdout


def test_tasks_that_are_not_there() -> None:
    with LLM(str(DEMO_MODEL)) as llm:
        with pytest.raises(ConfigError, match="no such task file"):
            run_task(llm, "nowhere/sums.yaml")
        with pytest.raises(ConfigError, match="knows no task 'sums_of_sums'"):
            run_task(llm, "sums_of_sums")
