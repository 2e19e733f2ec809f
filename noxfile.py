"""Every task of the project: `nox -l` lists them, `nox -s NAME` runs one, and the GitHub workflows run nothing else.

`nox` alone runs lint and types. `nox -s tests-3.12 -- tests/test_clock.py` runs one file of tests. UV_TORCH_BACKEND=cpu
spares the CUDA libraries that torch brings on Linux.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PROJECT = nox.project.load_toml("pyproject.toml")
FORMS = {
    "github-workflows": ".github/workflows/*.yml",
    "github-issue-forms": ".github/ISSUE_TEMPLATE/[!c]*.yml",
    "github-issue-config": ".github/ISSUE_TEMPLATE/config.yml",
    "dependabot": ".github/dependabot.yml",
    "citation-file-format": "CITATION.cff",
}
"""The schema of each file that a service reads."""

GALAXYGRAD = "galaxygrad==0.2.0"  # installed without JAX, which its networks are not run with here

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types"]


@nox.session
def lint(session: nox.Session) -> None:
    """Lock file, style, format, spelling, and the form of the workflows, issue forms and CITATION.cff."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("uv", "lock", "--check", external=True)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("codespell")
    for schema, files in FORMS.items():
        paths = sorted(map(str, Path().glob(files)))
        session.run("check-jsonschema", "--builtin-schema", f"vendor.{schema}", *paths)


@nox.session
def types(session: nox.Session) -> None:
    """mypy, strict, and pyright over the wheel as it is installed: in a clone, samplers/ is no part of the package."""
    session.install(".[test]")
    settings, away = Path("pyproject.toml").resolve(), session.create_tmp()
    shutil.copy(settings, away)
    session.cd(away)
    session.run("mypy", "-p", "stepcache", *session.posargs)
    package = session.run("python", "-c", "import stepcache; print(stepcache.__path__[0])", silent=True)
    session.run("pyright", str(package).strip())


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The tests with the newest releases of everything; what follows `--` goes to pytest."""
    session.install("-e", ".[test]", "pip")  # pip, because a test makes a wheel with it
    session.install("--no-deps", GALAXYGRAD)
    _pytest(session)


@nox.session(python=PYTHONS[0])
def oldest(session: nox.Session) -> None:
    """The tests with the oldest releases that pyproject.toml admits, without cache-dit, which asks for newer ones."""
    session.install(
        "--resolution", "lowest-direct", "--only-binary", ":all:", "--no-binary", "stepcache", "-e", ".[test-core]"
    )
    session.install("--no-deps", GALAXYGRAD)
    _pytest(session)


def _pytest(session: nox.Session) -> None:
    session.run("pytest", *session.posargs, env={"HF_HUB_OFFLINE": "1"})


@nox.session
def versions(session: nox.Session) -> None:
    """Writes docs/versions.md from the records of `STEPCACHE_RECORD=docs/versions nox -s tests oldest`."""
    session.run("python", "tests/helpers/versions.py")


@nox.session
def build(session: nox.Session) -> None:
    """Makes source distribution and wheel in dist/, and checks their metadata and contents."""
    session.install(*nox.project.dependency_groups(PROJECT, "release"))
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build")
    distributions = sorted(map(str, Path("dist").iterdir()))
    session.run("twine", "check", "--strict", *distributions)
    session.run("python", "tests/helpers/distribution.py", *distributions)


@nox.session
def wheel(session: nox.Session) -> None:
    """Installs the wheel that `build` made and uses it: import, command line, demo."""
    (made,) = Path("dist").glob("*.whl")
    made = made.resolve()
    session.install(f"stepcache[demo] @ {made.as_uri()}")
    session.cd(session.create_tmp())  # away from the clone, which would be imported instead
    session.run("stepcache", "--version")
    session.run("stepcache", "demo", "--samples", "10", "--out", "demo-output", env={"HF_HUB_OFFLINE": "1"})


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site in site/, strictly: a warning is an error."""
    session.install("-e", ".[docs]")
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def links(session: nox.Session) -> None:
    """Every link of the documentation site, those to other sites too. Needs the network."""
    session.install("-e", ".[docs]", "linkchecker")
    site = session.create_tmp()
    build = ("mkdocs", "build", "--strict", "--no-directory-urls", "--site-dir", site)
    session.run(*build, env={"NO_MKDOCS_2_WARNING": "1"})
    session.run("linkchecker", "--check-extern", f"{site}/index.html")


@nox.session
def tag(session: nox.Session) -> None:
    """Before a release: the tag is the version, and the changelog has a section for it. `nox -s tag -- v0.1.0`."""
    (name,) = session.posargs
    number = PROJECT["project"]["version"]
    if name != f"v{number}":
        session.error(f"the tag {name} is not v{number}, the version in pyproject.toml: change one of them")
    if f"## [{number}] - " not in Path("CHANGELOG.md").read_text(encoding="utf-8"):
        session.error(f"CHANGELOG.md has no section '## [{number}] - DATE': rename [Unreleased] to it")
