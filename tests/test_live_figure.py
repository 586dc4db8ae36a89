"""Live figures: what the HTML holds, read back and held against the numbers."""

import json
from html.parser import HTMLParser
from itertools import product

import numpy as np
import pytest

from implicit_layers.plotting import COLOURS, Axis, live_figure

SLIDERS = {"a": [-1.0, 0.5, 1.0], "b": (10, 20)}
STYLES = {
    "line": ("currentColor", "line"),
    "fixed": (COLOURS["theory"], "dashed"),
    "points": (COLOURS["newton"], "dots"),
    "roots": (COLOURS["implicit"], "rings"),
}
ALT = "A line, a constant and some points."
AXES = Axis("time (s)", -2, 2), Axis("height (m)", 0, 40)
X = np.linspace(-2, 2, 9)


def frame(a, b):
    curves = {
        "line": (X, 20 + a * b * X / 4),
        "fixed": (X, np.full(9, 5.0)),
        "points": ([a], [b]),
        "roots": (np.arange(a), np.arange(a)),  # as many as there are
    }
    return curves, f"slope {a * b:g}"


def figure(sliders=SLIDERS, styles=STYLES, axes=AXES, frame=frame, **options):
    return live_figure(frame, sliders, styles, *axes, **{"alt": ALT} | options).data


class Reader(HTMLParser):
    """The elements of the figure in their order: name, attributes, text."""

    def __init__(self, html):
        super().__init__()
        self.elements = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))

    def handle_data(self, data):
        if self.elements:
            self.elements[-1][2].append(data)

    def all(self, tag):
        return [(a, "".join(t).strip()) for name, a, t in self.elements if name == tag]


def stored(html):
    (data,) = [t for a, t in Reader(html).all("script") if a.get("type")]
    return json.loads(data)


def pixels(curve, position):
    """x and y of a curve at a position of the sliders, in pixels of the axes."""
    return tuple(
        np.array(
            curve[c]["texts"][int(curve[c]["at"].split()[position])].split(), float
        )
        for c in "xy"
    )


def size(html):
    _, inner = [a for a, _ in Reader(html).all("svg") if "aria-hidden" not in a]
    return float(inner["width"]), float(inner["height"])


def test_every_frame_is_stored_in_pixels_of_its_axes():
    html = figure()
    data, (width, height) = stored(html), size(html)
    for position, (a, b) in enumerate(product(*SLIDERS.values())):
        curves, says = frame(a, b)
        assert data["says"][position] == says
        for curve, name in zip(data["curves"], STYLES, strict=True):
            xs, ys = pixels(curve, position)
            x, y = (np.asarray(values, float) for values in curves[name])
            assert np.abs(xs - width * (x + 2) / 4).max(initial=0) < 0.051
            assert np.abs(ys - height * (1 - y / 40)).max(initial=0) < 0.051
            assert len(xs) == len(x)


def test_logarithmic_axis():
    y = np.array([1e-8, 1e-5, 1e-2, 0.0, -1.0])
    html = figure(
        {"a": (1, 2)},
        {"r": ("red", "line")},
        (Axis("k", 0, 4), Axis("residual", 1e-8, 1e-2, log=True)),
        lambda a: ({"r": (np.arange(5), y)}, "falls"),
    )
    _, ys = pixels(stored(html)["curves"][0], 0)
    height = size(html)[1]
    assert np.allclose(ys, [height, height / 2, 0, np.nan, np.nan], equal_nan=True)
    texts = [text for _, text in Reader(html).all("text")]
    assert {"10⁻⁸", "10⁻²"} <= {*texts}


def test_gap_where_there_is_no_number_and_far_outside():
    y = np.array([1.0, np.nan, 2.0, 3.0, np.inf, 1e9, 4.0])
    styles = {"line": ("red", "line"), "dots": ("red", "dots")}
    html = figure(
        {"a": (1, 2)},
        styles,
        (Axis("x", 0, 6), Axis("y", 0, 4)),
        lambda a: ({name: (np.arange(7), y) for name in styles}, "gaps"),
    )
    for curve in stored(html)["curves"]:
        assert np.isnan(pixels(curve, 0)[1]).tolist() == [0, 1, 0, 0, 1, 1, 0]
    ds = [a["d"] for a, _ in Reader(html).all("path")][2:]  # after the legend's two
    assert [d.count("M") for d in ds] == [3, 4]
    assert [d.count("L") for d in ds] == [1, 0]
    assert "nan" not in "".join(ds)


def test_equal_curves_are_stored_once():
    line, fixed, *_ = stored(figure())["curves"]
    assert len(line["y"]["texts"]) == 5  # a b is 10 twice
    assert len(line["x"]["texts"]) == len(fixed["y"]["texts"]) == 1


def test_figure_without_script_is_the_frame_of_the_start():
    for start in product(*SLIDERS.values()):
        html = figure(start=start)
        reader, data = Reader(html), stored(html)
        position = [*product(*SLIDERS.values())].index(start)
        assert [t for _, t in reader.all("output")] == [data["says"][position]]
        knobs = [attributes for attributes, _ in reader.all("input")]
        assert [int(knob["value"]) for knob in knobs] == [
            [*values].index(value)
            for values, value in zip(SLIDERS.values(), start, strict=True)
        ]
        assert all("disabled" in knob for knob in knobs)  # nothing moves yet
        d = [a["d"] for a, _ in reader.all("path")][len(STYLES)]
        xs, ys = pixels(data["curves"][0], position)
        points = [part.split() for part in d[1:].split("L")]
        assert np.array(points, float).tolist() == np.transpose([xs, ys]).tolist()


