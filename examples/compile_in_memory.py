"""Compile a model that lives in memory; its unfused weights are shared, not copied."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import autodeploy
from autodeploy import SamplingParams

config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM(config).eval()

compiled = autodeploy.compile(model)
input_ids = torch.randint(0, config.vocab_size, (2, 12))
with torch.no_grad():
    expected = model(input_ids).logits
print("largest difference from eager:", (compiled(input_ids) - expected).abs().max().item())

for output in compiled.generate([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=8)):
    print(output.prompt_token_ids, "->", output.outputs[0].token_ids)
print(compiled.report())
compiled.shutdown()
