"""Options: defaults, other spellings, and a message with name, reason and remedy for everything else."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from autodeploy import errors
from autodeploy.config import CudaGraphConfig, KVCacheConfig, LLMArgs, SamplingParams
from autodeploy.errors import ConfigError, TransformError, UnsupportedModelError, did_you_mean

T = TypeVar("T")


def build(cls: type[T], **options: Any) -> T:
    """An options object by names and values that a type checker need not know."""
    return cls(**options)


def refusal(cls: type, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(cls, **options)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


def test_config_needs_no_torch() -> None:
    code = "import sys, autodeploy.config, autodeploy.errors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# SamplingParams


@pytest.mark.parametrize(
    ("options", "greedy"),
    [
        ({}, True),
        ({"temperature": 0}, True),
        ({"temperature": 0.0, "top_p": 0.5}, True),
        ({"top_k": 1}, True),
        ({"top_k": 1, "temperature": 2.0}, True),
        ({"temperature": 1.0}, False),
        ({"top_k": 5}, False),
        ({"top_k": 0}, False),
        ({"top_k": -1}, False),
        ({"top_p": 1.0}, False),
        ({"min_p": 0.1}, False),
        ({"temperature": 1e-6, "min_p": 0.1}, True),
        ({"temperature": 1e-4}, False),
        ({"seed": 3}, True),
        ({"repetition_penalty": 1.2}, True),
    ],
)
def test_greedy_rule(options: dict[str, Any], greedy: bool) -> None:
    assert SamplingParams(**options).greedy is greedy


def test_a_copy_is_judged_by_its_own_options() -> None:
    params = SamplingParams(max_tokens=5)
    assert params.greedy and params.is_plain_argmax and not params.stop_ids
    changed = params.model_copy(update={"temperature": 1.0, "stop_token_ids": [3]})
    assert not changed.greedy and not changed.is_plain_argmax and changed.stop_ids == {3}
    assert changed.max_tokens == 5 and changed.model_fields_set == {"max_tokens", "temperature", "stop_token_ids"}
    with pytest.raises(ConfigError, match="top_p=2"):
        params.model_copy(update={"top_p": 2})


def test_token_ids_below_0_are_none() -> None:
    assert "stop_token_ids holds -1" in refusal(SamplingParams, stop_token_ids=[3, -1])


def test_plain_argmax_needs_neither_penalties_nor_bans() -> None:
    assert SamplingParams().is_plain_argmax
    for options in ({"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.1}, {"min_tokens": 1}):
        params = build(SamplingParams, **options)
        assert params.greedy and not params.is_plain_argmax


def test_stop_takes_several_forms() -> None:
    assert SamplingParams().stop_strings == SamplingParams(stop=None).stop_strings == ()
    assert SamplingParams(stop="a").stop_strings == ("a",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=[3, 4, 3]).stop_ids == {3, 4}
    assert SamplingParams(stop_token_ids=None).stop_ids == frozenset()


def test_params_are_values() -> None:
    params = SamplingParams(temperature=0.5, stop=["a"])
    assert params.greedy is False  # cached, and no part of the value
    assert params == SamplingParams(temperature=0.5, stop="a") != SamplingParams(temperature=0.5)
    assert pickle.loads(pickle.dumps(params)) == params
    assert hash(params) == hash(SamplingParams(temperature=0.5, stop="a"))
    with pytest.raises(ValueError, match="frozen"):
        params.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_token": 3}, ["no option 'max_token'", "Did you mean 'max_tokens'?"]),
        ({"zzz": 3}, ["no option 'zzz'"]),
        ({"max_tokens": -1}, ["max_tokens=-1", "greater than or equal to 0", "None for up to max_seq_len"]),
        ({"temperature": -0.1}, ["temperature=-0.1"]),
        ({"temperature": float("nan")}, ["temperature=nan", "finite"]),
        ({"top_k": -2}, ["top_k=-2", "-1 keeps all"]),
        ({"top_p": 0.0}, ["top_p=0.0", "(0, 1]", "temperature=0"]),
        ({"top_p": 1.1}, ["top_p=1.1"]),
        ({"min_p": 2}, ["min_p=2"]),
        ({"repetition_penalty": 0}, ["repetition_penalty=0"]),
        ({"presence_penalty": 3}, ["presence_penalty=3", "[-2, 2]"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"stop": ""}, ["empty stop string"]),
        ({"stop": ["a", 3]}, ["stop=", "valid string"]),
        ({"stop": "a", "detokenize": False}, ["detokenize=False", "stop_token_ids"]),
        ({"min_tokens": 5, "max_tokens": 4}, ["min_tokens=5", "max_tokens=4", "lower"]),
        ({"max_tokens": 3, "max_new_tokens": 4}, ["'max_tokens' is given twice", "max_new_tokens"]),
        ({"n": 2}, ["n=2 is not supported yet", "leave 'n' out"]),
        ({"logprobs": 0}, ["logprobs=0 is not supported yet"]),
        ({"logit_bias": {1: 2.0}}, ["logit_bias", "not supported yet"]),
        ({"embedding_bias": torch.zeros(3)}, ["embedding_bias", "not supported yet"]),
    ],
)
def test_sampling_refusals(options: dict[str, Any], words: list[str]) -> None:
    message = refusal(SamplingParams, **options)
    assert all(word in message for word in words), message


def test_later_options_pass_at_neutral_values() -> None:
    neutral = {"n": 1, "best_of": None, "logprobs": None, "logit_bias": {}, "bad_words": [], "use_beam_search": False}
    assert build(SamplingParams, **neutral, max_new_tokens=7) == SamplingParams(max_tokens=7)


# KVCacheConfig and LLMArgs


def test_defaults() -> None:
    args = LLMArgs(model="folder")
    assert (args.backend, args.max_batch_size, args.max_num_tokens, args.max_seq_len) == ("autodeploy", 32, 2048, None)
    assert args.kv_cache_config == KVCacheConfig(page_size=32, free_memory_fraction=0.25)
    assert args.enable_chunked_prefill and args.verify == "structure" and args.plugins == ()


def test_other_spellings() -> None:
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 128}
    args = build(LLMArgs, model="x", **options)
    assert (args.max_batch_size, args.max_num_tokens, args.max_seq_len) == (4, 64, 128)
    same = build(LLMArgs, model="x", max_batch_size=4, max_num_seqs=4)
    assert same.max_batch_size == 4
    for spelling in ("page_size", "tokens_per_block", "block_size"):
        nested = build(LLMArgs, model="x", kv_cache_config={spelling: 16})
        assert nested.kv_cache_config == KVCacheConfig(page_size=16)
    assert build(LLMArgs, model="x", kv_cache_config=None).kv_cache_config == KVCacheConfig()


@pytest.mark.parametrize(
    ("given", "name"),
    [("half", "float16"), ("bf16", "bfloat16"), ("float", "float32"), ("double", "float64")],
)
def test_dtype_spellings(given: str, name: str) -> None:
    assert LLMArgs(model="x", dtype=given).dtype == name
    with pytest.raises(ConfigError, match="none of auto, int8, fp8"):
        KVCacheConfig(dtype=given)


@pytest.mark.parametrize("given", ["fp8", "fp8_e4m3", "float8_e4m3fn", torch.float8_e4m3fn])
def test_spellings_of_the_caches_dtype(given: object) -> None:
    assert build(KVCacheConfig, dtype=given).dtype == "float8_e4m3fn"


def test_torch_objects_become_names() -> None:
    args = build(LLMArgs, model="x", dtype=torch.bfloat16, device=torch.device("cuda", 1))
    assert (args.dtype, args.device) == ("bfloat16", "cuda:1")


def test_max_batch_size_follows_a_small_token_budget() -> None:
    assert LLMArgs(model="x", max_num_tokens=8).max_batch_size == 8
    message = refusal(LLMArgs, model="x", max_num_tokens=8, max_batch_size=9)
    assert "max_batch_size=9" in message and "max_num_tokens=8" in message and "raise max_num_tokens" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_batchsize": 3}, ["no option 'max_batchsize'", "Did you mean 'max_batch_size'?"]),
        ({"max_num_seq": 3}, ["Did you mean 'max_num_seqs'?"]),
        ({"max_batch_size": 3, "max_num_seqs": 4}, ["'max_batch_size' is given twice"]),
        ({"max_num_tokens": 0}, ["max_num_tokens=0", "the most tokens computed in one step"]),
        ({"max_num_tokens": "many"}, ["max_num_tokens='many'", "integer"]),
        ({"backend": "tensorrt"}, ["backend='tensorrt'", "'autodeploy' or 'pytorch'"]),
        ({"dtype": "float8"}, ["dtype='float8'", "float16"]),
        ({"device": "tpu"}, ["device='tpu'", "cuda"]),
        ({"trust_remote_code": True}, ["trust_remote_code=True", "never run"]),
        ({"kv_cache_config": {"page_sise": 3}}, ["KVCacheConfig has no option 'page_sise'", "'page_size'"]),
        ({"kv_cache_config": {"page_size": 0}}, ["KVCacheConfig: page_size=0"]),
        ({"kv_cache_config": {"enable_block_reuse": True}}, ["enable_block_reuse=True is not supported yet"]),
        ({"gpu_memory_utilization": 0.9}, ["kv_cache_config={'free_memory_fraction': ...}"]),
        ({"block_size": 16}, ["kv_cache_config={'page_size': ...}"]),
        ({"load_format": "dummy"}, ["load_format='dummy' is not supported yet"]),
        ({"context_parallel_size": 2}, ["context_parallel_size=2 is not supported yet"]),
        ({"quantization": "fp9"}, ["scheme='fp9' is refused", "Did you mean 'fp8'"]),
        ({"cuda_graph_config": {"max_batchsize": 8}}, ["CudaGraphConfig has no option 'max_batchsize'", "'max_batch_size'"]),
        (
            {"cuda_graph_config": {"max_batch_size": 0}},
            ["CudaGraphConfig: max_batch_size=0", "requests of a captured decode step"],
        ),
        ({"cuda_graph_config": {"max_num_tokens": -1}}, ["CudaGraphConfig: max_num_tokens=-1", "captured in pieces"]),
        ({"cuda_graph_config": {"batch_sizes": [1, 2]}}, ["batch_sizes=[1, 2] is not supported yet"]),
        ({"cuda_graph_config": {"ahead": True}, "enforce_eager": True}, ["enforce_eager=True", "leave one out"]),
        ({"speculative_config": {"method": "ngram"}}, ["speculative_config", "not supported yet"]),
    ],
)
def test_engine_refusals(options: dict[str, Any], words: list[str]) -> None:
    message = refusal(LLMArgs, model="x", **options)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("options", "enabled"),
    [
        ({}, True),
        ({"cuda_graph_config": None}, False),
        ({"cuda_graph_config": False}, False),
        ({"cuda_graph_config": {"enabled": False}}, False),
        ({"cuda_graph_config": CudaGraphConfig(max_batch_size=4)}, True),
        ({"enforce_eager": True}, False),
    ],
)
def test_spellings_of_no_cuda_graphs(options: dict[str, Any], enabled: bool) -> None:
    assert build(LLMArgs, model="x", **options).cuda_graphs.enabled is enabled


def test_model_is_required() -> None:
    assert refusal(LLMArgs) == "LLMArgs: 'model' is required."


def test_every_later_option_has_a_neutral_value_that_passes() -> None:
    for cls, required in ((SamplingParams, {}), (KVCacheConfig, {}), (CudaGraphConfig, {}), (LLMArgs, {"model": "x"})):
        for name, neutral in cls._LATER.items():
            for value in neutral or (None,):
                assert build(cls, **required, **{name: value}) is not None
        assert set(cls._ALIASES.values()) <= set(cls.model_fields)
        assert not set(cls._ALIASES) & set(cls.model_fields)


# errors


def test_error_tree_is_the_one_drawn() -> None:
    drawn = errors.__doc__ or ""
    for name, error in vars(errors).items():
        if isinstance(error, type) and issubclass(error, errors.AutoDeployError):
            assert name in drawn
            line = next(line for line in drawn.splitlines() if name in line)
            assert ("(ValueError)" in line) is issubclass(error, ValueError)


def test_errors_say_where_and_survive_pickling() -> None:
    first = UnsupportedModelError("a mask from data", module_path="model.layers.0", source="modeling_x.py:12")
    where, remedy = "in module 'model.layers.0' at modeling_x.py:12", "backend='pytorch' runs this model uncompiled."
    assert str(first) == f"{where}: a mask from data. {remedy}"
    second = TransformError("shapes differ", transform="match_mlp")
    assert str(second) == "transform 'match_mlp': shapes differ"
    for error in (first, second):
        copy = pickle.loads(pickle.dumps(error))
        assert (str(copy), vars(copy)) == (str(error), vars(error))
    assert str(UnsupportedModelError("just so")) == "just so"


def test_did_you_mean() -> None:
    assert did_you_mean("tempereture", ["temperature", "top_p"]) == " Did you mean 'temperature'?"
    assert did_you_mean("zzz", ["temperature"]) == ""


def test_a_shard_plan_is_a_dict_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("'*.mlp.*': replicate\n")
    args = LLMArgs(model="x", tensor_parallel_size=2, shard_plan=str(file))
    assert args.shard_plan == LLMArgs(model="x", tensor_parallel_size=2, shard_plan={"*.mlp.*": "replicate"}).shard_plan
    for wrong, message in (
        ({"*.mlp.*": "replicated"}, "Did you mean 'replicate'"),
        (tmp_path / "none.yaml", "cannot be read"),
        (["replicate"], "maps patterns of parameter names to kinds"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLMArgs(model="x", tensor_parallel_size=2, shard_plan=wrong)
    with pytest.raises(ConfigError, match="give tensor_parallel_size=2 or more"):
        LLMArgs(model="x", shard_plan={"*.mlp.*": "replicate"})
