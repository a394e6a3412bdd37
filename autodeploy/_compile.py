"""compile(): a Hugging Face model -> a CompiledModel that computes logits and generates.

A stored program needs neither passes nor transformers: what does (`_lower`, `plugins`) is imported where it is used.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autodeploy.checkpoint import CheckpointSource
from autodeploy.config import LLMArgs, SamplingParams
from autodeploy.custom_ops.cpp import build_ahead
from autodeploy.distributed.launch import (
    Launch,
    connect_under_torchrun,
    is_under_torchrun,
    launch_processes,
    launch_under_torchrun,
    torchrun_place,
    torchrun_rank,
)
from autodeploy.distributed.ray_launch import launch_with_ray
from autodeploy.errors import ConfigError, EngineDeadError, RequestError
from autodeploy.executor.batch import BatchBuilder
from autodeploy.executor.cuda_graphs import GraphOptions
from autodeploy.executor.distributed_runner import DistributedRunner, RankOptions, Stage, start_ranks
from autodeploy.executor.engine import ADExecutor
from autodeploy.executor.memory import free_memory
from autodeploy.executor.model_runner import ModelRunner, Runner, limit_threads
from autodeploy.executor.outputs import RequestHandle, RequestOutput, outputs_of, raised
from autodeploy.executor.pool_sizes import PoolSizes
from autodeploy.executor.positions import table_of_positions
from autodeploy.executor.request import Detokenizer, Request
from autodeploy.executor.sampler import Sampler
from autodeploy.executor.scheduler import Scheduler
from autodeploy.executor.worker import serve
from autodeploy.program import Program
from autodeploy.program_cache import Lowered, Place, is_code, place_of
from autodeploy.program_store import Miss
from autodeploy.prompts import is_single, spread, token_ids
from autodeploy.report.timeline import Timeline
from autodeploy.specs import ModelFacts, Target

if TYPE_CHECKING:
    from autodeploy.transforms.pipeline import Observer, Pipeline


def compile(model: Any, **options: Any) -> CompiledModel:
    """Compile a Hugging Face causal language model.

    model: an `nn.Module` of transformers in memory (left as it is; unchanged weights are shared with it) or a checkpoint folder.
    options: those of `LLM`; see `LLMArgs`. Raises ConfigError, CheckpointError, UnsupportedModelError or TransformError.
    """
    args = LLMArgs(model=model, **options)
    serve_if_other_rank(args)
    return compile_observed(args)


def serve_if_other_rank(args: LLMArgs) -> None:
    """Under torchrun every rank runs the same script. In all but rank 0 this call serves until rank 0 is done, and exits."""
    if args.mesh.size > 1 and _distributed_backend(args) == "torchrun" and (rank := torchrun_rank(args.mesh.size)) > 0:
        _refuse_ranks(args)
        serve(connect_under_torchrun(rank), rank, torchrun_place())
        raise SystemExit(0)


def compile_observed(args: LLMArgs, *observers: Observer, timeline: Timeline | None = None) -> CompiledModel:
    """`compile`, with callbacks that see the program after each pass; before the first one too, with a record named "export"."""
    if not isinstance(args.model, str | Path):
        refuse_other_models(args.model)
    timeline = timeline or Timeline()
    if args.calibration is not None and args.backend != "pytorch":
        with TemporaryDirectory() as folder:  # its files stay mapped for as long as they are needed
            return compile_observed(_calibrated(args, Path(folder) / "quantized", timeline), *observers, timeline=timeline)
    if args.backend == "pytorch":
        pipeline_of(args)  # a wrong one is refused all the same
        others = {
            "quantization": args.quantization is not None,
            "kv_cache_config.dtype": args.kv_cache_config.dtype != "auto",
            "attention_backend": args.attention_backend != "auto",
        }
        for option in (option for option, is_given in others.items() if is_given):
            raise ConfigError(f"backend='pytorch' runs the model as it is; leave '{option}' out, or use backend='autodeploy'")
        return _eager(args, timeline)
    if args.mesh.size > 1:
        _refuse_ranks(args)
    else:
        _refuse_missing_gpu(_device(args))
    if args.autotune:
        limit_threads(_device(args))  # what is timed runs on as many as what serves
    lowered = _lowered(args, timeline, *observers)
    program, facts = lowered.program, _within_positions(args, lowered.facts, lowered.program)
    with timeline.phase("load weights", len(program.weights)) as advance:
        if args.mesh.size > 1:
            runner = _start_ranks(args, lowered, advance)
        else:
            graphs = _with_pieces(_graph_options(args), args, program)
            runner = ModelRunner(program, lowered.source, _device(args), advance, graphs)
    if lowered.place is not None and isinstance(runner, ModelRunner) and runner.device == "cpu":
        lowered.place.note_memory(runner.weight_bytes)
    return CompiledModel(args, facts, timeline, runner, program)


def trace(args: LLMArgs, timeline: Timeline, *observers: Observer, meta: bool = False) -> Program:
    """The lowered program alone, no weights loaded. observers: as for `compile_observed`. meta: read nothing but config.json."""
    from autodeploy._lower import lower

    return lower(args, pipeline_of(args), _target(args), timeline, *observers, meta=meta)[0].program


def _lowered(args: LLMArgs, timeline: Timeline, *observers: Observer) -> Lowered:
    """The stored program of a start like this one; else a new one, which is then stored."""
    edited = pipeline_of(args) if args.plugins or args.pipeline is not None else None
    with timeline.phase("program cache"):
        place = place_of(args, _target(args), edited, is_watched=bool(observers))
        try:
            if isinstance(place, Place):
                found = place.find()
                timeline.notes["program cache"] = "hit"
                return found
            note = f"not used: {place}"
        except Miss as error:
            note = f"miss: {error}"
    if _device(args) == "cpu":
        build_ahead()  # before transformers is imported, which takes seconds
    with timeline.phase("import transformers"):
        from autodeploy._lower import lower

    lowered, initial = lower(args, edited or pipeline_of(args), _target(args), timeline, *observers)
    if isinstance(place, Place):
        with timeline.phase("store program"):
            refused = place.keep(lowered, initial)
        lowered = replace(lowered, place=place)
        note += f" (not stored: {refused})" if refused else ""
    timeline.notes["program cache"] = note
    return lowered


def refuse_other_models(model: Any) -> None:
    """Raises what a start with this model raises before it reads any weights."""
    from autodeploy._lower import refuse

    refuse(model)


def pipeline_of(args: LLMArgs) -> Pipeline:
    """The passes that these options ask for."""
    from autodeploy.plugins import edited_pipeline

    return edited_pipeline(
        args.pipeline,
        args.plugins,
        _target(args),
        args.quantization,
        args.kv_cache_config.dtype,
        args.shard_plan,
        args.autotune,
        args.attention_backend,
    )


def _device(args: LLMArgs) -> str:
    if args.device != "auto":
        return args.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _target(args: LLMArgs) -> Target:
    return Target(device=_device(args), page_size=args.kv_cache_config.page_size, mesh=args.mesh)


def _graph_options(args: LLMArgs) -> GraphOptions:
    config = args.cuda_graphs
    largest = min(config.max_batch_size or args.max_batch_size, args.max_batch_size)
    return GraphOptions(largest if config.enabled else 0, config.ahead)


def _with_pieces(options: GraphOptions, args: LLMArgs, program: Program) -> GraphOptions:
    """Have steps with prompts run in pieces, if a GPU runs them. One rank alone: several would have to fail alike."""
    most = min(args.cuda_graphs.max_num_tokens, args.max_num_tokens)
    if not (options.max_batch_size and most and _device(args).startswith("cuda")):
        return options
    from autodeploy.transforms.split import split_pieces

    return replace(options, max_num_tokens=most, pieces=split_pieces(program))


def _refuse_ranks(args: LLMArgs) -> None:
    """Raises ConfigError for what several ranks cannot serve."""
    if not isinstance(args.model, str | Path):
        raise ConfigError(
            f"a model in memory is in this process alone, and {args.mesh.size} ranks need it. Write it with "
            "model.save_pretrained(folder), and give the folder."
        )


def _within_positions(args: LLMArgs, facts: ModelFacts, program: Program) -> ModelFacts:
    """The model's limits within what its tables of positions hold. Raises ConfigError where more is asked for."""
    if (table := table_of_positions(program)) is None:
        return facts
    name, rows = table
    if args.max_seq_len is not None and args.max_seq_len > rows:
        raise ConfigError(f"max_seq_len={args.max_seq_len}: '{name}' holds {rows} positions. Use max_seq_len={rows} or less.")
    return replace(facts, max_seq_len=min(facts.max_seq_len, rows))


