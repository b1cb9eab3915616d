"""The README and the site: every public name is there, and every link leads somewhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import tempbalance
from tempbalance import pruning, readers

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = "https://github.com/tempbalance/tempbalance"


def public(module: object) -> set[str]:
    """Names of a package that are not modules or private."""
    module_type = type(re)
    found = {n: value for n, value in vars(module).items() if not n.startswith("_")}
    return {n for n, value in found.items() if not isinstance(value, module_type)}


def test_every_public_name_is_in_the_reference() -> None:
    written = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.rst"))
    documented = set(re.findall(r"^\.\. auto(?:class|function|data):: (\S+)$", written, re.M))
    wanted = {f"tempbalance.{name}" for name in tempbalance.__all__}
    wanted |= {f"tempbalance.readers.{name}" for name in public(readers) - {"annotations"}}
    # Their rooms are functions of the same name, so that the modules are hidden behind them.
    wanted |= {f"tempbalance.pruning.{name}" for name in public(pruning)}
    wanted |= {
        "tempbalance.integrations.lightning.TempBalanceCallback",
        "tempbalance.integrations.huggingface.TempBalanceTrainerCallback",
        "tempbalance.balance.options.Options",
    }
    assert documented == wanted


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 130


def links(text: str) -> list[str]:
    without_code = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.findall(r"\]\((\S+?)\)", without_code)


def test_links_of_the_readme_are_absolute_and_lead_to_files_of_the_repository() -> None:
    """A page of a package index shows no relative picture and follows no relative link."""
    raw = REPOSITORY.replace("github.com", "raw.githubusercontent.com") + "/main/"
    own = 0
    for link in links(README):
        assert link.startswith("https://"), link
        for base in (f"{REPOSITORY}/blob/main/", raw):
            if link.startswith(base):
                own += 1
                assert (ROOT / link.removeprefix(base)).is_file(), link
    assert own > 10


def test_one_repository_everywhere() -> None:
    assert f'REPOSITORY = "{REPOSITORY}"' in (DOCS / "conf.py").read_text()
    for url in PROJECT.get("urls", {}).values():
        assert url.startswith(REPOSITORY), url


# Parts of results.md, whose links are relative to that.
PARTS = [DOCS / "results" / name for name in ("bias.md", "conclusions.md")]


@pytest.mark.parametrize(
    "page", sorted({*DOCS.rglob("*.md")} - {*PARTS}), ids=lambda path: path.name
)
def test_relative_links_of_the_docs_lead_to_files(page: Path) -> None:
    for link in links(page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:|#", link):
            assert (page.parent / link.partition("#")[0]).exists(), link


def test_the_lowest_versions_are_those_of_the_package() -> None:
    wanted = {"Python": PROJECT["requires-python"]}
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        wanted |= {re.split(r"[^\w-]", line)[0]: line for line in lines}
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|", README.split("## Versions")[1], re.M)
    assert len(rows) >= 3
    for name, lowest in rows:
        assert re.search(rf">={re.escape(lowest)}(,|$)", wanted[name]), (name, wanted[name])


def test_the_readme_cites_this_version() -> None:
    assert f"version = {{{tempbalance.__version__}}}" in README
