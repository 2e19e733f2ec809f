"""The command `stepcache`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from . import __version__, method
from ._optional import require
from .masks import LONGEST
from .options import number, unknown
from .samplers.install import HOSTS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="stepcache", description="Training-free acceleration of diffusion sampling.")
    parser.add_argument("--version", action="version", version=f"stepcache {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="sample three small trained networks with and without the cache")
    demo.add_argument("--out", type=Path, default=Path("demo-output"), help="folder to write to (default %(default)s)")
    demo.add_argument("--samples", type=int, default=10, help="images a run, a multiple of 10 (default %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the noise (default %(default)s)")
    bench = commands.add_parser("bench", help="measure quality against calls, beside fewer steps and other samplers")
    bench.add_argument(
        "--network",
        nargs="+",
        default=["unet", "dit"],
        metavar="NAME",
        help="unet and dit (the default), or names of the zoo, as unet@7.5, edm or hsc32",
    )
    bench.add_argument("--sampler", nargs="+", default=["euler", "dpmpp_2m", "euler_ancestral"], help="%(default)s")
    bench.add_argument("--steps", nargs="+", type=int, default=[20, 30], help="%(default)s")
    bench.add_argument(
        "--method",
        nargs="+",
        metavar="NAME[:OPTIONS]",
        help="as forecast, forecast:interval=3 or ucache:threshold=0.5,reset=0",
    )
    bench.add_argument(
        "--other", nargs="+", default=["euler", "dpmpp_2m", "heun", "lms"], help="rival samplers (default %(default)s)"
    )
    bench.add_argument(
        "--guidance", type=float, default=3.0, help="of unet and dit the guidance scale (default %(default)s)"
    )
    bench.add_argument("--samples", type=int, default=64, help="seeds, the same for all (default %(default)s)")
    bench.add_argument("--batch", type=int, default=16, help="samples drawn at once (default %(default)s)")
    bench.add_argument("--seed", type=int, default=0, help="the first seed (default %(default)s)")
    bench.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes (default %(default)s)"
    )
    bench.add_argument(
        "--out", type=Path, default=Path("bench-output"), help="folder; what is there is used (default %(default)s)"
    )
    host = commands.add_parser("install", help="put the entry point into a host's folder")
    host.add_argument("host", choices=sorted(HOSTS), help="which host")
    host.add_argument("path", type=Path, help="the host's folder, the one with its start script in it")
    options = parser.parse_args(arguments)
    try:
        {"demo": _demo, "bench": _bench, "install": _install}[options.command](options)
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        parser.exit(1, f"stepcache {options.command}: {error}\n")
    return 0


def _demo(options: argparse.Namespace) -> None:
    from stepcache.demo.run import demo

    _check_numbers(options)
    options.out.mkdir(parents=True, exist_ok=True)
    demo(options.out, options.samples, options.seed)


def _bench(options: argparse.Namespace) -> None:
    from stepcache.bench import bench
    from stepcache.demo import sampling, zoo

    _check_numbers(options)
    console = require("rich.console", "bench").Console()
    methods = {text: method(*text.split(":", 1)) for text in options.method} if options.method else None
    shipped = ("unet", "dit")
    for name in options.network:
        if name not in (*shipped, *zoo.NAMES):
            raise unknown("network", name, (*shipped, *zoo.NAMES))
    subjects = [
        sampling.subject(name, options.guidance) if name in shipped else zoo.subject(name) for name in options.network
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    results = bench(
        subjects,
        options.sampler,
        options.steps,
        methods,
        options.samples,
        options.seed,
        options.batch,
        options.other,
        options.out,
        options.workers,
        console,
    )
    results.show(console)
    console.print(f"Written to {options.out}: table.md, results.json, pareto.png, records.jsonl")


def _check_numbers(options: argparse.Namespace) -> None:
    """Refuses numbers that would fail after a while of sampling."""
    number("--seed", options.seed, high=2**31, whole=True)
    for name in ("samples", "batch", "workers"):
        number(f"--{name}", getattr(options, name, 1), low=1, whole=True)
    for steps in getattr(options, "steps", ()):
        number("--steps", steps, low=1, high=LONGEST, whole=True)
    number("--guidance", getattr(options, "guidance", 0), low=-1000, high=1000)


def _install(options: argparse.Namespace) -> None:
    for sentence in HOSTS[options.host](options.path.expanduser().resolve()):
        print(sentence)
