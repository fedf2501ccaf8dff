# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The page as a person uses it: Chromium clicks through every tab at two widths. Screenshots go to runs/screenshots."""

import io
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.places import ROOT
from helpers.serving import serving
from training.report.pictures import grid


playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="without Chromium; make test-browser installs it"),
]

SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", ROOT / "runs" / "screenshots"))
QUIET = [
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
]
TABS = {  # the example to press where one is needed
    "Sample": None,
    "Trajectory": None,
    "Steps and gamma": None,
    "One step or many": None,
    "Inpaint": "lower half",
    "Strokes": "ring",
    "Between seeds": None,
    "Between pictures": "two samples",
    "Guide": None,
    "Likelihood": "image",
}
IDLE = """() => {
    const seen = (one) => one.checkVisibility();
    const trackers = [...document.querySelectorAll("[data-testid=status-tracker]:not(.hide)")];
    const busy = trackers.filter(seen).filter((one) => !one.querySelector(".error"));
    return busy.length === 0 && [...document.querySelectorAll(".pixels img")].filter(seen).every((one) => one.complete);
}"""
# Elements of the page that lie upon others of their kind: none should. Those inside another, and what is hidden, are
# left out.
OVERLAPS = """() => {
    const kinds = "button, input, textarea, [role=slider], .prose p, .prose h1, label > span";
    const visible = (e) => e.checkVisibility({ visibilityProperty: true, opacityProperty: true });
    const all = [...document.querySelectorAll(kinds)].filter(visible);
    const boxes = all.map((e) => [e, e.getBoundingClientRect()]).filter(([e, b]) => b.width > 1 && b.height > 1);
    const found = [];
    for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
        const [a, p] = boxes[i], [b, q] = boxes[j];
        if (a.contains(b) || b.contains(a)) continue;
        const width = Math.min(p.right, q.right) - Math.max(p.left, q.left);
        const height = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
        const words = (e) => e.tagName + ":" + (e.innerText || e.ariaLabel || e.className).slice(0, 40);
        if (width > 3 && height > 3) found.push([a, b].map(words).join(" / "));
    }
    return found;
}"""


