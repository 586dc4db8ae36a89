"""Tables as text, and colours and figures by the numbers of what is drawn."""

import io
import itertools

import matplotlib as mpl
import matplotlib.image
import numpy as np
import pytest
from IPython.display import Markdown
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from implicit_layers.plotting import COLOURS, label_line, table, use_book_style

# Machado, Oliveira and Fernandes (2009), full severity, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
}
TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def linear(colour):
    """Undo the gamma of sRGB."""
    channels = np.array(to_rgb(colour))
    curve = ((channels + 0.055) / 1.055) ** 2.4
    return np.where(channels <= 0.04045, channels / 12.92, curve)


def contrast_with_white(colour):
    """Contrast ratio of WCAG 2, from 1 to 21."""
    return 1.05 / (TO_XYZ[1] @ linear(colour) + 0.05)


def lab(colour, vision):
    """Colour in CIE L*a*b* as it is seen, relative to white."""
    seen = np.clip(VISION[vision] @ linear(colour), 0, 1)
    x, y, z = np.cbrt(TO_XYZ @ seen / TO_XYZ.sum(axis=1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.fixture
def book_style():
    with mpl.rc_context():
        mpl.rcdefaults()
        use_book_style()
        yield


def picture(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png")
    file.seek(0)
    return matplotlib.image.imread(file)


def test_table_is_markdown_with_the_first_column_left():
    shown = table(
        {"method": ["newton", "implicit"], "error": ["1.9 %", 2], "s": [3, 4]}
    )
    assert isinstance(shown, Markdown)
    assert shown.data == (
        "| method | error | s |\n"
        "| :-- | --: | --: |\n"
        "| newton | 1.9 % | 3 |\n"
        "| implicit | 2 | 4 |"
    )


def test_table_without_rows_keeps_its_head():
    assert table({"a": [], "b": []}).data == "| a | b |\n| :-- | --: |"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": [1, 2], "b": [3]}, r"equally many cells each, got {'a': 2, 'b': 1}"),
        ({}, "one column or more .* got {}"),
        ({"a": ["$|z|$"]}, r"the cell '\$\|z\|\$' would break the table"),
        ({"a|b": [1]}, r"the cell 'a\|b' would break the table"),
        ({"a": ["two\nlines"]}, r"the cell 'two\\nlines' would break the table"),
    ],
)
def test_table_that_would_come_out_wrong_is_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        table(columns)


def test_all_colours_but_one_stand_out_from_white():
    # Orange has 2.2: the palette needs a light colour to be safe for the colour-blind.
    faint = [name for name, c in COLOURS.items() if contrast_with_white(c) < 3]
    assert faint == ["explicit"]
    assert contrast_with_white(COLOURS["explicit"]) > 2


@pytest.mark.parametrize("vision", VISION)
def test_any_two_colours_can_be_told_apart(vision):
    # A difference of 2.3 is just noticeable side by side; thin lines need far more.
    differences = {
        (a, b): np.linalg.norm(lab(COLOURS[a], vision) - lab(COLOURS[b], vision))
        for a, b in itertools.combinations(COLOURS, 2)
    }
    assert {pair: d for pair, d in differences.items() if d < 10} == {}


@pytest.mark.usefixtures("book_style")
def test_figure_is_opaque_and_has_the_size_of_the_book():
    figure = Figure()
    figure.subplots().plot([0, 1], [0, 1])
    pixels = picture(figure)
    assert pixels.shape == (408, 768, 4)  # 3.4 by 6.4 inches at 120 dots
    assert (pixels[..., 3] == 1).all()
    assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 1).all()


@pytest.mark.usefixtures("book_style")
def test_lines_take_the_colours_in_their_order():
    axes = Figure().subplots()
    lines = [axes.plot([0, 1])[0] for _ in COLOURS]
    assert [to_hex(line.get_color()).upper() for line in lines] == [*COLOURS.values()]


@pytest.mark.usefixtures("book_style")
def test_label_stands_above_and_right_of_its_point_in_the_given_colour():
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 10], [0, 10])
    label_line(axes, 4, 5, "newton", COLOURS["newton"])
    picture(figure)
    (label,) = axes.texts
    assert (label.get_text(), label.get_color()) == ("newton", COLOURS["newton"])
    box, (x, y) = label.get_window_extent(), axes.transData.transform((4, 5))
    assert 0 < box.x0 - x < 20
    assert 0 < box.y0 - y < 20
