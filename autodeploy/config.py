"""Options of the engine and of one request.

The models are frozen. Constructing one with a wrong option raises `ConfigError`, never `pydantic.ValidationError`. Three data
tables say which other spellings are understood (`_ALIASES`), which options come later and are accepted only at a value that
changes nothing (`_LATER`), and where an option known from other engines lives here (`_ELSEWHERE`).
"""

import copy
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from autodeploy.errors import ConfigError, did_you_mean
from autodeploy.specs import Mesh

_DTYPES = ("auto", "float16", "bfloat16", "float32", "float64")
_DTYPE_ALIASES = {
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
    "float": "float32",
    "fp32": "float32",
    "double": "float64",
    "fp64": "float64",
}


LEAST_TEMPERATURE = 1e-5
"""Logits that differ at all are told apart below, and a quotient by less may be no number."""
SHARE_KINDS = ("replicate", "column", "row", "vocabulary", "expert", "part")


def _dtype_name(value: object) -> str:
    """Bare name of a dtype given as a string or as a `torch.dtype`."""
    name = str(value).removeprefix("torch.")
    name = _DTYPE_ALIASES.get(name, name)
    if name not in _DTYPES:
        raise ValueError(f"it is none of {', '.join(_DTYPES)}.{did_you_mean(name, [*_DTYPES, *_DTYPE_ALIASES])}")
    return name


def _as_tuple(value: object) -> object:
    """A tuple from None, from one string or from a list; anything else as it is."""
    if value is None or isinstance(value, str):
        return () if value is None else (value,)
    return tuple(value) if isinstance(value, list) else value


def _only_neutral(names: str, **neutral: tuple[object, ...]) -> dict[str, tuple[object, ...]]:
    """A `_LATER` table: `names` take only None, False or nothing; the others also the values that are given."""
    return dict.fromkeys(names.split(), ()) | neutral


def _is_neutral(value: object, neutral: tuple[object, ...]) -> bool:
    """Whether an option that is not supported yet has a value that asks for nothing."""
    if value is None or value is False:
        return True
    return isinstance(value, bool | int | float | str | list | tuple | dict) and (value in neutral or value in ("", [], (), {}))


class _Options(BaseModel):
    """Base of the models below: resolves aliases and turns every failure into a `ConfigError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    _ALIASES: ClassVar[Mapping[str, str]] = {}
    _LATER: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    _ELSEWHERE: ClassVar[Mapping[str, str]] = {}

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**self._canonical(options))
        except ValidationError as error:
            raise self._explained(error) from None
        for name in self._LATER.keys() & type(self).model_fields.keys():
            self._refuse_later(name, getattr(self, name))

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As a new one that is given the options of this one and the others: checked, and nothing known of this one is kept."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**(copy.deepcopy(given) if deep else given), **(update or {})})

    @classmethod
    def _canonical(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The same options with only names of fields; raises on the first name that is none."""
        result: dict[str, Any] = {}
        for spelling, value in options.items():
            name = cls._ALIASES.get(spelling, spelling)
            if name in result and result[name] != value:
                raise ConfigError(
                    f"{cls.__name__}: '{name}' is given twice with different values; '{spelling}' is the same option."
                )
            if name in cls.model_fields:
                result[name] = value
            elif name in cls._LATER:
                cls._refuse_later(name, value)
            else:
                raise ConfigError(f"{cls.__name__} has no option '{spelling}'.{cls._hint(spelling)}")
        return result

    @classmethod
    def _refuse_later(cls, name: str, value: object) -> None:
        if not _is_neutral(value, cls._LATER[name]):
            raise ConfigError(f"{cls.__name__}: {name}={value!r} is not supported yet; leave '{name}' out.")

    @classmethod
    def _hint(cls, name: str) -> str:
        if name in cls._ELSEWHERE:
            return f" Use {cls._ELSEWHERE[name]}."
        return did_you_mean(name, [*cls.model_fields, *cls._ALIASES])

    @classmethod
    def _explained(cls, error: ValidationError) -> ConfigError:
        """The first failure as one sentence: field, value, reason, and what the field expects."""
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            return cause
        reason = first["msg"].removeprefix("Value error, ")
        reason += "" if reason.endswith(("?", ".")) else "."
        if not first["loc"]:
            return ConfigError(f"{cls.__name__}: {reason}")
        name = str(first["loc"][0])
        if first["type"] == "missing":
            return ConfigError(f"{cls.__name__}: '{name}' is required.")
        field = cls.model_fields.get(name)
        expected = f" '{name}' is {field.description}." if field and field.description else ""
        return ConfigError(f"{cls.__name__}: {name}={first['input']!r} is refused: {reason}{expected}")


