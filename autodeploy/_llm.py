"""LLM: text in, text out, over a CompiledModel.

torch is imported when the first one is made, not with this module: the model is known by then, and other work goes on meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

from autodeploy.collector import collector_at_rest
from autodeploy.config import LLMArgs, SamplingParams
from autodeploy.errors import CheckpointError, ConfigError, RequestError
from autodeploy.executor.detokenizer import IncrementalDetokenizer
from autodeploy.executor.outputs import RequestHandle, RequestOutput, outputs_of, raised
from autodeploy.light_torch import light_torch
from autodeploy.memory_ahead import memory_ahead
from autodeploy.program_store import model_name, store_of
from autodeploy.prompts import is_single, spread, token_ids
from autodeploy.report.timeline import Timeline, is_terminal

if TYPE_CHECKING:
    from autodeploy._compile import CompiledModel

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or {"prompt": text} / {"prompt_token_ids": ids}."""


class LLM:
    """A model being served in this process.

    model: a checkpoint folder, or a Hugging Face model in memory (then `tokenizer` must be given, or `skip_tokenizer_init=True`).
    options: the fields of `LLMArgs`; the spellings `max_num_seqs`, `max_num_batched_tokens` and `max_model_len` work too.
    `backend="pytorch"` runs the eager model behind the same methods: the reference.

    tensor_parallel_size: that many processes share each layer. This one is rank 0 and starts the others, unless torchrun has done
    so: then all run the same script, and in the others this call serves and exits the process when rank 0 is done.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        args, timeline = LLMArgs(model=model, **options), Timeline()
        with memory_ahead(_expected_memory(args)):
            with timeline.phase("import torch"), collector_at_rest(), light_torch():
                from autodeploy._compile import compile_observed, serve_if_other_rank
            serve_if_other_rank(args)
            self.tokenizer: Any = None if args.skip_tokenizer_init else tokenizer_of(args)
            if args.calibration is not None:
                prompts = [self._parse(prompt, SamplingParams())[1] for prompt in args.calibration]
                args = args.model_copy(update={"calibration": prompts})
            self.compiled: CompiledModel = compile_observed(args, timeline=timeline)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """End the executor; requests under way end with finish_reason abort. No harm when called again."""
        self.compiled.shutdown()

    @overload
    def generate(
        self,
        inputs: str | Mapping[str, Any] | list[int],
        sampling_params: SamplingParams | None = ...,
        use_tqdm: bool = ...,
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        inputs: Sequence[str] | Sequence[Sequence[int]] | Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = ...,
        use_tqdm: bool = ...,
    ) -> list[RequestOutput]: ...

    def generate(self, inputs: Any, sampling_params: Any = None, use_tqdm: bool = True) -> RequestOutput | list[RequestOutput]:
        """Generate for one prompt (one RequestOutput) or a list of prompts (a list in the same order).

        A flat list of ints is one prompt. In a list, a request that fails has finish_reason error and its `error` set, and the
        others go on; a single prompt raises, and so does the end of the engine. use_tqdm: a progress bar, where a terminal is.
        """
        if is_single(inputs):
            return raised(outputs_of([self.generate_async(inputs, spread(sampling_params, 1)[0])])[0])
        params = spread(sampling_params, len(inputs))
        parsed = [self._parse(prompt, item) for prompt, item in zip(inputs, params, strict=True)]  # all, before one is queued
        handles = [self._submit(*each, item, streaming=False) for each, item in zip(parsed, params, strict=True)]
        return outputs_of(handles, _with_bar if use_tqdm and is_terminal() else iter)

    def generate_async(
        self, inputs: Prompt, sampling_params: SamplingParams | None = None, streaming: bool = False
    ) -> RequestHandle:
        """Queue one prompt. The handle can be waited for, awaited, iterated (`for`, `async for`) or aborted.

        streaming: iterating gives an output per token, else the final one alone.
        """
        params = sampling_params or SamplingParams()
        return self._submit(*self._parse(inputs, params), params, streaming)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Answer a conversation (a list of {"role", "content"}), or a list of them, through the chat template."""
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError("chat needs a tokenizer with a chat template; this LLM has none. Use generate().")
        options = {"add_generation_prompt": True, **(chat_template_kwargs or {})}
        single = not messages or isinstance(messages[0], Mapping)
        conversations: list[Any] = [messages] if single else list(messages)
        prompts = [
            self._encode(self.tokenizer.apply_chat_template(talk, tokenize=False, **options), False) for talk in conversations
        ]
        return self.generate(prompts[0] if single else prompts, sampling_params, use_tqdm)  # pyright: ignore

    def _submit(self, text: str | None, ids: list[int], params: SamplingParams, streaming: bool) -> RequestHandle:
        detokenizer = None
        if self.tokenizer is not None and params.detokenize:
            detokenizer = IncrementalDetokenizer(
                self.tokenizer,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
        return self.compiled.submit(ids, params, prompt=text, streaming=streaming, detokenizer=detokenizer)

    def _parse(self, prompt: Any, params: SamplingParams) -> tuple[str | None, list[int]]:
        """Text, if there is any, and token ids. Raises RequestError for what is no prompt."""
        if isinstance(prompt, Mapping):
            if len(prompt) != 1 or not prompt.keys() <= {"prompt", "prompt_token_ids"}:
                raise RequestError(f"a prompt dict has either 'prompt' or 'prompt_token_ids', not {sorted(prompt)}")
            prompt = next(iter(prompt.values()))
        if isinstance(prompt, str):
            return prompt, self._encode(prompt, params.add_special_tokens)
        return None, token_ids(prompt)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if self.tokenizer is None:
            raise RequestError("a text prompt needs a tokenizer, and skip_tokenizer_init=True; give token ids")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"character {error.start} of the prompt is half of one (a lone surrogate); leave it out"
            ) from error
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)  # the scheduler judges length


