"""The book's one look: colours, figure style, tables, figures with sliders."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from IPython.display import HTML, Markdown
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import ArrayLike

#: One colour a method in every chapter, from the colour-blind-safe palette
#: of Okabe and Ito, and grey for theory.
COLOURS = {
    "fixed point": "#0072B2",
    "newton": "#D55E00",
    "implicit": "#009E73",
    "explicit": "#E69F00",
    "theory": "#6E6E6E",
    "highlight": "#CC79A7",
}


def use_book_style() -> None:
    """Set matplotlib's defaults to the book's: opaque, quiet, 120 dots per inch."""
    plt.rcParams.update(
        {
            "figure.figsize": (6.4, 3.4),
            "figure.dpi": 120,
            "savefig.dpi": 120,
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.prop_cycle": cycler(color=list(COLOURS.values())),
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "grid.color": "#E4E4E4",
            "lines.linewidth": 1.8,
            "legend.frameon": False,
            "font.size": 10,
        }
    )


def label_line(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    """Write the name of a line next to it, in its colour.

    Parameters
    ----------
    axes
        Where to write.
    x, y
        The point of the line that is labelled, in data coordinates; the text stands
        a little above and to the right of it.
    text, colour
        What to write, and the colour of the line.
    """
    axes.annotate(
        text, (x, y), (4, 4), textcoords="offset points", color=colour, weight="bold"
    )


def table(columns: Mapping[str, Sequence[object]]) -> Markdown:
    """Lay out columns as a Markdown table, first column left, the others right.

    Parameters
    ----------
    columns
        Heading and cells of each column, at least one; the cells are shown by `str`.

    Returns
    -------
    Markdown
        To be displayed as the value of a notebook cell.

    Raises
    ------
    ValueError
        If the columns differ in length, there is none, or a cell would break the table.
    """
    if len({len(cells) for cells in columns.values()}) != 1:
        lengths = {name: len(cells) for name, cells in columns.items()}
        raise ValueError(
            f"give one column or more with equally many cells each, got {lengths}"
        )
    rules = [":--"] + ["--:"] * (len(columns) - 1)
    rows = [list(columns), rules, *zip(*columns.values(), strict=True)]
    texts = [[str(cell) for cell in row] for row in rows]
    if broken := [text for row in texts for text in row if "|" in text or "\n" in text]:
        raise ValueError(
            f"the cell {broken[0]!r} would break the table: "
            r"write \vert or \Vert for a bar, and no line break"
        )
    lines = ["| " + " | ".join(row) + " |" for row in texts]
    return Markdown("\n".join(lines))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Axis:
    """An axis of a live figure: what it shows, and from where to where.

    Attributes
    ----------
    label
        Quantity and unit.
    low, high
        The ends; what lies beyond is not drawn.
    log
        Whether the scale is logarithmic. Then both ends must be positive.
    """

    label: str
    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (0 if self.log else -np.inf) < self.low < self.high < np.inf:
            raise ValueError(
                f"the axis {self.label!r} goes from {self.low} to {self.high}: give "
                "finite ends in ascending order, on a logarithmic scale positive ones"
            )

    def _ticks(self) -> dict[str, float]:
        """Give a few round values of the axis, and what to write beside them."""
        if self.log:
            values = LogLocator(numticks=7).tick_values(self.low, self.high)
            write = _power_of_ten
        else:
            steps = MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10])
            values, write = steps.tick_values(self.low, self.high), _number
        near = 1e-9
        return {write(v): v for v in values if -near <= self._place(v) <= 1 + near}

    def _place(self, values: ArrayLike) -> np.ndarray:
        """Map values to fractions of the axis: `low` to 0 and `high` to 1."""
        scale = np.log10 if self.log else np.asarray
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high, places = (scale(a) for a in (self.low, self.high, values))
        return (places - low) / (high - low)


def _number(value: float) -> str:
    return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")


def _power_of_ten(value: float) -> str:
    raised = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return "10" + f"{np.log10(value):.0f}".translate(raised)


# What follows each point of a path: nothing, where a line joins it to the next; a
# stroke of no length, whose round ends make a dot; two half circles.
_SHAPES = {
    "line": "",
    "dashed": "",
    "dots": "h0",
    "rings": "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
}
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 12, 50  # pixels around the axes
_MAX_BYTES = 150_000
# The style and the script of every live figure. Both follow the figure itself.
_BEHAVIOUR = Path(__file__).with_name("live_figure.html")


def _pixels(places: np.ndarray, start: float, length: float) -> str:
    """Write pixels with one decimal; what is not finite, or far outside, is a gap."""
    seen = np.abs(places - 0.5) < 20
    pixels = np.where(seen, start + length * places, np.nan).round(1) + 0.0  # no -0.0
    return " ".join(f"{pixel:.1f}" for pixel in pixels)


def _trace(xs: str, ys: str, shape: str) -> str:
    """Join pixels to the `d` of an SVG path, as the script of the figure does."""
    d, pen = "", "M"
    for x, y in zip(xs.split(), ys.split(), strict=True):
        gap = "nan" in (x, y)
        d += "" if gap else f"{pen}{x} {y}{shape}"
        pen = "M" if gap or shape else "L"
    return d


def _each_once(texts: Sequence[str]) -> dict[str, object]:
    """Keep equal texts once, and which of them stands `at` each position."""
    kept = {text: str(i) for i, text in enumerate(dict.fromkeys(texts))}
    return {"at": " ".join(kept[text] for text in texts), "texts": [*kept]}


def _text(x: float | str, y: float | str, text: str, more: str) -> str:
    return f'<text x="{x}" y="{y}" {more}>{escape(text)}</text>'


def _drawing(
    x: Axis, y: Axis, width: float, height: float, alt: str, paths: Sequence[str]
) -> str:
    """Draw paths between axes of the given length in pixels."""
    right, bottom = _LEFT + width, _TOP + height
    size = f"{right + _RIGHT:g} {bottom + _BOTTOM:g}"
    centred = 'text-anchor="middle"'
    parts = [f'<svg viewBox="0 0 {size}" role="img" aria-label="{escape(alt)}">']
    for text, value in x._ticks().items():
        at = f"{_LEFT + width * x._place(value):.1f}"
        parts += [f'<line x1="{at}" x2="{at}" y1="{_TOP}" y2="{bottom:g}"/>']
        parts += [_text(at, bottom + 17, text, centred)]
    for text, value in y._ticks().items():
        at = f"{bottom - height * y._place(value):.1f}"
        parts += [f'<line x1="{_LEFT}" x2="{right:g}" y1="{at}" y2="{at}"/>']
        parts += [_text(_LEFT - 6, at, text, 'dy="0.35em" text-anchor="end"')]
    turned = f'transform="translate(16 {_TOP + height / 2:g}) rotate(-90)" {centred}'
    parts += [_text(f"{_LEFT + width / 2:g}", bottom + 40, x.label, centred)]
    parts += [_text(0, 0, y.label, turned)]
    inner = f'x="{_LEFT}" y="{_TOP}" width="{width:g}" height="{height:g}"'
    return "\n".join([*parts, f"<svg {inner}>", *paths, "</svg>", "</svg>"])


def _path(mark: str, colour: str, d: str) -> str:
    return f'<path class="{mark}" stroke="{colour}" d="{d}"/>'


def _legend(styles: Mapping[str, tuple[str, str]]) -> str:
    """List the curves, each with a piece of its line or a point of it."""
    items = []
    for name, (colour, mark) in styles.items():
        xs, ys = ("13.0", "6.0") if _SHAPES[mark] else ("2.0 24.0", "6.0 6.0")
        sample = _path(mark, colour, _trace(xs, ys, _SHAPES[mark]))
        svg = f'<svg width="26" height="12" aria-hidden="true">{sample}</svg>'
        items.append(f"<li>{svg} {escape(name)}</li>")
    return "\n".join(["<ul>", *items, "</ul>"])


def _slider(name: str, values: Sequence[float], value: float) -> str:
    return (
        f"<label>{escape(name)} = <b>{_number(value)}</b>"
        f'<input type="range" max="{len(values) - 1}" value="{[*values].index(value)}"'
        f' aria-valuetext="{_number(value)}" disabled></label>'
    )


def _refuse_bad_figure(
    sliders: Mapping[str, Sequence[float]],
    styles: Mapping[str, tuple[str, str]],
    start: Sequence[float],
    alt: str,
) -> None:
    if not 1 <= len(sliders) <= 2 or min(map(len, sliders.values())) < 2:
        raise ValueError(f"give one slider or two, of two values or more: {sliders}")
    if start and tuple(start) not in itertools.product(*sliders.values()):
        raise ValueError(f"start={start} is no position of the sliders {sliders}")
    if unknown := {shape for _, shape in styles.values()} - {*_SHAPES}:
        raise ValueError(f"shapes are {', '.join(_SHAPES)}, not {', '.join(unknown)}")
    if len(alt.strip()) < 20:
        raise ValueError(f"describe the figure in 20 characters or more, not {alt!r}")


def _refuse_bad_curves(
    curves: Mapping[str, Any], styles: Mapping[str, tuple[str, str]]
) -> None:
    if {*curves} != {*styles}:
        raise ValueError(f"a frame has the curves {[*curves]}, not {[*styles]}")
    for name, points in curves.items():
        if len(shapes := {np.shape(axis) for axis in points}) > 1:
            raise ValueError(f"x and y of {name!r} must be equally long, not {shapes}")


def live_figure(
    frame: Callable[..., tuple[Mapping[str, Any], str]],
    sliders: Mapping[str, Sequence[float]],
    styles: Mapping[str, tuple[str, str]],
    x: Axis,
    y: Axis,
    *,
    alt: str,
    start: Sequence[float] = (),
    equal: bool = False,
) -> HTML:
    """Make a figure with sliders from frames that are all computed here and now.

    The page then needs no kernel, no library and no network: the result holds the
    frames and a short script. Without the script, or on paper, it shows one frame.

    Parameters
    ----------
    frame
        Called with one value of each slider, for all combinations. Returns the curves,
        x (n,) and y (n,) by the names in `styles`, and a sentence that says what there
        is to see. Where a value is not finite, the curve has a gap.
    sliders
        Name and values, two or more, of one slider or of two.
    styles
        Colour and shape of each curve. The colour ``"currentColor"`` is that of the
        text; the shape is ``"line"``, ``"dashed"``, ``"dots"`` or ``"rings"``.
    x, y
        The axes, the same in all frames.
    alt
        What the figure shows, for those who do not see it, in 20 characters or more.
    start
        Where the sliders stand first, as values of theirs; the first ones by default.
    equal
        Whether both axes have the same scale.

    Returns
    -------
    HTML
        To be displayed as the value of a notebook cell.

    Raises
    ------
    ValueError
        If there are no sliders or more than two, `start` is none of their positions, a
        shape is unknown, a frame has other curves than `styles`, x and y of one differ
        in length, `alt` is too short, or the figure would exceed 150 kB.
    """
    _refuse_bad_figure(sliders, styles, start, alt)
    positions = [*itertools.product(*sliders.values())]
    start = tuple(start) or positions[0]
    now = positions.index(start)
    frames = [frame(*position) for position in positions]
    for curves, _ in frames:
        _refuse_bad_curves(curves, styles)
    says = [sentence for _, sentence in frames]
    width, height = 402.0, 238.0
    if equal:  # as large as fits: a wider one would shrink its words on a phone
        across, up = x.high - x.low, y.high - y.low
        unit = min(width / across, 318.0 / up)
        width, height = unit * across, unit * up
    paths, traces = [], []
    for name, (colour, mark) in styles.items():
        points = [drawn[name] for drawn, _ in frames]
        xs = [_pixels(x._place(a), 0, width) for a, _ in points]
        ys = [_pixels(y._place(b), height, -height) for _, b in points]
        shape = _SHAPES[mark]
        paths.append(_path(mark, colour, _trace(xs[now], ys[now], shape)))
        traces.append({"shape": shape, "x": _each_once(xs), "y": _each_once(ys)})
    texts = [[_number(value) for value in values] for values in sliders.values()]
    data = {"values": texts, "says": says, "curves": traces}
    knobs = zip(sliders, sliders.values(), start, strict=True)
    parts = [
        f'<figure class="live-figure" style="max-width: {1.35 * width + 105:.0f}px">',
        *(_slider(*knob) for knob in knobs),
        _legend(styles),
        _drawing(x, y, width, height, alt, paths),
        f"<output>{escape(says[now])}</output>",
        '<script type="application/json">',
        json.dumps(data, ensure_ascii=False, indent=0).replace("<", "\\u003c"),
        "</script>",
        "</figure>",
        _BEHAVIOUR.read_text(encoding="utf-8").strip(),
    ]
    html = "\n".join(parts)
    if (size := len(html.encode())) > _MAX_BYTES:
        raise ValueError(
            f"the figure has {size:,} bytes, more than {_MAX_BYTES:,}: give it fewer "
            "positions, or its curves fewer points"
        )
    return HTML(html)  # type: ignore[no-untyped-call]
