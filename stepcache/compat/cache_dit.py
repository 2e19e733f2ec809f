"""Configurations of cache-dit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._optional import require
from ..masks import StepMask
from ..methods.cache_dit import CacheDiT
from ..methods.dbcache import DBCache
from ..methods.off import Off
from ..methods.registry import GUIDANCE_OPTIONS
from ..options import OptionError, flag, number, shown, unknown
from ..predictors.base import Baseline
from ..predictors.dmd import DMD
from ..predictors.taylorseer import TaylorSeer

FIELDS = (
    "cache_type",
    "Fn_compute_blocks",
    "Bn_compute_blocks",
    "residual_diff_threshold",
    "max_warmup_steps",
    "max_cached_steps",
    "max_continuous_cached_steps",
    "num_inference_steps",
    "steps_computation_mask",
    "steps_computation_policy",
    *GUIDANCE_OPTIONS,
    "enable_taylorseer",
    "taylorseer_order",
    "taylorseer_cache_type",
    "enable_dmd",
    "dmd_history",
    "dmd_rank",
    "dmd_ridge",
    "calibrator_cache_type",
)


NEUTRAL = {
    "warmup_interval": 1,
    "max_accumulated_residual_diff_threshold": None,
    "force_refresh_step_hint": None,
    "force_refresh_step_policy": "once",
    "enable_encoder_taylorseer": False,
    "enable_encoder_dmd": False,
    "dmd_svd_precision": "medium",
    "enable_foca": False,
    "enable_encoder_foca": False,
}
"""Fields of cache-dit that do nothing here, with the value at which they do nothing there either."""


ELSEWHERE = ("parallelism_config", "attention_backend", "quantize_config")


KINDS: dict[str, Baseline] = {"residual": "input", "hidden_states": "zero"}


def load_config(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A configuration in cache-dit's field names, as keywords for `attach(pipe, **load_config("cache.yaml"))`.

    Args:
        source: the path of a YAML or JSON file (.json), or a mapping; its fields flat or under `cache_config`.

    Returns "method" (a `Method`) and, if given, the options of the host: `enable_separate_cfg`, `cfg_compute_first`,
    `cfg_diff_compute_separate`; with `enable_separate_cfg: true` the others have cache-dit's defaults, false and true,
    with false they mean nothing, there as here. Under k-diffusion take "method" alone.

    Fields are `FIELDS`, with cache-dit's defaults (v1.5.0); a field that is null has its default.
    `steps_computation_mask` may be a preset's name. `taylorseer_cache_type` and `calibrator_cache_type` are "residual"
    or "hidden_states": what the series is of.

    Raises `OptionError` for an unknown field (with the nearest name), one that cannot act here, and values that are not
    accepted. YAML needs PyYAML: pip install 'stepcache[yaml]'.

    Example:
        >>> from stepcache import load_config
        >>> options = load_config({"cache_type": "DBCache", "residual_diff_threshold": 0.1})
        >>> options["method"].criterion.threshold
        0.1
    """
    fields = _fields(source)
    given = {key: value for key, value in fields.items() if value is not None}
    for key, value in given.items():
        if key in NEUTRAL and not _is_neutral(key, value):
            raise OptionError(
                f"{key}={shown(value)}: cache-dit has this, here it cannot act; "
                f"leave it out or set it to {NEUTRAL[key]!r}"
            )
        if key not in FIELDS and key not in NEUTRAL:
            raise unknown("field", key if isinstance(key, str) else shown(key), ["cache_config", *FIELDS])
    given = {key: value for key, value in given.items() if key in FIELDS}
    kind = given.pop("cache_type", "DBCache")
    kind = kind if isinstance(kind, str) else shown(kind)
    if kind not in ("DBCache", "NONE"):
        raise unknown("cache_type", kind, ("DBCache", "NONE"))
    host = _host_options(given)
    predictor = _predictor(given)
    _check_length(given)
    if kind == "NONE":
        return {"method": Off(), **host}
    method = DBCache(**given) if predictor is None else CacheDiT(**given, predictor=predictor)
    return {"method": method, **host}


