"""`stepcache bench`: what is compared with what, and that a broken-off measurement goes on where it was."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from tiny_pipelines import PIPELINES

from stepcache import Forecast, Method, OptionError, Report, Static, UCache
from stepcache.bench import METRICS, KDiffusion, Results, Sampled, bench
from stepcache.bench.run import within
from stepcache.cli import main
from stepcache.extend import Event, Position


def report(asked: int, made: int) -> Report:
    events = [Event(Position(0, i, 1.0), "cond", i < made, "") for i in range(asked)]
    return Report("toy", events=events)


@dataclass
class Ladder:
    """Images whose error to the truth, 0, is 1 / steps, or 1 / calls^2 under a method that makes half the calls.

    `twice` makes two calls a step but the last; `noisy` is off by the seed, too.
    """

    name: str = "ladder"
    truth: float = 0.0
    metrics: dict = field(default_factory=lambda: {"PSNR": METRICS["PSNR"]})
    limit: tuple[str, int] | None = ("plain", 1000)
    noisy: frozenset[str] = frozenset({"noisy"})
    settings: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)

    def sample(self, sampler: str, steps: int, method: Method | None, seeds) -> Sampled:
        self.asked.append((sampler, steps, method and method.name, tuple(seeds)))
        asked = {"twice": 2 * steps - 1}.get(sampler, steps)
        made = asked if method is None else asked // 2
        error = 1 / steps + (0 if method is None else 1 / made**2)
        shift = [0.01 * seed if sampler == "noisy" else 0.0 for seed in seeds]
        images = torch.stack([torch.full((1, 8, 8), self.truth + error + s) for s in shift])
        return Sampled(images, 1.0 if method is None else 0.5, report(asked, made))


def db(error: float) -> float:
    return 10 * math.log10(4 / error**2)


def test_every_number_of_a_row_by_hand():
    results = bench(Ladder(), ["plain"], [20], {"half": Static("10")}, samples=5, batch=2, others=["plain", "twice"])
    full, half = results.rows
    assert (full.method, full.calls, full.same, full.fewer, full.other) == ("full run", 20, True, None, None)
    assert (half.calls, half.asked, half.speedup) == (10, 20, 2.0)
    assert half.scores["PSNR"].mean == pytest.approx(db(1 / 100), abs=1e-3)
    assert half.scores["PSNR"].half == pytest.approx(0, abs=1e-3)
    assert half.limit.mean == pytest.approx(db(1 / 20 + 1 / 100 - 1 / 1000), abs=1e-3)
    assert (half.fewer.sampler, half.fewer.steps) == ("plain", 10)
    assert half.fewer.scores["PSNR"] == pytest.approx(db(1 / 10 - 1 / 20), abs=1e-3)
    assert half.fewer.gain.mean == pytest.approx(db(1 / 100) - db(1 / 20), abs=1e-3)
    assert half.fewer.limit == pytest.approx(db(1 / 10 - 1 / 1000), abs=1e-3)
    assert (half.other.sampler, half.other.steps) == ("twice", 5)  # nine calls: ten it cannot make
    assert half.other.limit == pytest.approx(db(1 / 5 - 1 / 1000), abs=1e-3)


def test_a_sampler_with_fresh_noise_has_no_limit_and_samples_are_compared_in_pairs():
    (_, half) = bench(Ladder(), ["noisy"], [20], {"half": Static("10")}, samples=4, batch=3).rows
    assert half.limit is None
    assert half.fewer.gain.mean == pytest.approx(db(1 / 100) - db(1 / 20), abs=1e-2)
    assert half.fewer.gain.half == pytest.approx(0, abs=1e-2)


def test_the_best_other_sampler_is_the_one_nearest_to_the_limit():
    @dataclass
    class Two(Ladder):
        def sample(self, sampler, steps, method, seeds):
            made = super().sample(sampler, steps, method, seeds)
            return Sampled(made.images / 4 if sampler == "good" else made.images, made.seconds, made.report)

    rows = bench(Two(), ["plain"], [20], {"half": Static("10")}, 2, others=["twice", "good"]).rows
    assert rows[1].other.sampler == "good"


@pytest.mark.parametrize(
    ("spacing", "budget", "steps"),
    [((2, 1), 11, 11), ((3, 2), 21, 11), ((3, 2), 20, 10), ((3, 1), 11, 10), ((3, 2), 1, 1), ((4, 2), 1, None)],
)
def test_fewer_steps_never_make_more_calls(spacing, budget, steps):
    assert within(spacing, budget) == steps


def test_the_interval_is_students():
    scipy = pytest.importorskip("scipy.stats")
    values = [1.0, 2.0, 4.0, 8.5, 3.0]
    rows = [
        {
            **dict.fromkeys(("own_steps", "budget", "calls", "steps"), 5),
            "subject": "a",
            "sampler": "s",
            "own_sampler": "s",
            "seeds": [0],
            "role": "full",
            "name": "full run",
            "seconds": 1.0,
            "same": False,
            "scores": {"m": values},
            "limit": None,
        }
    ]
    mark = Results(rows).rows[0].scores["m"]
    low, high = scipy.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mark.mean - mark.half, mark.mean + mark.half) == (pytest.approx(low), pytest.approx(high))
    assert mark.mean == statistics.fmean(values)


def test_a_measurement_goes_on_where_it_was_broken_off(tmp_path):
    call = partial(bench, samplers=["plain"], methods={"half": Static("10")}, batch=2, out=tmp_path)
    whole = call(Ladder(), steps=[20], samples=4)
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    (tmp_path / "records.jsonl").write_text(lines[0] + "\n" + lines[1][:50])
    again = Ladder()
    assert call(again, steps=[20], samples=4).rows == whole.rows
    assert {seeds for *_, seeds in again.asked if len(seeds) > 1} == {(2, 3)}
    more = Ladder()
    call(more, steps=[20, 30], samples=6)
    assert {(steps, seeds) for _, steps, name, seeds in more.asked if name} == {
        (20, (4, 5)), (30, (0, 1)), (30, (2, 3)), (30, (4, 5)),
    }  # fmt: skip
    other_method = Ladder()
    bench(other_method, ["plain"], [20], {"half": Static("100")}, 2, batch=2, out=tmp_path)
    assert any(name for _, _, name, _ in other_method.asked)


def test_records_made_with_other_settings_of_the_cache_are_not_taken(tmp_path):
    common = {"samplers": ["plain"], "steps": [20], "methods": {"half": Static("10")}, "samples": 2, "out": tmp_path}
    subject = Ladder(settings={"guidance": 3.0})
    bench(subject, **common)
    made = len(subject.asked)
    bench(subject, **common)
    assert ("plain", 20, "static", (0, 1)) not in subject.asked[made:]
    other = Ladder(settings={"guidance": 6.0})
    bench(other, **common)
    assert ("plain", 20, "static", (0, 1)) in other.asked


def test_records_of_another_model_of_the_same_name_are_refused(tmp_path):
    call = partial(bench, samplers=["plain"], steps=[20], methods={"half": Static("10")}, samples=2, out=tmp_path)
    call(Ladder())
    with pytest.raises(OptionError, match=r"records of 'ladder' were made by another model.*another folder or another"):
        call(Ladder(truth=0.5))


def test_what_is_written_can_be_read(tmp_path):
    results = bench(
        Ladder(), ["plain", "twice"], [20], {"half": Static("10"), "same": Static("11")}, 3, out=tmp_path, batch=2
    )
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(row["sampler"], row["method"]) for row in rows] == [
        (s, m) for s in ("plain", "twice") for m in ("full run", "half", "same")
    ]
    table = (tmp_path / "table.md").read_text().splitlines()
    widths = {line.count("|") for line in table}
    assert len(widths) == 1
    assert any("**plain, 20 steps**" in line.replace("ladder, ", "") for line in table)
    assert any(line.startswith("|half") and "(+14.0 ±0.0)" in line and "twice" in line for line in table)
    assert (tmp_path / "pareto.png").stat().st_size > 5000
    assert results.plot(tmp_path / "again.png").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples": 0}, "samples=0: accepted is 1 or more"),
        ({"steps": []}, "steps=0: accepted is 1 or more"),
        ({"methods": {"full run": UCache()}}, "'full run' is there anyway"),
    ],
)
def test_options_that_cannot_be_are_refused(options, said):
    with pytest.raises(OptionError, match=said):
        bench(Ladder(), **{"samplers": ["plain"], **options})


def test_metrics_by_hand():
    image = torch.linspace(-1, 1, 256).view(1, 1, 16, 16)
    both = torch.cat([image, image])
    off = torch.cat([image.clamp(max=0.8), image])
    below, identical = METRICS["PSNR"](off, both, [0, 1])
    assert identical == 100.0
    assert below == pytest.approx(10 * math.log10(4 / float((off[0] - image[0]).square().mean())), rel=1e-4)
    ours, same = METRICS["SSIM"](off, both, [0, 1])
    assert same == pytest.approx(1.0)
    assert 0.5 < ours < 1
    video = METRICS["SSIM"](torch.stack([off[0], image[0]])[None], torch.stack([image[0], image[0]])[None], [0])
    assert video == [pytest.approx((ours + 1) / 2, rel=1e-4)]


def denoiser() -> KDiffusion:
    return KDiffusion(
        "toy",
        lambda x, sigma, strength=1.0: x / (1 + sigma.view(-1, 1, 1, 1) ** 2) * strength,
        (1, 8, 8),
        lambda steps: torch.cat([torch.linspace(10, 0.1, steps), torch.zeros(1)]),
        extra_args=lambda seeds: {"strength": 0.9},
        decode=lambda latents: latents.clamp(-1, 1),
    )


def test_a_seed_gives_the_same_image_in_any_batch():
    alone = denoiser().sample("euler", 9, Forecast(), [3])
    among = denoiser().sample("euler", 9, Forecast(), [1, 3, 7])
    torch.testing.assert_close(alone.images[0], among.images[1])
    assert alone.calls == among.calls == 6
    assert not torch.equal(among.images[0], among.images[1])


def test_a_users_denoiser_is_measured_under_k_diffusions_samplers():
    (_, ours) = bench(denoiser(), ["heun"], [8], {"forecast": Forecast()}, 2, others=["euler"]).rows
    assert ours.asked == 15
    assert ours.fewer.steps == 5  # Forecast makes nine of the fifteen calls
    assert ours.other.steps == 9
    with pytest.raises(OptionError, match="sampler='dpm_fast': accepted is 'unipc', and one of k-diff"):
        denoiser().sample("dpm_fast", 5, None, [0])


def test_a_users_pipeline_is_measured_under_its_own_scheduler():
    from stepcache.bench import Pipeline

    tiny = PIPELINES["sd"]
    pipe = tiny.build()
    ours = {"generator", "num_inference_steps", "output_type"}
    subject = Pipeline("tiny", pipe, arguments={k: v for k, v in tiny.call(pipe).items() if k not in ours})
    name, before = type(pipe.scheduler).__name__, pipe.scheduler
    (_, ours) = bench(subject, [name], [6], {"mask": Static("101011")}, 2).rows
    assert (ours.calls, ours.asked) == (4, 6)
    assert pipe.scheduler is before
    with pytest.raises(OptionError, match="unknown scheduler 'Eulr'"):
        subject.sample("Eulr", 4, None, [0])


def test_the_command_measures_the_shipped_networks_in_two_processes(tmp_path, capsys):
    command = "bench --network unet --sampler heun --steps 5 --method forecast ucache:threshold=0.5 --other euler"
    assert main([*command.split(), "--samples=2", "--batch=1", "--workers=2", f"--out={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["method"] for row in rows] == ["full run", "forecast", "ucache:threshold=0.5"]
    assert rows[1]["calls"] == 6
    assert rows[1]["other"]["sampler"] == "euler"
    assert set(rows[0]["scores"]) == {"PSNR", "SSIM", "right"}
    assert "forecast" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*command.split(), "--method=nothing", f"--out={tmp_path}"])
    assert "nothing" in capsys.readouterr().err