def _refuse_missing_gpu(device: str) -> None:
    """Raises ConfigError for a GPU that is not there."""
    kind, _, index = device.partition(":")
    if kind == "cuda" and (count := torch.cuda.device_count()) <= int(index or 0):
        raise ConfigError(
            f"device='{device}': torch finds {count} GPUs here. Use device='cpu' or, where there is a GPU, a torch built for it."
        )


def _start_ranks(args: LLMArgs, lowered: Lowered, advance: Callable[[str], None]) -> DistributedRunner:
    """Every rank with its share of the weights, this one included."""
    if any(map(is_code, lowered.program.weights.recipes.values())):
        raise ConfigError(
            f"the weights of {args.model} need a conversion that is code of transformers, which cannot be sent to other ranks. "
            "Load the model with transformers and write it anew with save_pretrained, or use one rank."
        )
    assert isinstance(lowered.source, CheckpointSource)  # or it would be a model in memory
    options = RankOptions(args.mesh, _device(args), args.distributed_timeout, _graph_options(args))
    return start_ranks(_stages(lowered, args.mesh.pp), lowered.source, _launch(args), options, advance)


def _stages(lowered: Lowered, num_stages: int) -> list[Stage]:
    """What the ranks of each stage run. The program is cut after it was read, so that what is stored is all of it."""
    if num_stages == 1:
        return [Stage(lowered.program, lowered.as_json)]
    from autodeploy.transforms.split_stages import split_stages

    return [Stage(program, program.as_json().encode()) for program in split_stages(lowered.program, num_stages)]


