"""The book's one look: colours, figure style, tables."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from cycler import cycler
from IPython.display import Markdown
from matplotlib.axes import Axes

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
