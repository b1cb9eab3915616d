"""The page of a report: one file, whole, safe, with what a reader sorts by."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from torch import nn

import tempbalance as tb


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.titles: list[str] = []
        self.open: str = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open = tag
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        if self.open == "th":
            self.titles.append(data)
        if self.open == "td":
            self.rows[-1].append(data)

    def handle_endtag(self, tag: str) -> None:
        self.open = ""


@pytest.fixture(scope="module")
def report() -> tb.Report:
    zero = nn.Linear(20, 20)
    nn.init.zeros_(zero.weight)
    return tb.analyze(nn.ModuleDict({"a": nn.Linear(40, 30), "<b>": nn.Linear(30, 30), "z": zero}))


def test_the_page_is_one_file_without_network(report: tb.Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = report.to_html(tmp_path / "new" / "r.html", title="<my> net")
    assert (tmp_path / "new" / "r.html").read_text(encoding="utf-8") == text
    assert not re.search(r"(src|href)=[\"']?(https?:|//)", text.replace('xlink:href="#', ""))
    assert "<script src" not in text and "<link" not in text
    assert "<title>&lt;my&gt; net</title>" in text
    assert "<b>" not in text and "&lt;b&gt;" in text
    svg = text[text.index("<svg") : text.index("</svg>") + 6]
    assert ET.fromstring(svg).tag.endswith("svg")
    assert "random matrix of the shape" in svg  # text is kept as text
    assert "every weight is zero" in text and "a bias or vector" in text


def test_the_table_holds_the_numbers(report: tb.Report) -> None:
    cells = Cells()
    cells.feed(report.to_html())
    at = cells.titles.index("alpha")
    rows = [row for row in cells.rows if row]
    assert [row[0] for row in rows] == ["a", "<b>", "z"]
    assert rows[0][at] == f"{report['a'].alpha:.3f}" and rows[2][at] == "-"
    assert rows[0][at + 1] == f"{report.level()['a']:.3f}"
    assert cells.titles[at + 1] == "random"


def test_a_notebook_shows_the_table_without_scripts(report: tb.Report) -> None:
    html = report._repr_html_()
    assert "<table" in html and "<script" not in html and "<svg" not in html
    assert "&lt;b&gt;" in html and "2 of 3 layers measured" in html


def test_repr_is_one_line(report: tb.Report) -> None:
    assert repr(report).startswith("Report(2 of 3 layers measured")
    assert len(repr(report)) < 120 and "\n" not in repr(report)


def test_traps_have_columns_where_they_were_looked_for(report: tb.Report) -> None:
    assert "trap units" not in report.to_html()
    trapped = tb.analyze(nn.Linear(40, 30), traps=True)
    assert "trap units" in trapped.to_html() and "trap units" in str(trapped)
