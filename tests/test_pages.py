"""Pages: complete, offline, and safe whatever a model's names hold."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx
import pytest
from small_models import FEATURES, mlp, renamed, samples

from mscompile.audit.pipeline import audit
from mscompile.audit.report import AuditReport
from mscompile.audit.setup import AuditOptions
from mscompile.cli import run
from mscompile.options import Options
from mscompile.pages import Figure, audit_html, audit_markdown, compile_html, compile_markdown, figures_html
from mscompile.pages.drawing import Series, lines
from mscompile.pipeline import Compilation, compile_model

HOSTILE = "h0</code><script>alert(1)</script>|`*&\"'"


class Reader(HTMLParser):
    """Tags seen, and whether they close in order."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Compilation, AuditReport]:
    folder = tmp_path_factory.mktemp("pages")
    onnx.save(renamed(mlp((FEATURES, 24, 16, 3)), {"h0": HOSTILE}), folder / "dense.onnx")
    np.savez(folder / "dense.calib.npz", x=samples(400, seed=1), label=np.arange(400) % 3)
    compiled = compile_model(folder / "dense.onnx", None, folder / "small.onnx", Options(keep=0.7), command=HOSTILE)
    data = {"x": samples(600, seed=2), "label": np.arange(600) % 3}
    options = AuditOptions(fidelity=0.8, table=64, swaps=(0.5,))
    report = audit(
        folder / "dense.onnx", folder / "small.onnx", data, options, output=folder / "small.audit.json",
        against=folder / "small.onnx", command=HOSTILE,
    )  # fmt: skip
    (folder / "small.audit.json").write_text(report.to_json())
    return folder, compiled, report


def pages(made: tuple[Path, Compilation, AuditReport]) -> list[str]:
    return [compile_html(made[1].report), audit_html(made[2])]


def test_pages_are_well_formed_and_escaped(made: tuple[Path, Compilation, AuditReport]) -> None:
    for page in pages(made):
        reader = Reader(page)
        assert "script" not in reader.tags
        assert HOSTILE in "".join(reader.text)
        assert reader.tags.count("svg") >= 2
        assert "undefined" not in page.lower()
        assert "None" not in "".join(reader.text)


def test_pages_load_nothing(made: tuple[Path, Compilation, AuditReport]) -> None:
    for page in pages(made):
        reader = Reader(page)
        assert not {"link", "img", "iframe", "object", "script", "form"} & set(reader.tags)
        assert not any(name in ("src", "href", "style") or name.startswith("on") for name, _ in reader.attributes)
        policy = next(v for k, v in reader.attributes if k == "content" and v and "default-src" in v)
        assert "default-src 'none'" in policy
        style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
        assert style
        assert f"'sha256-{base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()}'" in policy


def test_pages_say_what_was_found(made: tuple[Path, Compilation, AuditReport]) -> None:
    _, compiled, report = made
    fidelity = compiled.report.fidelity
    assert fidelity is not None
    assert f"{fidelity.iia_lower:.4f}" in compile_html(compiled.report)
    page, text = audit_html(report), audit_markdown(report)
    for shown in (page, text):
        assert report.verdict.capitalize() in shown
        assert f"{report.claims[0].iia_lower:.4f}" in shown
        assert report.digest in shown
        assert "onnxruntime as ort" in shown  # the lines that run the counterexample
    for sentence in report.scope:
        assert sentence.split(" of ")[0].split("`")[0][:40] in page


def test_markdown_tables_keep_their_columns(made: tuple[Path, Compilation, AuditReport]) -> None:
    for text in (compile_markdown(made[1].report), audit_markdown(made[2])):
        columns = None
        for line in text.splitlines():
            if not line.startswith("|"):
                columns = None
                continue
            count = len(re.findall(r"(?<!\\)\|", line))
            columns = columns or count
            assert count == columns, line
        assert "<script>" not in re.sub(r"`[^`]*`", "", re.sub(r"\\.", "", text))  # but for what is escaped, or code


def test_rendering_again(made: tuple[Path, Compilation, AuditReport], capsys: pytest.CaptureFixture[str]) -> None:
    folder, compiled, report = made
    for name, page in (("small.report.json", compile_html(compiled.report)), ("small.audit.json", audit_html(report))):
        assert run(["report", str(folder / name)]) == 0
        assert (folder / name).with_suffix(".html").read_text() == page
        assert run(["report", str(folder / name)]) == 2  # never overwritten
        assert run(["report", str(folder / name), "--markdown", str(folder / f"{name}.md")]) == 0
    capsys.readouterr()
    (folder / "not.json").write_text("{}")
    assert run(["report", str(folder / "not.json")]) == 2
    assert run(["report", str(folder / "nowhere.json")]) == 2


def test_figures_with_their_numbers() -> None:
    plot = lines([Series("a", [1, 2], [0.1, 0.2])], title=HOSTILE, description="d", x="x", y="y")
    reader = Reader(figures_html(HOSTILE, HOSTILE, [Figure(HOSTILE, plot, HOSTILE, ["a", HOSTILE], [["1", HOSTILE]])]))
    assert "script" not in reader.tags
    assert "".join(reader.text).count(HOSTILE) == 8  # each of them, in the plot's title, and in the page's
    assert (reader.tags.count("svg"), reader.tags.count("td")) == (1, 2)


def test_a_page_beside_a_compile(made: tuple[Path, Compilation, AuditReport], tmp_path: Path) -> None:
    arguments = [
        str(made[0] / "dense.onnx"),
        "-o",
        str(tmp_path / "out.onnx"),
        "--keep",
        "0.7",
        "--html",
        str(tmp_path / "p.html"),
    ]
    assert run([*arguments, "-q"]) == 0
    assert Reader((tmp_path / "p.html").read_text()).tags.count("svg") >= 2
    assert run([*arguments, "-q"]) == 2
