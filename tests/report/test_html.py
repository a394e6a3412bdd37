"""The report page of the demo model: complete, self-contained, well formed, and not blank in a browser."""

import re
import shutil
import struct
import subprocess
import xml.etree.ElementTree as ET
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import autodeploy
from autodeploy.cli import app
from autodeploy.errors import ConfigError
from autodeploy.program import Choice, Program
from autodeploy.report.drawing import draw
from autodeploy.report.html import Before, Settings, page
from autodeploy.report.layer import Box, LayerView
from autodeploy.report.markup import Html, num_bytes, tag
from autodeploy.report.timeline import Timeline
from autodeploy.transforms.default import default_pipeline

DEMO = str(Path(autodeploy.__file__).parent / "demo_model")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    done = CliRunner().invoke(app, ["report", DEMO, "-o", str(path), "--max-batch-size", "4"], catch_exceptions=False)
    assert done.exit_code == 0
    return path


@pytest.fixture(scope="module")
def text(written: Path) -> str:
    return written.read_text(encoding="utf-8")


def test_nothing_is_fetched_or_run_and_no_path_of_this_machine_shows(text: str) -> None:
    assert not re.search(r"https?:|//|<script|<link|<img|<iframe|url\(|@import|\son\w+=", text)
    assert str(Path(DEMO).parent) not in text
    assert len(text) < 200_000


def test_the_page_has_every_pass_and_every_part(text: str) -> None:
    for name in default_pipeline().names():
        assert f"<code>{name}</code>" in text
    for heading in (
        "Pipeline",
        "One layer, before and after",
        "Kernels",
        "Caches",
        "Weights by format",
        "Memory plan",
        "Start-up",
    ):
        assert f"<h2>{heading}</h2>" in text
    for op in ("aten.linear", "paged_attention", "rope_append", "rms_norm", "gated_activation"):
        assert op in text
    assert "Program cache: not used: switched off." in text
    for phase in ("export", "passes", "load weights"):
        assert f'<span class="phase">{phase}</span>' in text
    assert "prefers-color-scheme: dark" in text


def test_nothing_is_said_of_twins_and_foreign_passes_where_there_are_none(text: str) -> None:
    assert "twin" not in text
    assert "from elsewhere" not in text


def test_what_to_verify_is_an_option(tmp_path: Path) -> None:
    for command in (["report", "-o", str(tmp_path / "report.html")], ["inspect"]):
        with pytest.raises(ConfigError, match="verify"):
            CliRunner().invoke(app, [*command, DEMO, "--verify", "nothing"], catch_exceptions=False)


def test_bytes_are_those_of_the_program(text: str, demo_program: Program) -> None:
    specs = demo_program.caches.values()
    per_token = sum(spec.num_kv_heads * (spec.head_dim_k + spec.head_dim_v) * 4 for spec in specs)
    assert f"<b>{num_bytes(per_token)}</b><span>of cache per token</span>" in text
    assert "33 pages of 32 tokens" in text  # 4 requests of 256 tokens, and a scratch page
    assert re.search(rf"<code>float32</code></td><td[^>]*>{len(demo_program.weights)}</td>", text)
    num_values = sum(demo_program.parameter(name).numel() for name in demo_program.weights)
    assert f">{4 * num_values:,}</td>" in text


def test_the_body_is_well_formed(text: str) -> None:
    body = re.search(r"<body>.*</body>", text, re.DOTALL)
    assert body
    ET.fromstring(body[0])


def test_one_layer_has_more_ops_before_than_after(text: str) -> None:
    before, after = drawn(text)
    assert before.num_boxes >= 2 * after.num_boxes
    assert before.labels.count("attention") == 1
    assert after.labels.count("paged_attention") == after.labels.count("rope_append") == 1
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} <= {*before.reads}
    assert "q_proj_k_proj_v_proj" in after.reads
    assert any(title.startswith("paged_attention") for title in after.titles)


class Drawn:
    def __init__(self, svg: str) -> None:
        root = ET.fromstring(svg)
        groups = [group for group in root if "op" in (group.get("class") or "").split()]
        self.num_boxes = len(groups)
        self.titles = [group.findtext("title", "") for group in groups]
        texts = [(text.get("class"), text.text or "") for group in groups for text in group.iter("text")]
        self.labels = [text for kind, text in texts if kind == "label"]
        self.reads = [text for kind, text in texts if kind == "reads"]


def drawn(text: str) -> list[Drawn]:
    return [Drawn(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def test_text_of_the_model_is_escaped(demo_program: Program) -> None:
    program = replace(demo_program, providers={"rope": (Choice("fast <b>", {"slow": ("a < b & c", "d")}),)})
    settings = Settings(page_size=32, pools={"pages": 9}, max_batch_size=1, max_num_tokens=64, max_seq_len=256)
    shown = page("<i>&", program, Before(), Timeline(), settings)
    assert "<h1>&lt;i&gt;&amp;</h1>" in shown
    assert "<code>fast &lt;b&gt;</code>" in shown
    assert "<div><code>slow</code>: a &lt; b &amp; c, d</div>" in shown
    svg = draw(LayerView(0, 1, {"a": Box("<x>", "1 & 2", "norm", '"w"', "</title>")}, ()))
    assert [Drawn(svg).labels, Drawn(svg).titles] == [["<x>"], ["</title>"]]


def test_a_layer_too_large_to_draw_is_said_to_be() -> None:
    boxes = {f"n{i}": Box("add", "1", "arithmetic") for i in range(500)}
    assert "500 ops are too many" in draw(LayerView(0, 1, boxes, ()))


def test_markup() -> None:
    assert tag("a", "<", Html("<b/>"), class_="x", stroke_width=None) == '<a class="x">&lt;<b/></a>'
    assert [num_bytes(n) for n in (0, 1023, 1536, 200 << 20, 3 << 40)] == ["0 B", "1023 B", "1.5 KiB", "200 MiB", "3.0 TiB"]


@pytest.mark.skipif(BROWSER is None, reason="needs Debian's package chromium to look at the page")
def test_a_browser_shows_the_page(written: Path, tmp_path: Path) -> None:
    assert BROWSER
    shot = tmp_path / "shot.png"
    options = [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", "--window-size=1200,2400"]
    subprocess.run([BROWSER, *QUIET, *options, written.as_uri()], check=True, capture_output=True, timeout=120)
    width, height, num_values = read_png(shot.read_bytes())
    assert (width, height) == (1200, 2400)
    assert num_values > 50, "the picture is blank"


def read_png(data: bytes) -> tuple[int, int, int]:
    """Width, height, and how many different byte values its rows hold: a blank picture has very few."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    pixels, at = b"", 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            pixels += data[at + 8 : at + 8 + length]
        at += 12 + length
    return width, height, len(set(zlib.decompress(pixels)))
