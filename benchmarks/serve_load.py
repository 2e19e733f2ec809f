"""A load test of examples/serve_ray.py on loopback: mixed requests, each compared with the same request made alone.

python benchmarks/serve_load.py [--requests 500] [--replicas 2] [--at-once 12] [--batch 4] [--bare]

--bare sends the same requests to replicas without stepcache as well, whose memory is reported beside ours.

Sizes, steps, methods and speeds are mixed, one to four requests alike in a row; of ten one hangs up in the middle, one
fails on purpose, one is wrong.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import serve_ray

METHODS = [
    {"method": "forecast"},
    {"method": "forecast", "options": "interval=3"},
    {"speed": 1},
    {"speed": 3},
    {"method": "ucache", "options": "threshold=0.5"},
    {"method": "static", "options": "mask=fast"},
    {"method": "hicache"},
]
QUARTERS = 4
WRONG = [{"steps": 0}, {"method": "forcast"}, {"size": 3}, {"options": "interval=x"}, {"width": "wide"}]


def requests(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Each with what must become of it, under "expect"."""
    draw, made = random.Random(seed), []
    for number in range(count):
        if number and draw.random() < 0.5:  # one more of the same, as for several images of one prompt
            last = made[-1]
            made.append({"body": last["body"] | {"seed": number}, "expect": last["expect"]})
            continue
        size = draw.choice([{"width": 32, "height": 32}, {"width": 48, "height": 32}, {"width": 64, "height": 64}])
        body = {"prompt": f"image {number}", "seed": number, "steps": draw.choice([4, 10, 10, 20]), **size}
        body |= draw.choice(METHODS)
        kind = draw.choices(["image", "hangs up", "fails", "wrong"], [7, 1, 1, 1])[0]
        if kind == "fails":
            body["fail_at"] = draw.randint(1, body["steps"])
        made.append({"body": body | draw.choice(WRONG) if kind == "wrong" else body, "expect": kind})
    return made


def send(url: str, request: dict[str, Any]) -> dict[str, Any]:
    """The status, the image and the headers; status 0 if it hung up."""
    data, started = json.dumps(request["body"]).encode(), time.perf_counter()
    patience = 0.05 if request["expect"] == "hangs up" else 300
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=patience) as answer:
            image = np.asarray(Image.open(io.BytesIO(answer.read())))
            found = {"status": 200, "image": image, **{k: answer.headers[k] for k in ("calls-made", "batch")}}
    except urllib.error.HTTPError as error:
        found = {"status": error.code, "text": error.read().decode()}
    except (TimeoutError, OSError):
        found = {"status": 0}
    return found | {"seconds": time.perf_counter() - started}


def memory() -> list[int]:
    """Megabytes of each replica, as the system counts them."""
    import psutil

    every = psutil.process_iter(["pid", "cmdline", "memory_info"])
    ours = [one.info for one in every if any("ServeReplica" in word for word in one.info["cmdline"] or ())]
    return [round(one["memory_info"].rss / 2**20) for one in sorted(ours, key=lambda one: one["pid"])]


def counters(port: int) -> dict[str, float]:
    """Ray's own metrics: the sum of each of ours over replicas and methods."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=30) as answer:
        text = answer.read().decode()
    totals: Counter[str] = Counter()
    for name, value in re.findall(r"^ray_(stepcache_[a-z_]+?)(?:\{[^}]*\})? ([0-9.e+-]+)$", text, re.MULTILINE):
        if not name.endswith("_bucket"):
            totals[name] += float(value)
    return dict(totals)


def main(line: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--at-once", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--bare", action="store_true", help="without stepcache as well")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--metrics-port", type=int, default=8124)
    options = parser.parse_args(line)
    plan = requests(options.requests)
    answers, seconds, grown, totals = under_load(plan, options)
    bare = {"without stepcache": under_load(plan, options, "--no-cache")[2]} if options.bare else {}
    return judge(plan, answers) | {
        "seconds": round(seconds, 1),
        "requests per second": round(len(plan) / seconds, 2),
        "memory of each replica after each quarter, MB": {"with stepcache": grown} | bare,
        "metrics": totals,
    }


def under_load(
    plan: list[dict[str, Any]], options: argparse.Namespace, *more: str
) -> tuple[list[dict[str, Any]], float, list[list[int]], dict[str, float]]:
    """The answers, their seconds, the memory of each replica before and after each quarter, and Ray's counters."""
    given = ["--tiny", "--device=cpu", "--faults", f"--replicas={options.replicas}", f"--batch={options.batch}", *more]
    ports = [f"--port={options.port}", f"--metrics-port={options.metrics_port}"]
    end, url = serve_ray.start(serve_ray.arguments([*given, *ports])), f"http://127.0.0.1:{options.port}/"
    quarter = -(-len(plan) // QUARTERS)
    try:
        with ThreadPoolExecutor(options.at_once) as pool:
            list(pool.map(lambda one: send(url, one), requests(40, seed=1)))  # memory grows while caches fill
            grown, answers, started = [memory()], [], time.perf_counter()
            for first in range(0, len(plan), quarter):
                answers += pool.map(lambda one: send(url, one), plan[first : first + quarter])
                grown.append(memory())
        seconds = time.perf_counter() - started
        time.sleep(12)  # Ray passes its counters on every 10 s
        return answers, seconds, grown, counters(options.metrics_port)
    finally:
        end()


def judge(plan: list[dict[str, Any]], answers: list[dict[str, Any]]) -> dict[str, Any]:
    """What became of the requests; every image is compared with the request made alone, in this process."""
    import torch

    torch.set_num_threads(1)
    alone = serve_ray.Painter(None, "cpu", "float32")
    ends: Counter[str] = Counter(f"{one['expect']}: {got['status']}" for one, got in zip(plan, answers, strict=True))
    levels = Counter[str]()
    for one, got in zip(plan, answers, strict=True):
        if got["status"] == 200:
            (painted,) = alone.paint([serve_ray.Job.read(json.dumps(one["body"]).encode(), faults=True)])
            difference = int(np.abs(painted.image.astype(int) - got["image"]).max())
            how = "alone" if got["batch"] == "1" else "in a batch"
            levels[f"{how}, off by {difference}"] += 1
    seconds = sorted(got["seconds"] for got in answers if got["status"] == 200)
    return {
        "answers": dict(ends),
        "images": len(seconds),
        "images by their largest difference in levels of 255": dict(levels),
        "median seconds": round(seconds[len(seconds) // 2], 2),
    }


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
