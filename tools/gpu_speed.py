"""Part 3 of gpu_check: decode and prefill of published shapes, against what the card can do and against Hugging Face."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import autodeploy
from autodeploy import CompiledModel, SamplingParams
from autodeploy.executor.cuda_graphs import LaunchedStep
from autodeploy.specs import bytes_per_token
from tools.gpu_rows import Check, free, measure_limits, providers, switch_graphs

ROPE_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **ROPE_3},
    },
    "Qwen3-0.6B": {},  # a published shape of the benchmarks
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "gpt-oss-20b": {"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32},
}
TINY_SHAPE = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERT_COUNTS = ("num_experts", "num_local_experts")


@dataclass(frozen=True)
class Load:
    """What is measured: requests that decode at once, lengths of prompts, tokens before and during a decode."""

    decodes: tuple[int, ...] = (1, 8, 64, 256)
    prefills: tuple[int, ...] = (2048, 8192)
    prompt: int = 512
    new: int = 64
    hf_batch: int = 8

    @property
    def cells(self) -> list[str]:
        """In the order in which they are measured."""
        decodes = [f"decode {count}" for count in self.decodes]
        prefills = [f"prefill {length}" for length in self.prefills]
        return [*decodes, *prefills, f"HF {self.hf_batch}", f"decode {self.hf_batch} without graphs"]

    @property
    def longest(self) -> int:
        return max(*self.prefills, self.prompt + self.new) + 8


TINY_LOAD = Load((1, 4), (32, 64), 16, 40, 2)


def speed(check: Check) -> None:
    limits = measure_limits(check)
    load = Load() if check.is_gpu else TINY_LOAD
    for name in SHAPES if check.is_gpu else ["tiny llama"]:
        start = f"{name}: start"
        if check.is_ok(start) and not check.is_ok(f"{name}: {load.cells[-1]}"):
            start += f" again after {len(check.done)} rows"  # this is a new process
        if check.wants(start, least=90 if check.is_gpu else 0):
            _measure_model(check, name, start, load, limits)
            free(check)


def _measure_model(check: Check, name: str, start: str, load: Load, limits: dict[str, float]) -> None:
    model = compiled = None
    with check.row(start) as facts:
        started = time.perf_counter()
        model = random_model(name, check.device)
        facts["model_s"] = time.perf_counter() - started
        started = time.perf_counter()
        compiled = _compiled(model, check.device, load)
        facts |= {
            "compile_s": time.perf_counter() - started,
            "phases": compiled.timeline.seconds,
            "providers": providers(compiled),
        }
        assert compiled.executor is not None
    if model is None or compiled is None:
        return
    try:
        served = Served(compiled, StepWatch(compiled, check.is_gpu), Work.of(model, compiled, limits), load)
        for cell in load.cells:
            if check.wants(f"{name}: {cell}", least=20 if check.is_gpu else 0):
                with check.row(f"{name}: {cell}") as facts:
                    _measure(facts, check, model, served, name, cell)
        check.found.setdefault("reports", {})[name] = compiled.report().splitlines()[-3:]
    finally:
        compiled.shutdown()


def _measure(facts: dict[str, Any], check: Check, model: Any, served: Served, name: str, cell: str) -> None:
    """One cell of `Load.cells`."""
    what, number, *rest = cell.split()
    if what == "HF":
        _hf_generate(facts, check, model, served.load)
        ours = next((row for row in check.found["rows"] if row["name"] == f"{name}: decode {served.load.hf_batch}"), {})
        facts["times_ours"] = facts["step_ms"] / ours["step_ms"] if "step_ms" in ours else None
    elif what == "prefill":
        _prefill(facts, served, int(number))
    else:
        _decode(facts, served, int(number), use_graphs=not rest)


def random_model(name: str, device: str) -> Any:
    """A model of a published shape with random bf16 weights, made on the device."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from autodeploy.bench.workers import worker_model

    shape = dict(SHAPES.get(name, TINY_SHAPE) or worker_model.SHAPES[name.lower()])
    config = CONFIG_MAPPING[shape.pop("model_type")](**shape)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    return model


