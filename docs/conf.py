"""Sphinx: how docs/ becomes a site. `make docs` builds it into docs/_build/html; no network needed.

Guides are Markdown (MyST). The API reference is made from the docstrings, each name with a link to
its line in the repository.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import tempbalance

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/tempbalance/tempbalance"
BRANCH = "main"

project = "tempbalance"
author = "The tempbalance authors"
copyright = f"2026, {author}"
version = release = tempbalance.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.linkcode",
    "sphinx.ext.mathjax",
]
# Two files are parts of results.md, one is a program's data.
exclude_patterns = ["_build", "results/bias.md", "results/conclusions.md"]
nitpicky = False

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"tempbalance {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": BRANCH,
    "source_directory": "docs/",
}


def linkcode_resolve(domain: str, info: dict[str, Any]) -> str | None:
    """The line in the repository where a documented name is defined."""
    if domain != "py" or not info["module"]:
        return None
    found: Any = importlib.import_module(info["module"])
    for part in info["fullname"].split("."):
        found = getattr(found, part, None)
    found = inspect.unwrap(found.fget if isinstance(found, property) else found)
    try:
        path = Path(inspect.getsourcefile(found) or "").resolve()
        lines, first = inspect.getsourcelines(found)
        place = path.relative_to(ROOT)
    except (TypeError, ValueError, OSError):  # a value, or a name of another package
        return None
    return f"{REPOSITORY}/blob/{BRANCH}/{place.as_posix()}#L{first}-L{first + len(lines) - 1}"


def _seen_from_docs(link: re.Match[str]) -> str:
    target = link[1]
    if target.startswith("docs/"):
        return f"]({target.removeprefix('docs/')})"
    return f"]({REPOSITORY}/blob/{BRANCH}/{target})"


def _contributing(app: Any, docname: str, source: list[str]) -> None:
    """The page on contributing is CONTRIBUTING.md of the repository's root, where there is one."""
    path = ROOT / "CONTRIBUTING.md"
    if docname == "contributing" and path.is_file():
        app.env.note_dependency(str(path))
        text = path.read_text(encoding="utf-8")
        source[0] = re.sub(r"\]\((?![a-z]+:|#)(\S+?)\)", _seen_from_docs, text)


def setup(app: Any) -> None:
    app.connect("source-read", _contributing)
