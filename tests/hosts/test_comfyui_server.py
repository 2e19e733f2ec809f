"""A clone of this repository in a real ComfyUI: its start, its server, and ComfyUI-Manager's install code.

Skipped unless STEPCACHE_COMFYUI is the folder of a checkout; the Manager's tests also need STEPCACHE_COMFYUI_MANAGER.
docs/hosts.md says how to prepare both. The checkouts are only read: ComfyUI runs on a base directory of the test's.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfyui_server as comfyui
import pytest

from stepcache import __version__
from stepcache.samplers.comfyui import NODE_CLASS_MAPPINGS
from stepcache.samplers.install import COMFYUI as ENTRY_POINT

CHECKOUT, MANAGER = os.environ.get("STEPCACHE_COMFYUI"), os.environ.get("STEPCACHE_COMFYUI_MANAGER")
if not CHECKOUT:
    pytest.skip("STEPCACHE_COMFYUI is not set", allow_module_level=True)
needs_manager = pytest.mark.skipif(not MANAGER, reason="STEPCACHE_COMFYUI_MANAGER is not set")

COMFY, HOSTS = Path(CHECKOUT), Path(__file__).parent
WORKFLOWS = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((comfyui.ROOT / "examples" / "comfyui").glob("*.json"))
}
MODELS = {
    "diffusion_models": ("flux1-dev.safetensors", "wan2.1_t2v_1.3B_fp16.safetensors"),
    "text_encoders": ("clip_l.safetensors", "t5xxl_fp16.safetensors", "umt5_xxl_fp8_e4m3fn_scaled.safetensors"),
    "vae": ("ae.safetensors", "wan_2.1_vae.safetensors"),
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return comfyui.repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[comfyui.Server]:
    """With a clone, a checkpoint of random weights, and empty files in place of Flux's and Wan's."""
    base = comfyui.base(tmp_path_factory.mktemp("comfyui"))
    comfyui.clone(repository, base / "custom_nodes" / "stepcache")
    checkpoint = base / "models" / "checkpoints" / "your-checkpoint.safetensors"
    subprocess.run([sys.executable, str(HOSTS / "comfyui_checkpoint.py"), str(COMFY), str(checkpoint)], check=True)
    for folder, names in MODELS.items():
        (base / "models" / folder).mkdir()
        for name in names:
            (base / "models" / folder / name).touch()
    shutil.copy(COMFY / "input" / "example.png", base / "input")
    with comfyui.server(COMFY, base) as running:
        yield running


def changed(name: str, **inputs: dict[str, Any]) -> dict[str, Any]:
    """One of the workflows, smaller, with other inputs for the nodes of some classes."""
    workflow = json.loads(json.dumps(WORKFLOWS[name]))
    if name == "img2img":
        scale = {"image": ["5", 0], "upscale_method": "area", "width": 64, "height": 64, "crop": "disabled"}
        workflow["30"] = {"class_type": "ImageScale", "inputs": scale}
        workflow["9"]["inputs"]["pixels"] = ["30", 0]
    smaller = {"EmptyLatentImage": {"width": 64, "height": 64}, "KSampler": {"steps": 10}}
    for node in workflow.values():
        kind = node["class_type"]
        node["inputs"].update({**smaller.get(kind, {}), **inputs.get(kind, {})})
    return workflow


def advanced(workflow: dict[str, Any], **fields: str) -> dict[str, Any]:
    """The workflow with the node StepCache (advanced) in place of the node StepCache."""
    inputs = NODE_CLASS_MAPPINGS["StepCacheAdvanced"].INPUT_TYPES()["required"]
    usual = {name: rest[0]["default"] for name, (_, *rest) in inputs.items() if rest}
    workflow["2"] = {
        "class_type": "StepCacheAdvanced",
        "inputs": {"model": workflow["2"]["inputs"]["model"], **usual, **fields},
    }
    return workflow


def picture(record: dict[str, Any], node: str, folder: Path) -> Any:
    from PIL import Image

    (file,) = record["outputs"][node]["images"]
    return Image.open(folder / file["type"] / file["subfolder"] / file["filename"]).convert("RGB")


@pytest.mark.parametrize("name", ["stepcache", "ComfyUI-Step.Cache nightly"])
def test_a_start_loads_a_clone_under_any_name(tmp_path: Path, repository: Path, name: str) -> None:
    base = comfyui.base(tmp_path)
    folder = comfyui.clone(repository, base / "custom_nodes" / name)
    log = comfyui.start_once(COMFY, base)
    assert f"StepCache {__version__}: {folder}" in log
    assert "IMPORT FAILED" not in log
    assert "Unable to parse pyproject.toml" not in log


def test_a_clone_beside_the_installed_package_and_its_entry_point(tmp_path: Path, repository: Path) -> None:
    """ComfyUI takes the two folders in the file system's order. One copy is loaded, and the log says which."""
    base, installed = comfyui.base(tmp_path), tmp_path / "site-packages"
    for part in ("stepcache", "samplers"):  # as a wheel has them
        shutil.copytree(
            repository / part, installed / "stepcache" / (part if part == "samplers" else "."), dirs_exist_ok=True
        )
    folder = comfyui.clone(repository, base / "custom_nodes" / "a clone")
    (base / "custom_nodes" / "stepcache").mkdir()
    (base / "custom_nodes" / "stepcache" / "__init__.py").write_text(ENTRY_POINT)
    log = comfyui.start_once(COMFY, base, PYTHONPATH=str(installed))
    assert "IMPORT FAILED" not in log
    first = f"StepCache {__version__}: {folder}"
    second = f"StepCache: another copy was imported first. {installed} "
    assert (first in log) != (second in log)


