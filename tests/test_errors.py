"""Every way in which a folder, a model, an option or a prompt can be wrong: the message names object, reason and remedy."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM, BertConfig, DogeConfig

import autodeploy
from autodeploy import (
    LLM,
    CheckpointError,
    CompiledModel,
    ConfigError,
    EngineDeadError,
    ExecutionError,
    RequestError,
    SamplingParams,
    Target,
    Transform,
    UnsupportedModelError,
)
from autodeploy.program import Program
from autodeploy.transforms.rewrite import insert_call
from tests.models.families import make_model
from tests.models.parity import random_prompts


def words(*parts: str) -> str:
    """A pattern: these texts, in this order."""
    return ".*".join(re.escape(part) for part in parts)


# Folders


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def good(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders") / "good-model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(good, tmp_path / "spoiled"))


@pytest.fixture
def sharded(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    return tmp_path / "sharded"


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("load", [autodeploy.compile, LLM])
def test_a_folder_that_is_not_there_is_named_with_its_nearest_sibling(load: Any, good: Path) -> None:
    with pytest.raises(CheckpointError, match=words("goood-model is not a folder", "mean 'good-model'", "Give the path")):
        load(good.with_name("goood-model"))


@pytest.mark.parametrize("load", [autodeploy.compile, LLM])
def test_a_folder_without_config(load: Any, folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=words("spoiled has no config.json", "Give the path", "save_pretrained")):
        load(folder)


@pytest.mark.parametrize("load", [autodeploy.compile, LLM])
@pytest.mark.parametrize(
    ("text", "reason"), [('{"model_type": ', "is not valid JSON"), ("\xff", "is not valid JSON"), ("[]", "holds a JSON list")]
)
def test_a_config_that_is_no_json_object(load: Any, text: str, reason: str, folder: Path) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=words("config.json", reason, "Download it again")):
        load(folder)


def test_a_config_with_a_value_that_transformers_refuses(folder: Path) -> None:
    edit_config(folder, hidden_size=63)
    with pytest.raises(CheckpointError, match=words("config.json", "hidden size (63) is not a multiple", "Correct it")):
        autodeploy.compile(folder)


def test_pickle_weights_are_refused_with_the_way_to_convert_them(model: Any, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    expected = words("spoiled", "pickle", "'pytorch_model.bin'", "can run code", "Convert them", "save_pretrained")
    with pytest.raises(CheckpointError, match=expected):
        autodeploy.compile(folder)


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=words("spoiled holds no model.safetensors", "Point to a folder")):
        autodeploy.compile(folder)


@pytest.mark.parametrize(
    "spoil", [lambda data: data[:-1000], lambda data: data[:100], lambda data: b"no header" * 50, lambda _: b""]
)
def test_truncated_and_garbage_safetensors(spoil: Callable[[bytes], bytes], folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CheckpointError, match=words("model.safetensors is truncated or corrupt", "header", "Download it again")):
        autodeploy.compile(folder)


def test_a_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(
        CheckpointError, match=words(f"{shard.name} is missing", "index.json names it", "Download the folder again")
    ):
        autodeploy.compile(sharded)


def test_an_index_that_lists_tensors_its_files_lack(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=words("index.json lists 'model.extra.weight', not in the files", "Download")):
        autodeploy.compile(sharded)


def test_missing_tensors_are_counted_and_the_first_ones_named(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.0" in name])
    names = words("'model.layers.0.input_layernorm.weight'", "and 6 more are missing", "Check that config.json belongs")
    with pytest.raises(CheckpointError, match=names):
        autodeploy.compile(folder)


def test_a_missing_tensor_with_a_near_name_is_suggested(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.norms.weight": tensors.pop("model.norm.weight")}))
    with pytest.raises(CheckpointError, match=words("'model.norms.weight'", "not in the model")):
        autodeploy.compile(folder)
    with pytest.raises(CheckpointError, match=words("'model.norm.weight' are missing", "Did you mean 'model.norms.weight'")):
        autodeploy.compile(folder, ignore_unexpected_weights=True)


def test_an_unexpected_tensor_is_refused_and_passed_over_on_request(folder: Path, model: Any) -> None:
    edit_tensors(folder, lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(
        CheckpointError, match=words("'extra' are not in the model", "config.json", "ignore_unexpected_weights=True")
    ):
        autodeploy.compile(folder)
    compiled = autodeploy.compile(folder, ignore_unexpected_weights=True)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.allclose(compiled(ids), model(ids).logits, atol=1e-5)
    compiled.shutdown()


def test_a_tensor_of_the_wrong_shape(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(255, 64)}))
    expected = words("tensor 'lm_head.weight' has shape [255, 64], but the model has [256, 64]", "Check that config.json")
    with pytest.raises(CheckpointError, match=expected):
        autodeploy.compile(folder)


def test_a_quantized_checkpoint_of_a_kind_nobody_reads(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptqq", "bits": 4})
    with pytest.raises(
        UnsupportedModelError, match=words("spoiled", "'gptqq' is not read", "Did you mean 'gptq'", "unquantized")
    ):
        autodeploy.compile(folder)


# Code in a folder is never run


def plant_code(folder: Path) -> Path:
    """Modules that the config's auto_map names and that would leave a file behind."""
    marker = folder / "code was run"
    for name in ("configuration_planted", "modeling_planted"):
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')\n")
    edit_config(folder, auto_map={"AutoConfig": "configuration_planted.C", "AutoModelForCausalLM": "modeling_planted.M"})
    return marker


