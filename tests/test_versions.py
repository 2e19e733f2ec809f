"""The version has one place, and the table of versions has what the runs recorded."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata

import versions
from package import ROOT

import stepcache
from stepcache import _version

THREE = """
import pytest

def test_three_passes(): pass
def test_three_fails(): assert False
def test_three_is_skipped(): pytest.skip("not here")
"""

RUN = {
    "python": "3.12.1",
    "system": "Linux x86_64",
    "torch": "2.10.0+cpu",
    "diffusers": "0.36.0",
    "transformers": "4.55.0",
    "k-diffusion": "0.1.1",
    "cache-dit": "not installed",
    "numpy": "1.26.4",
    "passed": 12,
    "failed": 1,
    "error": 2,
    "skipped": 3,
    "chosen": [],
    "commit": "abc1234",
    "date": "2026-11-28",
}


def test_a_clone_has_the_version_of_its_pyproject():
    assert stepcache.__version__ == _version.version(ROOT)
    assert f'version = "{stepcache.__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_another_projects_pyproject_is_not_read(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\nversion = "9.9"\n', encoding="utf-8")
    assert _version.version(tmp_path) != "9.9"


def test_an_installed_package_has_the_version_of_its_metadata(tmp_path, monkeypatch):
    monkeypatch.setattr(_version, "installed", {"stepcache": "1.2.3"}.__getitem__)
    assert _version.version(tmp_path) == "1.2.3"


def test_a_copy_of_the_folder_alone_has_no_version(tmp_path, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(_version, "installed", missing)
    assert _version.version(tmp_path) == "unknown"


def test_the_changelog_begins_with_what_is_unreleased_and_has_the_six_kinds_alone():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)[0] == "Unreleased"
    kinds = set(re.findall(r"^### (.+)$", changelog, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_a_run_records_what_it_ran_with_and_how_it_ended(tmp_path):
    """In a process of its own, with workers: one passes, one fails, one is skipped."""
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_three.py").write_text(THREE, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "helpers"), "STEPCACHE_RECORD": str(tmp_path / "records")}
    env.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-n", "2", "-k", "three"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    (file,) = (tmp_path / "records").iterdir()
    found = json.loads(file.read_text(encoding="utf-8"))
    assert f"Recorded in {file}" in done.stdout
    assert [found[name] for name in versions.COUNTED] == [1, 1, 0, 1]
    assert found["torch"] == metadata.version("torch")
    assert found["chosen"] == [str(tmp_path), "three"]


def test_the_page_lists_the_oldest_versions_first_and_counts_errors_as_failures():
    newer = RUN | {"torch": "2.10.0+cpu", "failed": 1, "error": 2}
    older = RUN | {"torch": "2.4.0", "chosen": ["tests/test_clock.py"]}
    rows = [row.split(" | ") for row in versions.page([newer, older]).splitlines() if row.startswith("| 3.12")]
    assert [row[1] for row in rows] == ["2.4.0", "2.10.0"]
    assert rows[0][7] == "12 (only tests/test_clock.py)"
    assert rows[1][7:10] == ["12", "3", "3"]


def test_the_latest_run_of_the_same_versions_replaces_the_earlier_one(tmp_path):
    versions.write(RUN, tmp_path)
    path = versions.write(RUN | {"passed": 99}, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["python-3.12.1_torch-2.10.0_diffusers-0.36.0.json"]
    assert json.loads(path.read_text(encoding="utf-8"))["passed"] == 99
