"""The command `stepcache`."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import __version__


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="stepcache", description="Training-free acceleration of diffusion sampling.")
    parser.add_argument("--version", action="version", version=f"stepcache {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="sample two small trained networks with and without the cache")
    demo.add_argument("--out", type=Path, default=Path("demo-output"), help="folder to write to (default %(default)s)")
    demo.add_argument("--samples", type=int, default=10, help="images a run, a multiple of 10 (default %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the noise (default %(default)s)")
    options = parser.parse_args(arguments)

    from stepcache.demo.run import demo as run_demo

    try:
        run_demo(options.out, options.samples, options.seed)
    except (ImportError, ValueError) as error:
        parser.exit(1, f"stepcache demo: {error}\n")
    return 0