def test_the_server_describes_the_nodes(server: comfyui.Server) -> None:
    for name, node in NODE_CLASS_MAPPINGS.items():
        described = server.get(f"/object_info/{name}")[name]
        assert described["output"] == list(node.RETURN_TYPES)
        for group in ("required", "optional"):
            assert described["input_order"].get(group, []) == list(node.INPUT_TYPES().get(group, {}))


def test_the_workflows_are_among_the_servers_templates(server: comfyui.Server) -> None:
    assert sorted(server.get("/workflow_templates")["stepcache"]) == [f"comfyui_{name}" for name in WORKFLOWS]


@pytest.mark.parametrize("name", ["text_to_image", "img2img"])
def test_a_workflow_runs_and_its_report_is_text_and_image(server: comfyui.Server, name: str) -> None:
    record = server.run(changed(name))
    assert record["status"]["status_str"] == "success", record["status"]
    (text,) = record["outputs"]["21"]["text"]
    assert "10 steps, 10 evaluations, 20 calls asked for" in text
    assert "12 made, 8 skipped" in text
    image = picture(record, "22", server.log.parent)
    assert image.width == 960
    grey = sum(pixel == (227, 230, 235) for pixel in image.getdata())
    assert 0.3 < grey / (8 * 34 * image.width * 0.85 / 10) < 1.2  # 8 of 20 cells
    assert len(record["outputs"]["8"]["images"]) == 1


@pytest.mark.parametrize("name", ["flux", "wan_video"])
def test_a_workflow_whose_models_are_too_large_is_accepted_by_the_server(server: comfyui.Server, name: str) -> None:
    """The server checks every input, link and file name before it queues; then the empty files cannot be loaded."""
    record = server.run(WORKFLOWS[name])
    (failed,) = [content for kind, content in record["status"]["messages"] if kind == "execution_error"]
    assert "Loader" in failed["node_type"]