@pytest.mark.parametrize("load", [autodeploy.compile, LLM])
def test_code_of_a_folder_with_an_unknown_model_type_is_not_run(load: Any, folder: Path) -> None:
    marker = plant_code(folder)
    edit_config(folder, model_type="planted")
    with pytest.raises(UnsupportedModelError, match=words("'planted' is not in transformers", "never run", "Use a version")):
        load(folder)
    assert not marker.exists()


@pytest.mark.parametrize("backend", ["autodeploy", "pytorch"])
def test_a_known_model_type_works_without_its_auto_map(backend: str, folder: Path, model: Any) -> None:
    marker = plant_code(folder)
    compiled = autodeploy.compile(folder, backend=backend)
    expected = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False, eos_token_id=None)[0, 3:].tolist()
    assert compiled.generate([3, 4, 5], SamplingParams(max_tokens=4, ignore_eos=True)).outputs[0].token_ids == expected
    compiled.shutdown()
    assert not marker.exists()


# Models


def test_a_model_type_that_generates_no_text(folder: Path) -> None:
    edit_config(folder, model_type="t5")
    with pytest.raises(
        UnsupportedModelError, match=words("spoiled", "no causal language model for model_type 't5'", "decoder-only")
    ):
        autodeploy.compile(folder)


SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def test_a_mask_of_its_own_is_refused_with_its_class_and_line() -> None:
    model = AutoModelForCausalLM.from_config(DogeConfig(**SMALL, num_key_value_heads=2))
    with pytest.raises(UnsupportedModelError, match=r"an attention mask of its own.*backend='pytorch'") as caught:
        autodeploy.compile(model)
    assert re.search(r"DogeAttention, line \d+", caught.value.source)
    assert caught.value.source in str(caught.value)


def test_attention_that_looks_ahead_is_refused_with_its_class_and_line() -> None:
    model = AutoModelForCausalLM.from_config(BertConfig(**SMALL))
    with pytest.raises(UnsupportedModelError, match="attention is not causal") as caught:
        autodeploy.compile(model)
    assert re.search(r"BertSelfAttention, line \d+", caught.value.source)