@pytest.fixture(scope="module")
def address():
    with serving() as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox", *(f"--{name}" for name in QUIET)]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """A function that opens the page; at the end it must have asked nobody but the server, and no script failed."""
    pages, asked, failed = [], [], []

    def open(query="", width=1280, height=900, **options):
        context = browser.new_context(
            viewport={"width": width, "height": height}, permissions=["clipboard-read", "clipboard-write"], **options
        )
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: failed.append(str(error)))
        pages.append(page)
        page.goto(address + query)
        page.locator(".pixels img:visible").first.wait_for()
        settle(page)
        return page

    yield open
    for page in pages:
        page.context.close()
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))] and not failed


def settle(page):
    """Wait until nothing is computed and no picture is on its way."""
    page.wait_for_timeout(300)
    page.wait_for_function(IDLE)
    page.wait_for_timeout(200)


def choose(page, tab, settled=True):
    button = page.locator("[role=tablist] button[role=tab]:visible").get_by_text(tab, exact=True)
    if button.count() == 0:  # a phone has the others in a menu
        page.locator(".overflow-menu > button").click()
        button = page.locator(".overflow-dropdown button").get_by_text(tab, exact=True)
    button.click()
    page.locator("[role=tab][aria-selected=true]:visible").get_by_text(tab, exact=True).wait_for()
    if settled:
        settle(page)


def panel(page):
    return page.locator("[role=tabpanel]:visible").last


def words(page):
    return panel(page).locator(".prose.report").inner_text()


def shown(page):
    """The picture of the tab, as the server sent it."""
    source = panel(page).locator(".pixels img").last.get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB"))


def slider_of(page, label):
    return panel(page).get_by_role("slider", name=re.compile(label)).first


def move(page, label, keys):
    """Move a slider by the keyboard."""
    slider = slider_of(page, label)
    slider.focus()
    for key in keys:
        slider.press(key)
    settle(page)


def press(page, name):
    """Press a button of the tab and wait for what follows from it."""
    panel(page).get_by_role("button", name=name).click()
    page.wait_for_timeout(700)  # an example fills the controls first
    settle(page)


def draw(page, start, end):
    """Draw a line on the canvas of the tab, from and to offsets from its middle, in sides of the canvas."""
    panel(page).get_by_role("button", name=re.compile("brush|draw", re.IGNORECASE)).first.click()
    canvas = panel(page).locator("canvas").first.bounding_box()
    x, y = canvas["x"] + canvas["width"] / 2, canvas["y"] + canvas["height"] / 2
    side = min(canvas["width"], canvas["height"])
    page.mouse.move(x + start[0] * side, y + start[1] * side)
    page.mouse.down()
    page.mouse.move(x + end[0] * side, y + end[1] * side, steps=12)
    page.mouse.up()
    page.wait_for_timeout(300)


@pytest.mark.parametrize("width, height, scheme", [(1280, 900, "light"), (390, 844, "dark")])
def test_every_tab(open_page, width, height, scheme):
    page = open_page(width=width, height=height, color_scheme=scheme)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for tab, example in TABS.items():
        choose(page, tab, settled=False)
        if example is not None:
            panel(page).get_by_role("button", name=f"Example: {example}").click()
        elif tab == "Guide":
            panel(page).get_by_role("button", name="Run").click()
        panel(page).locator(".prose.report").get_by_text(re.compile("network evaluation")).first.wait_for()
        settle(page)  # the picture comes after the words
        assert panel(page).locator(".pixels img").last.bounding_box()["width"] > 150, tab
        page.screenshot(path=SCREENSHOTS / f"{width}-{tab.replace(' ', '-').lower()}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
        assert page.evaluate(OVERLAPS) == [], tab
        assert page.locator(".toast-body.error").count() == 0


def test_sliders_are_live(open_page):
    page = open_page()
    first = shown(page)
    move(page, "gamma", ["End"])
    moved = shown(page)
    assert not np.array_equal(first, moved)
    move(page, "gamma", ["Home"])
    assert np.array_equal(first, shown(page))  # from the same noise
    press(page, "New seed")
    assert not np.array_equal(first, shown(page))
    press(page, "Seed before")
    assert np.array_equal(first, shown(page))
    for _ in range(20):  # faster than the answers come: the last one counts
        slider_of(page, "gamma").press("ArrowRight", no_wait_after=True)
    page.wait_for_timeout(500)
    settle(page)
    assert np.array_equal(moved, shown(page))


def test_a_movement_ends_the_run_with_other_values(open_page):
    page, sent = open_page("/?tab=sample&steps=20"), []
    page.on("request", lambda request: sent.append(request.post_data) if request.url.endswith("/stop") else None)
    moves = """() => {
        const [, turn] = ctmStarts('tab', [2, null]);
        for (const value of [2, 3, 4]) ctmMoved('tab', [value]);
        return turn;
    }"""
    with page.expect_response("**/run/stop") as answer:
        turn = page.evaluate(moves)
    assert answer.value.ok and len(sent) == 1 and f'"{turn}"' in sent[0]
    assert page.evaluate("ctmStarts('tab', [2, null])[1]") != turn
    for key in ("End", "Home", "End", "Home"):  # whatever was ended, the last is shown
        slider_of(page, "Images").press(key, no_wait_after=True)
    panel(page).locator(".prose.report").get_by_text("1 image, 20 steps").wait_for()
    settle(page)
    assert page.locator(".toast-body").count() == 0


def test_from_slider_to_picture(open_page):
    page = open_page("/?tab=sample&steps=1")
    for i in range(16):
        slider_of(page, "Images").press("ArrowLeft" if i % 8 < 4 else "ArrowRight")
        page.wait_for_timeout(350)
    log = page.locator("#latency").inner_text()
    print(log)
    middle = int(re.search(r"middle of the last \d+: (\d+) ms", log)[1])
    assert middle < 400  # 150 on a machine that does nothing else: see the README


def test_a_link_restores_the_page(open_page):
    page = open_page()
    choose(page, "Steps and gamma")
    choose(page, "Sample")
    move(page, "gamma", ["ArrowRight"] * 5)
    move(page, "Steps", ["ArrowRight"] * 3)
    panel(page).get_by_label("Tuned schedule").check()
    press(page, "New seed")
    other = open_page(page.url[page.url.index("/?") :])
    assert np.array_equal(shown(page), shown(other))
    assert "gamma=0.25" in other.url and "steps=5" in other.url
    assert panel(other).get_by_label("Tuned schedule").is_checked() and "no schedule for 5 steps" in words(other)
    choose(page, "Between seeds")
    move(page, "Images", ["ArrowLeft"] * 4)
    third = open_page(page.url[page.url.index("/?") :])
    assert panel(third).get_by_text("From seed 0 to seed 1").is_visible() and np.array_equal(shown(page), shown(third))
    wrong = open_page("/?tab=sample&gamma=7&steps=x&label=%3Cscript%3E&model=/etc&count=4")
    warning = wrong.locator(".toast-body.warning").inner_text()
    assert all(name in warning for name in ("model", "gamma", "steps", "label")) and "4 images, 2 steps" in words(wrong)


def test_the_copied_python_makes_what_is_on_the_screen(open_page, tmp_path, monkeypatch):
    page = open_page("/?tab=sample&steps=3&gamma=0.75&seed=42&count=6")
    panel(page).get_by_text("Python that makes the same").click()
    page.wait_for_timeout(300)
    panel(page).get_by_role("button", name=re.compile("Copy", re.IGNORECASE)).first.click()
    text = page.evaluate("navigator.clipboard.readText()")
    assert "42" in text and "0.75" in text
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    exec(compile(text, "copied.py", "exec"), {})
    torch.set_num_threads(threads)
    images = [Image.open(path) for path in sorted((tmp_path / "samples").iterdir())]
    assert len(images) == 6 and np.array_equal(np.asarray(grid(images)), shown(page))


def test_a_mask_is_drawn(open_page):
    page = open_page()
    choose(page, "Inpaint")
    press(page, "Example: middle")
    before = shown(page)
    draw(page, (-1 / 4, -1 / 3), (1 / 4, -1 / 3))
    press(page, "Run")
    first, after = (picture[: len(picture) // 3, : len(picture) // 3].astype(int) for picture in (before, shown(page)))
    hidden = [(np.abs(picture - (200, 60, 160)).sum(-1) < 9).mean() for picture in (first, after)]
    assert 0.2 < hidden[0] < 0.3 and hidden[1] > hidden[0] + 0.05  # the first picture shows what is hidden
    page.screenshot(path=SCREENSHOTS / "drawn.png", full_page=True)


def test_strokes_are_drawn(open_page):
    page = open_page(width=390, height=844)
    choose(page, "Strokes")
    panel(page).get_by_role("button", name="Run").click()
    page.locator(".toast-body.error").get_by_text("Draw something first").wait_for()
    draw(page, (0, -1 / 4), (0, 1 / 4))
    press(page, "Run")
    assert "8 images" in words(page) and shown(page).max() > 200


def test_a_bad_upload_is_a_message(open_page, tmp_path):
    page = open_page()
    choose(page, "Likelihood")
    (tmp_path / "text.png").write_text("no picture")
    panel(page).locator("input[type=file]").first.set_input_files(tmp_path / "text.png")
    page.wait_for_timeout(500)
    press(page, "Run")
    page.locator(".toast-body.error").get_by_text("cannot be read").wait_for()
    choose(page, "Sample")
    move(page, "gamma", ["End"])
    assert "16 images" in words(page)


def test_another_checkpoint(open_page):
    page = open_page()
    digits = shown(page)
    page.get_by_label("Checkpoint").click()
    page.get_by_role("option", name="emoji-ctm").click()
    settle(page)
    assert not panel(page).get_by_label("Tuned schedule").is_visible()  # it carries none
    emoji = shown(page)
    assert emoji.shape != digits.shape or not np.array_equal(emoji, digits)
    assert (emoji[..., 0] != emoji[..., 2]).any() and "model=emoji-ctm" in page.url  # it has colors
    panel(page).get_by_label("Class").click()
    page.get_by_role("option", name="flags").click()
    settle(page)
    assert not np.array_equal(shown(page), emoji)
    other = open_page(page.url[page.url.index("/?") :])
    assert np.array_equal(shown(page), shown(other)) and "CC BY 4.0" in other.locator("body").inner_text()
