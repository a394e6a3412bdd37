"""Several ranks, each a process of its own, serve one model."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import torch

import autodeploy
from autodeploy import LLM, CompiledModel, ConfigError, EngineDeadError, SamplingParams
from autodeploy.config import LLMArgs
from autodeploy.distributed.messages import Array, Forward
from autodeploy.executor import distributed_runner
from autodeploy.executor.distributed_runner import DistributedRunner
from autodeploy.program_cache import Lowered
from autodeploy.recipes import Convert
from tests.models.families import make_model

PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [13], list(range(20, 60))]
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)


def tokens(compiled: CompiledModel) -> list[list[int]]:
    try:
        return [output.outputs[0].token_ids for output in compiled.generate(PROMPTS, PARAMS)]
    finally:
        compiled.shutdown()


def start(folder: Path, cache: Path, ranks: int = 2, **options: Any) -> CompiledModel:
    return autodeploy.compile(folder, program_cache=cache, tensor_parallel_size=ranks, max_seq_len=128, **options)


@pytest.fixture(scope="module")
def expected(folder: Path, cache: Path) -> list[list[int]]:
    return tokens(start(folder, cache, 1))


@pytest.fixture
def no_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes started from here find a package of that name that cannot be imported."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("raise ImportError('no rank may import this')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "transformers" in sys.modules


@pytest.mark.usefixtures("no_transformers")
def test_two_ranks_give_the_tokens_of_one_and_need_no_transformers(folder: Path, cache: Path, expected: list[list[int]]) -> None:
    before, threads, shared = set(psutil.Process().children()), torch.get_num_threads(), set(os.listdir("/dev/shm"))
    compiled = start(folder, cache)
    assert isinstance(compiled.runner, DistributedRunner)
    (worker,) = set(psutil.Process().children()) - before
    assert not [connection for connection in worker.net_connections() if not is_local(connection)]
    assert "weights as stored" in compiled.report()
    with pytest.raises(ConfigError, match="already belongs to a process group"):
        start(folder, cache)
    assert tokens(compiled) == expected  # and shuts down
    compiled.shutdown()  # no harm
    assert not worker.is_running()
    assert torch.get_num_threads() == threads
    assert set(os.listdir("/dev/shm")) <= shared


def is_local(connection: Any) -> bool:
    return all(address.ip in ("127.0.0.1", "::1") for address in (connection.laddr, connection.raddr) if address)


def test_a_program_of_the_cache_is_sent_as_it_is_stored(folder: Path, cache: Path, expected: list[list[int]]) -> None:
    compiled = start(folder, cache)
    assert compiled.timeline.notes["program cache"] == "hit"
    assert tokens(compiled) == expected


def test_a_rank_with_another_program_is_refused(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed_runner, "digest_of", lambda text: "0" * 64)
    with pytest.raises(EngineDeadError, match="rank 1 failed: ProgramFileError: the program is not the one of rank 0"):
        start(folder, cache)
    assert not torch.distributed.is_initialized()


def test_a_rank_that_cannot_read_the_weights_is_named(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = distributed_runner._start_of

    def elsewhere(*given: Any) -> Any:
        return msgspec.structs.replace(made(*given), folder="/no/such/folder")

    monkeypatch.setattr(distributed_runner, "_start_of", elsewhere)
    with pytest.raises(EngineDeadError, match="rank 1 failed: CheckpointError: /no/such/folder"):
        start(folder, cache)


# What is refused


def test_a_model_in_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"2 ranks need it. Write it with model.save_pretrained\(folder\)"):
        autodeploy.compile(make_model("llama"), tensor_parallel_size=2)


def test_recipes_that_are_code_are_refused(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_code(*given: Any) -> Lowered:
        lowered = lower(*given)
        name = next(iter(lowered.program.weights))
        lowered.program.weights = lowered.program.weights.with_recipes({name: Convert((), lambda tensors: {}, "f")})
        return lowered

    lower = autodeploy._compile._lowered
    monkeypatch.setattr(autodeploy._compile, "_lowered", with_code)
    with pytest.raises(ConfigError, match="conversion that is code of transformers"):
        start(folder, cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 4, "moe_expert_parallel_size": 3}, "moe_expert_parallel_size=3 does not divide"),
        ({"moe_expert_parallel_size": 2}, "choose a divisor"),
        ({"tensor_parallel_size": 2, "backend": "pytorch"}, "backend='pytorch' runs in one process"),
        ({"tensor_parallel_size": 2, "device": "cuda:1"}, "device='cuda' without a number"),
        ({"distributed_executor_backend": "mpi"}, "who starts the ranks"),
        ({"distributed_timeout": 0}, "counts as hung"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLMArgs(model="x", **options)


def test_the_mesh_of_options() -> None:
    args = LLMArgs(model="x", tensor_parallel_size=4, moe_expert_parallel_size=2, pipeline_parallel_size=2)
    assert (args.mesh.tp, args.mesh.ep, args.mesh.pp, args.mesh.size) == (4, 2, 2, 8)


def test_torchrun_is_not_there(folder: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match="needs RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment"):
        LLM(
            folder, tensor_parallel_size=2, distributed_executor_backend="torchrun", skip_tokenizer_init=True, program_cache=cache
        )


# What is the end of all ranks


def test_a_forward_that_raises_is_the_end_for_every_request(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> Any:
        raise ZeroDivisionError("no logits")

    compiled = start(folder, cache)
    assert isinstance(compiled.runner, DistributedRunner)
    monkeypatch.setattr(compiled.runner.local, "forward", fail)
    handles = [compiled.submit(prompt, PARAMS) for prompt in PROMPTS]
    for handle in handles:
        with pytest.raises(EngineDeadError, match="rank 0 failed: ZeroDivisionError: no logits"):
            handle.result(10)
    with pytest.raises(EngineDeadError):
        compiled.submit(PROMPTS[0], PARAMS)
    compiled.shutdown()


def test_a_rank_that_fails_while_nobody_asks_is_the_end_too(folder: Path, cache: Path) -> None:
    compiled = start(folder, cache)
    assert isinstance(compiled.runner, DistributedRunner)
    compiled.generate(PROMPTS, PARAMS)
    compiled.runner.ranks.send(Forward({"input_ids": Array("O", (1,), b"12345678")}))
    compiled.executor._thread.join(10)
    with pytest.raises(EngineDeadError, match="the engine has ended") as caught:
        compiled.generate(PROMPTS, PARAMS)
    assert "rank 1 failed: ValueError: an input of dtype O" in str(caught.value.__cause__)
    compiled.shutdown()


@pytest.mark.slow
def test_a_rank_that_is_stopped_while_nobody_asks_is_the_end_too(folder: Path, cache: Path) -> None:
    before = set(psutil.Process().children())
    compiled = start(folder, cache, distributed_timeout=1)
    (worker,) = set(psutil.Process().children()) - before
    loop = compiled.executor._thread
    worker.suspend()
    loop.join(10)
    assert not loop.is_alive()
    with pytest.raises(EngineDeadError) as caught:
        compiled.generate(PROMPTS, PARAMS)
    assert "rank 1 has been stopped for longer than 1 s" in str(caught.value.__cause__)
    compiled.shutdown()
    assert not worker.is_running()


# Memory


def anonymous_bytes(process: psutil.Process) -> int:
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])
    return 0


@pytest.mark.slow
def test_a_rank_takes_little_more_than_its_weights_and_caches(tmp_path: Path) -> None:
    """Weights are read and laid out one parameter at a time; what a rank needs besides is what it has after its imports."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "vocab_size": 8000}
    make_model("llama", **sizes, num_attention_heads=16, num_key_value_heads=16).save_pretrained(tmp_path)
    code = "import autodeploy.executor.worker, sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as imported:
        assert imported.stdout is not None
        imported.stdout.readline()
        floor = anonymous_bytes(psutil.Process(imported.pid))
        imported.communicate()
    peaks, is_over = dict[psutil.Process, int](), threading.Event()

    def look() -> None:
        while not is_over.wait(0.004):
            for process in psutil.Process().children():
                peaks[process] = max(peaks.get(process, 0), anonymous_bytes(process))

    looking = threading.Thread(target=look)
    looking.start()
    compiled = start(tmp_path, tmp_path / "cache", kv_cache_config={"max_tokens": 2048}, max_num_tokens=256)
    assert isinstance(compiled.runner, DistributedRunner)
    compiled.generate([[5 + i] * 100 for i in range(20)], SamplingParams(max_tokens=8, ignore_eos=True))
    own = compiled.runner.ranks.ready[1].weight_bytes + compiled._pool_sizes().num_bytes(compiled._num_pages)
    compiled.shutdown()
    is_over.set()
    looking.join()
    assert own > 300e6
    assert max(peaks.values()) - floor <= 1.25 * own
