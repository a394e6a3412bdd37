"""compile(): a Hugging Face model -> a CompiledModel that computes logits and generates."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from autodeploy.capture.checkpoint import CheckpointSource
from autodeploy.capture.export import capture
from autodeploy.capture.origin import ModelFacts, origin_of
from autodeploy.capture.patches import rope_thresholds
from autodeploy.capture.skeleton import read_config
from autodeploy.capture.twin import capture_twin
from autodeploy.config import LLMArgs, SamplingParams
from autodeploy.errors import ConfigError, EngineDeadError, RequestError
from autodeploy.executor.batch import BatchBuilder
from autodeploy.executor.engine import ADExecutor
from autodeploy.executor.kv_cache import KVCacheManager
from autodeploy.executor.model_runner import EagerRunner, ModelRunner, Runner
from autodeploy.executor.outputs import RequestHandle, RequestOutput
from autodeploy.executor.request import Detokenizer, Request
from autodeploy.executor.sampler import Sampler
from autodeploy.executor.scheduler import Scheduler
from autodeploy.plugins import apply_plugins, foreign_text
from autodeploy.program import PassRecord, Program
from autodeploy.report.tables import describe
from autodeploy.report.timeline import Timeline
from autodeploy.specs import Target
from autodeploy.transforms.default import default_pipeline
from autodeploy.transforms.pipeline import Observer, Pipeline
from autodeploy.transforms.verify_numeric import MAX_BYTES, float64_bytes
from autodeploy.weights import TensorSource


def compile(model: Any, **options: Any) -> CompiledModel:
    """Compile a Hugging Face causal language model.

    model: an `nn.Module` of transformers in memory (left as it is; unchanged weights are shared with it) or a checkpoint folder.
    options: those of `LLM`; see `LLMArgs`. Raises ConfigError, CheckpointError, UnsupportedModelError or TransformError.
    """
    return compile_observed(LLMArgs(model=model, **options))


def compile_observed(args: LLMArgs, *observers: Observer) -> CompiledModel:
    """`compile`, with callbacks that see the program after each pass; before the first one too, with a record named "export"."""
    _refuse_other_models(args.model)
    timeline = Timeline()
    if args.backend == "pytorch":
        pipeline_of(args)  # a wrong one is refused all the same
        return _eager(args, timeline)
    program, source, facts = _lowered(args, timeline, *observers)
    with timeline.phase("load weights", len(program.weights)) as advance:
        runner = ModelRunner(program, source, _device(args), advance)
    return CompiledModel(args, facts, timeline, runner, program)


def trace(args: LLMArgs, timeline: Timeline, *observers: Observer) -> Program:
    """The lowered program alone, no weights loaded. observers: as for `compile_observed`."""
    return _lowered(args, timeline, *observers)[0]


def _lowered(args: LLMArgs, timeline: Timeline, *observers: Observer) -> tuple[Program, TensorSource, ModelFacts]:
    """The lowered program, its weights as recipes over the source."""
    pipeline = pipeline_of(args)
    origin = origin_of(args.model, args.dtype, args.ignore_unexpected_weights)
    with timeline.phase("export"):
        captured = capture(origin.skeleton, origin.buffers)
    for observe in observers:
        observe(captured.program, PassRecord("export", 0, timeline.seconds["export"], {}))
    verify = args.verify
    if verify == "numeric" and float64_bytes(captured.program) > MAX_BYTES:
        with timeline.phase("verify on a small twin"):
            twin = capture_twin(origin.facts.config, next(origin.skeleton.parameters()).dtype, MAX_BYTES)
            pipeline.run(twin.program, _target(args), verify="numeric")
        verify = "structure"
    with timeline.phase("passes", len(pipeline.passes)) as advance:
        program = pipeline.run(captured.program, _target(args), advance, *observers, verify=verify)
    program.weights = program.weights.substitute(origin.recipes)
    return program, origin.source_with(captured.initial), origin.facts


def _refuse_other_models(model: Any) -> None:
    what = type(model).__name__
    if isinstance(model, nn.Module):
        if not isinstance(model, PreTrainedModel) or not model.can_generate():
            raise ConfigError(f"'model' is a {what}, not a causal language model of transformers; use AutoModelForCausalLM")
    elif not isinstance(model, str | Path):
        raise ConfigError(f"'model' is a {what}; give a checkpoint folder or a causal language model of transformers")


def pipeline_of(args: LLMArgs) -> Pipeline:
    """The passes that these options ask for: the default ones or those given, as the plugins and then a function edit them."""
    given = args.pipeline if isinstance(args.pipeline, Pipeline) else default_pipeline(_target(args))
    edited = apply_plugins(given, args.plugins)
    if args.pipeline is None or isinstance(args.pipeline, Pipeline):
        return edited
    if not callable(args.pipeline) or not isinstance(edited := args.pipeline(edited), Pipeline):
        raise ConfigError("'pipeline' must be a Pipeline or a function from Pipeline to Pipeline")
    return edited


def _device(args: LLMArgs) -> str:
    if args.device != "auto":
        return args.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _target(args: LLMArgs) -> Target:
    return Target(device=_device(args), page_size=args.kv_cache_config.page_size)


def _eager(args: LLMArgs, timeline: Timeline) -> CompiledModel:
    model: Any = args.model
    with timeline.phase("load weights"):
        if not isinstance(model, nn.Module):
            read_config(Path(model))
            CheckpointSource(Path(model))
            model = AutoModelForCausalLM.from_pretrained(model, dtype=args.dtype, trust_remote_code=False, use_safetensors=True)
        own = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})  # shared
    facts = ModelFacts.of(model.config, model.generation_config)
    return CompiledModel(args, facts, timeline, EagerRunner(own.eval(), rope_thresholds(own)), None)


class CompiledModel:
    """A program with its weights. The executor and its KV pool are made at the first call."""

    def __init__(self, args: LLMArgs, facts: ModelFacts, timeline: Timeline, runner: Runner, program: Program | None) -> None:
        self.args, self.facts, self.timeline, self.runner = args, facts, timeline, runner
        self._program = program
        self._executor: ADExecutor | None = None
        self._is_shut_down = False
        self._lock = threading.Lock()
        self._ids = itertools.count()
        self._num_pages()  # a pool that is too small is refused now

    @property
    def program(self) -> Program:
        if self._program is None:
            raise ConfigError("backend='pytorch' runs the eager model: there is no program")
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
        return (self._num_pages() - 1) * self.args.kv_cache_config.page_size

    def report(self) -> str:
        """Passes, providers, caches, weights, start-up time and the passes that are not autodeploy's own, as text."""
        text = describe(self.program, self.timeline, self.args.kv_cache_config.page_size)
        return text + foreign_text(pipeline_of(self.args))

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

        In a list a request that fails has `finish_reason` error and its `error` set; alone it raises it.
        """
        if is_single(prompts):
            return self.submit(token_ids(prompts), spread(sampling_params, 1)[0]).result()
        params = spread(sampling_params, len(prompts))
        parsed = [token_ids(prompt) for prompt in prompts]  # all, before one is queued
        return [handle.output() for handle in [self.submit(ids, item) for ids, item in zip(parsed, params, strict=True)]]

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

    def _make_executor(self) -> ADExecutor:
        args, page_size = self.args, self.args.kv_cache_config.page_size
        with self.timeline.phase("allocate KV pool"):
            num_pages = self._num_pages()
            self.runner.allocate(num_pages, page_size)
        kv = KVCacheManager(num_pages, page_size)
        chunked, thresholds = args.enable_chunked_prefill and self.runner.can_chunk, self.runner.rope_thresholds
        scheduler = Scheduler(kv, args.max_batch_size, args.max_num_tokens, self.max_seq_len, chunked, thresholds)
        batches = BatchBuilder(kv, args.max_batch_size, args.max_num_tokens)
        return ADExecutor(self.runner, scheduler, batches, Sampler(self.facts.vocab_size, args.seed))

    def _num_pages(self) -> int:
        """Pages of the pool, the scratch page included: the smallest of the limits that hold."""
        config, page_size = self.args.kv_cache_config, self.args.kv_cache_config.page_size
        specs: Iterable[Any] = self._program.caches.values() if self._program else ()
        bytes_per_page = sum(spec.bytes_per_page(page_size) for spec in specs)
        limits = [self.args.max_batch_size * -(-self.max_seq_len // page_size)]
        if config.max_tokens is not None:
            limits = [-(-config.max_tokens // page_size)]
        if bytes_per_page:
            limits.append(
                (config.max_bytes or int(config.free_memory_fraction * free_memory(_device(self.args)))) // bytes_per_page
            )
        if min(limits) < 1:
            raise ConfigError(
                f"kv_cache_config leaves room for no page of {page_size} tokens ({bytes_per_page} bytes). Raise max_bytes."
            )
        return 1 + min(limits)


def free_memory(device: str) -> int:
    """Bytes that can still be allocated on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else psutil.virtual_memory().available


