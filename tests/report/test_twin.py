"""A model whose numbers were verified on a twin says so: in its program, in the text and on the page."""

from __future__ import annotations

from pathlib import Path

import pytest

import autodeploy
from autodeploy import CompiledModel, _lower
from autodeploy.program import Program, Twin
from autodeploy.report.html import Before, Settings, page
from autodeploy.report.timeline import Timeline
from tests.models.families import make_model

SENTENCE = (
    "erified numerically on a twin of 1 layer (546 KiB in float64), because this model's own weights would take 1.4 MiB in "
    "float64, more than the limit of 1.0 MiB; the model itself is verified in structure"
)


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_lower, "MAX_BYTES", 1 << 20)
        return autodeploy.compile(make_model("llama", num_hidden_layers=4), verify="numeric")


def test_the_program_knows_its_twin_and_keeps_it_when_saved(compiled: CompiledModel, tmp_path: Path) -> None:
    assert compiled.program.twin == Twin(num_layers=1, num_bytes=558656, model_bytes=1446464, max_bytes=1 << 20)
    compiled.program.save(tmp_path)
    assert Program.load(tmp_path).twin == compiled.program.twin


def test_text_and_page_say_so_in_one_sentence(compiled: CompiledModel) -> None:
    assert f"\nv{SENTENCE}\n" in compiled.report()
    settings = Settings(page_size=32, pools={"pages": 9}, max_batch_size=1, max_num_tokens=64, max_seq_len=256)
    shown = page("llama", compiled.program, Before(), Timeline(), settings)
    assert f">V{SENTENCE.replace(chr(39), '&#x27;')}.</p>" in shown


def test_a_model_that_is_small_enough_has_no_twin() -> None:
    compiled = autodeploy.compile(make_model("llama", num_hidden_layers=1), verify="numeric")
    assert compiled.program.twin is None
    assert "twin" not in compiled.report()
