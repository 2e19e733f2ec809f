"""ComfyUI's own server on a folder of its own: the checkout stays as it is, and the nodes come from a clone."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDERS = ("models/checkpoints", "custom_nodes", "input", "output", "temp", "user")


def base(folder: Path) -> Path:
    """The folders that `--base-directory` stands for."""
    for name in FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    return folder


def repository(folder: Path) -> Path:
    """A git repository of the working tree as it is, uncommitted changes too, to be cloned from."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    for step in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "The working tree"]):
        subprocess.run([*git, *step], cwd=folder, check=True)
    return folder


def clone(source: Path, target: Path) -> Path:
    subprocess.run(["git", "clone", "-q", str(source), str(target)], check=True)
    return target


def environment(**more: str) -> dict[str, str]:
    """Without this checkout on the path: the package comes from the clone."""
    return {**{key: value for key, value in os.environ.items() if key != "PYTHONPATH"}, **more}


def start_once(checkout: Path, folder: Path, **more: str) -> str:
    """The log of a start and an end, as ComfyUI's own tests do it."""
    command = [sys.executable, "main.py", "--cpu", "--quick-test-for-ci", "--base-directory", str(folder)]
    done = subprocess.run(command, cwd=checkout, env=environment(**more), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


class Server:
    """A running server's HTTP interface."""

    def __init__(self, port: int, log: Path) -> None:
        self.address, self.log = f"http://127.0.0.1:{port}", log

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.address}{path}", timeout=30) as answer:
            return json.loads(answer.read())

    def post(self, path: str, content: Any) -> tuple[int, Any]:
        """Status and answer, also of a refusal."""
        request = urllib.request.Request(f"{self.address}{path}", json.dumps(content).encode(), method="POST")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def run(self, workflow: dict[str, Any], seconds: float = 300) -> dict[str, Any]:
        """Queues a workflow and waits for its end: ComfyUI's record of it, with outputs and status."""
        status, answer = self.post("/prompt", {"prompt": workflow})
        assert status == 200, answer
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if found := self.get(f"/history/{answer['prompt_id']}").get(answer["prompt_id"]):
                return found
            time.sleep(0.5)
        raise TimeoutError(self.log.read_text()[-4000:])


@contextmanager
def server(checkout: Path, folder: Path) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "server.log"
    command = [sys.executable, "main.py", "--cpu", "--base-directory", str(folder), "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=checkout, env=environment(), stdout=file, stderr=subprocess.STDOUT)
        try:
            made = Server(port, log)
            for _ in range(240):
                try:
                    made.get("/system_stats")
                    break
                except OSError:
                    assert process.poll() is None, log.read_text()
                    time.sleep(0.5)
            yield made
        finally:
            process.terminate()
            process.wait(30)
