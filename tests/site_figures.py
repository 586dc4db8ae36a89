"""Live figures in a real browser: `python -m pytest tests/site_figures.py`.

What a figure must show comes from the output stored in the notebook, decoded here by
itself, and what it shows is read off the page.
"""

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import pytest
from playwright.sync_api import Browser, Locator, Page
from site_check import ROOT, SITE, browser, served

__all__ = ["browser"]  # a fixture
INDEX = ROOT / "chapters" / "index.md"


def live_outputs(notebook: Path) -> dict[str, str]:
    """The stored live figures of a notebook, by the ids of their cells."""
    cells = nbformat.read(notebook, as_version=4).cells
    outputs = [(c["id"], o) for c in cells for o in c.get("outputs", [])]
    found = {id: o.get("data", {}).get("text/html", "") for id, o in outputs}
    return {id: html for id, html in found.items() if 'class="live-figure"' in html}


def figures() -> Iterator[tuple[str, int, str]]:
    """Page, number on the page and HTML of each live figure in the book."""
    for path in sorted((ROOT / "chapters").glob("*.ipynb")):
        for number, html in enumerate(live_outputs(path).values()):
            yield f"chapters/{path.stem}.html", number, html
    borrowed = re.findall(r"\{live-output\} (\S+) (\S+)", INDEX.read_text())
    for number, (name, id) in enumerate(borrowed):
        yield "chapters/index.html", number, live_outputs(INDEX.parent / name)[id]


FIGURES = [*figures()]
each_figure = pytest.mark.parametrize(("page", "number", "html"), FIGURES)
SAMPLE = min((html for _, _, html in FIGURES), key=len)


def stored(html: str) -> Any:
    return json.loads(
        re.findall(r'"application/json">\n(.*?)\n</script', html, re.S)[0]
    )


def expected(html: str, position: int) -> list[list[list[float]]]:
    """The points of each curve of one frame."""
    curves = []
    for curve in stored(html)["curves"]:
        xs, ys = (
            curve[c]["texts"][int(curve[c]["at"].split()[position])].split()
            for c in "xy"
        )
        points = zip(xs, ys, strict=True)
        curves.append([[float(x), float(y)] for x, y in points if "nan" not in (x, y)])
    return curves


def shown(figure: Locator) -> list[list[list[float]]]:
    """The points of each curve on the page: where the pen is set, or moves to."""
    ds = figure.evaluate(
        "f => [...f.querySelectorAll(':scope > svg svg path')]"
        ".map(path => path.getAttribute('d'))"
    )
    number = r"(-?[\d.]+)"
    pairs = [re.findall(rf"[ML]{number} {number}", d) for d in ds]
    return [[[float(x), float(y)] for x, y in points] for points in pairs]


@contextmanager
def opened(
    browser: Browser, page: str, folder: Path = SITE, **options: Any
) -> Iterator[Page]:
    options = {"viewport": {"width": 390, "height": 800}} | options
    context = browser.new_context(**options)
    with served(folder) as site:
        # formulas take most of the time, and are not looked at here
        context.route("**/_mathjax/**", lambda route: route.abort())
        tab = context.new_page()
        tab.goto(site + page)
        yield tab
    context.close()


def agrees(figure: Locator, html: str, places: tuple[int, ...]) -> bool:
    """Whether picture, sentence and sliders say the same, that of these places."""
    data = stored(html)
    position = 0
    for place, values in zip(places, data["values"], strict=True):
        position = position * len(values) + place
    names = [
        values[place] for place, values in zip(places, data["values"], strict=True)
    ]
    knobs = figure.locator("input").all()
    return (
        shown(figure) == expected(html, position)
        and figure.locator("output").inner_text() == data["says"][position]
        and [knob.get_attribute("aria-valuetext") for knob in knobs] == names
        and figure.locator("label b").all_inner_texts() == names
    )


@each_figure
def test_keys_lead_through_all_frames(
    browser: Browser, page: str, number: int, html: str
) -> None:
    with opened(browser, page) as tab:
        figure = tab.locator(".live-figure").nth(number)
        knobs = figure.locator("input").all()
        last = [len(values) - 1 for values in stored(html)["values"]]
        for knob in knobs:
            knob.press("Home")
        assert agrees(figure, html, (0,) * len(knobs))
        pictures = set()
        for place in range(1, last[0] + 1):
            knobs[0].press("ArrowRight")
            assert agrees(figure, html, (place, *[0] * (len(knobs) - 1)))
            pictures.add(str(shown(figure)))
        assert len(pictures) > 1
        for knob in knobs:
            knob.press("End")
        assert agrees(figure, html, tuple(last))


@each_figure
def test_mouse_and_finger_set_a_slider(
    browser: Browser, page: str, number: int, html: str
) -> None:
    with opened(browser, page, has_touch=True) as tab:
        figure = tab.locator(".live-figure").nth(number)
        last = [len(values) - 1 for values in stored(html)["values"]]
        for knob, (share, act) in itertools.product(
            figure.locator("input").all(), ((0.02, "click"), (0.98, "tap"))
        ):
            box = knob.bounding_box()
            assert box and box["height"] >= 24 and box["width"] >= 100
            spot = {"x": share * box["width"], "y": box["height"] / 2}
            getattr(knob, act)(position=spot)
            place = 0 if share < 0.5 else int(knob.get_attribute("max") or 0)
            assert int(knob.input_value()) == place
        assert agrees(figure, html, tuple(last))


