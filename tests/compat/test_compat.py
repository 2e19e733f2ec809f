"""Every example line that others' documents give for a cache, as text; and cache-dit's configurations, strictly."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepcache import (
    CacheDiT,
    DBCache,
    EasyCache,
    Forecast,
    Method,
    Off,
    OptionError,
    Spectrum,
    Static,
    StepMask,
    TaylorSeerCache,
    UCache,
    load_config,
    parse,
)
from stepcache.compat.cache_dit import FIELDS, NEUTRAL
from stepcache.extend import DMD, Chebyshev, TaylorSeer

SCALARS = (
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(max_size=5)
    | st.dates()
    | st.sampled_from([10**400, -1, 0, 1, 2, 10**20, "fast", "dynamic", "static", "residual", "NONE"])
)
VALUES = SCALARS | st.lists(SCALARS)
PIECES = st.sampled_from(
    ["--cache-mode", "--cache-option", "--cache-preset", "--scm-mask", "--scm-policy", "--cache-mode=", "ucache"]  # noqa: RUF005
    + ["cache-dit", "spectrum", "threshold=1", "window=inf", "m=1000000", "fast", "1,0,1", "static", "--", "-1"]
    + [",", "=", "'", '"']
)

MASK = "1,1,1,1,0,0,1,0,0,0,1,0,0,0,1,0,0,0,1,1"


@pytest.mark.parametrize(
    ("line", "method"),
    [
        (
            'sd-cli -m model.safetensors -p "a cat" --cache-mode ucache --cache-option "threshold=1.5"',
            UCache(threshold=1.5),
        ),
        ('--cache-mode easycache --cache-option "threshold=0.3"', EasyCache(threshold=0.3)),
        ('--cache-mode dbcache --cache-option "threshold=0.25,warmup=4"', DBCache(threshold=0.25, warmup=4)),
        ("--cache-mode taylorseer", TaylorSeerCache()),
        ("--cache-mode cache-dit --cache-preset fast", CacheDiT(preset="fast")),
        (f'--scm-mask "{MASK}"', CacheDiT(mask=MASK)),
        ("--scm-policy dynamic", CacheDiT()),
    ],
)
def test_the_example_lines_of_stable_diffusion_cpps_page(line, method):
    assert parse(line) == method


@pytest.mark.parametrize(
    ("line", "method"),
    [
        ("", Off()),
        ("sd-cli -p x --steps 20", Off()),
        ("--cache-mode disabled", Off()),
        ("--cache-mode none", Off()),
        ("--cache-mode dbcache --cache-option fn=1", DBCache(Fn=1)),
        ("--cache-mode dbcache --cache-option Fn=4,Bn=2", DBCache(Fn=4, Bn=2)),
        ("--cache-mode cache-dit --cache-preset u", CacheDiT(preset="ultra")),
        ("--cache-mode dbcache --cache-preset S", DBCache(preset="slow")),
        ("--cache-mode cache-dit --cache-preset f --cache-option warmup=3", CacheDiT(preset="fast", warmup=3)),
        ("--cache-mode=ucache --cache-option=decay=0.9,reset=0", UCache(decay=0.9, reset=False)),
        ("--cache-mode ucache --cache-option start=0.2,end=0.8,relative=0", UCache(start=0.2, end=0.8, relative=False)),
        ("--cache-mode ucache --cache-preset fast", UCache(mask="fast")),
        ("--cache-mode ucache --scm-mask 1,0 --scm-policy static", UCache(mask=StepMask("10", "static"))),
        ("--cache-mode cache-dit --scm-mask 1,0 --cache-preset m", CacheDiT(preset="medium", mask="10")),
        ("--scm-policy static --cache-preset m", CacheDiT(mask=StepMask("medium", "static"), preset="medium")),
        ("--cache-mode ucache --cache-mode easycache", EasyCache()),
        ("--cache-mode spectrum --cache-option w=0.3,m=4,lam=0.5,window=3,flex=1,warmup=5,stop=0.8",
         Spectrum(0.3, 4, 0.5, 3, 1, 5, 0.8)),
        ("--cache-mode forecast --cache-option interval=3", Forecast(3)),
        ("--cache-mode static --scm-mask 110", Static("110")),
        (["--cache-mode", "ucache", "-p", "--a cat"], UCache()),
    ],
)  # fmt: skip
def test_other_lines(line, method):
    assert parse(line) == method


def test_a_preset_whose_mask_is_given_apart_says_that_it_does_nothing_where_it_is_only_a_mask():
    line = "--cache-mode ucache --cache-option threshold=1.5 --scm-mask 1,1,0 --scm-policy dynamic --cache-preset fast"
    with pytest.warns(UserWarning, match="of a preset ucache takes the mask only, and --scm-mask is given"):
        assert parse(line) == UCache(threshold=1.5, mask="110")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--cache-modes ucache", "unknown option '--cache-modes'. Did you mean '--cache-mode'?"),
        ("--scm-maks 1,0", "unknown option '--scm-maks'. Did you mean '--scm-mask'?"),
        ("--cache-mode", "--cache-mode: expected one argument"),
        ("--cache-mode UCache", "unknown --cache-mode 'UCache'. Did you mean 'ucache'?"),
        ("--cache-mode teacache", "unknown --cache-mode 'teacache'."),
        ("--cache-option threshold=1", "--cache-option threshold=1: say whose option it is, with --cache-mode"),
        ("--cache-mode ucache --scm-policy static", "--scm-policy static: it is about a mask's zeros"),
        ("--scm-policy static", "policy='static' says what happens on a mask's zeros: give a mask or a preset too"),
        ("--cache-mode cache-dit --cache-preset fst", "unknown mask preset 'fst'. Did you mean 'fast'?"),
        ("--cache-mode cache-dit --cache-option preset", "option 'preset' has no '='."),
        ("--cache-mode dbcache --cache-option FN=1", "unknown option 'FN'. Did you mean 'fn'?"),
        ("--cache-mode dbcache --cache-option Fn=8.7", "Fn='8.7': accepted is a whole number"),
        ("--cache-mode dbcache --cache-option threshold=-1", "threshold=-1.0: accepted is a number of at least 0"),
        ("--cache-mode dbcache --cache-option Fn=0", "Fn=0: accepted is a whole number of at least 1"),
        ("--cache-mode ucache --scm-mask 1,2", "mask entry 2 is '2'"),
    ],
)
def test_what_cannot_be_meant_is_refused(line, message):
    with pytest.raises(OptionError) as refusal:
        parse(line)
    assert str(refusal.value).startswith(message)


CONFIG = """
cache_config:
  max_warmup_steps: 8
  max_cached_steps: -1
  max_continuous_cached_steps: 2
  Fn_compute_blocks: 1
  Bn_compute_blocks: 0
  residual_diff_threshold: 0.12
  enable_taylorseer: true
  taylorseer_order: 1
