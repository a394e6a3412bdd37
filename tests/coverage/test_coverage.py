"""Every causal language model of transformers runs right, or is refused on purpose."""

import json
import os
import re
import time
from functools import cache
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

import autodeploy
from autodeploy.capture.twin import capture_twin
from autodeploy.cli import app
from autodeploy.coverage.examine import Kind, Result, compare
from autodeploy.coverage.hints import HINTS
from autodeploy.coverage.run import isolated
from autodeploy.coverage.small import NoSmallModelError, NotDecoderOnlyError, chosen_types, model_types, perturbed, small_model
from autodeploy.coverage.tables import as_json, markdown, markdown_row, totals
from autodeploy.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
QUICK = {
    "deepseek_v3",  # latent attention, experts, a dense layer first
    "gemma2",  # windows, softcap
    "gpt_neo",  # attention of its own
    "mamba2",  # states only
}
TYPES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in model_types()]


@cache
def result_of(model_type: str) -> Result:
    return isolated(model_type, timeout=600)


@pytest.mark.parametrize("model_type", TYPES)
def test_model_type_is_right_or_refused(model_type: str) -> None:
    result = result_of(model_type)
    assert result.kind in (Kind.OK, Kind.UNSUPPORTED, Kind.NOT_COUNTED), result
    assert result.kind is Kind.OK or result.reason, result
    if result.kind is Kind.OK:
        assert result.error is not None and result.error <= 1e-5, result
        assert result.judged is not None and result.judged >= 0.85, result


@pytest.mark.parametrize("model_type", sorted(QUICK))
def test_the_page_shows_what_is_measured(model_type: str) -> None:
    assert result_of(model_type).kind is Kind.OK
    assert markdown_row(result_of(model_type)) in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_has_each_model_type_once_and_counts_them_right() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = [re.split(r" (?<!\\)\| ", line[2:-2]) for line in text.splitlines() if line.startswith("| `")]
    assert sorted(row[0].strip("`") for row in rows) == model_types()
    counted = [Result(row[0], Kind(row[1])) for row in rows if len(row) > 2]
    others = [Result(row[0], Kind.NOT_COUNTED) for row in rows if len(row) == 2]
    assert totals(counted + others) in text
    assert f"transformers {transformers.__version__}" in text


def test_results_are_written_as_json_and_markdown() -> None:
    result = Result("a", Kind.WRONG, "b | c", ("PagedKV",), ("attention",), 3e-7, 0.97, 1.5)
    (fields,) = json.loads(as_json([result]))
    assert Result(**{**fields, "kind": Kind(fields["kind"]), "caches": ("PagedKV",), "ops": ("attention",)}) == result
    assert (fields["caches"], fields["ops"]) == (["PagedKV"], ["attention"])
    assert markdown_row(result) == r"| `a` | wrong | PagedKV | attention | 1e-06 | 95 % | b \| c |"
    assert "0 of 1 decoder-only model types ok; 0 unsupported, 1 wrong, 0 failed; 0 others" in markdown([result])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", HINTS)
def test_each_hint_is_needed(model_type: str) -> None:
    with pytest.raises((NoSmallModelError, NotDecoderOnlyError)) as without:
        small_model(model_type, {})
    try:
        small_model(model_type)
    except NotDecoderOnlyError as error:  # then the reason is about the model, not about how it was built
        assert str(error).startswith("eager is not causal") and str(error) != str(without.value)


def test_a_later_token_and_an_encoder_are_noticed() -> None:
    with pytest.raises(NotDecoderOnlyError, match="not causal"):
        small_model("bert")
    with pytest.raises(NotDecoderOnlyError, match="encoder"):
        small_model("bart")


def test_wrong_weights_are_noticed() -> None:
    model, other = small_model("llama"), perturbed(small_model("llama"), seed=7)
    compiled = autodeploy.compile(other)
    assert compare(model, compiled)["kind"] is Kind.WRONG
    compiled.shutdown()


def hang(model_type: str) -> Result:
    time.sleep(60)
    return Result(model_type, Kind.OK)


def crash(model_type: str) -> Result:
    os._exit(3)


def test_a_hang_and_a_crash_of_one_do_not_end_the_run() -> None:
    assert isolated("a", timeout=1.0, work=hang).reason == "no result after 1 s"
    assert isolated("a", timeout=60.0, work=crash).reason == "its process ended with code 3"


def test_the_command_prints_results_and_refuses_an_unknown_type() -> None:
    ran = CliRunner().invoke(app, ["coverage", "--families", "bart,bert", "--json", "-"])
    printed = json.loads(ran.stdout)
    assert [(each["model_type"], each["kind"]) for each in printed] == [
        ("bart", "not decoder-only"),
        ("bert", "not decoder-only"),
    ]
    with pytest.raises(ConfigError, match="Did you mean 'llama'"):
        chosen_types("lama")


def test_small_models_are_their_own_twins() -> None:
    config = small_model("gemma2").config
    assert capture_twin(config, config.dtype, 1 << 30).program.op_counts()["autodeploy.attention"] == 2
