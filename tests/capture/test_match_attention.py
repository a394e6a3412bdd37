"""Attention in plain calls becomes the op it means, or is refused with the line that says something else."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autodeploy
from autodeploy import UnsupportedModelError
from autodeploy import custom_ops as ops
from autodeploy.capture.export import capture
from autodeploy.capture.skeleton import skeleton_of
from autodeploy.transforms.rewrite import arguments, calls
from tests.models.families import make_model
from tests.transforms.helpers import Toy

HEADS = 2
NEVER = torch.finfo(torch.float32).min


def heads(x):
    return x.view(1, -1, HEADS, 8).transpose(1, 2)


def joined(y):
    return y.transpose(1, 2).reshape(1, -1, 16)


def causal(n):
    return torch.ones(n, n, dtype=torch.bool).tril()


def weighted(x, change, dim=-1):
    """softmax(change(q @ k^T)) @ v with q = k = v = x."""
    q = heads(x)
    return joined(F.softmax(change(q @ q.transpose(-1, -2)), dim=dim) @ q)


def masked(scores, mask):
    return scores.masked_fill(~mask, NEVER)


def distance(scores):
    position = torch.arange(scores.shape[-1])
    return position[None] - position[:, None]


def own_chunks(toy, x, p):
    def change(scores):
        position = torch.arange(scores.shape[-1])
        mask = causal(scores.shape[-1]) & (position[:, None] // 5 == position[None] // 5)
        return torch.where(mask, scores / 8**0.5, NEVER)

    return weighted(x, change)


def window_in_a_buffer(toy, x, p):
    return weighted(x, lambda scores: torch.where(toy.extra["table"].seen[: x.shape[1], : x.shape[1]], scores, NEVER))


def alibi_by_query(toy, x, p):
    slopes = torch.tensor([0.5, 0.25])[:, None, None]
    return weighted(x, lambda scores: masked(0.3 * (scores + slopes * distance(scores)), causal(x.shape[1])))


def alibi_by_key(toy, x, p):
    slopes = torch.tensor([0.5, 0.25])[:, None, None]
    return weighted(x, lambda scores: masked(scores + slopes * torch.arange(x.shape[1]), causal(x.shape[1])))


def batched(toy, x, p):
    q = heads(x).reshape(HEADS, -1, 8)
    added = torch.zeros(x.shape[1], x.shape[1]).masked_fill(~causal(x.shape[1]), -math.inf)
    weights = torch.baddbmm(added, q, q.transpose(1, 2), beta=1.0, alpha=0.5).softmax(-1, dtype=torch.float32)
    return joined(torch.bmm(weights, q).view(1, HEADS, -1, 8))


def one_kv_head(toy, x, p):
    q, k = heads(x), x[:, None, :, :8]
    return joined(masked(q @ k.transpose(-1, -2), causal(x.shape[1])).softmax(-1) @ k)


def sdpa_call(toy, x, p):
    q = heads(x)
    return joined(F.scaled_dot_product_attention(q, q, q, is_causal=True))


def sdpa_call_with_a_window(toy, x, p):
    q, mask = heads(x), causal(x.shape[1]).triu(-3)
    return joined(F.scaled_dot_product_attention(q, q, q, attn_mask=mask, scale=0.7))


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", causal(128).triu(-6), persistent=False)


MEANT = {
    own_chunks: {"chunk": 5, "scale": 8**-0.5},
    window_in_a_buffer: {"window": 7, "scale": 1.0},
    alibi_by_query: {"scale": 0.3, "alibi": (0.15, 0.075)},
    alibi_by_key: {"scale": 1.0, "alibi": (0.5, 0.25)},
    batched: {"scale": 0.5},
    one_kv_head: {"scale": 1.0},
    sdpa_call: {"scale": 8**-0.5},
    sdpa_call_with_a_window: {"window": 4, "scale": 0.7},
}


def captured(body):
    torch.manual_seed(0)
    toy = Toy(body, table=Table()).eval()
    return capture(skeleton_of(toy), dict(toy.named_buffers())), toy


@pytest.mark.parametrize("body", MEANT, ids=lambda body: body.__name__)
def test_plain_calls_become_the_attention_they_mean(body) -> None:
    capture, toy = captured(body)
    (node,) = calls(capture.program, ops.attention)
    said, meant = arguments(node), {"window": 0, "chunk": 0, **MEANT[body]}
    slopes = said["alibi"] and capture.initial[said["alibi"].target]
    assert (slopes is None) == ("alibi" not in meant)
    if slopes is not None:
        torch.testing.assert_close(slopes, torch.tensor(meant["alibi"]))
    assert (said["window"], said["chunk"], said["scale"]) == (meant["window"], meant["chunk"], pytest.approx(meant["scale"]))
    assert not any("softmax" in name or "arange" in name for name in capture.program.op_counts())
    capture.program.graph.recompile()
    tensors = {**dict(toy.named_parameters()), **capture.initial}
    for path in capture.program.weights:
        module: nn.Module = capture.program.graph
        *modules, name = path.split(".")
        for part in modules:
            module = getattr(module, part)
        setattr(module, name, nn.Parameter(tensors[path], requires_grad=False))
    ids, positions = torch.arange(33)[None] % 64, torch.arange(33)[None]
    with torch.no_grad():
        torch.testing.assert_close(capture.program.graph(ids, positions), toy(ids, positions).logits)


def by_ids(toy, x, p):
    mask = causal(x.shape[1]) & (toy.embed.weight[:, 0].argmax() < p)  # reads a weight
    return weighted(x, lambda scores: masked(scores, mask))


def read_twice(toy, x, p):
    weights = masked(heads(x) @ heads(x).transpose(-1, -2), causal(x.shape[1])).softmax(-1)
    return joined(weights @ heads(x) + weights.sum(-1, keepdim=True))


def every_head_its_own(scores):
    windows = torch.tensor([3, 6])[:, None, None]
    return masked(scores, causal(scores.shape[-1]) & (distance(scores) > -windows))


REFUSED = {
    "bidirectional": (lambda toy, x, p: weighted(x, lambda s: s), "every token sees all others"),
    "a call that is bidirectional": (
        lambda toy, x, p: joined(F.scaled_dot_product_attention(heads(x), heads(x), heads(x))),
        "every token sees all others",
    ),
    "a prefix": (
        lambda toy, x, p: weighted(x, lambda s: masked(s, causal(x.shape[1]) | (torch.arange(x.shape[1]) < 4))),
        "token 0 sees token 1, which comes after it",
    ),
    "weights in the mask": (by_ids, "depend on the weights 'embed.weight'"),
    "a window for each head": (lambda toy, x, p: weighted(x, every_head_its_own), "do not all see the same keys"),
    "squared distance": (
        lambda toy, x, p: weighted(x, lambda s: masked(s - distance(s) ** 2, causal(x.shape[1]))),
        "neither a mask nor linear",
    ),
    "tanh": (lambda toy, x, p: weighted(x, lambda s: masked(s.tanh(), causal(x.shape[1]))), "times one number"),
    "a limit far away": (
        lambda toy, x, p: weighted(x, lambda s: masked(s, causal(x.shape[1]) & (distance(s) > -5000))),
        "a limit of 5000 tokens",
    ),
    "over queries": (lambda toy, x, p: weighted(x, lambda s: masked(s, causal(x.shape[1])), dim=-2), "runs over queries"),
    "two products": (
        lambda toy, x, p: weighted(x, lambda s: masked(s + heads(x) @ heads(x.flip(-1)).mT, causal(x.shape[1]))),
        "sum of 2 products",
    ),
    "weights read twice": (read_twice, "not by a product with the values alone"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_op_cannot_say_is_refused_with_its_source_line(name) -> None:
    body, reason = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=rf"helpers\.py:\d+: .*({reason})"):
        captured(body)


def test_layers_with_the_same_scores_share_their_slopes() -> None:
    model = make_model("bloom")
    capture_ = capture(skeleton_of(model), dict(model.named_buffers()))
    slopes = [arguments(node)["alibi"] for node in calls(capture_.program, ops.attention)]
    assert len(slopes) == 2 and slopes[0] is slopes[1]
    assert capture_.initial[slopes[0].target].tolist() == [0.25, 0.0625, 0.015625, 0.00390625]


@pytest.mark.parametrize("name", ["falcon", "falcon_alibi"])
def test_a_model_with_sdpa_calls_says_the_same(name) -> None:
    model = make_model(name)
    numbers = []
    for implementation in ("eager", "sdpa"):
        model.config._attn_implementation = implementation
        program = capture(skeleton_of(model), dict(model.named_buffers())).program
        numbers.append([arguments(node)[key] for node in calls(program, ops.attention) for key in ("scale", "window", "chunk")])
        assert len(numbers[-1]) == 6
    assert numbers[0] == pytest.approx(numbers[1])


@pytest.mark.parametrize("name", ["gptj", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bloom", "falcon_alibi"))])
def test_the_passes_keep_the_numbers_of_what_was_found(name) -> None:
    compiled = autodeploy.compile(make_model(name), verify="numeric")
    counts = compiled.program.op_counts()
    compiled.shutdown()
    assert sum(count for name, count in counts.items() if "paged_attention" in name) == 2


@pytest.mark.parametrize("name", ["falcon_alibi", "gpt_neo"])
def test_numbers_are_the_same_in_bfloat16(name) -> None:
    """Scale, window and slopes are read in float64, whatever the model rounds to."""
    said = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(name).to(dtype)
        found = capture(skeleton_of(model), dict(model.named_buffers()))
        nodes = [arguments(node) for node in calls(found.program, ops.attention)]
        slopes = [found.initial[node["alibi"].target] for node in nodes if node["alibi"]]
        said.append(([(node["scale"], node["window"]) for node in nodes], slopes))
    assert said[0][0] == said[1][0]
    torch.testing.assert_close(said[0][1], said[1][1])
