"""Memory that is asked for while torch is imported: who gets it, what is given back, and that starts of a known model use it."""

from __future__ import annotations

import mmap
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from autodeploy import LLM, SamplingParams, huge_pages, memory_ahead
from autodeploy.memory_ahead import HUGE_PAGE, PIECE, take
from autodeploy.program_store import MEMORY, Store, model_name

MB = 1 << 20


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "memory-ahead"]


def test_memory_is_resident_given_out_once_and_kept() -> None:
    assert take(HUGE_PAGE) is None
    with memory_ahead.memory_ahead(3 * PIECE):
        first = huge_pages.empty([PIECE // 2], torch.uint8)
        second = huge_pages.empty([3, 1000, 1000], torch.bfloat16)
        assert not threads()
        assert not first.any() and not second.any()
        first.fill_(1)
        second.fill_(2)
        assert huge_pages.empty([4 * PIECE], torch.uint8).numel() == 4 * PIECE  # from elsewhere
    assert 0 <= second.data_ptr() - first.data_ptr() - first.nbytes < 4096
    assert first.data_ptr() % HUGE_PAGE == 0
    assert first.eq(1).all() and second.eq(2).all()
    assert take(HUGE_PAGE) is None


def test_what_nobody_takes_is_given_back() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    with memory_ahead.memory_ahead(256 * MB):
        while threads():
            pass
        assert process.memory_info().rss > before + 250 * MB
        kept = huge_pages.empty([32 * MB], torch.uint8)
    assert not kept.any()
    assert process.memory_info().rss < before + 64 * MB


def test_an_error_ends_it_too() -> None:
    with pytest.raises(ZeroDivisionError), memory_ahead.memory_ahead(1 << 30):
        _ = 1 / 0
    assert not threads() and take(HUGE_PAGE) is None


def test_one_at_a_time_and_never_more_than_there_is() -> None:
    with memory_ahead.memory_ahead(psutil.virtual_memory().available * 2):
        assert not threads() and take(HUGE_PAGE) is None
    with memory_ahead.memory_ahead(PIECE):
        with memory_ahead.memory_ahead(PIECE):
            assert len(threads()) <= 1
        assert take(HUGE_PAGE) is not None


def test_what_was_noted_last_of_a_model_is_known(tmp_path: Path) -> None:
    store, facts = Store(tmp_path / "programs"), {"x": "1"}
    assert store.last_memory("model") == 0
    store.write(facts, "model", lambda folder: (folder / "file").write_text(""))
    assert store.last_memory("model") == 0
    store.note_memory(facts, 123)
    assert (store.last_memory("model"), store.last_memory("another")) == (123, 0)
    assert store.read(facts, "model") == {"file": b""}
    next(store.folder.glob(f"*/{MEMORY}")).write_text("what?")
    assert store.last_memory("model") == 0
    store.folder.chmod(0o777)  # then others may have put something in the place of the file
    store.note_memory(facts, 5)
    store.folder.chmod(0o700)
    assert store.last_memory("model") == 0
    store.note_memory({"x": "2"}, 5)  # of no entry
    assert len(list(store.folder.glob("*/"))) == 1


def test_what_grows_begins_in_small_pages() -> None:
    plain, growing = (huge_pages.empty([32 * MB], torch.uint8, grows=grows) for grows in (False, True))
    for tensor in (plain, growing):
        tensor[0] = tensor[2 * HUGE_PAGE] = 1
    before = resident(growing)
    assert resident(plain) - before >= HUGE_PAGE - 4096 or resident(plain) < HUGE_PAGE  # where the system gives none at all
    growing[: HUGE_PAGE // 2].fill_(1)
    assert HUGE_PAGE // 2 - 4096 <= resident(growing) - before <= HUGE_PAGE // 2


def test_a_short_prompt_takes_little_memory_of_each_cache(folder: Path) -> None:
    limits = {"max_bytes": 64 * MB}
    with LLM(folder, skip_tokenizer_init=True, kv_cache_config=limits, program_cache=False) as llm:
        llm.generate([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True))
        caches = llm.compiled.runner.caches  # pyright: ignore[reportAttributeAccessIssue]
        assert caches and all(cache.nbytes > 2 * HUGE_PAGE and 0 < resident(cache) < HUGE_PAGE // 4 for cache in caches)


def resident(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's memory that the process has."""
    first, last = tensor.data_ptr() // mmap.PAGESIZE, -(-(tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE)
    with Path("/proc/self/pagemap").open("rb") as pages:
        pages.seek(8 * first)
        entries = struct.unpack(f"<{last - first}Q", pages.read(8 * (last - first)))
    return sum(entry >> 63 for entry in entries) * mmap.PAGESIZE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of more than one huge page each."""
    folder = tmp_path_factory.mktemp("model")
    config = Qwen3Config(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=64,
    )
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def test_the_second_start_of_a_model_uses_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    given = memory_ahead.take
    monkeypatch.setattr(huge_pages, "take", lambda num_bytes: (taken.append(given(num_bytes)), taken[-1])[1])
    tokens = []
    for _ in range(2):
        taken.clear()
        with LLM(folder, program_cache=tmp_path, skip_tokenizer_init=True) as llm:
            tokens.append(llm.generate([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True)).outputs[0].token_ids)
            noted = Store(tmp_path).last_memory(model_name(folder))
            assert noted == llm.compiled.runner.weight_bytes  # pyright: ignore[reportAttributeAccessIssue]
            assert not threads()
    assert any(taken) and tokens[0] == tokens[1]


def test_llm_is_imported_without_torch() -> None:
    code = "import sys; from autodeploy import LLM, SamplingParams; print({'torch', 'transformers', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