def _fields(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    from_file = not isinstance(source, Mapping)
    fields = dict(source if isinstance(source, Mapping) else _loaded(Path(source)))
    for key in ELSEWHERE:
        if key in fields:
            raise OptionError(f"{key}: cache-dit's own, not about skipping steps; leave it out and set it up there")
    if "cache_config" in fields:
        nested = fields.pop("cache_config")
        if fields:
            raise OptionError(f"{', '.join(map(str, fields))}: beside cache_config; put all fields under it, or none")
        if not isinstance(nested, Mapping):
            raise OptionError(f"cache_config={shown(nested)}: accepted are fields with values")
        fields = dict(nested)
    for key, value in fields.items() if from_file else ():
        if not all(item is None or isinstance(item, (bool, int, float, str)) for item in _items(value)):
            raise OptionError(f"{shown(key)}={shown(value)}: accepted are numbers, booleans, text, and lists of them")
    return fields


def _loaded(path: Path) -> Mapping[str, Any]:
    """The fields in a file, as it has them; OptionError if there are none in it."""
    yaml = None if path.suffix.lower() == ".json" else require("yaml", "yaml")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
        fields = json.loads(text) if yaml is None else yaml.safe_load(text)
    except Exception as error:  # of PyYAML nearly any: a date that is none, a tag that does not fit, deep nesting
        raise OptionError(f"{path.name} cannot be read: {type(error).__name__}: {error}"[:500]) from None
    if not isinstance(fields, Mapping):
        raise OptionError(f"{path.name}: accepted are fields with values, {', '.join(FIELDS[:4])}, ...")
    return fields


def _is_neutral(key: str, value: Any) -> bool:
    try:
        return bool(value == NEUTRAL[key])
    except (TypeError, ValueError, RuntimeError):  # an array or a tensor
        return False


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _host_options(given: dict[str, Any]) -> dict[str, Any]:
    """Takes the options of the host out of the fields."""
    host = {key: flag(key, given.pop(key)) for key in GUIDANCE_OPTIONS if key in given}
    separate = host.get("enable_separate_cfg")
    if separate:
        return {"cfg_compute_first": False, "cfg_diff_compute_separate": True, **host}
    return host if separate is None else {"enable_separate_cfg": False}


def _predictor(given: dict[str, Any]) -> TaylorSeer | DMD | None:
    """Takes the fields of the calibrator out; None is DBCache's own, reuse."""
    taylor, dmd = (flag(key, given.pop(key, False)) for key in ("enable_taylorseer", "enable_dmd"))
    if taylor and dmd:
        raise OptionError("enable_taylorseer and enable_dmd: one or the other")
    own = {"taylorseer_order": taylor, "taylorseer_cache_type": taylor, "calibrator_cache_type": taylor or dmd}
    own |= dict.fromkeys(("dmd_history", "dmd_rank", "dmd_ridge"), dmd)
    for key, acts in own.items():
        if key in given and not acts:
            needed = "enable_dmd" if key.startswith("dmd") else "enable_taylorseer"
            raise OptionError(f"{key}={shown(given[key])}: it does nothing without {needed}: true")
    kinds = [given.pop(key) for key in ("taylorseer_cache_type", "calibrator_cache_type") if key in given]
    for kind in kinds:
        if not isinstance(kind, str) or kind not in KINDS:
            raise unknown("calibrator_cache_type", kind if isinstance(kind, str) else shown(kind), KINDS)
    baseline: Baseline = KINDS[kinds[0]] if kinds else "input"
    if dmd:
        options = {key: given.pop(f"dmd_{key}") for key in ("history", "rank", "ridge") if f"dmd_{key}" in given}
        return DMD(**options, baseline=baseline)
    return TaylorSeer(given.pop("taylorseer_order", 1), baseline) if taylor else None


def _check_length(given: dict[str, Any]) -> None:
    """`num_inference_steps` is not needed here; if it is given, a mask must fit it."""
    steps = given.pop("num_inference_steps", None)
    if steps is not None:
        steps = int(number("num_inference_steps", steps, low=1, whole=True))
    if steps is not None and "steps_computation_mask" in given:
        StepMask(given["steps_computation_mask"]).for_steps(steps)
