"""Page: a report as HTML in one file, with a table that sorts itself; no network, no library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

from tempbalance.analysis.text import number
from tempbalance.measure.measurement import LayerRecord, Outcome

_Column = tuple[str, str, Callable[[LayerRecord], str]]  # title, explanation, text of a cell

_COLUMNS: tuple[_Column, ...] = (
    ("layer", "name in the model", lambda r: r.name),
    ("alpha", "power-law exponent of the spectrum's tail", lambda r: number(r.alpha)),
    ("D", "Kolmogorov-Smirnov distance of the fit", lambda r: number(r.D)),
    ("kind", "type of the layer", lambda r: r.kind),
    ("shape", "rows x columns; of several slices their number x rows x columns",
     lambda r: " x ".join(map(str, r.shape[r.shape[0] == 1 :]))),
    ("parameters", "real numbers in the weight", lambda r: f"{r.numel:,}"),
    ("eigenvalues", "eigenvalues that were fitted, over all windows", lambda r: f"{r.n_eigs:,}"),
    ("spectral norm", "largest singular value", lambda r: number(r.spectral_norm, 0, 4)),
    ("log norm", "log10 of the squared Frobenius norm", lambda r: number(r.log_norm)),
    ("stable rank", "squared Frobenius norm over squared spectral norm",
     lambda r: number(r.stable_rank, 0, 2)),
    ("outcome", "what came of measuring it", lambda r: r.outcome.value),
)  # fmt: skip
_TRAPS: tuple[_Column, ...] = (
    ("traps", "eigenvalues of the shuffled weight beyond the random edge",
     lambda r: "-" if r.traps is None else str(r.traps)),
    ("trap units", "the largest above that edge, in Tracy-Widom units",
     lambda r: number(r.trap_units, 0, 1)),
    ("largest entry", "|entry - mean| over the standard deviation",
     lambda r: number(r.largest_entry, 0, 1)),
    ("kurtosis", "of the entries, in excess of a Gaussian's", lambda r: number(r.kurtosis, 0, 2)),
)  # fmt: skip
_TEXT = {"layer", "kind", "outcome"}

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#1c1c1c;margin:2rem auto;max-width:1440px;
padding:0 1.2rem}h1{font-size:1.5rem;margin:0 0 .4rem}h2{font-size:1.1rem;margin:2rem 0 .5rem}
p.sum{font-size:1.05rem;margin:.1rem 0}li{margin:.15rem 0}svg{max-width:100%;height:auto}
"""
_TABLE_STYLE = """
.tb-wrap{overflow-x:auto}table.tb{border-collapse:collapse;font:13px/1.35 system-ui,sans-serif;
color:#1c1c1c;background:#fff}
table.tb th,table.tb td{padding:.28rem .28rem;text-align:right;white-space:nowrap;
border-bottom:1px solid #e4e4e4}table.tb .t{text-align:left}
table.tb td.n{font:12px/1.35 ui-monospace,monospace;text-align:left}
table.tb thead th{cursor:pointer;background:#f3f5f7;white-space:normal;vertical-align:bottom;
user-select:none}
table.tb tr>:first-child{position:sticky;left:0;background:#fff}
table.tb thead tr>:first-child{background:#f3f5f7}
@media(max-width:1300px){table.tb td.t{white-space:normal}
table.tb td.n{white-space:normal;overflow-wrap:anywhere;min-width:min(9.5rem,34vw)}}
table.tb thead th:hover{text-decoration:underline}
table.tb thead th[aria-sort=ascending]::after{content:" \\2191"}
table.tb thead th[aria-sort=descending]::after{content:" \\2193"}
table.tb tbody tr:hover>*{background:#eef5fb}table.tb tr.bad td{color:#9a4b00}
"""
# Numbers sort as numbers and layers in definition order (data-i); cells without a number go last.
_SCRIPT = """
document.querySelectorAll("table.tb").forEach(function(t){
 var b=t.tBodies[0],h=t.tHead.rows[0].cells;
 function key(r,c){var x=r.cells[c].dataset.v;return x===undefined?r.cells[c].textContent:
  (x===""?null:parseFloat(x));}
 Array.prototype.forEach.call(h,function(th,c){
  th.tabIndex=0;
  function sort(){
   var s=th.getAttribute("aria-sort"),d=s==="ascending"?-1:s==="descending"?0:1;
   Array.prototype.forEach.call(h,function(o){o.removeAttribute("aria-sort");});
   if(d)th.setAttribute("aria-sort",d>0?"ascending":"descending");
   Array.from(b.rows).sort(function(p,q){
    if(!d)return p.dataset.i-q.dataset.i;
    var x=key(p,c),y=key(q,c);
    if(x===null||y===null)return (x===null)-(y===null)||p.dataset.i-q.dataset.i;
    var o=typeof x==="number"?x-y:String(x).localeCompare(String(y),undefined,{numeric:true});
    return d*o||p.dataset.i-q.dataset.i;
   }).forEach(function(r){b.appendChild(r);});
  }
  th.addEventListener("click",sort);
  th.addEventListener("keydown",function(e){if(e.key==="Enter"){sort();}});
 });
});
"""