def _compiled(model: Any, device: str, load: Load) -> CompiledModel:
    most = max(load.decodes)
    tokens = max(most * (load.prompt + load.new + 64), load.longest + 64)
    options = {"max_num_tokens": max(*load.prefills, most), "max_batch_size": most, "max_seq_len": load.longest}
    return autodeploy.compile(
        model, device=device, kv_cache_config={"max_tokens": tokens, "free_memory_fraction": 0.9}, **options
    )


@dataclass
class Step:
    """One step of the executor. Seconds: all of it, and those in which the host waited for the device.

    launched: it started before the tokens of the one before it were known, for which it then waited.
    """

    num_tokens: int
    num_requests: int
    seconds: float
    waited: float
    launched: bool


class StepWatch:
    """Notes every step of an executor, from the outside, whether it waits for its own logits or for the tokens before."""

    def __init__(self, compiled: CompiledModel, is_gpu: bool) -> None:
        self.steps: list[Step] = []
        self._is_gpu, self._is_running, self._waited, self._shape, self._launched = is_gpu, False, 0.0, (0, 0), False
        executor: Any = compiled.executor
        self._step, self._forward = executor.step, compiled.runner.forward
        executor.step, compiled.runner.forward = self._timed_step, self._watched_forward  # pyright: ignore
        if executor.launcher is not None:
            self._launch, executor.launcher.launch = executor.launcher.launch, self._watched_launch

    def _watched_forward(self, batch: Any, rows: Any) -> Tensor:
        logits = self._forward(batch, rows)
        self._note(batch, launched=False)
        if self._is_gpu:
            self._wait_for(torch.cuda.current_stream(logits.device).synchronize)
        return logits

    def _watched_launch(self, batch: Any, after: LaunchedStep | None) -> LaunchedStep:
        step = self._launch(batch, after)
        self._note(batch, launched=True)
        return LaunchedStep(step.chosen, lambda: self._wait_for(lambda: step.found))

    def _note(self, batch: Any, *, launched: bool) -> None:
        self._shape, self._launched = (batch["input_ids"].shape[1], len(batch["seq_lens"])), launched

    def _wait_for(self, wait: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        try:
            return wait()
        finally:
            self._waited += time.perf_counter() - started

    def _timed_step(self) -> None:
        self._is_running, self._waited, started = True, 0.0, time.perf_counter()
        self._step()
        self.steps.append(Step(*self._shape, time.perf_counter() - started, self._waited, self._launched))
        self._is_running = False

    def take(self) -> list[Step]:
        """The steps since the last time; requests end within a step, which is waited for."""
        while self._is_running:
            time.sleep(1e-4)
        steps, self.steps = self.steps, []
        return steps


@dataclass(frozen=True)
class Work:
    """What a step must do at least. body: numbers every token meets, experts by the share of them that it chooses."""

    dense: int
    experts: int
    share: float
    head: int
    num_bytes: int
    kv_bytes: int
    limits: dict[str, float]

    @classmethod
    def of(cls, model: Any, compiled: CompiledModel, limits: dict[str, float]) -> Work:
        table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        rest = {name: p.numel() for name, p in model.named_parameters() if p is not table and p is not head}
        experts = sum(count for name, count in rest.items() if ".experts." in name)
        config = model.config.get_text_config()
        total = next((getattr(config, key) for key in EXPERT_COUNTS if getattr(config, key, None)), 1)
        share = getattr(config, "num_experts_per_tok", None) or 1
        kv_bytes = bytes_per_token(compiled.program.caches.values())
        dense = sum(rest.values()) - experts
        return cls(dense, experts, share / total if experts else 1.0, head.numel(), head.element_size(), kv_bytes, limits)

    def decode_floor(self, count: int, context: float) -> float | None:
        """Seconds to read the weights that this many tokens meet, and their keys and values (windows not heeded)."""
        touched = self.experts * (1 - (1 - self.share) ** count)
        read = (self.dense + self.head + touched) * self.num_bytes + count * context * self.kv_bytes
        flop = 2 * count * (self.dense + self.head + self.experts * self.share)
        return max(read / self.limits["bytes_per_s"], flop / self.limits["flop_per_s"]) if self.limits else None

    def prefill_floor(self, length: int) -> float | None:
        """Seconds to multiply; the products of attention are left out."""
        flop = 2 * length * (self.dense + self.experts * self.share)
        return flop / self.limits["flop_per_s"] if self.limits else None


def _serve(compiled: CompiledModel, count: int, length: int, new: int, patience: float = 90.0) -> float:
    """Seconds from the first prompt to the last token. Requests that take longer are given up."""
    vocab, generator = compiled.facts.vocab_size, torch.Generator().manual_seed(count + length)
    prompts = torch.randint(3, vocab, (count, length), generator=generator).tolist()
    started = time.perf_counter()
    handles = [compiled.submit(ids, SamplingParams(max_tokens=new, ignore_eos=True)) for ids in prompts]
    try:
        for handle in handles:
            handle.result(max(0.1, started + patience - time.perf_counter()))
    except TimeoutError:
        for handle in handles:
            handle.abort()
        raise
    return time.perf_counter() - started


@dataclass(frozen=True)
class Served:
    """A model that is being measured."""

    compiled: CompiledModel
    watch: StepWatch
    work: Work
    load: Load


def _decode(facts: dict[str, Any], served: Served, count: int, use_graphs: bool) -> None:
    compiled, watch, load = served.compiled, served.watch, served.load
    graphs = switch_graphs(compiled, use_graphs)
    watch.take()
    facts["seconds"] = _serve(compiled, count, load.prompt, load.new)
    decodes = [step for step in watch.take() if step.num_tokens == step.num_requests == count][4:]  # captures come first
    assert decodes, "no step in which all decode"
    step = statistics.median(each.seconds for each in decodes)
    facts |= {
        "step_ms": step * 1e3,
        "host_ms": statistics.median(each.seconds - each.waited for each in decodes) * 1e3,
        "tokens_per_s": count / step,
        **_against_floor(step, served.work.decode_floor(count, load.prompt + load.new / 2)),
        "num_steps": len(decodes),
        "launched": sum(each.launched for each in decodes),
    }
    if graphs is not None:
        facts |= {"captured": len(graphs.captured), "not captured": graphs.failure}


def _prefill(facts: dict[str, Any], served: Served, length: int) -> None:
    _serve(served.compiled, 1, length, 1)
    served.watch.take()
    facts["seconds"] = _serve(served.compiled, 1, length, 1)
    step = sum(each.seconds for each in served.watch.take())
    facts |= {"step_ms": step * 1e3, "tokens_per_s": length / step, **_against_floor(step, served.work.prefill_floor(length))}


def _against_floor(seconds: float, floor: float | None) -> dict[str, float]:
    return {} if floor is None else {"floor_ms": floor * 1e3, "floor_share": floor / seconds}


def _hf_generate(facts: dict[str, Any], check: Check, model: Any, load: Load) -> None:
    """Hugging Face, eager, on the same weights: what one more token costs."""
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (load.hf_batch, load.prompt), device=check.device)
    few, many = 4, 4 + load.new // 2
    seconds = {}
    for new in (few, few, many):  # the first warms up
        started = time.perf_counter()
        with torch.inference_mode():
            options = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        if check.is_gpu:
            torch.cuda.synchronize()
        seconds[new] = time.perf_counter() - started
    facts["step_ms"] = (seconds[many] - seconds[few]) / (many - few) * 1e3
