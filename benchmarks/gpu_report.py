"""One Markdown page of what benchmarks/gpu.sh measured: python benchmarks/gpu_report.py gpu-output."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NETWORKS = ("sdxl", "flux", "wan")
COLUMNS = (
    "method", "computed steps", "s a run", "ms a computed step", "ms a skipped step", "speed-up", "ideal", "of ideal",
    "kernels computed", "kernels skipped", "transfers computed", "transfers skipped", "peak GiB", "note",
)  # fmt: skip


def page(folder: Path) -> Iterator[str]:
    yield "# On one accelerator\n"
    yield "Written by `benchmarks/gpu.sh`. Weights are random. A step is a scheduler's step, all branches of guidance"
    yield "included. *Ideal* is steps over computed steps; kernels and device-to-host transfers are those of one step."
    for name in NETWORKS:
        yield from _network(folder / f"{name}.json", name)
    yield from _overhead(folder)
    yield from _training(folder / "train.json")
    if (faults := folder / "faults.txt").exists():
        yield f"\n## What did not end well\n\n{faults.read_text(encoding='utf-8').strip()}"


def _network(path: Path, name: str) -> Iterator[str]:
    yield f"\n## {name}\n"
    if not path.exists():
        yield "Not measured."
        return
    rows = json.loads(path.read_text(encoding="utf-8"))
    known = next((row for row in rows if row["parameters"]), rows[0])
    size = f"{known['parameters'] / 1e9:.3g} billion weights, " if known["parameters"] else ""
    yield f"{size}{known['dtype']}, {known['device']}, {known['steps']} steps."
    for compiled in (False, True):
        yield f"\n{'With torch.compile' if compiled else 'Without torch.compile'}:\n"
        yield f"| {' | '.join(COLUMNS)} |"
        yield "|---" * len(COLUMNS) + "|"
        for row in rows:
            if row["compiled"] is compiled:
                yield f"| {' | '.join(_cells(row))} |"


def _cells(row: dict[str, Any]) -> Iterator[str]:
    share = row["speedup"] / row["ideal"] if row["speedup"] and row["ideal"] else None
    yield row["method"]
    yield "" if row["computed"] is None else f"{row['computed']} of {row['steps']}"
    for value in (row["seconds"], row["computed_ms"], row["skipped_ms"], row["speedup"], row["ideal"], share):
        yield "" if value is None else f"{value:.3g}"
    for name in ("computed_kernels", "skipped_kernels", "computed_transfers", "skipped_transfers"):
        yield "" if row[name] is None else str(row[name])
    yield "" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
    yield row["note"]


def _overhead(folder: Path) -> Iterator[str]:
    yield "\n## What the wrapper itself costs\n\n`benchmarks/overhead.py`: one evaluation, in copies of the latent.\n"
    path = folder / "overhead.md"
    yield path.read_text(encoding="utf-8").strip() if path.exists() else "Not measured."


def _training(path: Path) -> Iterator[str]:
    yield "\n## The colour network, larger\n"
    if not path.exists():
        yield "Not trained."
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    yield (
        f"{found['parameters'] / 1e6:.1f} million weights, {found['optimiser_steps']} optimiser steps on "
        f"{found['images']}, loss {found['loss']:.4f}. Euler, 20 steps, guidance 3; PSNR against the full run.\n"
    )
    yield "| method | calls | PSNR, dB | fewer steps, dB |\n|---|---|---|---|"
    for row in found["rows"]:
        yield f"| {row['method']} | {row['calls']} of {row['of']} | {row['psnr']:.1f} | {row['psnr_fewer_steps']:.1f} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    names = (*NETWORKS, "overhead", "train")
    found = {name: json.loads(path.read_text()) for name in names if (path := folder / f"{name}.json").exists()}
    (folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder / "gpu.md").write_text("\n".join(page(folder)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