# Options


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_batchsize": 4}, words("LLMArgs has no option 'max_batchsize'", "Did you mean 'max_batch_size'")),
        ({"gpu_memory_utilization": 0.9}, words("no option 'gpu_memory_utilization'", "Use kv_cache_config")),
        (
            {"context_parallel_size": 2},
            words("context_parallel_size=2 is not supported yet", "leave 'context_parallel_size' out"),
        ),
        ({"quantization": "int5"}, words("scheme='int5' is refused", "Did you mean 'int8'")),
        ({"dtype": "float31"}, words("dtype='float31' is refused", "none of", "Did you mean 'float")),
        ({"trust_remote_code": True}, words("trust_remote_code=True is refused", "never run", "use a model whose code")),
        ({"max_num_tokens": 4, "max_batch_size": 8}, words("max_batch_size=8 exceeds max_num_tokens=4", "raise max_num_tokens")),
    ],
)
def test_a_wrong_engine_option(option: dict[str, Any], message: str, good: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        autodeploy.compile(good, **option)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_token": 4}, words("SamplingParams has no option 'max_token'", "Did you mean 'max_tokens'")),
        ({"n": 2}, words("n=2 is not supported yet", "leave 'n' out")),
        ({"logprobs": 5}, words("logprobs=5 is not supported yet", "leave 'logprobs' out")),
        ({"top_p": 0.0}, words("top_p=0.0 is refused", "probability mass", "for greedy choose temperature=0")),
        ({"min_tokens": 9, "max_tokens": 3}, words("min_tokens=9 exceeds max_tokens=3", "lower one")),
    ],
)
def test_a_wrong_sampling_parameter(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**option)


def test_a_pool_without_room_for_a_page(model: Any) -> None:
    with pytest.raises(ConfigError, match=words("kv_cache_config leaves room for no page of 32 tokens", "Raise max_bytes")):
        autodeploy.compile(model, kv_cache_config={"max_bytes": 10}).generate([3])


# One bad request among eight. The model runs through a function that raises, or makes NaN, when it meets a certain token.

RAISES, IS_NAN = 200, 201


def raise_on_token(input_ids: Tensor) -> Tensor:
    if not isinstance(input_ids, FakeTensor) and (input_ids == RAISES).any():
        raise ArithmeticError(f"token {RAISES} was met")
    return input_ids


@dataclass(frozen=True, kw_only=True)
class Poison(Transform):
    name: ClassVar[str] = "poison"

    def apply(self, program: Program, target: Target) -> int:
        ids = next(iter(program.graph.graph.nodes))
        users = list(ids.users)
        first = next(node for node in program.graph.graph.nodes if node.op != "placeholder")
        checked = insert_call(program, first, raise_on_token, ids)
        for user in users:
            user.replace_input_with(ids, checked)
        return 1


