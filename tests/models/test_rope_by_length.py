"""Rope that depends on a request's length, while requests of other lengths share the row."""

import pytest
import torch

import autodeploy
from autodeploy import SamplingParams
from tests.models.families import make_model
from tests.models.parity import (
    TIGHT,
    Verdict,
    check_logits,
    context_logits,
    eager_logits,
    judge,
    random_prompts,
    relative_error,
    variant_logits,
    with_options,
)

LONG_THRESHOLD = 64


def test_long_rope_is_recomputed_across_its_threshold_beside_short_requests() -> None:
    """Below the threshold a token is predicted with the short frequencies, above it with the long ones for the whole request."""
    model = make_model("phi3_longrope")
    compiled = autodeploy.compile(model)
    error = check_logits(model, compiled)
    compiled = with_options(compiled, **TIGHT)
    assert compiled.program.rope_thresholds == (LONG_THRESHOLD,)
    prompts = random_prompts((5, 50, 64, 65, 13))
    outputs = compiled.generate(prompts, SamplingParams(max_tokens=32, ignore_eos=True))
    verdict = Verdict()
    for ids, output in zip(prompts, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        whole = ids + tokens
        short = min(max(LONG_THRESHOLD - len(ids) + 1, 0), len(tokens))  # tokens predicted from at most LONG_THRESHOLD tokens
        for part, row in ((slice(0, short), whole[:LONG_THRESHOLD]), (slice(short, len(tokens)), whole)):
            expected = tokens[part]
            if expected:
                first = len(ids) - 1 + (part.start or 0)
                predicting = slice(first, first + len(expected))
                judge(verdict, expected, eager_logits(model, row)[predicting], variant_logits(model, row)[predicting], error)
    compiled.shutdown()
    assert verdict.total == 5 * 32 and verdict.wrong == 0 and verdict.share >= 0.95, verdict


def test_long_rope_equals_generate_across_the_threshold() -> None:
    """Hugging Face's own generate, with its cache, recomputes at the same token."""
    model = make_model("phi3_longrope")
    ids = random_prompts((60,))[0]
    expected = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 60:].tolist()
    compiled = autodeploy.compile(model)
    outputs = compiled.generate([ids, ids[:7]], SamplingParams(max_tokens=12, ignore_eos=True))
    compiled.shutdown()
    assert outputs[0].outputs[0].token_ids == expected


@pytest.fixture(scope="module")
def dynamic():
    model = make_model("llama_dynamic")  # max_position_embeddings 64
    compiled = autodeploy.compile(model, max_seq_len=256)
    yield model, compiled
    compiled.shutdown()


def fresh(model):
    """Eager keeps the frequencies of the longest sequence it has seen; each comparison starts from a new copy."""
    copy = make_model("llama_dynamic")
    copy.load_state_dict(model.state_dict())
    return copy


def test_dynamic_rope_prompts_past_the_limit_equal_eager_beside_short_ones(dynamic) -> None:
    model, compiled = dynamic
    prompts = random_prompts((13, 64, 65, 90, 5, 120))
    for ids, ours in zip(prompts, context_logits(compiled, prompts), strict=True):
        assert relative_error(ours, eager_logits(fresh(model), ids)) <= 1e-5, len(ids)


@pytest.mark.parametrize("chunk", [2048, 16])
def test_dynamic_rope_tokens_past_the_limit_equal_generate_with_its_cache(dynamic, chunk: int) -> None:
    model, compiled = dynamic
    compiled = with_options(compiled, max_num_tokens=chunk, max_seq_len=256, kv_cache_config={"page_size": 8, "max_tokens": 160})
    prompts = random_prompts((70, 40, 9))
    outputs = compiled.generate(prompts, SamplingParams(max_tokens=32, ignore_eos=True))
    compiled.shutdown()
    for ids, output in zip(prompts, outputs, strict=True):
        expected = fresh(model).generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False, eos_token_id=None)
        assert output.outputs[0].token_ids == expected[0, len(ids) :].tolist(), len(ids)
