"""Which nodes are one layer, for models of one, two and three layers, in memory."""

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from autodeploy._compile import trace
from autodeploy.config import LLMArgs
from autodeploy.program import op_name
from autodeploy.report.html import Before
from autodeploy.report.layer import LayerView, view_layer
from autodeploy.report.timeline import Timeline


def views(num_layers: int) -> tuple[LayerView, LayerView]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=64, num_hidden_layers=num_layers, **sizes))
    before = Before()
    program = trace(LLMArgs(model=model), Timeline(), before)
    assert before.layer
    ops = [op_name(node.target) for node in program.graph.graph.nodes if node.op == "call_function"]
    assert before.num_ops > len(ops)
    return before.layer, view_layer(program)


@pytest.mark.parametrize(("num_layers", "index", "num_inlets"), [(1, 0, 1), (2, 0, 1), (3, 1, 4)])
def test_a_layer_holds_one_attention_and_its_projections(num_layers: int, index: int, num_inlets: int) -> None:
    before, after = views(num_layers)
    assert (before.index, before.num_layers) == (after.index, after.num_layers) == (index, num_layers)
    labels = [box.label for box in after.boxes.values()]
    assert labels.count("paged_attention") == labels.count("rope_append") == 1
    has_head = num_layers == 1
    assert labels.count("linear") == 4 + has_head  # joined q, k, v; o; joined gate, up; down
    assert [box.label for box in before.boxes.values()].count("linear") == 7 + has_head
    assert sum(box.kind == "inlet" for box in after.boxes.values()) == num_inlets  # residual, cos, sin, cache


def test_the_cache_is_written_before_it_is_read() -> None:
    _, after = views(1)
    names = {box.label: name for name, box in after.boxes.items()}
    assert (names["rope_append"], names["paged_attention"]) in after.edges
