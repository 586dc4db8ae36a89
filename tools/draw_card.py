"""Draw the picture of link previews, _static/card.png: `python tools/draw_card.py`."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from implicit_layers.plotting import COLOURS, use_book_style

CARD = Path(__file__).resolve().parent.parent / "_static" / "card.png"
# the size that link previews are made for, in inches at 100 dots each
WIDTH, HEIGHT = 12.0, 6.3


def cobweb(slope: float, start: float, steps: int) -> tuple[list[float], list[float]]:
    """Follow z = tanh(slope z) from a start: to the curve, then to the diagonal."""
    across, up = [start], [0.0]
    for _ in range(steps):
        z = float(np.tanh(slope * across[-1]))
        across += [across[-1], z]
        up += [z, z]
    return across, up


def main() -> None:
    """Draw the card."""
    use_book_style()
    figure = plt.figure(figsize=(WIDTH, HEIGHT), layout="none")
    axes = figure.add_axes((0.60, 0.14, 0.36, 0.36 * WIDTH / HEIGHT))
    z = np.linspace(-0.05, 1.05, 200)
    axes.plot(z, z, color=COLOURS["theory"], linewidth=2)
    axes.plot(z, np.tanh(1.9 * z), color=COLOURS["fixed point"], linewidth=4)
    axes.plot(*cobweb(1.9, 0.08, 12), color=COLOURS["newton"], linewidth=2)
    axes.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), xticks=[], yticks=[])
    axes.set_xlabel("$z$", fontsize=24)
    axes.set_ylabel(r"$\tanh(wz + x)$", fontsize=24)
    figure.text(
        0.05, 0.58, "Deep\nImplicit Layers,\nexecutable", fontsize=46, va="center"
    )
    about = "A tutorial book in PyTorch\nthat runs all it claims"
    figure.text(0.05, 0.2, about, fontsize=25, va="center", color=COLOURS["theory"])
    figure.savefig(CARD, dpi=100)


if __name__ == "__main__":
    main()
