"""Page: pictures and tables as HTML in one file, which needs no network and no script."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

_STYLE = """
body{font:16px/1.55 system-ui,sans-serif;color:#1c1c1c;background:#fff;margin:2rem auto;
max-width:960px;padding:0 1rem}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .6rem}h2{font-size:1.2rem;margin:2.4rem 0 .4rem}
p{margin:.5rem 0}figure{margin:1rem 0;overflow-x:auto}
img{max-width:100%;min-width:34rem;height:auto;display:block}
figcaption{font-size:.88rem;color:#5b6168}
pre{background:#f3f5f7;padding:.7rem .9rem;overflow-x:auto;font:13.5px/1.5 ui-monospace,monospace}
.wide{overflow-x:auto;margin:.8rem 0}table{border-collapse:collapse;font-size:.88rem;
font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;text-align:right;white-space:nowrap;border-bottom:1px solid #e4e4e4}
th{background:#f3f5f7}th:first-child,td:first-child{text-align:left}
summary{cursor:pointer;color:#1a5fb4}
"""


@dataclass(frozen=True)
class Table:
    """A header and rows of text as long as it; folded away behind `folded`, where that is given."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: str = ""

    def html(self) -> str:
        """The element, in a box of its own that scrolls sideways."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.header)
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        whole = f'<div class="wide">{table}</div>'
        if not self.folded:
            return whole
        return f"<details><summary>{escape(self.folded)}</summary>{whole}</details>"


@dataclass(frozen=True)
class Picture:
    """A PNG file, which is written into the page, and what it shows."""

    path: Path
    shown: str

    def html(self) -> str:
        """The element."""
        data = base64.b64encode(self.path.read_bytes()).decode()
        image = f'<img alt="{escape(self.shown)}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{escape(self.shown)}</figcaption></figure>"


@dataclass(frozen=True)
class Code:
    """Lines to type."""

    text: str

    def html(self) -> str:
        """The element."""
        return f"<pre>{escape(self.text)}</pre>"


@dataclass(frozen=True)
class Section:
    """A heading and what follows it, in order; a string is a paragraph."""

    title: str
    parts: Sequence[str | Code | Picture | Table]

    def html(self) -> str:
        """Its elements."""
        return "\n".join([f"<h2>{escape(self.title)}</h2>", *map(_element, self.parts)])


def _element(part: str | Code | Picture | Table) -> str:
    return f"<p>{escape(part)}</p>" if isinstance(part, str) else part.html()


def page(title: str, lead: Sequence[str], sections: Sequence[Section]) -> str:
    """A whole page."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>{escape(title)}</h1>\n"
        + "\n".join(map(_element, lead))
        + "\n"
        + "\n".join(section.html() for section in sections)
        + "\n</body></html>\n"
    )