"""


def test_a_yaml_file_and_its_json_twin_give_the_method(tmp_path):
    expected = CacheDiT(Fn=1, threshold=0.12, warmup=8, max_consecutive=2, order=1)
    (tmp_path / "cache.yaml").write_text(CONFIG)
    assert load_config(tmp_path / "cache.yaml") == {"method": expected}
    fields = {"max_warmup_steps": 8, "max_continuous_cached_steps": 2, "Fn_compute_blocks": 1}
    fields |= {"residual_diff_threshold": 0.12, "enable_taylorseer": True}
    (tmp_path / "cache.json").write_text(json.dumps(fields))
    assert load_config(str(tmp_path / "cache.json")) == load_config(fields) == {"method": expected}


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ({}, DBCache()),
        (
            {
                "max_warmup_steps": 8,
                "max_cached_steps": -1,
                "Fn_compute_blocks": 8,
                "Bn_compute_blocks": 8,
                "residual_diff_threshold": 0.12,
            },
            DBCache(Fn=8, Bn=8, threshold=0.12, warmup=8),
        ),
        ({"Fn_compute_blocks": 1, "residual_diff_threshold": 0.08}, DBCache(Fn=1)),
        ({"Fn_compute_blocks": 12, "Bn_compute_blocks": 12, "residual_diff_threshold": 0.2}, DBCache(12, 12, 0.2)),
        ({"steps_computation_mask": [1, 0], "steps_computation_policy": "static"}, DBCache(mask="10", policy="static")),
        ({"steps_computation_mask": "fast", "num_inference_steps": 28}, DBCache(mask="fast")),
        ({"cache_type": "NONE"}, Off()),
        ({"max_cached_steps": None, "warmup_interval": 1, "force_refresh_step_hint": None}, DBCache()),
        ({"enable_taylorseer": True, "taylorseer_cache_type": "hidden_states", "taylorseer_order": 2},
         CacheDiT(predictor=TaylorSeer(2, baseline="zero"))),
        ({"enable_dmd": True, "dmd_history": 8}, CacheDiT(predictor=DMD(history=8))),
    ],
)  # fmt: skip
def test_configurations(fields, method):
    assert load_config(fields) == {"method": method}


def test_the_options_of_the_host_come_apart_with_cache_dits_defaults():
    assert load_config({"enable_separate_cfg": True}) == {
        "method": DBCache(),
        "enable_separate_cfg": True,
        "cfg_compute_first": False,
        "cfg_diff_compute_separate": True,
    }
    given = {"enable_separate_cfg": True, "cfg_compute_first": True, "cfg_diff_compute_separate": False}
    assert load_config(given) == {"method": DBCache(), **given}
    given = {"enable_separate_cfg": False, "cfg_compute_first": False, "cfg_diff_compute_separate": True}
    assert load_config(given) == {"method": DBCache(), "enable_separate_cfg": False}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"enable_sperate_cfg": True}, "unknown field 'enable_sperate_cfg'. Did you mean 'enable_separate_cfg'?"),
        ({"cache_confg": {}}, "unknown field 'cache_confg'. Did you mean 'cache_config'?"),
        ({"warmup_interval": 2}, "warmup_interval=2: cache-dit has this, here it cannot act; leave it out"),
        ({"enable_foca": torch.ones(2)}, "enable_foca=tensor([1., 1.]): cache-dit has this"),
        ({"force_refresh_step_hint": 25}, "force_refresh_step_hint=25: cache-dit has this"),
        ({"enable_foca": True}, "enable_foca=True: cache-dit has this"),
        ({"enable_taylorseer": True, "enable_dmd": True}, "enable_taylorseer and enable_dmd: one or the other"),
        ({"taylorseer_order": 2}, "taylorseer_order=2: it does nothing without enable_taylorseer: true"),
        ({"dmd_rank": 2}, "dmd_rank=2: it does nothing without enable_dmd: true"),
        ({"enable_dmd": True, "calibrator_cache_type": "hidden"}, "unknown calibrator_cache_type 'hidden'."),
        ({"cache_type": "DBPrune"}, "unknown cache_type 'DBPrune'."),
        ({"steps_computation_mask": [1, 0], "num_inference_steps": 3}, "the mask has 2 entries, the run has 3 steps"),
        ({"Fn_compute_blocks": "8"}, "Fn='8': accepted is a whole number"),
        ({"Fn_compute_blocks": True}, "Fn=True: accepted is a whole number"),
        ({"residual_diff_threshold": -0.1}, "threshold=-0.1: accepted"),
        ({"parallelism_config": {}}, "parallelism_config: cache-dit's own, not about skipping steps"),
        ({"cache_config": {}, "Fn_compute_blocks": 1}, "Fn_compute_blocks: beside cache_config"),
        ({"cache_config": 3}, "cache_config=3: accepted are fields with values"),
        ({"enable_separate_cfg": "yes"}, "enable_separate_cfg='yes': accepted is 0 or 1"),
    ],
)  # fmt: skip
def test_a_configuration_is_read_strictly(fields, message):
    with pytest.raises(OptionError) as refusal:
        load_config(fields)
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize(("name", "text"), [("a.yaml", "a: [1"), ("a.json", "{"), ("a.yaml", "- 1\n"), ("b.yaml", "")])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(OptionError, match=f"^{name[0]}\\."):
        load_config(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [
        "warmup_interval: 2024-13-45",
        "enable_dmd: !!bool maybe",
        "[" * 1000,
        "a: &a [*a]",
        "steps_computation_mask: &a [*a, *a]",
        "max_warmup_steps: 2024-01-01",
        "taylorseer_cache_type: [residual]\nenable_taylorseer: true",
        "cache_type: [DBCache]",
        "steps_computation_mask: {1: 0}",
        "num_inference_steps: [1]\nsteps_computation_mask: fast",
        f"max_warmup_steps: {'1' * 5000}",
        "max_warmup_steps: " + "1" * 310,
        "<<: 3",
        "? [a]\n: b",
        "a: !!python/object:os.system 1",
        "x: &x [1,1,1]\ny: &y [*x,*x,*x]\n" + "".join(f"z{k}: &z{k} [*y,*y]\n" for k in range(3)),
        b"\xff\xfe\x00",
        b"max_warmup_steps: \xe9",
    ],
)
def test_a_file_with_anything_in_it_is_accepted_or_refused_with_a_sentence(tmp_path, text):
    (tmp_path / "a.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(OptionError) as refusal:
        load_config(tmp_path / "a.yaml")
    assert 3 < len(str(refusal.value).split()) < 100


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(st.sampled_from([*FIELDS, *NEUTRAL, "cache_config", "x", 1]), VALUES, max_size=3))
def test_any_fields_are_accepted_or_refused_with_a_sentence(fields):
    with warnings.catch_warnings(), contextlib.suppress(OptionError):
        warnings.simplefilter("ignore")
        assert isinstance(load_config(fields)["method"], Method)


@settings(deadline=None)
@given(st.text() | st.lists(st.text()) | st.lists(PIECES, max_size=6).map(" ".join))
def test_any_command_line_is_accepted_or_refused_with_a_sentence(line):
    with warnings.catch_warnings(), contextlib.suppress(OptionError):
        warnings.simplefilter("ignore")
        assert isinstance(parse(line), Method)


@pytest.mark.parametrize("line", ["--cache-mode 'ucache", '--cache-mode ucache --cache-option "threshold=1', [1, 2], 5])
def test_a_command_that_is_no_words_is_refused(line):
    with pytest.raises(OptionError, match=r"^command "):
        parse(line)


def test_without_pyyaml_json_still_loads_and_yaml_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "a.json").write_text("{}")
    assert load_config(tmp_path / "a.json") == {"method": DBCache()}
    (tmp_path / "a.yaml").write_text(CONFIG)
    with pytest.raises(ImportError, match=r"pip install 'stepcache\[yaml\]'"):
        load_config(tmp_path / "a.yaml")


def test_the_predictors_of_parsed_methods_are_the_named_ones():
    assert parse("--cache-mode cache-dit").predictor == TaylorSeer(1, baseline="input")
    assert parse("--cache-mode taylorseer --cache-option order=2").predictor == TaylorSeer(2, baseline="zero")
    assert isinstance(parse("--cache-mode spectrum").predictor, Chebyshev)