def test_ticks_stand_at_their_values():
    html = figure()
    (outer, inner), reader = size(html), Reader(html)
    left, top = (
        float(next(a[c] for a, _ in reader.all("svg") if c in a)) for c in ("x", "y")
    )
    ticks = [(a, t.replace("\N{MINUS SIGN}", "-")) for a, t in reader.all("text")]
    xs = {
        float(t): float(a["x"])
        for a, t in ticks
        if a.get("text-anchor") == "middle" and t.lstrip("-").replace(".", "").isdigit()
    }
    ys = {float(t): float(a["y"]) for a, t in ticks if a.get("text-anchor") == "end"}
    assert {-2, 0, 2} <= {*xs} and {0, 20, 40} <= {*ys}
    assert all(abs(at - left - outer * (v + 2) / 4) < 0.06 for v, at in xs.items())
    assert all(abs(at - top - inner * (1 - v / 40)) < 0.06 for v, at in ys.items())


def test_equal_scale():
    width, height = size(figure(axes=(AXES[0], Axis("z", -1, 2)), equal=True))
    assert width / 4 == pytest.approx(height / 3)


@pytest.mark.parametrize(("low", "high"), [(-1, 2), (0, 30), (-0.1, 0.1)])
def test_equal_scale_is_no_wider_or_higher_than_a_page_has_room_for(low, high):
    axes = AXES[0], Axis("z", low, high)
    width, height = size(figure(axes=axes, equal=True))
    assert width / height == pytest.approx(4 / (high - low))
    other, _ = size(figure())
    assert width <= other * (1 + 1e-9) and height <= 318 * (1 + 1e-9)
    assert width == pytest.approx(other) or height == pytest.approx(318)


def test_names_for_who_does_not_see_it():
    reader = Reader(figure(alt='An "x" < 2 & more of it.'))
    (drawing, *_) = [a for a, _ in reader.all("svg") if "viewbox" in a]
    assert drawing["role"] == "img"
    assert drawing["aria-label"] == 'An "x" < 2 & more of it.'
    assert [text.split(" =")[0] for _, text in reader.all("label")] == [*SLIDERS]
    assert [a["aria-valuetext"] for a, _ in reader.all("input")] == ["−1", "10"]  # noqa: RUF001
    assert {"time (s)", "height (m)"} <= {text for _, text in reader.all("text")}


def test_whatever_is_written_stays_text():
    evil = "</script><b>&"
    html = figure(
        {evil: (1, 2)},
        {evil: ("red", "line")},
        (Axis(evil, 0, 1), Axis(evil, 0, 1)),
        lambda a: ({evil: ([0, 1], [0, 1])}, evil),
    )
    assert stored(html)["says"] == [evil, evil]
    assert html.count("</script>") == 2 and html.count("<b>") == 1


def test_figure_is_the_same_each_time_and_asks_nobody():
    assert figure() == figure()
    assert not [x for x in ("http", "//", "src=", "url(", "import") if x in figure()]


def test_numbers_are_seen_as_numbers_by_the_check_of_outputs():
    from notebook_check import text_differences

    html = figure()
    pixel = stored(html)["curves"][0]["y"]["texts"][0].split()[0]
    moved = html.replace(f'"{pixel} ', f'"{float(pixel) + 0.1:.1f} ')
    assert moved != html
    assert [*text_differences(html, moved, {})] == []
    moved = html.replace(f'"{pixel} ', f'"{float(pixel) + 0.3:.1f} ')
    assert "differs from" in "".join(text_differences(html, moved, {}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sliders": {}}, "one slider or two"),
        ({"sliders": {"a": (1, 2), "b": (1, 2), "c": (1, 2)}}, "one slider or two"),
        ({"sliders": {"a": (1,), "b": (1, 2)}}, "of two values or more"),
        ({"start": (0.0, 10)}, "is no position of the sliders"),
        ({"start": (0.5,)}, "is no position of the sliders"),
        ({"styles": {"line": ("red", "dotted")}}, "rings, not dotted"),
        ({"styles": STYLES | {"more": ("red", "line")}}, r"'roots'\], not \['line'"),
        ({"styles": {"line": ("red", "line")}}, r"not \['line'\]"),
        ({"alt": "a figure"}, "20 characters or more, not 'a figure'"),
    ],
)
def test_bad_figure_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        figure(**options)


def test_unequal_lengths_are_refused():
    curves = {"line": (X, X[:-1])}
    with pytest.raises(ValueError, match="x and y of 'line' must be equally long"):
        figure(
            {"a": (1, 2)}, {"line": ("red", "line")}, frame=lambda a: (curves, "short")
        )


def test_large_figure_is_refused():
    x = np.linspace(-2, 2, 9000)
    with pytest.raises(ValueError, match=r"bytes, more than 150,000: give it fewer"):
        figure(
            {"a": range(2)},
            {"line": ("red", "line")},
            frame=lambda a: ({"line": (x, 20 + a * x)}, "long"),
        )


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [
        (1, 1, False),
        (2, 1, False),
        (0, np.inf, False),
        (np.nan, 1, False),
        (0, 1, True),
    ],
)
def test_bad_axis_is_refused(low, high, log):
    with pytest.raises(ValueError, match=r"the axis 'x' goes from .* to"):
        Axis("x", low, high, log)
