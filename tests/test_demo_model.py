"""The model that ships with the package: it loads offline, its tokenizer loses nothing, and it answers what it never saw."""

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream
from transformers import AutoModelForCausalLM, AutoTokenizer

from autodeploy import demo_questions
from autodeploy.demo_questions import Question, check, held_out_questions, is_held_out, training_pairs, training_questions
from tools.train_demo_model import ASSISTANT, BOS, END, USER, greedy_answers

FOLDER = Path(str(files("autodeploy"))) / "demo_model"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


def test_artefact_is_small_and_plain() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["hidden_size"] % 128 == config["intermediate_size"] % 128 == config["vocab_size"] % 128 == 0
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    assert not [path.name for path in FOLDER.iterdir() if "auto_map" in path.read_text(errors="ignore") or path.suffix == ".py"]


def test_model_and_tokenizer_agree(model, tokenizer) -> None:
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert len(tokenizer) == model.config.vocab_size <= 512
    assert tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id) == tokenizer.eos_token == END
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


@given(text=st.text())
@example("What is 123+456? <|user|><|end|> \r\n\t é 漢字 👩‍🚀 \x00 Reverse: What is ")
def test_any_text_survives_the_tokenizer(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_text_decodes_token_by_token(tokenizer, text: str) -> None:
    stream = DecodeStream(skip_special_tokens=False)
    pieces = [stream.step(tokenizer.backend_tokenizer, i) for i in tokenizer.encode(text)]
    assert "".join(piece for piece in pieces if piece) == text


def test_digits_are_single_tokens(tokenizer) -> None:
    assert tokenizer.tokenize("1234567890") == list("1234567890")


def test_chat_template_is_what_training_used(tokenizer) -> None:
    turns = [("user", "1+2="), ("assistant", "3"), ("system", "left out"), ("user", "2+2=")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == f"{BOS}{USER}1+2={END}{ASSISTANT}3{END}{USER}2+2={END}{ASSISTANT}"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.encode(text)


def key_of(prompt: str) -> str:
    """The key a prompt must have, read off its text alone."""
    if match := re.fullmatch(r"(?:What is )?(\d+) ?\+ ?(\d+)[?=]", prompt):
        low, high = sorted(map(int, match.groups()))
        return f"add:{low}+{high}"
    for pattern, key in [
        (r"Reverse: (\w+)", r"reverse:\1"),
        (r"Uppercase: (\w+)", r"uppercase:\1"),
        (r"Repeat (\d) times: (\w+)", r"repeat:\1 \2"),
        (r"Count from (\d+) to (\d+)", r"count:\1-\2"),
    ]:
        if match := re.fullmatch(pattern, prompt):
            return match.expand(key)
    raise AssertionError(prompt)


def test_every_prompt_has_one_key() -> None:
    questions = [*held_out_questions(), *islice(training_questions(), 20_000)]
    assert {question.key.partition(":")[0] for question in questions} == set(demo_questions.KINDS)
    assert all(question.key == key_of(question.prompt) for question in questions)


def test_held_out_questions_are_distinct_and_repeatable() -> None:
    questions = held_out_questions()
    assert len(questions) == len({question.key for question in questions}) == 500
    assert sum(question.kind == "add" for question in questions) >= 400
    assert questions == held_out_questions(500, seed=0) != held_out_questions(500, seed=1)


def test_training_cannot_produce_a_held_out_question(monkeypatch) -> None:
    """Whatever the makers offer, training lets no held-out key through, and every one of the 500 has a held-out key."""
    held_out = held_out_questions()
    assert all(is_held_out(question.key) for question in held_out)
    assert not {question.prompt for question in held_out} & {prompt for prompt, _ in training_pairs(50_000)}

    allowed = Question("1+1=", "2", "add:1+1")
    assert not is_held_out(allowed.key)
    offers = iter([*held_out, allowed])
    for kind in demo_questions.KINDS:
        monkeypatch.setitem(demo_questions.KINDS, kind, lambda rng: next(offers))
    monkeypatch.setattr(demo_questions, "add_any_length", lambda rng: next(offers))
    assert next(training_questions()) is allowed


@pytest.mark.parametrize(("text", "right"), [("579", True), (" 579\n", True), ("5790", False), ("", False), ("It is 579", False)])
def test_check_wants_the_exact_answer(text: str, right: bool) -> None:
    assert check(demo_questions.addition(123, 456), text) is right


@pytest.fixture
def one_thread() -> Iterator[None]:
    """So small a model is fastest on one thread, and does not suffer from busy neighbours."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_model_answers_held_out_questions(model, tokenizer) -> None:
    questions = held_out_questions()
    answers = greedy_answers(model, tokenizer, questions)
    wrong = {q.prompt: answer for q, answer in zip(questions, answers, strict=True) if not check(q, answer)}
    assert len(wrong) <= 0.02 * len(questions), wrong
