"""What compiling a model in memory leaves alone, and how much memory it takes beside the model's own."""

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, DogeConfig, DogeForCausalLM, masking_utils

import autodeploy
from autodeploy import CompiledModel, SamplingParams, UnsupportedModelError
from autodeploy.recipes import Cat, Initial, Take
from tests.models.families import make_model

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79]])


@pytest.fixture(scope="module")
def model() -> Any:
    """Tied embeddings, biases, a window and parameters of its own in every place that a pass rewrites."""
    return make_model("qwen2", tie_word_embeddings=True, intermediate_size=192)


@pytest.fixture(scope="module")
def before(model: Any) -> tuple[dict[str, tuple[int, Tensor]], Tensor, Any]:
    """Address and value of every tensor, the logits, and the config, as they were before anything was compiled."""
    tensors = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in tensors_of(model).items()}
    with torch.no_grad():
        return tensors, model(IDS).logits, model.config.to_dict()


@pytest.fixture(scope="module")
def compiled(model: Any, before: object) -> Iterator[CompiledModel]:
    compiled = autodeploy.compile(model)
    compiled.generate(IDS[0].tolist(), SamplingParams(max_tokens=4))
    yield compiled
    compiled.shutdown()


@pytest.fixture(scope="module")
def unfused(model: Any, before: object) -> CompiledModel:
    return autodeploy.compile(model, pipeline=lambda passes: passes.without("fuse_linears"))


def tensors_of(model: Any) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def parameters_of(compiled: CompiledModel) -> dict[str, Tensor]:
    """The real tensors behind the program's weights."""
    return {name: reduce(getattr, name.split("."), compiled.runner.module) for name in compiled.program.weights}


def storages(tensors: dict[str, Tensor]) -> dict[int, int]:
    """Address -> bytes."""
    found = [tensor.untyped_storage() for tensor in tensors.values()]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def test_every_tensor_of_the_model_stays_where_and_what_it_was(model: Any, before: Any, compiled: CompiledModel) -> None:
    after = tensors_of(model)
    assert after.keys() == before[0].keys()
    for name, (address, value) in before[0].items():
        assert after[name].data_ptr() == address, name
        assert torch.equal(after[name], value), name


def test_the_model_still_computes_the_same_bits(model: Any, before: Any, compiled: CompiledModel) -> None:
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before[1])


def test_the_config_of_the_model_stays(model: Any, before: Any, compiled: CompiledModel) -> None:
    assert model.config.to_dict() == before[2]
    assert model.config._attn_implementation == "eager"
    assert model.training is False


def test_without_fusing_every_parameter_shares_the_memory_of_the_model(model: Any, unfused: CompiledModel) -> None:
    own, parameters = tensors_of(model), parameters_of(unfused)
    taken = {name: recipe for name, recipe in unfused.program.weights.recipes.items() if isinstance(recipe, Take)}
    assert len(taken) > 20
    for name, recipe in taken.items():
        assert parameters[name].data_ptr() == own[recipe.name].data_ptr(), name
    assert all(isinstance(recipe, Take | Initial) for recipe in unfused.program.weights.recipes.values())


def test_unfused_and_fused_models_compute_the_same(compiled: CompiledModel, unfused: CompiledModel, before: Any) -> None:
    assert torch.allclose(unfused(IDS), before[1], atol=1e-5)
    assert torch.allclose(compiled(IDS), before[1], atol=1e-5)
    unfused.shutdown()


def test_only_fused_weights_take_new_memory(model: Any, compiled: CompiledModel) -> None:
    own, parameters = storages(tensors_of(model)), parameters_of(compiled)
    new = {address: size for address, size in storages(parameters).items() if address not in own}
    recipes = compiled.program.weights.recipes
    fused = sum(parameters[name].nbytes for name, recipe in recipes.items() if isinstance(recipe, Cat))
    assert 0 < sum(new.values()) <= 1.05 * fused


def test_tied_embeddings_stay_one_tensor(model: Any, compiled: CompiledModel) -> None:
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tables = [name for name, tensor in parameters_of(compiled).items() if tensor.shape == model.lm_head.weight.shape]
    assert tables == ["model.embed_tokens.weight"]
    assert parameters_of(compiled)[tables[0]].data_ptr() == model.lm_head.weight.data_ptr()


def attempt_unsupported() -> None:
    with pytest.raises(UnsupportedModelError):
        autodeploy.compile(
            DogeForCausalLM(DogeConfig(vocab_size=256, hidden_size=64, num_hidden_layers=1, num_attention_heads=4))
        )


@pytest.mark.parametrize("attempt", [lambda: None, attempt_unsupported], ids=["success", "failure"])
def test_transformers_is_as_it_was_after(attempt: Callable[[], None], compiled: CompiledModel) -> None:
    attempt()
    assert masking_utils.find_packed_sequence_indices.__module__ == "transformers.masking_utils"
    assert masking_utils.find_packed_sequence_indices.__name__ == "find_packed_sequence_indices"
    assert "autodeploy" not in masking_utils.AttentionMaskInterface._global_mapping
    assert "autodeploy" not in AttentionInterface._global_mapping