def test_figures_of_a_page_do_not_disturb_each_other(browser: Browser) -> None:
    pages = [page for page, _, _ in FIGURES]
    page = max({*pages}, key=pages.count)
    assert pages.count(page) > 1
    with opened(browser, page) as tab:
        figures = tab.locator(".live-figure").all()
        for moved in figures:
            before = [shown(figure) for figure in figures]
            knob = moved.locator("input").first
            knob.press("Home" if knob.input_value() != "0" else "End")
            for figure, points in zip(figures, before, strict=True):
                assert (shown(figure) != points) == (figure is moved)


def test_the_same_figure_twice(browser: Browser, tmp_path: Path) -> None:
    start = "<!DOCTYPE html><title>Twice</title><link rel='icon' href='data:,'>"
    (tmp_path / "page.html").write_text(f"{start}{SAMPLE}{SAMPLE}", encoding="utf-8")
    with opened(browser, "page.html", tmp_path) as tab:
        first, second = tab.locator(".live-figure").all()
        first.locator("input").first.press("End")
        assert shown(first) != shown(second)
        second.locator("input").first.press("End")
        assert shown(first) == shown(second)


def test_alone_in_a_frame_as_notebooks_show_it(
    browser: Browser, tmp_path: Path
) -> None:
    (tmp_path / "page.html").write_text(
        "<!DOCTYPE html><title>Frame</title><link rel='icon' href='data:,'>"
        "<iframe sandbox='allow-scripts' src='figure.html' width='380' height='600'>"
    )
    (tmp_path / "figure.html").write_text(f"<body>{SAMPLE}", encoding="utf-8")
    with opened(browser, "page.html", tmp_path) as tab:
        figure = tab.frame_locator("iframe").locator(".live-figure")
        for knob in figure.locator("input").all():
            knob.press("End")
        last = tuple(len(values) - 1 for values in stored(SAMPLE)["values"])
        assert agrees(figure, SAMPLE, last)


@each_figure
def test_without_script_it_is_its_first_frame(
    browser: Browser, page: str, number: int, html: str
) -> None:
    with opened(browser, page, java_script_enabled=False) as tab:
        figure = tab.locator(".live-figure").nth(number)
        assert figure.locator(":scope > svg").is_visible()
        assert figure.locator("output").inner_text() in stored(html)["says"]
        assert all(knob.is_disabled() for knob in figure.locator("input").all())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@each_figure
def test_lines_and_words_stand_out_and_fit(
    browser: Browser, page: str, number: int, html: str, scheme: Any
) -> None:
    with opened(browser, page, color_scheme=scheme) as tab:
        figure = tab.locator(".live-figure").nth(number)
        seen = figure.evaluate(
            """figure => {
              let ground = figure, fill;
              do fill = getComputedStyle(ground).backgroundColor;
              while (/, 0\\)/.test(fill) && (ground = ground.parentElement));
              const text = [...figure.querySelectorAll("text")];
              const boxes = text.map(t => t.getBoundingClientRect());
              const paths = figure.querySelectorAll(":scope > svg svg path");
              return {
                fill,
                colours: text.map(t => getComputedStyle(t).fill),
                strokes: [...paths].map(path => getComputedStyle(path).stroke),
                heights: text.map(t => parseFloat(getComputedStyle(t).fontSize)
                  * t.getScreenCTM().a || 99),
                left: Math.min(...boxes.map(box => box.left)),
                right: Math.max(...boxes.map(box => box.right)),
                width: document.documentElement.clientWidth,
              };
            }"""
        )
        ground = luminance(seen["fill"])
        assert min(contrast(luminance(c), ground) for c in seen["colours"]) >= 4.5
        assert min(contrast(luminance(c), ground) for c in seen["strokes"]) >= 3
        assert min(seen["heights"]) >= 9.5
        assert seen["left"] >= 0
        assert seen["right"] <= seen["width"]


def luminance(colour: str) -> float:
    """Relative luminance of a colour that the browser gives as rgb(r, g, b)."""
    channels = [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]
    linear = [
        c / 12.92 if c <= 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: float, b: float) -> float:
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)


def test_on_paper_it_is_a_picture(browser: Browser) -> None:
    page, number, _ = FIGURES[0]
    with opened(browser, page) as tab:
        tab.emulate_media(media="print")
        figure = tab.locator(".live-figure").nth(number)
        assert figure.locator(":scope > svg").is_visible()
        assert figure.locator("label").first.is_visible()
        assert not figure.locator("input").first.is_visible()


def test_the_book_has_live_figures() -> None:
    pages = [page for page, _, _ in FIGURES]
    assert pages.count("chapters/index.html") == 1
    assert pages.count("chapters/introduction.html") >= 3
    assert pages.count("chapters/implicit_functions.html") >= 2
