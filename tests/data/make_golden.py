"""Makes golden.json and spectrum.json from the full traces: `python make_golden.py sdcpp_traces.json`.

Figures of stable-diffusion.cpp, nothing else. A case keeps the keys it has in the full file, fewer of them. Kept are
all EasyCache and cache-dit cases, all special ones, of the UCache grid the brittle ones (margin below 0.05) and at
least one of every combination, and of a few cases the columns that tell error and threshold. Of Spectrum every case is
kept, with two columns that tell what was returned.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

KEYS = ("id", "mode", "sched", "den", "sampler", "loop", "cfg", "scenario", "dec", "dec_un", "n_model", "xf", "margin")
OPTIONS = {
    "ucache": ("threshold", "start", "end", "decay", "relative", "reset"),
    "easycache": ("threshold", "start", "end"),
}
SPECTRUM = {
    "w": "w",
    "m": "m",
    "lam": "lam",
    "window": "window_size",
    "flex": "flex_window",
    "sp_warmup": "warmup",
    "stop": "stop",
}
DUAL_BLOCK = {"Fn": "Fn", "Bn": "Bn", "rdt": "threshold"}
CLI = {"reuse_threshold": "threshold"}
WITH_COLUMNS = (
    "uc/closed/karras20/t1/d0.9/rel1/rst0/.15-.95",
    "uc/closed/karras20/t1/d1/rel0/rst1/.15-.95",
    "uc/closed/karras20/t1.5/d1/rel1/rst1/.15-.95",
    "uc/closed/flow50/t1.5/d0.9/rel1/rst0/0-1",
    "uc/closed/flow50/t1.5/d1/rel0/rst0/0-1",
    "uc/open/karras20/t1/d1/rel1/rst1/0-1",
    "uc/open/karras20/t1.5/d0.9/rel0/rst1/0-1",
    "uc/x/sampler_dpm2",
    "uc/x/zero_at_13",
    "uc/x/few_steps_8",
    "ec/closed/karras20/t0.2/0-1",
    "ec/closed/flow28s3/t0.2/0-1",
    "ec/closed/flow50-flux1.15/t0.3/.15-.95",
    "ec/open/flow50/t0.05",
    "ec/x/sampler_heun",
    "cd/flow50/t0.25",
    "cd/opt/Bn_20",
)


def compact(full: dict[str, Any]) -> dict[str, Any]:
    cases = [case for case in full["cases"] if case["mode"] in OPTIONS or dual_block(case)]
    by_id = {case["id"]: case for case in full["cases"]}
    tables = full["tables"]
    return {
        "source": f"{full['meta']['source']} {full['meta']['commit']}",
        "cases": [trimmed(case, by_id) for case in chosen(cases)],
        "tables": {
            "ucache_window": tables["ucache_window"]["rows"],
            "easycache_active": tables["easycache_active"],
            "percent_to_sigma": tables["percent_to_sigma"],
            "adaptive_threshold": tables["micro"]["adaptive_threshold"],
            "float32_sequential_mean_abs": tables["micro"]["float32_sequential_mean_abs"]["rows"],
            "cli": [cli(row) for row in tables["cli"] if row["mode"] in OPTIONS],
        },
    }


def dual_block(case: dict[str, Any]) -> bool:
    """A case of the modes cache-dit and taylorseer, without skip-layer guidance, which the trajectory here lacks."""
    return case["mode"] in ("cache-dit", "taylorseer") and "slg" not in case.get("scenario", {})


def chosen(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    seen, kept = set(), []
    for case in cases:
        p = case["p"]
        kind = (case["mode"], case["loop"], case["sched"], *(p[key] for key in ("decay", "relative", "reset")))
        special = case["mode"] != "ucache" or "/x/" in case["id"] or case["id"] in WITH_COLUMNS
        if special or kind not in seen or case["margin"] < 0.05:
            kept.append(case)
        seen.add(kind)
    return kept


def trimmed(case: dict[str, Any], by_id: dict[str, Any]) -> dict[str, Any]:
    kept = {key: case[key] for key in KEYS if key in case}
    if dual_block(case):
        kept["p"] = {DUAL_BLOCK[key]: case["p"][key] for key in DUAL_BLOCK}
    else:
        kept["p"] = {key: case["p"][key] for key in OPTIONS[case["mode"]]}
    if case["id"] in WITH_COLUMNS:
        columns = by_id[case.get("col_same_as", case["id"])]["col"]
        reference = [row for row, branch in enumerate(columns["c"]) if branch in (0, 3)]
        kept["col"] = {key: [columns[key][row] for row in reference] for key in ("err", "thr") if key in columns}
    return kept


def cli(row: dict[str, Any]) -> list[Any]:
    """[mode, option text, accepted, options that differ from the defaults]."""
    options = {CLI.get(key, key): value for key, value in row["set"].items() if key != "mode"}
    return [row["mode"], row["opt"], bool(row["parse"] and row["valid"]), options]


def spectrum(full: dict[str, Any]) -> dict[str, Any]:
    by_id = {case["id"]: case for case in full["cases"]}
    return {
        "source": f"{full['meta']['source']} {full['meta']['commit']}",
        "cases": [forecast(case, by_id) for case in full["cases"] if case["mode"] == "spectrum"],
        "tables": {"cadence": full["tables"]["spectrum_cadence"]},
    }


def forecast(case: dict[str, Any], by_id: dict[str, Any]) -> dict[str, Any]:
    columns = by_id[case.get("col_same_as", case["id"])]["col"]
    kept = {key: case[key] for key in KEYS if key in case and key not in ("mode", "dec_un")}
    kept["p"] = {SPECTRUM[key]: case["p"][key] for key in SPECTRUM}
    return kept | {"col": {key: columns[key] for key in ("oa", "o0")}}


def text(golden: dict[str, Any]) -> str:
    """JSON with a case, or a table, on a line."""

    def line(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"))

    cases = ",\n".join(line(case) for case in golden["cases"])
    tables = ",\n".join(f"{line(name)}:{line(table)}" for name, table in golden["tables"].items())
    return f'{{"source":{line(golden["source"])},\n"cases":[\n{cases}],\n"tables":{{\n{tables}}}}}\n'


if __name__ == "__main__":
    full = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for name, golden in (("golden", compact(full)), ("spectrum", spectrum(full))):
        Path(__file__).with_name(f"{name}.json").write_text(text(golden), encoding="utf-8")