def _with_bar(handles: Iterable[RequestHandle]) -> Iterable[RequestHandle]:
    from rich.console import Console  # late, as in `Timeline`
    from rich.progress import track

    return track(handles, "generating", console=Console(stderr=True), transient=True)


def _expected_memory(args: LLMArgs) -> int:
    """Bytes of the weights in the memory of the CPU, where the last start of this folder noted them."""
    store = store_of(args.program_cache)
    if store is None or not isinstance(args.model, str | Path) or args.device.startswith("cuda") or args.mesh.size > 1:
        return 0
    return store.last_memory(model_name(Path(args.model)))


def tokenizer_of(args: LLMArgs) -> Any:
    """The tokenizer given, or that of a folder. Raises CheckpointError or ConfigError with the remedy."""
    from autodeploy._compile import refuse_other_models
    from autodeploy.checkpoint import raw_config

    given = args.tokenizer
    if given is not None and not isinstance(given, str | Path):
        return given
    if given is None and not isinstance(args.model, str | Path):
        refuse_other_models(args.model)
        raise ConfigError(
            "a model in memory brings no tokenizer; pass tokenizer=..., or skip_tokenizer_init=True to use token ids"
        )
    folder = Path(given or args.model)
    if given is None:
        raw_config(folder)
    elif not folder.is_dir():
        where = folder if folder.is_absolute() else f"{folder} (relative to {Path.cwd()})"
        raise CheckpointError(f"tokenizer: {where} is not a folder. Give the path of a folder written by save_pretrained.")
    try:
        with collector_at_rest():
            from transformers import AutoTokenizer  # late: token ids can be served without

            tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # made from config.json alone, it turns every text into nothing
            raise ValueError("its files are missing: only special tokens are known")
        return tokenizer
    except (OSError, ValueError) as error:
        if given is None:
            refuse_other_models(folder)  # a folder that is wrong as a whole is refused for that, not for its tokenizer
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder} has no usable tokenizer ({reason}). Pass another folder as tokenizer=... (--tokenizer of the command); "
            "or, in Python, skip_tokenizer_init=True to use token ids."
        ) from error