def is_single(prompts: Any) -> bool:
    """One prompt, not a list of them (an empty list is an empty prompt)."""
    is_list = isinstance(prompts, Sequence) and not isinstance(prompts, str)
    return not is_list or not prompts or isinstance(prompts[0], Integral)


def token_ids(prompt: Any) -> list[int]:
    """A prompt of token ids as ints. Raises RequestError for anything else."""
    if isinstance(prompt, Sequence) and all(isinstance(token, Integral) for token in prompt):
        return [int(token) for token in prompt]
    kinds = sorted({type(token).__name__ for token in prompt}) if isinstance(prompt, Sequence) else []
    what = f"{type(prompt).__name__}{' of ' if kinds else ''}{' and '.join(kinds)}"
    raise RequestError(f"a prompt is text or a list of token ids, not {what}; a tensor or an array has tolist()")


def spread(params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int) -> list[SamplingParams]:
    """One SamplingParams per prompt, from none, one, or one each."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if not isinstance(params, Sequence) or not all(isinstance(item, SamplingParams) for item in params):
        raise ConfigError(f"sampling_params is a {type(params).__name__}; give a SamplingParams, or a list of one per prompt")
    if len(params) != num_prompts:
        raise ConfigError(f"{len(params)} sampling_params for {num_prompts} prompts; give one, or one for each")
    return list(params)
