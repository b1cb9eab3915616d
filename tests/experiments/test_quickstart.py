"""The demonstration, small: a screen of text, and a page that needs no network."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from experiments import quickstart
from experiments.page import Code, Picture, Section, Table, page

SMALL = ("data.share=0.2", "model.width=4", "trainer.max_epochs=2")


@pytest.mark.ci
def test_the_demonstration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--outputs", str(tmp_path), "--seeds", "1,2", *SMALL]
    assert quickstart.main(options) == 0
    printed = capsys.readouterr().out
    assert 24 <= len(printed.strip().splitlines()) <= 40
    assert max(map(len, printed.replace(str(tmp_path), "").splitlines())) <= 80
    whole = re.search(r"^ *whole (.*)", printed, re.MULTILINE)
    assert whole is not None
    alphas = [float(x) for x in whole[1].split()]
    assert alphas == sorted(alphas) and alphas[-1] > 7  # of narrow random matrices

    folder = tmp_path / "quickstart"
    shown = (folder / "index.html").read_text()
    for method, title in quickstart.METHODS.items():
        values = [
            json.loads(p.read_text())["value"] for p in folder.glob(f"{method}-*/result.json")
        ]
        assert len(values) == 2
        mean = f"{100 * sum(values) / 2:.2f}%"
        assert f"<td>{title}</td><td>2</td><td>{mean}</td>" in shown
        assert re.search(rf"{title} +2 +{mean}", printed)
    assert shown.count("data:image/png;base64,") == 6
    assert not re.search('(src|href)="(?!data:)', shown) and "<script" not in shown
    assert f"page: {folder / 'index.html'}" in printed

    assert quickstart.main(options) == 0  # shown again, nothing trained
    assert capsys.readouterr().out == printed


def test_a_page_escapes_what_it_is_given(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"png")
    table = Table(("a<b", "c"), [("1", "<i>")], folded="more & more")
    parts = ["x < y", Code("a < b"), Picture(picture, 'a "b"'), table]
    shown = page("<t>", ["lead"], [Section("s & t", parts)])
    for whole in ("&lt;t&gt;", "s &amp; t", "x &lt; y", "<pre>a &lt; b</pre>", "&lt;i&gt;",
                  'alt="a &quot;b&quot;"', "base64,cG5n", "more &amp; more"):  # fmt: skip
        assert whole in shown
    assert "<i>" not in shown
