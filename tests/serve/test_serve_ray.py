"""examples/serve_ray.py: requests are read strictly and painted as if alone; one that fails or hangs up harms no other.

The tests with Ray run if the extra `ray` is installed. `benchmarks/serve_load.py` is the load test."""

from __future__ import annotations

import json
import os
import sys
import threading

import numpy as np
import pytest
from package import EXAMPLES

from stepcache import OptionError

pytest.importorskip("diffusers")
sys.path.insert(0, str(EXAMPLES))
serve_ray = pytest.importorskip("serve_ray")
sys.path.remove(str(EXAMPLES))

SMALL = {"width": 32, "height": 32, "steps": 10}


def job(**given):
    return serve_ray.Job.read(json.dumps(SMALL | given).encode(), faults=True)


@pytest.fixture(scope="module")
def painter():
    return serve_ray.Painter(None, "cpu", "float32")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "the request is not JSON"),
        ("[1]", "the request must be a JSON object"),
        ('{"promt": "x"}', "unknown field 'promt'"),
        ('{"prompt": 3}', "prompt=3: accepted is text"),
        ('{"steps": 0}', "steps=0: accepted is a whole number from 1 to 1000"),
        ('{"steps": true}', "steps=True"),
        ('{"seed": -1}', "seed=-1"),
        ('{"width": 1e99}', "width="),
        ('{"guidance": "much"}', "guidance='much'"),
        ('{"speed": 0}', "speed=0"),
        (
            '{"speed": 2, "method": "ucache"}',
            "speed is a number of calls with Forecast: give it, or method and options",
        ),
        ('{"method": "forcast"}', "unknown method 'forcast'. Did you mean 'forecast'?"),
        ('{"options": "intervals=3"}', "unknown option 'intervals'"),
        ('{"fail_at": 3}', "unknown field 'fail_at'"),
        ('{"cancelled": true}', "unknown field 'cancelled'"),
    ],
)
def test_a_request_is_read_strictly(body, message):
    with pytest.raises(OptionError) as refusal:
        serve_ray.Job.read(body.encode())
    assert str(refusal.value).startswith(message)


def test_requests_are_painted_as_if_alone(painter):
    """Alike ones share a call, others do not, and one that fails fails alone."""
    jobs = [job(seed=1), job(seed=2), job(seed=3, speed=1), job(seed=4, fail_at=2), job(seed=5, method="ucache")]
    jobs += [job(seed=6, method="ucache"), job(seed=7, width=48)]
    painted = painter.paint(jobs)
    assert [one.together for one in painted] == [2, 2, 1, 1, 1, 1, 1]
    assert [type(one.error).__name__ for one in painted if one.error is not None] == ["Fault"]
    for one, request in zip(painted, jobs, strict=True):
        (alone,) = painter.paint([request])
        if one.error is None:
            assert np.abs(one.image.astype(int) - alone.image.astype(int)).max() <= 1  # a batch may round otherwise
    assert painted[0].report.skipped > 0
    assert painted[2].report.skipped == 0


def test_images_of_a_batch_are_decoded_as_if_alone(painter):
    rows = []
    seen = painter.pipe.vae.decoder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        assert [one.together for one in painter.paint([job(seed=seed, speed=1) for seed in range(3)])] == [3, 3, 3]
    finally:
        seen.remove()
    assert rows == [1, 1, 1]


def test_without_stepcache_every_request_is_painted_as_if_it_had_asked_for_none(painter):
    bare = serve_ray.Painter(None, "cpu", "float32", cached=False)
    (one,), (none,) = bare.paint([job(seed=1)]), painter.paint([job(seed=1, speed=1)])
    assert (one.image == none.image).all()
    assert one.report is None


def test_a_request_that_hangs_up_ends_after_the_step_in_progress_and_leaves_nothing(painter):
    calls, first = [], job(seed=1, steps=50, speed=1)

    def hang_up(*_):
        calls.append(1)
        first.cancelled = len(calls) == 3

    count = painter.pipe.unet.register_forward_pre_hook(hang_up)
    try:
        painter.paint([first])
    finally:
        count.remove()
    assert len(calls) == 3
    (again,), (alone,) = painter.paint([job(seed=2)]), serve_ray.Painter(None, "cpu", "float32").paint([job(seed=2)])
    assert (again.image == alone.image).all()
    (dropped,) = painter.paint([first])
    assert str(dropped.error) == "cancelled"


def test_threads_do_not_meet_in_one_pipeline(painter):
    jobs = [job(seed=seed, method=method) for seed in range(3) for method in ("forecast", "ucache")]
    alone, found = [painter.paint([one])[0].image for one in jobs], {}
    threads = [
        threading.Thread(target=lambda k=k: found.update({k: painter.paint([jobs[k]])[0].image})) for k in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((found[k] == alone[k]).all() for k in range(6))


def test_calls_and_errors_are_counted_once_a_batch(painter):
    class Metric:
        def __init__(self) -> None:
            self.total, self.tags = 0.0, []

        def inc(self, value=1.0, tags=None) -> None:
            self.total += value
            self.tags.append(tags)

        observe = inc

    metrics = {name: Metric() for name in ("requests", "made", "skipped", "seconds", "error")}
    jobs = [job(seed=1), job(seed=2), job(seed=3, fail_at=1)]
    painted = painter.paint(jobs)
    for one, request in zip(painted, jobs, strict=True):
        serve_ray.count(one, request, metrics)
    assert metrics["requests"].total == 3
    assert metrics["made"].total == painted[0].report.calls
    assert metrics["skipped"].total == painted[0].report.skipped > 0
    assert [tags["outcome"] for tags in metrics["requests"].tags] == ["painted", "painted", "failed"]


@pytest.mark.parametrize(("batch", "count"), [(4, 30), (1, 12)])
def test_the_service_on_ray(batch, count, monkeypatch):
    """Mixed requests on one replica: every image is that of the request alone, bit for bit without batches."""
    pytest.importorskip("ray", reason="the extra ray is not installed")
    monkeypatch.syspath_prepend(EXAMPLES.parent / "benchmarks")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES), prepend=os.pathsep)  # for the replicas
    import serve_load

    result = serve_load.main([f"--requests={count}", "--replicas=1", f"--batch={batch}"])
    assert set(result["answers"]) <= {"image: 200", "wrong: 400", "fails: 500", "hangs up: 0", "hangs up: 200"}
    differences = result["images by their largest difference in levels of 255"]
    together = set() if batch == 1 else {"in a batch, off by 0", "in a batch, off by 1"}
    assert set(differences) <= {"alone, off by 0"} | together
    assert result["metrics"]["stepcache_calls_skipped_total"] > 0