PROMPTS = [[token % 190 + 3 for token in ids] for ids in random_prompts((1, 5, 9, 13, 20, 30, 40))]
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def compiled() -> Iterator[CompiledModel]:
    model = make_model("llama", num_hidden_layers=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[IS_NAN] = torch.nan
        model.lm_head.weight[[RAISES, IS_NAN]] = 0.0  # never the most likely token
    options: dict[str, Any] = {"max_num_tokens": 32, "max_batch_size": 8, "kv_cache_config": {"page_size": 8}}
    options["verify"] = "off"  # a function that is no op would be refused
    compiled = autodeploy.compile(model, pipeline=lambda passes: passes.insert_before("select_kernels", Poison()), **options)
    yield compiled
    compiled.shutdown()


@pytest.fixture(scope="module")
def alone(compiled: CompiledModel) -> list[list[int]]:
    """What each good prompt gives with the engine to itself."""
    return [compiled.generate(ids, PARAMS).outputs[0].token_ids for ids in PROMPTS]


BAD = {
    "empty": ([], RequestError, words("prompt is empty", "Give at least one token")),
    "too long": ([3] * 300, RequestError, words("prompt has 300 tokens", "max_seq_len is 256", "Shorten the prompt")),
    "negative id": ([5, -1], RequestError, words("Token 1 of the prompt is -1", "from 0 to 255", "own tokenizer")),
    "large id": ([5, 6, 256], RequestError, words("Token 2 of the prompt is 256", "from 0 to 255", "own tokenizer")),
    "raises": ([5, RAISES], ExecutionError, words("forward failed", f"ArithmeticError: token {RAISES} was met")),
    "raises late": ([5] * 70 + [RAISES, 5], ExecutionError, words("forward failed", f"ArithmeticError: token {RAISES} was met")),
    "not finite": ([5, IS_NAN], ExecutionError, words("largest logit", "nan, not a finite number", "try dtype")),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("at", [0, 4])
def test_one_bad_request_in_eight_ends_alone(kind: str, at: int, compiled: CompiledModel, alone: list[list[int]]) -> None:
    ids, error, message = BAD[kind]
    outputs = compiled.generate([*PROMPTS[:at], ids, *PROMPTS[at:]], PARAMS)
    culprit = outputs.pop(at)
    assert culprit.outputs[0].finish_reason == "error"
    assert isinstance(culprit.error, error)
    assert re.search(message, str(culprit.error))
    assert [output.outputs[0].token_ids for output in outputs] == alone
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}
    scheduler = compiled.executor.scheduler
    scheduler.check()


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_request_alone_raises_and_the_engine_serves_on(kind: str, compiled: CompiledModel, alone: list[list[int]]) -> None:
    ids, error, message = BAD[kind]
    with pytest.raises(error, match=message):
        compiled.generate(ids, PARAMS)
    assert compiled.generate(PROMPTS[3], PARAMS).outputs[0].token_ids == alone[3]


def test_input_ids_without_a_batch_dimension_are_refused(compiled: CompiledModel) -> None:
    with pytest.raises(RequestError, match=words("input_ids has shape [3]", "[batch, tokens]")):
        compiled(torch.tensor([1, 2, 3]))


NO_MODELS = {"nothing": None, "a number": 3, "a module without a config": torch.nn.Linear(3, 3)}


@pytest.mark.parametrize("name", NO_MODELS)
def test_what_is_no_model_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"'model' is a \w+.*transformers"):
        autodeploy.compile(NO_MODELS[name])


def test_token_ids_that_are_no_numbers_are_refused_and_the_engine_serves_on(compiled: Any) -> None:
    for wrong in (["a"], [1.5, 2], [[1, "b"]]):
        with pytest.raises(RequestError, match="token ids, not"):
            compiled.generate(wrong)
    with pytest.raises(RequestError, match="tolist"):
        compiled.generate(torch.tensor([3, 4]))
    assert compiled.generate([3, 4], SamplingParams(max_tokens=2)).outputs[0].length == 2


def test_sampling_params_of_another_type_are_refused(compiled: Any) -> None:
    with pytest.raises(ConfigError, match="sampling_params is a dict"):
        compiled.generate([3, 4], {"max_tokens": 3})


def test_a_pool_without_room_for_a_page_is_refused_before_it_is_used() -> None:
    with pytest.raises(ConfigError, match=r"no page.*Raise max_bytes"):
        autodeploy.compile(make_model("qwen3", num_hidden_layers=1), kv_cache_config={"max_bytes": 10})


def test_requests_after_a_shutdown_that_came_first_are_refused() -> None:
    compiled = autodeploy.compile(make_model("qwen3", num_hidden_layers=1))
    compiled.shutdown()
    with pytest.raises(EngineDeadError, match="compile again"):
        compiled.generate([1, 2])


def test_first_use_from_many_threads_makes_one_executor() -> None:
    compiled = autodeploy.compile(make_model("qwen3", num_hidden_layers=1))
    with ThreadPoolExecutor(8) as pool:
        executors = set(pool.map(lambda _: id(compiled.executor), range(8)))
    compiled.shutdown()
    assert len(executors) == 1


def test_the_eager_backend_leaves_the_users_model_in_training_mode() -> None:
    model = make_model("qwen3", num_hidden_layers=1).train()
    compiled = autodeploy.compile(model, backend="pytorch")
    compiled.generate([1, 2], SamplingParams(max_tokens=2))
    compiled.shutdown()
    assert model.training and compiled.runner.model.lm_head.weight is model.lm_head.weight
