"""The page of `stepcache compare` in a browser: no errors, no requests, a slider that moves, pictures of their size."""

from __future__ import annotations

import shutil

import painter
import pytest

from stepcache import Forecast, UCache
from stepcache.bench import compare

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    methods = {"Forecast 2x": Forecast(), "UCache": UCache(), "forecast:interval=3,warmup=2,last_step=1": Forecast(3)}
    made = compare(painter.subject(), methods, "euler", 16, [0, 1, 2])
    return made.save(tmp_path_factory.mktemp("page") / "page.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(params=[(1200, 900), (360, 740)], ids=["desktop", "phone"])
def opened(browser, address, request):
    """The page, with what went wrong and what was fetched."""
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height}, has_touch=True)
    said, fetched = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(address)
    yield page
    assert said == []
    assert [url for url in fetched if not url.startswith("data:")] == [address]
    page.close()


def test_every_picture_is_there_and_has_the_right_size(opened):
    sizes = opened.eval_on_selector_all(
        "img", "all => all.map(one => [one.complete, one.naturalWidth, one.naturalHeight])"
    )
    assert len(sizes) == 3 + 3 * 6 * 3  # thumbnails; three images of six cards, three pictures each
    assert {tuple(size) for size in sizes} == {(True, painter.SIZE, painter.SIZE)}
    for selector in (".pair", ".difference", ".pair .cached"):
        shown = [one.bounding_box() for one in opened.locator(selector).all() if one.is_visible()]
        assert len(shown) == 6
        assert all(box["width"] == pytest.approx(box["height"], abs=1) and box["width"] > 120 for box in shown)


def test_nothing_is_wider_than_the_window(opened):
    assert opened.evaluate("document.documentElement.scrollWidth") == opened.viewport_size["width"]


def test_one_slider_moves_the_edge_on_every_card(opened):
    pair = opened.locator(".pair").first
    pair.scroll_into_view_if_needed()
    clip = "all => [...new Set(all.map(one => getComputedStyle(one).clipPath))]"
    assert opened.eval_on_selector_all(".cached", clip) == ["inset(0px 0px 0px 50%)"]
    box = pair.bounding_box()
    opened.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    opened.mouse.down()
    opened.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] / 2, steps=5)
    opened.mouse.up()
    (moved,) = opened.eval_on_selector_all(".cached", clip)
    share = float(moved.split()[-1].rstrip("%)"))
    assert 85 <= share <= 100
    line = opened.locator(".pair .line").first.bounding_box()
    assert line["x"] - box["x"] == pytest.approx(box["width"] * share / 100, abs=2)
    pair.locator("input").press("Home")
    assert opened.eval_on_selector_all(".cached", clip) == ["inset(0px 0px 0px 0%)"]


def test_a_thumbnail_chooses_the_image_of_every_card(opened):
    shown = "all => all.filter(one => !one.hidden).map(one => one.dataset.sample)"
    assert opened.eval_on_selector_all("[data-sample]", shown) == ["0"] * 6
    opened.locator("[data-pick]").nth(2).click()
    assert opened.eval_on_selector_all("[data-sample]", shown) == ["2"] * 6
    pressed = "all => all.map(one => one.getAttribute('aria-pressed'))"
    assert opened.eval_on_selector_all("[data-pick]", pressed) == ["false", "false", "true"]
    assert opened.locator("figcaption:visible").first.inner_text().startswith("seed 2: ")


def test_blink_shows_both_images_in_turn_and_stops(opened):
    from playwright.sync_api import expect

    cached = opened.locator(".cached").first
    opened.get_by_role("button", name="Blink").click()
    expect(cached).to_have_css("clip-path", "none")
    for state in ("hidden", "visible", "hidden"):
        expect(cached).to_have_css("visibility", state)
    opened.get_by_role("button", name="Blink").click()
    assert cached.evaluate("one => getComputedStyle(one).clipPath").startswith("inset")
    expect(cached).to_have_css("visibility", "visible")


def test_large_pictures_take_the_width(opened):
    before = opened.locator(".pair").first.bounding_box()["width"]
    opened.get_by_role("button", name="Large").click()
    assert opened.locator(".pair").first.bounding_box()["width"] > 1.7 * before


def test_each_cell_of_a_trace_says_why(opened):
    first = opened.locator(".cells").first.locator("i")
    assert first.count() == 16
    words = [first.nth(number).get_attribute("title") for number in range(16)]
    assert words[0].startswith("step 0, sigma 10: computed, interval of 2")
    assert words[2] == f"step 2, sigma {painter.schedule(16)[2]:.3g}: skipped"
    assert "a skip would have been off by" in words[3]
    colours = [first.nth(n).evaluate("one => getComputedStyle(one).backgroundColor") for n in (1, 2)]
    assert colours[0] == "rgb(29, 95, 168)"
    assert colours[1] != colours[0]
