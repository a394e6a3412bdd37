"""Pieces joined equal one decode of everything, for any text and for any token ids."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from autodeploy.executor.detokenizer import IncrementalDetokenizer

TEXT = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "Größe, naïve café, çà et là; ¿qué tal? Größe!",
    "Быстрая лиса прыгает через собаку.",
    "你好世界。今天天气很好。こんにちは世界",
    "emoji 😀😀 👩‍👩‍👧‍👦 🇩🇪 and ∑∫√ maths",
] * 4


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    return wrap(tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False))
    return wrap(tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2: spaces as U+2581, one token for each byte that the vocabulary lacks, one leading space stripped."""
    vocab = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehlortw", "▁hello", "▁world"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(tokenizer)


TOKENIZERS = {"byte_level": byte_level(), "metaspace": metaspace(), "byte_fallback": byte_fallback()}


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def eos_of(tokenizer: PreTrainedTokenizerFast) -> int:
    return len(tokenizer) - 1


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]


def pieces(tokenizer: PreTrainedTokenizerFast, token_ids: list[int], step: int = 1, **options: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    found = [detokenizer.append(token_ids[i : i + step]) for i in range(0, len(token_ids), step)]
    found.append(detokenizer.finish())
    assert detokenizer.text == "".join(found)
    return found


def whole(tokenizer: PreTrainedTokenizerFast, token_ids: list[int], skip_special_tokens: bool = True) -> str:
    text = tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


WORDS = st.sampled_from([*"ab ,", " hello", " world", "😀", "é", "你", "\ufffd", "👩‍👩‍👧‍👦", " ", "  ", "\n"])
ANY_TEXT = st.one_of(st.text(), st.lists(WORDS, max_size=60).map("".join), st.text("\ufffdaé😀", max_size=60))


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT, name=st.sampled_from(list(TOKENIZERS)), step=st.integers(1, 5))
def test_pieces_of_any_text_join_to_the_whole(text: str, name: str, step: int) -> None:
    tokenizer = TOKENIZERS[name]
    token_ids = ids_of(tokenizer, text)
    assert "".join(pieces(tokenizer, token_ids, step)) == whole(tokenizer, token_ids)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), name=st.sampled_from(["byte_level", "metaspace"]), skip=st.booleans(), step=st.integers(1, 3))
def test_pieces_of_random_tokens_join_to_the_whole(data: st.DataObject, name: str, skip: bool, step: int) -> None:
    tokenizer = TOKENIZERS[name]
    token = st.one_of(st.integers(0, len(tokenizer) + 3), st.just(eos_of(tokenizer)))
    token_ids = data.draw(st.lists(token, max_size=80))
    assert "".join(pieces(tokenizer, token_ids, step, skip_special_tokens=skip)) == whole(tokenizer, token_ids, skip)


@settings(max_examples=200, deadline=None)
@given(token_ids=st.lists(st.integers(0, 270), max_size=60))
def test_byte_fallback_never_fails_on_random_bytes(token_ids: list[int]) -> None:
    pieces(TOKENIZERS["byte_fallback"], token_ids)


def test_no_piece_ends_inside_a_character(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "😀 你好 é 👩‍👩‍👧‍👦 hello" if tokenizer is not TOKENIZERS["metaspace"] else "Größe 你好 😀"
    for piece in pieces(tokenizer, ids_of(tokenizer, text)):
        assert "\ufffd" not in piece


def test_text_comes_without_waiting_for_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    token_ids = ids_of(tokenizer, " hello world hello")
    assert sum(bool(piece) for piece in pieces(tokenizer, token_ids)[:-1]) >= len(token_ids) - 1


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", ["\ufffd" * 200, "a" + "\ufffd" * 200, "\ufffd" * 5 + "\u0800", "\ufffd" * 50 + "😀"])
def test_a_long_run_of_replacements_is_not_held_for_ever(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    found = pieces(tokenizer, ids_of(tokenizer, text))
    assert "".join(found) == text
    assert len(found[-1]) <= 20


def test_an_unfinished_character_is_flushed_at_the_end() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    half = ids_of(tokenizer, "🦜")[:2]
    found = pieces(tokenizer, half)
    assert found[:-1] == ["", ""]
    assert found[-1] == whole(tokenizer, half) == "\ufffd"


def test_space_after_many_skipped_special_tokens_is_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    word = ids_of(tokenizer, " world")
    token_ids = word + [eos_of(tokenizer)] * 100 + word
    assert "".join(pieces(tokenizer, token_ids)) == whole(tokenizer, token_ids)


def test_time_per_token_does_not_grow(tokenizer: PreTrainedTokenizerFast) -> None:
    word = ids_of(tokenizer, " hello 😀")
    for unit in (word, [eos_of(tokenizer)]):
        detokenizer = IncrementalDetokenizer(tokenizer)
        largest = 0
        for _ in range(2000 // len(unit)):
            detokenizer.append(unit)
            largest = max(largest, len(detokenizer._context) + len(detokenizer._pending))
        assert largest <= 64
