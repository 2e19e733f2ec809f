"""What the documentation's pages claim is so: options, quoted messages, figures and paths."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from importlib import import_module

import pytest
from package import ROOT, modules

from stepcache import METHODS
from stepcache.extend import accepted_options

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def options():
    """The script that writes the page of all options while the site is built."""
    pytest.importorskip("griffe", reason="the extra docs is not installed")
    sys.path.insert(0, str(DOCS / "_site"))
    yield import_module("options")
    sys.path.remove(str(DOCS / "_site"))


@pytest.mark.parametrize("name", METHODS)
def test_every_option_of_a_method_is_explained(name, options):
    explained = options.described(name) | options.common_descriptions()
    assert [key for key in accepted_options(name) if not explained.get(key)] == []


def test_the_page_of_options_has_every_method_and_option(options):
    page = options.page()
    for name in METHODS:
        section = page.partition(f"{{#{name}}}")[2].partition("\n## ")[0]
        assert all(f"| `{key}` |" in section for key in options.own_options(name)), name


@cache
def strings() -> str:
    """Every text in the package's code; what a formatted one fills in is left out."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in modules().values()]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def quoted(section: str) -> list[str]:
    """What is quoted in the first column of the table in a section of the page on troubleshooting."""
    text = (
        (DOCS / "troubleshooting.md").read_text(encoding="utf-8").partition(f"## {section}\n")[2].partition("\n## ")[0]
    )
    rows = re.findall(r"^\| (`.*?`)[^`]* \| ", text, re.MULTILINE)
    return [quote for row in rows for quote in re.findall("`([^`]+)`", row)]


@pytest.mark.parametrize("quote", [*quoted("Nothing is skipped"), *quoted("Error texts")])
def test_a_message_that_is_explained_is_in_the_code(quote):
    assert all(part.strip() in strings() for part in quote.split("...") if len(part) > 3)


def claims() -> list[tuple[str, list[str], list[str]]]:
    """Of every item and row of the page on choosing that links a page: the figures in it, and the pages."""
    text = (DOCS / "choosing.md").read_text(encoding="utf-8")
    parts = re.split(r"\n(?=\s*(?:\d\.|-|\|) )", text.partition("\n1. ")[2])
    found = [
        (part, re.findall(r"\d+\.\d", re.sub("`.*?`", "", part)), re.findall(r"\]\(([\w-]+\.md)", part))
        for part in parts
    ]
    return [claim for claim in found if claim[1]]


@pytest.mark.parametrize(("text", "figures", "pages"), claims())
def test_a_figure_that_a_choice_rests_on_is_on_the_page_that_is_linked(text, figures, pages):
    linked = "".join((DOCS / page).read_text(encoding="utf-8") for page in pages)
    assert pages, text
    assert [figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", linked)] == []


def defaults() -> list[tuple[str, str, str]]:
    """Every `option=default` in the table of docs/methods.md, with the method of its row."""
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \W*`(\w+)\(.*?\)`\W* \| (.*?) \|", text, re.MULTILINE)
    return [(name, *pair) for name, cell in rows for pair in re.findall(r"(\w+)=([\w.-]+)", cell)]


@pytest.mark.parametrize(("function", "option", "default"), defaults())
def test_a_default_in_the_overview_is_the_methods_own(function, option, default):
    (name,) = [name for name, made in METHODS.items() if made.__name__ == function]
    assert str(accepted_options(name)[option]) == default


def test_the_overview_has_every_method():
    assert {function for function, _, _ in defaults()} == {made.__name__ for made in METHODS.values()} - {
        "Off",
        "Profile",
        "Static",
    }


@pytest.mark.parametrize("folder", ["stepcache", "samplers"])
def test_the_design_page_names_every_file_at_the_top(folder):
    text = (DOCS / "design.md").read_text(encoding="utf-8")
    files = {path.name for path in (ROOT / folder).glob("*.py") if not path.name.startswith("_")}
    assert [name for name in files if name not in text] == []
    assert {name for name in re.findall(r"(?<!\w)\w+\.py", text) if not [*ROOT.rglob(name)]} == set()


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted(DOCS.rglob("*.md")), ids=lambda path: path.name)
def test_a_list_in_a_list_is_indented_by_four(page):
    """MkDocs takes fewer spaces for the outer list; GitHub takes both for the inner one."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^ {1,3}(?:[-*]|\d+\.) .*", text, re.MULTILINE) == []


FOLDERS = "stepcache|samplers|tests|examples|benchmarks|docs"


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))], ids=lambda path: path.name)
def test_a_file_that_is_named_exists(page):
    named = set(re.findall(rf"(?<![\w./-])((?:{FOLDERS})/[\w./*-]+\.\w+)", page.read_text(encoding="utf-8")))
    assert [path for path in named if not [*ROOT.glob(path)]] == []
