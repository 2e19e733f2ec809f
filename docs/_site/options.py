"""The page of all options, written from the registry, the signatures and the docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import griffe
from reading import with_examples

from stepcache import METHODS, Method, extend
from stepcache.extend import accepted_options
from stepcache.methods.registry import presets_of

INTRODUCTION = """# Every option of every method

Give options as keywords, `UCache(threshold=0.5)`, or as text, `method("ucache", "threshold=0.5")`, in the command line
`ucache:threshold=0.5`. All methods take the [common options](#common-options), too.
"""

COMMON = """
## Common options

Every method takes them beside its own, if it has none of the same name. Defaults are those of `Method`; a method may
have another, for instance a window.
"""


def page() -> str:
    """The page in Markdown."""
    return "\n".join([INTRODUCTION, *(part for name in METHODS for part in _method(name)), *_common()]) + "\n"


def described(name: str) -> dict[str, str]:
    """What is said about each of a method's own options: in its docstring, or in that of a method named there."""
    function = METHODS[name]
    named = [other for other in METHODS.values() if f"`{other.__name__}`" in (function.__doc__ or "")]
    known = common_descriptions()
    for other in (*named, function):
        said = _descriptions(other, griffe.DocstringSectionKind.parameters)
        known |= {key: text for key, text in said.items() if "as for `" not in text}
    return {key: known[key] for key in own_options(name) if key in known}


def own_options(name: str) -> dict[str, Any]:
    """The options in a method's own signature, with their defaults."""
    return {key: default for key, default in accepted_options(name).items() if key in _parameters(name)}


def common_descriptions() -> dict[str, str]:
    """What the docstring of `Method` says about each option that all methods have."""
    said = _descriptions(Method, griffe.DocstringSectionKind.attributes)
    return {key: text for key, text in said.items() if key not in ("criterion", "name")}


def _method(name: str) -> Iterator[str]:
    function = METHODS[name]
    yield f"\n## `{name}` {{#{name}}}\n\n`{function.__name__}{_call(name)}`\n"
    sections = _sections(function)
    if not any(section.kind is griffe.DocstringSectionKind.parameters for section in sections):
        sections.insert(1, griffe.DocstringSectionParameters([]))
    for section in sections:
        if section.kind is griffe.DocstringSectionKind.text:
            yield linked(section.value) + "\n"
        elif section.kind is griffe.DocstringSectionKind.parameters:
            yield from _table(described(name), own_options(name))
            if common := next((item for item in section.value if item.name.startswith("**")), None):
                yield f"\n[Common options](#common-options): {linked(_line(common.description))}\n"
        elif section.kind is griffe.DocstringSectionKind.examples:
            yield "\n".join(f"```pycon\n{text}\n```\n" for _, text in section.value)
    if presets := presets_of(name):
        yield "| `preset` | sets |\n|---|---|"
        for preset, values in presets.items():
            yield f"| `{preset}` | {', '.join(f'`{key}={value!r}`' for key, value in values.items())} |"


def _common() -> Iterator[str]:
    yield COMMON
    defaults = {field.name: field.default for field in fields(Method)}
    yield from _table(common_descriptions(), defaults)


def _table(descriptions: dict[str, str], defaults: dict[str, Any]) -> Iterator[str]:
    if not descriptions:
        return
    yield "| option | default | |\n|---|---|---|"
    for key, text in descriptions.items():
        default = defaults.get(key)
        plain = isinstance(default, (bool, int, float, str, tuple)) and default != ""
        yield f"| `{key}` | {f'`{default!r}`' if plain or default is None else ''} | {linked(text)} |"
    yield ""


def _descriptions(of: Any, kind: griffe.DocstringSectionKind) -> dict[str, str]:
    """Option -> sentence; other names of an option, in brackets in the docstring, come first."""
    found: dict[str, str] = {}
    for section in _sections(of):
        for item in section.value if section.kind is kind else ():
            other = f"({item.annotation}) " if item.annotation else ""
            for name in item.name.split(", ") if not item.name.startswith("**") else ():
                found[name] = other + _line(item.description)
    return found


def _sections(of: Any) -> list[griffe.DocstringSection]:
    return griffe.Docstring(with_examples(inspect.getdoc(of) or ""), lineno=1).parse("google", warnings=False)


def _parameters(name: str) -> list[str]:
    signature = inspect.signature(inspect.unwrap(METHODS[name]))
    return [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]


def _call(name: str) -> str:
    return f"({', '.join(_parameters(name))})"


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def linked(text: str) -> str:
    """Files of docs/ and names of `stepcache.extend` as links."""
    text = re.sub(r"docs/([\w-]+)\.md", r"[\1](\1.md)", text)

    def link(match: re.Match[str]) -> str:
        name = match[1].rpartition(".")[2]
        return f"[`{name}`][stepcache.extend.{name}]" if name in extend.__all__ else match[0]

    return re.sub(r"`(stepcache\.[\w.]+|[A-Z]\w+(?:Rule|Change|Order))`", link, text)