def _distributed_backend(args: LLMArgs) -> str:
    return args.distributed_executor_backend or ("torchrun" if is_under_torchrun() else "mp")


def _launch(args: LLMArgs) -> Launch:
    if _distributed_backend(args) == "torchrun":
        return launch_under_torchrun(args.mesh.size, args.distributed_timeout)
    if _distributed_backend(args) == "ray":
        return launch_with_ray(args.mesh.size, _device(args), args.distributed_timeout)
    return launch_processes(args.mesh.size, _device(args))


def _calibrated(args: LLMArgs, folder: Path, timeline: Timeline) -> LLMArgs:
    """The options for a quantized copy of the model, which is written to that folder."""
    from autodeploy.calibrate import quantize

    if not isinstance(args.model, str | Path):
        raise ConfigError("calibration reads a checkpoint folder; write the model in memory with save_pretrained first")
    assert args.quantization is not None  # or the options would have been refused
    with timeline.phase("calibrate", None) as advance:
        done = quantize(args.model, folder, args.quantization, [token_ids(prompt) for prompt in args.calibration], advance)
    timeline.notes["calibrate"] = str(done)
    return args.model_copy(update={"model": folder, "quantization": None, "calibration": None})


def _eager(args: LLMArgs, timeline: Timeline) -> CompiledModel:
    from autodeploy._lower import eager

    facts, runner = eager(args, timeline)
    return CompiledModel(args, facts, timeline, runner, None)