class SamplingParams(_Options):
    """How the tokens of one request are chosen and when it stops.

    `SamplingParams()` is **greedy**: the most likely token is taken at each step, nothing is drawn. The rule: greedy when
    `temperature` is 0 (or below 1e-5), or `top_k=1`, or none of `temperature`, `top_k`, `top_p` and `min_p` is given; otherwise
    tokens are drawn, at temperature 1.0 unless one is given. Nothing is read from the model's generation_config.json except
    its end-of-sequence ids.

    The order is: penalties, temperature, top_k, top_p, min_p. Raises `ConfigError`.
    """

    _ALIASES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}
    _LATER = _only_neutral(
        "use_beam_search beam_width_array early_stopping top_p_min top_p_decay top_p_reset_ids end_id pad_id stop_regex "
        "bad bad_words bad_token_ids embedding_bias logit_bias allowed_token_ids logprobs prompt_logprobs "
        "logprob_token_ids flat_logprobs return_context_logits return_generation_logits return_hidden_states "
        "return_encoder_output return_perf_metrics additional_model_outputs guided_decoding structured_outputs "
        "logits_processor logits_processors apply_batched_logits_processor extra_args lora_request truncate_prompt_tokens "
        "thinking_token_budget repetition_detection",
        n=(1,),
        best_of=(1,),
        beam_width=(1,),
        beam_search_diversity_rate=(0.0,),
        length_penalty=(1.0,),
        no_repeat_ngram_size=(0,),
    )

    max_tokens: int | None = Field(
        default=32, ge=0, description="the most tokens to generate, 0 or more, or None for up to max_seq_len"
    )
    min_tokens: int = Field(
        default=0, ge=0, description="the number of tokens before which nothing but max_tokens stops the request"
    )
    temperature: float | None = Field(
        default=None, ge=0.0, allow_inf_nan=False, description="the divisor of the logits, 0 or more; 0 is greedy"
    )
    top_k: int | None = Field(default=None, ge=-1, description="how many of the most likely tokens are kept; 0 or -1 keeps all")
    top_p: float | None = Field(
        default=None, gt=0.0, le=1.0, description="the probability mass that is kept, in (0, 1]; for greedy choose temperature=0"
    )
    min_p: float | None = Field(
        default=None, ge=0.0, le=1.0, description="the least probability kept, relative to the most likely token, in [0, 1]"
    )
    repetition_penalty: float = Field(
        default=1.0, gt=0.0, allow_inf_nan=False, description="a factor on tokens of prompt and output, above 0; 1.0 is none"
    )
    presence_penalty: float = Field(
        default=0.0, ge=-2.0, le=2.0, description="what a token that was generated before loses, in [-2, 2]"
    )
    frequency_penalty: float = Field(
        default=0.0, ge=-2.0, le=2.0, description="what a token loses each time it was generated before, in [-2, 2]"
    )
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="the seed of this request's draws, in [0, 2**63), or None")
    stop: str | Sequence[str] | None = Field(default=(), description="a non-empty string, or several, at which the text ends")
    stop_token_ids: Sequence[int] | None = Field(default=(), description="the token ids at which the request ends")
    include_stop_str_in_output: bool = Field(default=False, description="whether the text keeps what stopped it")
    ignore_eos: bool = Field(default=False, description="whether to go on after an end-of-sequence token")
    skip_special_tokens: bool = Field(default=True, description="whether special tokens are left out of the text")
    spaces_between_special_tokens: bool = Field(
        default=True, description="whether a slow tokenizer puts spaces between special tokens"
    )
    add_special_tokens: bool = Field(default=True, description="whether the tokenizer adds its special tokens to a text prompt")
    detokenize: bool = Field(default=True, description="whether token ids are turned into text")

    @field_validator("stop", "stop_token_ids", mode="before")
    @classmethod
    def _as_tuple(cls, value: object) -> object:
        return _as_tuple(value)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}; lower one or raise the other")
        if (least := min(self.stop_token_ids or (), default=0)) < 0:
            raise ValueError(f"stop_token_ids holds {least}, but token ids are 0 or more; leave it out")
        if "" in self.stop_strings:
            raise ValueError("an empty stop string would end every request at once; leave it out")
        if self.stop and not self.detokenize:
            raise ValueError("stop strings are found in the text, and detokenize=False makes none; use stop_token_ids")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop`, however it was given."""
        return cast(tuple[str, ...], self.stop)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """`stop_token_ids` as a set."""
        return frozenset(self.stop_token_ids or ())

    @cached_property
    def greedy(self) -> bool:
        """Whether the most likely token is taken instead of drawing one."""
        if self.top_k == 1 or (self.temperature is not None and self.temperature < LEAST_TEMPERATURE):
            return True
        return self.temperature is None and self.top_k is None and self.top_p is None and self.min_p is None

    @cached_property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @cached_property
    def is_plain_argmax(self) -> bool:
        """Whether the next token is the largest logit, with nothing to apply before."""
        return self.greedy and not self.has_penalties and self.min_tokens == 0


class KVCacheConfig(_Options):
    """Size of the paged KV pool. The smallest of the limits that are given holds. Raises `ConfigError`."""

    _ALIASES = {
        "tokens_per_block": "page_size",
        "block_size": "page_size",
        "max_gpu_total_bytes": "max_bytes",
        "kv_cache_memory_bytes": "max_bytes",
        "free_gpu_memory_fraction": "free_memory_fraction",
    }
    _LATER = _only_neutral(
        "enable_block_reuse enable_partial_reuse enable_prefix_caching copy_on_partial_reuse max_attention_window "
        "secondary_offload_min_priority",
        host_cache_size=(0,),
        disk_cache_size=(0,),
    )

    page_size: int = Field(default=32, ge=1, description="the number of tokens in one page, 1 or more")
    max_tokens: int | None = Field(default=None, ge=1, description="the most tokens the pool holds, or None")
    max_bytes: int | None = Field(default=None, ge=1, description="the most bytes the pool takes on one device, or None")
    free_memory_fraction: float = Field(
        default=0.25, gt=0.0, lt=1.0, description="the share of the memory available once the weights are loaded, in (0, 1)"
    )
    dtype: Literal["auto", "int8", "float8_e4m3fn"] = Field(
        default="auto", description="the element type of the cache: auto (that of the model), int8 or fp8"
    )

    @field_validator("dtype", mode="before")
    @classmethod
    def _known_dtype(cls, value: object) -> object:
        name = str(value).removeprefix("torch.")
        name = "float8_e4m3fn" if name in ("fp8", "fp8_e4m3") else name
        if name not in (known := ("auto", "int8", "float8_e4m3fn")):
            raise ValueError(f"it is none of auto, int8, fp8.{did_you_mean(name, known)}")
        return name


class CudaGraphConfig(_Options):
    """Steps as CUDA graphs, on GPUs; CPUs do without. Raises `ConfigError`."""

    _ALIASES = {"max_cudagraph_capture_size": "max_batch_size"}
    _LATER = _only_neutral("batch_sizes cudagraph_capture_sizes", enable_padding=(True,))

    enabled: bool = Field(default=True, description="whether steps are captured and replayed")
    ahead: bool = Field(default=False, description="whether all shapes are captured at the start, not when one comes again")
    max_batch_size: int | None = Field(
        default=None, ge=1, description="the most requests of a captured decode step; None is the engine's max_batch_size"
    )
    max_num_tokens: int = Field(
        default=512, ge=0, description="the most tokens of a step with prompts that is captured in pieces; 0 captures none"
    )


class QuantConfig(_Options):
    """Rounding of weights: each number to the nearest or, with calibration, by an algorithm. Raises `ConfigError`."""

    scheme: Literal["int8", "w8a8", "int4", "fp8", "nvfp4", "mxfp4"] = Field(
        description="int8, w8a8 (activations of 8 bits too), int4 (the same), fp8, nvfp4 or mxfp4"
    )
    group_size: int = Field(
        default=0, ge=0, multiple_of=8, description="the columns that share a scale, a multiple of 8, of int4; 0 is 32"
    )
    lm_head: bool = Field(default=True, description="whether the output head is quantized too, to 8 bits at least")
    exclude: tuple[str, ...] = Field(default=(), description="names of matrices to leave as they are; * stands for anything")
    algorithm: Literal["gptq", "awq", "smoothquant"] = Field(
        default="gptq", description="what calibration is used for: gptq, awq or smoothquant"
    )

    @property
    def rounding(self) -> dict[str, Any]:
        """The options that rounding to the nearest numbers has."""
        return self.model_dump(exclude={"algorithm"})

    @field_validator("scheme", mode="before")
    @classmethod
    def _known_scheme(cls, value: object) -> object:
        known = get_args(cls.model_fields["scheme"].annotation)
        if value not in known:
            raise ValueError(f"it is none of {', '.join(known)}.{did_you_mean(str(value), known)}")
        return value

    @field_validator("exclude", mode="before")
    @classmethod
    def _as_names(cls, value: object) -> object:
        return _as_tuple(value)

    @model_validator(mode="after")
    def _groups_of_int4(self) -> Self:
        if self.group_size and self.scheme != "int4":
            raise ValueError(f"group_size is for scheme='int4'; {self.scheme} has a size of its own. Leave it out")
        return self


class LLMArgs(_Options):
    """Every option of the engine; `LLM` and `compile` take the same names. Raises `ConfigError`."""

    _ALIASES = {
        "max_num_seqs": "max_batch_size",
        "max_num_batched_tokens": "max_num_tokens",
        "max_model_len": "max_seq_len",
        "enable_autotuner": "autotune",
        "attn_backend": "attention_backend",
    }
    _LATER = _only_neutral(
        "revision tokenizer_revision hf_token hf_overrides cp_config enable_expert_parallel "
        "enable_attention_dp attention_dp_config gpus_per_node max_input_len enable_prefix_caching scheduler_config "
        "async_scheduling torch_compile_config compilation_config logits_processors "
        "batched_logits_processor speculative_config guided_decoding_backend structured_outputs_config enable_lora "
        "lora_config peft_cache_config cache_transceiver_config kv_transfer_config orchestrator_type "
        "enable_iter_perf_stats return_perf_metrics generation_config",
        load_format=("auto",),
        tokenizer_mode=("auto",),
        context_parallel_size=(1,),
        decode_context_parallel_size=(1,),
        prefill_context_parallel_size=(1,),
        moe_tensor_parallel_size=(1,),
        data_parallel_size=(1,),
        max_beam_width=(1,),
        cpu_offload_gb=(0,),
        sampler_type=("auto",),
        stream_interval=(1,),
        num_postprocess_workers=(0,),
        disable_log_stats=(True,),
    )
    _ELSEWHERE = {
        "block_size": "kv_cache_config={'page_size': ...}",
        "tokens_per_block": "kv_cache_config={'page_size': ...}",
        "kv_cache_dtype": "kv_cache_config={'dtype': ...}",
        "kv_cache_memory_bytes": "kv_cache_config={'max_bytes': ...}",
        "gpu_memory_utilization": "kv_cache_config={'free_memory_fraction': ...}, a share of what the weights leave free",
    }

    model: Any = Field(description="a checkpoint folder or a Hugging Face model in memory")
    backend: Literal["autodeploy", "pytorch"] = Field(
        default="autodeploy", description="the compiled engine, or the eager reference"
    )
    tokenizer: Any = Field(default=None, description="a folder or a tokenizer object; None takes the model's folder")
    skip_tokenizer_init: bool = Field(default=False, description="whether to serve token ids only")
    trust_remote_code: bool = Field(default=False, description="always False")
    dtype: str = Field(default="auto", description="the element type of weights and activations; auto is that of the checkpoint")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:<index>")
    load_format: Literal["auto", "dummy"] = Field(default="auto", description="where weights come from: auto is the checkpoint")
    ignore_unexpected_weights: bool = Field(
        default=False, description="whether tensors that the model does not use are passed over"
    )
    quantization: QuantConfig | None = Field(
        default=None,
        description="a scheme to quantize to (int8, w8a8, int4, ...), a QuantConfig or a dict of its options, or None",
    )
    calibration: Any = Field(default=None, description="prompts (texts, or lists of token ids) to quantize for, or None")
    tensor_parallel_size: int = Field(default=1, ge=1, description="the number of ranks that share each layer")
    pipeline_parallel_size: int = Field(default=1, ge=1, description="the number of ranks that layers are divided over")
    moe_expert_parallel_size: int | None = Field(
        default=None, ge=1, description="the number of groups of these ranks that experts are dealt out to; None is 1"
    )
    distributed_executor_backend: Literal["mp", "ray", "torchrun"] | None = Field(
        default=None, description="who starts the ranks: mp (this process), torchrun or ray; None finds out"
    )
    distributed_timeout: float = Field(
        default=60.0, gt=0.0, allow_inf_nan=False, description="the seconds after which a step of several ranks counts as hung"
    )
    shard_plan: Any = Field(
        default=None,
        description="how ranks share parameters: a dict of name patterns (* stands for anything) and kinds (replicate, column, "
        "row, vocabulary, expert or part), or a YAML file of one; None is what the graph says",
    )
    max_seq_len: int | None = Field(
        default=None, ge=1, description="the most tokens of one request, prompt and output; None is the model's"
    )
    max_num_tokens: int = Field(default=2048, ge=1, description="the most tokens computed in one step")
    max_batch_size: int = Field(
        default_factory=lambda fields: min(32, fields["max_num_tokens"]),
        ge=1,
        description="the most requests running at once; 32, or max_num_tokens if that is less",
    )
    kv_cache_config: KVCacheConfig = Field(default=KVCacheConfig(), description="a KVCacheConfig or a dict of its options")
    cuda_graph_config: CudaGraphConfig = Field(
        default=CudaGraphConfig(), description="a CudaGraphConfig, a dict of its options, or None or False for no CUDA graphs"
    )
    enforce_eager: bool = Field(default=False, description="True is cuda_graph_config={'enabled': False}")
    disable_overlap_scheduler: bool = Field(
        default=False, description="whether a GPU waits for the tokens of a decode step before the next one is started"
    )
    enable_chunked_prefill: bool = Field(default=True, description="whether a long prompt may be computed over several steps")
    seed: int = Field(default=0, ge=0, lt=2**63, description="the seed of draws of requests that bring none, in [0, 2**63)")
    plugins: tuple[str, ...] = Field(default=(), description="the plugins to apply: names of installed ones, or module:attribute")
    pipeline: Any = Field(default=None, description="a Pipeline, or a function from Pipeline to Pipeline")
    verify: Literal["off", "structure", "numeric"] = Field(
        default="structure", description="what is checked after each graph pass"
    )
    autotune: bool = Field(
        default=False,
        description="whether kernels that may take each other's place are timed at the first start, and the fastest are taken",
    )
    attention_backend: Literal["auto", "flashinfer", "triton", "cpp", "torch"] = Field(
        default="auto",
        description="who computes attention: flashinfer or triton on GPUs, cpp on CPUs, torch anywhere; auto is what serves best",
    )
    program_cache: bool | Path = Field(
        default=True,
        description="whether lowered programs of checkpoint folders are stored and used again, or the folder for them",
    )

    @field_validator("program_cache", mode="before")
    @classmethod
    def _cache_folder(cls, value: object) -> object:
        return Path(value).expanduser() if isinstance(value, str) else value

    @field_validator("dtype", mode="before")
    @classmethod
    def _bare_dtype(cls, value: object) -> str:
        return _dtype_name(value)

    @field_validator("device", mode="before")
    @classmethod
    def _known_device(cls, value: object) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(value)):
            raise ValueError("no such device")
        return str(value)

    @field_validator("attention_backend", mode="before")
    @classmethod
    def _known_attention(cls, value: object) -> object:
        known = get_args(cls.model_fields["attention_backend"].annotation)
        name = "auto" if value is None else str(value).lower()
        if name not in known:
            raise ValueError(f"it is none of {', '.join(known)}.{did_you_mean(name, known)}")
        return name

    @field_validator("quantization", mode="before")
    @classmethod
    def _scheme(cls, value: object) -> object:
        return {"scheme": value} if isinstance(value, str) else value

    @field_validator("plugins", mode="before")
    @classmethod
    def _as_names(cls, value: object) -> object:
        names = _as_tuple(value)
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError("plugins are named by text; give a function from Pipeline to Pipeline as pipeline=function")
        return names

    @field_validator("shard_plan", mode="before")
    @classmethod
    def _read_shard_plan(cls, value: object) -> object:
        if isinstance(value, str | Path):
            import yaml  # late: few starts need it

            try:
                value = yaml.safe_load(Path(value).expanduser().read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise ValueError(f"the file cannot be read ({error}); write lines such as '*.mlp.*: replicate'") from error
        if value is not None and not (isinstance(value, dict) and all(isinstance(name, str) for name in value)):
            raise ValueError("it maps patterns of parameter names to kinds, such as {'*.mlp.*': 'replicate'}")
        for kind in (value or {}).values():
            if kind not in SHARE_KINDS:
                raise ValueError(f"'{kind}' is none of {', '.join(SHARE_KINDS)}.{did_you_mean(str(kind), SHARE_KINDS)}")
        return value

    @field_validator("kv_cache_config", mode="before")
    @classmethod
    def _default_kv_cache(cls, value: object) -> object:
        return KVCacheConfig() if value is None else value

    @field_validator("cuda_graph_config", mode="before")
    @classmethod
    def _as_switch(cls, value: object) -> object:
        return CudaGraphConfig(enabled=bool(value)) if value is None or isinstance(value, bool) else value

    @field_validator("trust_remote_code")
    @classmethod
    def _no_remote_code(cls, value: bool) -> bool:
        if value:
            raise ValueError("code from a model folder is never run; use a model whose code is part of transformers")
        return value

    @model_validator(mode="after")
    def _one_token_each(self) -> Self:
        if self.calibration is not None and self.quantization is None:
            raise ValueError("calibration is for quantization; give a scheme as quantization=..., or leave it out")
        if self.max_batch_size > self.max_num_tokens:
            raise ValueError(
                f"max_batch_size={self.max_batch_size} exceeds max_num_tokens={self.max_num_tokens}, but each running request "
                "needs one token per step; raise max_num_tokens or lower max_batch_size"
            )
        self._check_mesh()
        if self.enforce_eager and self.cuda_graph_config.ahead:
            raise ValueError("enforce_eager=True captures no CUDA graphs, but cuda_graph_config asks for them; leave one out")
        return self

    def _check_mesh(self) -> None:
        mesh = self.mesh
        if mesh.tp % mesh.ep:
            raise ValueError(
                f"moe_expert_parallel_size={mesh.ep} does not divide tensor_parallel_size={mesh.tp}, whose ranks the experts are "
                "dealt out to; choose a divisor"
            )
        if self.shard_plan is not None and mesh.tp == 1:
            raise ValueError("shard_plan is for ranks that share layers; give tensor_parallel_size=2 or more, or leave it out")
        if mesh.size > 1 and self.backend == "pytorch":
            raise ValueError("backend='pytorch' runs in one process; leave the parallel sizes out, or use backend='autodeploy'")
        if mesh.size > 1 and ":" in self.device:
            raise ValueError(f"{mesh.size} ranks have a GPU each; give device='cuda' without a number")

    @property
    def mesh(self) -> Mesh:
        """The ranks. As in TensorRT-LLM, the experts are dealt out among the ranks of a layer, not to further ones."""
        return Mesh(self.tensor_parallel_size, self.moe_expert_parallel_size or 1, self.pipeline_parallel_size)

    @property
    def cuda_graphs(self) -> CudaGraphConfig:
        """`cuda_graph_config`, with `enforce_eager` heeded."""
        return CudaGraphConfig(enabled=False) if self.enforce_eager else self.cuda_graph_config
