"""The command `stepcache`: whatever goes wrong is one sentence, and nothing is written where it should not be."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepcache.cli import main


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    assert end.value.code in (1, 2)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    for part in ("comfy", "custom_nodes"):
        (tmp_path / "ComfyUI" / part).mkdir(parents=True)
    for part in ("nodes.py", "comfy/samplers.py"):
        (tmp_path / "ComfyUI" / part).touch()
    return tmp_path / "ComfyUI"


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_an_out_that_is_a_file_is_refused_before_anything_is_measured(command, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "file" in refused(capsys, command, f"--out={tmp_path / 'file'}")
    assert "file" in refused(capsys, command, f"--out={tmp_path / 'file' / 'inside'}")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--guidance=inf", "--guidance=inf: accepted is a number from -1000 to 1000"),
        ("--guidance=nan", "--guidance=nan: accepted is"),
        ("--samples=0", "--samples=0: accepted is a whole number of at least 1"),
        ("--batch=-1", "--batch=-1: accepted is"),
        ("--workers=0", "--workers=0: accepted is"),
        ("--steps=0", "--steps=0: accepted is a whole number from 1 to 1000"),
        (f"--seed={10**30}", "accepted is a whole number from 0 to"),
        ("--method=ucache:threshold", "has no '='"),
    ],
)
def test_numbers_that_cannot_be_used_are_refused_before_anything_is_measured(given, message, tmp_path, capsys):
    assert message in refused(capsys, "bench", given, f"--out={tmp_path / 'out'}")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--guidance=nan", "--guidance=nan: accepted is"),
        ("--samples=0", "--samples=0: accepted is a whole number of at least 1"),
        ("--repeats=0", "--repeats=0: accepted is a whole number of at least 1"),
        ("--steps=0", "--steps=0: accepted is a whole number from 1 to 1000"),
        ("--seed=-1", "--seed=-1: accepted is a whole number from 0 to"),
        ("--gain=0.5", "--gain=0.5: accepted is a number from 1 to"),
        ("--methods=forcast", "unknown method 'forcast'. Did you mean 'forecast'"),
        ("--methods=ucache:threshold", "has no '='"),
        ("--methods=forecast,forecast", "--methods: 'forecast' is given twice"),
        ("--class=kats", "unknown class 'kats'. Did you mean 'cats'"),
        ("--network=colours", "unknown network 'colours'. Did you mean 'colour'"),
        ("--prompt=a cat", "--prompt='a cat': colour draws classes"),
        ("--device=cpu", "--device: with --pipeline"),
        ("--sampler=oiler", "sampler='oiler': accepted is"),
    ],
)
def test_compare_refuses_what_it_cannot_use_and_writes_nothing(given, message, tmp_path, capsys):
    assert message in refused(capsys, "compare", given, f"--out={tmp_path / 'page.html'}")
    assert not any(tmp_path.iterdir())


def test_compare_refuses_an_out_that_is_no_file(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert f"--out={tmp_path}: a folder; accepted is" in refused(capsys, "compare", f"--out={tmp_path}")
    assert "file" in refused(capsys, "compare", f"--out={tmp_path / 'file' / 'page.html'}")


def test_install_writes_through_no_link(comfyui, tmp_path, capsys):
    elsewhere, folder = tmp_path / "elsewhere", comfyui / "custom_nodes" / "stepcache"
    elsewhere.mkdir()
    folder.symlink_to(elsewhere)
    assert f"{folder} is a link to {elsewhere}" in refused(capsys, "install", "comfyui", str(comfyui))
    assert not any(elsewhere.iterdir())
    elsewhere.rmdir()
    assert "is a link" in refused(capsys, "install", "comfyui", str(comfyui))
    folder.unlink()
    folder.mkdir()
    (folder / "__init__.py").symlink_to(tmp_path / "mine.py")
    assert "is a link" in refused(capsys, "install", "comfyui", str(comfyui))
    assert not (tmp_path / "mine.py").exists()


def test_install_says_what_is_in_the_way(comfyui, capsys):
    folder = comfyui / "custom_nodes" / "stepcache"
    folder.touch()
    assert f"{folder} is a file" in refused(capsys, "install", "comfyui", str(comfyui))
    folder.unlink()
    (folder / "__init__.py").mkdir(parents=True)
    assert "__init__.py" in refused(capsys, "install", "comfyui", str(comfyui))
    (folder / "__init__.py").rmdir()
    (folder / "__init__.py").write_bytes(b"\xff\xfe")
    assert "was not written by stepcache" in refused(capsys, "install", "comfyui", str(comfyui))


def test_install_without_permission_is_a_sentence(comfyui, capsys, monkeypatch):
    def forbidden(self: Path, *arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_text", forbidden)
    assert "Permission denied" in refused(capsys, "install", "comfyui", str(comfyui))


def test_a_home_that_nobody_has_is_a_sentence(capsys):
    assert "home" in refused(capsys, "install", "comfyui", "~nobody-has-this/ComfyUI")
