"""Models: random weights for a config, and the sizes that ceilings are computed from."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from autodeploy.capture.skeleton import build_skeleton, read_config
from autodeploy.errors import ConfigError, did_you_mean

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": True,
    },
}
"""Published shapes by name."""
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def write(config: str, folder: str, num_layers: int | None = None) -> dict[str, Any]:
    """A checkpoint with random bf16 weights and a tokenizer that knows bytes, for engines that insist on one.

    config: a folder with a config.json, a name of `SHAPES`, or a model type (its config class's own defaults). num_layers: in
    place of its own number.
    """
    torch.manual_seed(0)
    settings = config_of(config)
    if num_layers is not None:
        set_depth(settings.get_text_config(), num_layers)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    byte_tokenizer(settings.get_text_config().vocab_size).save_pretrained(folder)
    os.sync()  # so that writing does not go on during the first runs
    return {"num_numbers": sum(parameter.numel() for parameter in model.parameters())}


def config_of(name: str) -> Any:
    if Path(name).is_dir():
        return read_config(Path(name))
    if name in SHAPES:
        shape = dict(SHAPES[name])
        return CONFIG_MAPPING[shape.pop("model_type")](**shape)
    if name in CONFIG_MAPPING:
        return CONFIG_MAPPING[name]()
    near = did_you_mean(name, [*SHAPES, *CONFIG_MAPPING.keys()])
    raise ConfigError(
        f"'{name}' is no folder with a config.json, no published shape ({', '.join(SHAPES)}) and no model type.{near}"
    )


def set_depth(config: Any, num_layers: int) -> None:
    """Another number of layers; lists with an entry per layer are repeated or cut."""
    had = config.num_hidden_layers
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == had:
            setattr(config, name, [value[i % had] for i in range(num_layers)])
    config.num_hidden_layers = num_layers


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """As many entries as the model has: the bytes, one merge (llama.cpp loads no model without any), names without meaning."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "ab", *(f"<unused{i}>" for i in range(vocab_size))][:vocab_size]
    merges = [("a", "b")] if "ab" in tokens else []
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=tokens[-1])


def size(model: str) -> dict[str, Any]:
    """Numbers and bytes that one step reads of the weights; see `ceilings.ModelSize`."""
    config = read_config(Path(model))
    dtype: Any = config.dtype or torch.float32
    skeleton = build_skeleton(config, dtype)
    text = config.get_text_config()
    table, head = skeleton.get_input_embeddings().weight, skeleton.get_output_embeddings().weight  # pyright: ignore
    body = sum(
        parameter.numel() * experts_share(name, text)
        for name, parameter in skeleton.named_parameters()
        if parameter is not table and parameter is not head
    )
    heads = getattr(text, "num_attention_heads", 0)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // max(heads, 1)
    return {
        "body_numbers": math.ceil(body),
        "head_numbers": head.numel(),
        "vocab_size": text.vocab_size,
        "weight_bytes": math.ceil(body + head.numel()) * dtype.itemsize,
        "attention_flop": 4 * heads * head_dim,
        "dtype": str(dtype).removeprefix("torch."),
    }


def experts_share(name: str, config: Any) -> float:
    """Of a parameter, the part that one token meets."""
    chosen = getattr(config, "num_experts_per_tok", None)
    total = next((getattr(config, key) for key in EXPERT_COUNTS if getattr(config, key, None)), None)
    return chosen / total if ".experts." in name and chosen and total else 1.0
