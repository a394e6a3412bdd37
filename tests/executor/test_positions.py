"""Tables of positions have an end: requests that would go beyond it are refused when the model is compiled."""

import pytest

import autodeploy
from autodeploy import ConfigError
from autodeploy.executor.positions import table_of_positions
from tests.models.families import make_model


@pytest.mark.parametrize(
    ("family", "table"), [("gpt2", "transformer.wpe.weight"), ("opt", "model.decoder.embed_positions.weight")]
)
def test_no_request_is_longer_than_the_table(family: str, table: str) -> None:
    model = make_model(family, max_position_embeddings=32) if family == "opt" else make_model(family, n_positions=32)
    with pytest.raises(ConfigError, match=f"max_seq_len=33: '{table}' holds 32 positions. Use max_seq_len=32"):
        autodeploy.compile(model, max_seq_len=33)
    compiled = autodeploy.compile(model)
    assert table_of_positions(compiled.program) == (table, 32)
    assert compiled.max_seq_len == 32
    compiled.shutdown()


def test_a_table_that_is_indexed_is_one_too() -> None:
    model = make_model("codegen")
    compiled = autodeploy.compile(model)
    table, rows = table_of_positions(compiled.program) or ("", 0)
    assert table.endswith("embed_positions") and rows == model.transformer.h[0].attn.embed_positions.shape[0]
    compiled.shutdown()


def test_positions_that_are_computed_have_no_end() -> None:
    compiled = autodeploy.compile(make_model("llama"), max_seq_len=100_000)
    assert table_of_positions(compiled.program) is None and compiled.max_seq_len == 100_000
    compiled.shutdown()