def test_off_is_the_picture_without_the_node(server: comfyui.Server) -> None:
    without = changed("text_to_image")
    without["6"]["inputs"]["model"] = without["2"]["inputs"]["model"]
    without = {name: node for name, node in without.items() if name not in ("2", "20", "21", "22")}
    without["7"]["inputs"]["samples"] = ["6", 0]
    pictures = [
        picture(server.run(workflow), "8", server.log.parent)
        for workflow in (without, changed("text_to_image", StepCache={"speed": "off"}), changed("text_to_image"))
    ]
    bare, off, cached = (image.tobytes() for image in pictures)
    assert off == bare
    assert cached != bare


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"threshold_or_interval": "two"}, "threshold_or_interval='two': accepted is 'default' or a number"),
        ({"options": "mask=110"}, "the mask has 3 entries, the run has 10 steps"),
        ({"method": "fbcache", "threshold_or_interval": "0.1", "skip": "uncond"}, "skip='uncond' with fbcache"),
    ],
)
def test_a_wrong_option_is_an_error_of_our_node(server: comfyui.Server, fields: dict[str, str], sentence: str) -> None:
    record = server.run(advanced(changed("text_to_image"), **fields))
    (failed,) = [content for kind, content in record["status"]["messages"] if kind == "execution_error"]
    assert failed["node_type"] == "StepCacheAdvanced"
    assert sentence in failed["exception_message"]


def test_a_speed_that_is_none_is_refused_before_the_run(server: comfyui.Server) -> None:
    workflow = changed("text_to_image", StepCache={"speed": "5x"})
    status, answer = server.post("/prompt", {"prompt": workflow})
    assert status == 400
    assert answer["node_errors"]["2"]["class_type"] == "StepCache"
    assert "5x" in answer["node_errors"]["2"]["errors"][0]["details"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path, repository: Path) -> Iterator[str]:
    """The repository where git clones it from by HTTP, as the Manager asks of an address."""
    bare = tmp_path / "www" / "stepcache.git"
    subprocess.run(["git", "clone", "-q", "--bare", str(repository), str(bare)], check=True)
    subprocess.run(["git", "update-server-info"], cwd=bare, check=True)
    handler = functools.partial(Quiet, directory=str(bare.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}/stepcache.git"
        web.shutdown()


@needs_manager
def test_the_manager_installs_it_and_runs_nothing_and_comfyui_loads_it(tmp_path: Path, address: str) -> None:
    base = comfyui.base(tmp_path / "base")
    manager = base / "custom_nodes" / "ComfyUI-Manager"
    shutil.copytree(MANAGER, manager)
    command = [sys.executable, str(HOSTS / "comfyui_manager.py"), str(COMFY), str(base), address]
    done = subprocess.run(
        command, env=comfyui.environment(COMFYUI_PATH=str(COMFY)), capture_output=True, text=True, timeout=300
    )
    said = "".join(done.stdout.split())
    assert "Installationwassuccessful." in said, done.stdout + done.stderr
    assert "RESULTTrue" in said
    assert "RAN" not in said
    shutil.rmtree(manager)
    log = comfyui.start_once(COMFY, base)
    assert f"StepCache {__version__}: {base / 'custom_nodes' / 'stepcache'}" in log
    assert "IMPORT FAILED" not in log


@needs_manager
@pytest.mark.parametrize("with_list", [True, False])
def test_the_managers_scanner_finds_exactly_our_nodes(tmp_path: Path, repository: Path, with_list: bool) -> None:
    """From node_list.json, and without it from the source alone."""
    folder = comfyui.clone(repository, tmp_path / "clones" / "stepcache")
    (tmp_path / "clones" / "ComfyUI").mkdir()
    if not with_list:
        (folder / "node_list.json").unlink()
    entry = {"title": "StepCache", "install_type": "git-clone", "files": ["https://github.com/stepcache/stepcache"]}
    (tmp_path / "custom-node-list.json").write_text(json.dumps({"custom_nodes": [entry]}))
    command = [sys.executable, str(Path(MANAGER) / "scanner.py"), "clones", "--skip-all"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    found = json.loads((tmp_path / "extension-node-map.json").read_text())
    assert found["https://github.com/stepcache/stepcache"][0] == sorted(NODE_CLASS_MAPPINGS)
