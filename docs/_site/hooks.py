"""What the site has beside the pages of docs/: README and its neighbours, all options, the reference, the examples."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

import options  # noqa: E402

import stepcache  # noqa: E402
from stepcache import extend  # noqa: E402

TOP = {path.name: path.name.lower() for path in ROOT.glob("*.md")} | {"README.md": "index.md"}
"""The pages of the repository's top folder, and their names here."""

REFERENCE = """# {title}

{introduction}

"""

PARTS = {
    "A method": ("methods", "masks", "compat"),
    "A host": ("engine", "call", "parametrization"),
    "Gates": ("gates",),
    "Criteria": ("criteria",),
    "Predictors": ("predictors",),
    "What they look at": ("branch", "clock", "run_info", "plan", "deferred", "noise", "probe"),
    "The report": ("report", "event", "trace"),
    "Options": ("options", "_optional"),
}
"""The titles of a reference page, and which parts of the package are under each."""

FOR_USERS = (
    "The names for users. [`attach`][stepcache.samplers.diffusers.attachment.attach] is with the other hosts, in "
    "[samplers](samplers.md). Every method with its options is in [a table](../options.md) as well."
)
FOR_AUTHORS = "The names for authors of [methods](../writing-a-method.md) and [hosts](../writing-a-host.md)."


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are written while the site is built."""
    others = {*stepcache.__all__} - {"Forecast", "attach"}
    made = {
        **{page: repository_page(name) for name, page in TOP.items()},
        "options.md": options.page(),
        "reference/stepcache.md": _reference("stepcache", FOR_USERS, ["Forecast", *sorted(others)]),
        "reference/extend.md": _reference("stepcache.extend", FOR_AUTHORS, extend.__all__),
    }
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    for path in sorted(ROOT.joinpath("examples").rglob("*")):
        if path.suffix in (".py", ".json") and "demo" not in path.parts:
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def repository_page(name: str) -> str:
    """A page from the repository's top folder, with links that are right in the site."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
    return re.sub(r"\]\((\w+\.md)", lambda match: f"]({TOP.get(match[1], match[1])}", text)


def _reference(module: str, introduction: str, names: list[str]) -> str:
    """A page of a module's public names, under the titles of `PARTS`."""
    written = [REFERENCE.format(title=f"`{module}`", introduction=introduction)]
    left = dict.fromkeys(names)
    for title, homes in {**PARTS, "More": None}.items():
        mine = [name for name in left if homes is None or _home(module, name) in homes]
        written += [f"## {title}\n\n"] if mine else []
        written += [f"::: {module}.{name}\n\n" for name in mine]
        left = {name: None for name in left if name not in mine}
    return "".join(written)


def _home(module: str, name: str) -> str:
    """The part of the package in which a name is defined; "" for constants, which do not know it."""
    defined = getattr(getattr(sys.modules[module], name), "__module__", None)
    parts = defined.split(".") if isinstance(defined, str) else [""]
    return parts[1] if len(parts) > 1 and parts[0] == "stepcache" else ""