class CompiledModel:
    """A program with its weights. The executor and its KV pool are made at the first call."""

    def __init__(self, args: LLMArgs, facts: ModelFacts, timeline: Timeline, runner: Runner, program: Program | None) -> None:
        self.args, self.facts, self.timeline, self.runner = args, facts, timeline, runner
        self._program = program
        self._executor: ADExecutor | None = None
        self._is_shut_down = False
        self._lock = threading.Lock()
        self._ids = itertools.count()
        self._num_pages = self._count_pages()  # a pool that is too small is refused now
        """Usable pages of a pool that keeps every token."""

    @property
    def program(self) -> Program:
        if self._program is None:
            raise ConfigError("backend='pytorch' runs the eager model: there is no program")
        self._program.derive_values()  # one from the cache has none, since it can run without
        return self._program

    @property
    def max_seq_len(self) -> int:
        return self.args.max_seq_len or self.facts.max_seq_len

    @property
    def executor(self) -> ADExecutor:
        with self._lock:
            if self._executor is None:
                if self._is_shut_down:
                    raise EngineDeadError("the engine has been shut down; compile again to go on")
                self._executor = self._make_executor()
            return self._executor

    @property
    def num_pool_tokens(self) -> int:
        """Tokens of running requests, prompts included, that the KV pool has room for."""
        return self._num_pages * self.args.kv_cache_config.page_size

    @property
    def pool_units(self) -> dict[str, int]:
        """Pages of each pool of caches and slots of the states, their scratch ones included."""
        return self._pool_sizes().units(self._num_pages)

    def report(self) -> str:
        """Passes, providers, caches, weights, start-up time and the passes that are not autodeploy's own, as text."""
        from autodeploy.plugins import foreign_text
        from autodeploy.report.tables import describe

        text, runner = describe(self.program, self.timeline), self._local_runner
        assert runner is not None  # else there is no program
        sizes = f"weights as stored: {runner.stored_bytes / 1e6:.1f} MB; in memory: {runner.weight_bytes / 1e6:.1f} MB\n"
        if runner.graphs is not None:
            sizes += f"{runner.graphs.summary()}\n"
        return text + sizes + foreign_text(pipeline_of(self.args))

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits [B, S, vocab] of token ids [B, S]; the B rows are served as B requests."""
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise RequestError(
                f"input_ids has shape {list(input_ids.shape)}, but [batch, tokens] with at least one token is needed"
            )
        handles = [self.submit(row, SamplingParams(max_tokens=0), return_context_logits=True) for row in input_ids.tolist()]
        return torch.stack([handle.result().context_logits for handle in handles])

    def generate(
        self,
        prompts: Sequence[int] | Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Token ids in, token ids out: one prompt gives one output, a list of prompts a list in the same order.

        In a list a request that fails has `finish_reason` error and its `error` set; alone it raises it. The end of the engine is
        always raised.
        """
        if is_single(prompts):
            return raised(outputs_of([self.submit(token_ids(prompts), spread(sampling_params, 1)[0])])[0])
        params = spread(sampling_params, len(prompts))
        parsed = [token_ids(prompt) for prompt in prompts]  # all, before one is queued
        return outputs_of([self.submit(ids, item) for ids, item in zip(parsed, params, strict=True)])

    def submit(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        streaming: bool = False,
        detokenizer: Detokenizer | None = None,
        return_context_logits: bool = False,
    ) -> RequestHandle:
        """Queue one request. A bad one is given a handle that raises its RequestError."""
        request = Request(
            next(self._ids),
            prompt_token_ids,
            params,
            self.facts.eos_token_ids,
            self._max_new_tokens(prompt_token_ids, params),
            detokenizer,
            return_context_logits,
        )
        handle = RequestHandle(request, prompt, streaming, self.executor.abort)
        self.executor.submit(handle)
        return handle

    def _max_new_tokens(self, ids: list[int], params: SamplingParams) -> int:
        """What was asked for; up to the end of the sequence when nothing was asked, or when only the default is too long."""
        room = max(self.max_seq_len - len(ids), 0)
        if params.max_tokens is None:
            return room
        return params.max_tokens if "max_tokens" in params.model_fields_set else min(params.max_tokens, room)

    def shutdown(self) -> None:
        """End the executor. No harm when called again."""
        with self._lock:
            self._is_shut_down = True
        if self._executor is not None:
            self._executor.shutdown()
        if isinstance(self.runner, DistributedRunner):
            self.runner.shutdown()

    def _make_executor(self) -> ADExecutor:
        args, sizes = self.args, self._pool_sizes()
        units = sizes.units(self._num_pages)
        with self.timeline.phase("allocate KV pool"):
            self.runner.allocate(units, sizes.page_size)
        sampler, launcher = Sampler(self.facts.vocab_size, args.seed), None
        if isinstance(self.runner, ModelRunner) and (launcher := self.runner.graphs) is not None:
            launcher.greedy = sampler.greedy
        self._capture_ahead(sizes.page_size)
        kv = sizes.manager(units)
        thresholds = self.runner.rope_thresholds
        scheduler = Scheduler(kv, args.max_batch_size, args.max_num_tokens, self.max_seq_len, self._chunks, thresholds)
        batches = BatchBuilder(kv, args.max_batch_size, args.max_num_tokens)
        executor = ADExecutor(self.runner, scheduler, batches, sampler, launcher, not args.disable_overlap_scheduler)
        if isinstance(self.runner, DistributedRunner):
            self.runner.ranks.tell(executor.fail)
        return executor

    @property
    def _local_runner(self) -> ModelRunner | None:
        """What runs the program in this process."""
        runner = self.runner.local if isinstance(self.runner, DistributedRunner) else self.runner
        return runner if isinstance(runner, ModelRunner) else None

    def _capture_ahead(self, page_size: int) -> None:
        """The CUDA graphs of all shapes, if that is asked for."""
        graphs = self._local_runner.graphs if self._local_runner is not None else None
        if graphs is not None and graphs.options.ahead:
            num_pages = -(-self.max_seq_len // page_size)
            with self.timeline.phase("capture CUDA graphs", graphs.num_captures(num_pages)) as advance:
                capture_all = self.runner.capture_all if isinstance(self.runner, DistributedRunner) else graphs.capture_all
                capture_all(num_pages, advance)

    @property
    def _chunks(self) -> bool:
        return self.args.enable_chunked_prefill and self.runner.can_chunk

    def _pool_sizes(self) -> PoolSizes:
        args, specs = self.args, list(self._program.caches.values()) if self._program else []
        max_step = args.max_num_tokens if self._chunks else self.max_seq_len
        shares = self.runner.stage_caches if isinstance(self.runner, DistributedRunner) else [specs]
        return PoolSizes(specs, args.max_batch_size, self.max_seq_len, args.kv_cache_config.page_size, max_step, shares)

    def _count_pages(self) -> int:
        """What the limits allow with the memory that is free now."""
        config = self.args.kv_cache_config
        limits = [config.max_bytes] if config.max_bytes is not None else []
        if not limits or "free_memory_fraction" in config.model_fields_set:
            limits.append(int(config.free_memory_fraction * self._free_memory()))
        return self._pool_sizes().num_pages(config.max_tokens, min(limits))

    def _free_memory(self) -> int:
        """Bytes that each rank may still allocate."""
        return self.runner.free_bytes if isinstance(self.runner, DistributedRunner) else free_memory(_device(self.args))
