"""The command `stepcache`."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path

from . import Method, __version__, method
from ._optional import require
from .masks import LONGEST
from .options import OptionError, number
from .samplers.install import HOSTS
from .tuning import command

NETWORK = "unet, dit, a name of the zoo (colour, unet@7.5, edm, hsc32, ...), or MODULE:FUNCTION that makes a subject"
METHODS = "as forecast, forecast:interval=3 or ucache:threshold=0.5,reset=0"
GUIDANCE = "guidance scale of unet, dit and colour (default 3), and of your own"


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
        "--network", nargs="+", default=["unet", "dit"], metavar="NAME", help=NETWORK + " (unet and dit)"
    )
    bench.add_argument("--sampler", nargs="+", default=["euler", "dpmpp_2m", "euler_ancestral"], help="%(default)s")
    bench.add_argument("--steps", nargs="+", type=int, default=[20, 30], help="%(default)s")
    bench.add_argument("--methods", "--method", nargs="+", metavar="NAME[:OPTIONS]", help=METHODS)
    bench.add_argument(
        "--other", nargs="+", default=["euler", "dpmpp_2m", "heun", "lms"], help="rival samplers (default %(default)s)"
    )
    bench.add_argument("--guidance", type=float, help=GUIDANCE)
    bench.add_argument("--samples", type=int, default=64, help="seeds, the same for all (default %(default)s)")
    bench.add_argument("--batch", type=int, default=16, help="samples drawn at once (default %(default)s)")
    bench.add_argument("--seed", type=int, default=0, help="the first seed (default %(default)s)")
    bench.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes (default %(default)s)"
    )
    bench.add_argument("--ray", action="store_true", help="Ray starts the workers, on all machines of its cluster")
    bench.add_argument(
        "--out", type=Path, default=Path("bench-output"), help="folder; what is there is used (default %(default)s)"
    )
    _add_compare(
        commands.add_parser("compare", help="a page with images, differences and what was skipped, to look at")
    )
    command.add(
        commands.add_parser("tune", help="a profile for a number of calls, a speed-up or a quality"), NETWORK, GUIDANCE
    )
    host = commands.add_parser("install", help="put the entry point into a host's folder")
    host.add_argument("host", choices=sorted(HOSTS), help="which host")
    host.add_argument("path", type=Path, help="the host's folder, the one with its start script in it")
    options = parser.parse_args(arguments)
    try:
        {"demo": _demo, "bench": _bench, "compare": _compare, "tune": _tune, "install": _install}[options.command](
            options
        )
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
    from stepcache.demo import named

    _check_numbers(options)
    console = require("rich.console", "bench").Console()
    methods = _methods(options.methods)
    subjects = [named.subject(name, options.guidance) for name in options.network]
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
        options.ray,
    )
    results.show(console)
    console.print(f"Written to {options.out}: table.md, results.json, pareto.png, records.jsonl")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--network", default="colour", metavar="NAME", help=NETWORK + " (default %(default)s)")
    source.add_argument("--pipeline", metavar="FOLDER", help="instead a diffusers pipeline, by folder or hub id")
    parser.add_argument("--prompt", help="what the pipeline, or your own function, is asked for")
    parser.add_argument(
        "--class", dest="label", metavar="NAME", help="what a shipped network is asked for, as cats or 7"
    )
    parser.add_argument("--methods", "--method", nargs="+", metavar="NAME[:OPTIONS]", help=METHODS)
    parser.add_argument("--sampler", help="(default euler; of a pipeline its own scheduler)")
    parser.add_argument("--steps", type=int, default=20, help="(default %(default)s)")
    parser.add_argument("--guidance", type=float, help=GUIDANCE)
    parser.add_argument("--samples", type=int, help="images, one a seed (default 4; 1 with --pipeline)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=1, help="runs of each, for the seconds of the fastest (default %(default)s)"
    )
    parser.add_argument(
        "--gain",
        type=float,
        help="how many times brighter differences are shown (default: as bright as can be, by image)",
    )
    parser.add_argument("--device", help="with --pipeline (default: cuda if there is one, else cpu)")
    parser.add_argument("--out", type=Path, default=Path("compare.html"), help="the page (default %(default)s)")


def _compare(options: argparse.Namespace) -> None:
    from stepcache.bench import Subject, compare
    from stepcache.demo import named

    _check_numbers(options)
    if options.gain is not None:
        number("--gain", options.gain, low=1, high=1e6)
    if options.out.is_dir():
        raise OptionError(
            f"--out={options.out}: a folder; accepted is the name of the page, as {options.out}/page.html"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    methods = _methods(options.methods)
    count = options.samples or (1 if options.pipeline else 4)
    subject: Subject
    captions: Callable[[int], str] = "seed {}".format
    if options.pipeline:
        for name in ("label", "sampler"):
            if getattr(options, name) is not None:
                raise OptionError(f"--{name.replace('label', 'class')}: not with --pipeline, which has its own")
        pipeline = named.pipeline(options.pipeline, options.prompt, options.guidance, options.device)
        sampler = next(iter(pipeline.schedulers))
        subject = pipeline
    else:
        if options.device is not None:
            raise OptionError("--device: with --pipeline; the networks run on the CPU, and your function knows its own")
        subject = named.subject(options.network, options.guidance, options.prompt)
        sampler = options.sampler or "euler"
        captions = named.captions(options.network)
    seeds = named.seeds(options.network, options.label, options.seed, count)
    comparison = compare(subject, methods, sampler, options.steps, seeds, captions, options.repeats)
    print(f"Written to {comparison.save(options.out, options.gain)}: open it in a browser")


def _tune(options: argparse.Namespace) -> None:
    from stepcache.demo import named

    _check_numbers(options)
    command.run(options, named.subject(options.network, options.guidance))


def _methods(texts: list[str] | None) -> dict[str, Method] | None:
    """Methods by their text. They come apart at spaces, and at commas that a method's name follows."""
    if texts is None:
        return None
    found: dict[str, Method] = {}
    for text in (part for given in texts for part in re.split(r",(?=[^=,]+(?:,|:|$))", given)):
        if text in found:
            raise OptionError(f"--methods: {text!r} is given twice")
        found[text] = method(text)
    return found


def _check_numbers(options: argparse.Namespace) -> None:
    """Refuses numbers that would fail after a while of sampling."""
    number("--seed", options.seed, high=2**31, whole=True)
    for name in ("samples", "batch", "workers", "repeats"):
        if (value := getattr(options, name, None)) is not None:
            number(f"--{name}", value, low=1, whole=True)
    steps = getattr(options, "steps", [])
    for count in steps if isinstance(steps, list) else [steps]:
        number("--steps", count, low=1, high=LONGEST, whole=True)
    if (guidance := getattr(options, "guidance", None)) is not None:
        number("--guidance", guidance, low=-1000, high=1000)


def _install(options: argparse.Namespace) -> None:
    for sentence in HOSTS[options.host](options.path.expanduser().resolve()):
        print(sentence)