def page(
    title: str,
    summary: Sequence[str],
    remarks: Sequence[str],
    layers: Sequence[LayerRecord],
    picture: str = "",
    level: Mapping[str, float] | None = None,
) -> str:
    """A whole page: heading, summary, the picture (an SVG element), the table, what is missing.

    Args:
        level: by layer, alpha of a random matrix of its shape, a column of its own.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        *(f'<p class="sum">{escape(line)}</p>' for line in summary),
        picture,
        "<h2>Layers</h2><p>Click a column to sort by it; a third click restores the order of "
        "the model.</p>" if layers else "<p>The model has no weight matrix to measure.</p>",
        _table(layers, level or {}),
        "<h2>Not measured, and why</h2>" + _list(remarks) if remarks else "",
    ]  # fmt: skip
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{_TABLE_STYLE}</style></head><body>\n"
        + "\n".join(filter(None, parts))
        + f"\n<script>{_SCRIPT}</script></body></html>\n"
    )


def fragment(
    summary: Sequence[str],
    remarks: Sequence[str],
    layers: Sequence[LayerRecord],
) -> str:
    """What a notebook shows: summary and table, without scripts, and the rest folded away."""
    more = f"<details><summary>Not measured, and why</summary>{_list(remarks)}</details>"
    style = _TABLE_STYLE.replace("cursor:pointer;", "").partition("table.tb thead th:hover")[0]
    return (
        f"<style>{style}</style>"
        + "".join(f"<p>{escape(line)}</p>" for line in summary)
        + _table(layers, {})
        + (more if remarks else "")
    )


def _table(layers: Sequence[LayerRecord], level: Mapping[str, float]) -> str:
    if not layers:
        return ""
    traps = any(layer.trap_units is not None for layer in layers)
    random: _Column = (
        "random", "alpha of a random matrix of the shape", lambda r: number(level.get(r.name))
    )  # fmt: skip
    before, after = _COLUMNS[:2], _COLUMNS[2:-1]
    columns = [*before, *[random] * bool(level), *after, *_TRAPS * traps, _COLUMNS[-1]]
    head = "".join(
        f'<th title="{escape(told)}"{_left(title)}>{escape(title)}</th>'
        for title, told, _ in columns
    )
    rows = []
    for i, layer in enumerate(layers):
        good = layer.outcome is Outcome.OK
        cells = "".join(_cell(layer, column) for column in columns)
        told = "" if good else f' class="bad" title="{escape(layer.message)}"'
        rows.append(f'<tr data-i="{i}"{told}>{cells}</tr>')
    return (
        f'<div class="tb-wrap"><table class="tb"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(layer: LayerRecord, column: _Column) -> str:
    title, _, show = column
    text = show(layer)
    if title in _TEXT:
        return f'<td class="{"n" if title == "layer" else "t"}">{escape(text)}</td>'
    if title == "shape":  # sorts by its size
        slices, rows, cols = layer.shape
        return f'<td data-v="{slices * rows * cols}">{text}</td>'
    return f'<td data-v="{"" if text == "-" else text.replace(",", "")}">{text}</td>'


def _left(title: str) -> str:
    return ' class="t"' if title in _TEXT else ""


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
