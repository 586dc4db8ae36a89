"""The tables and figures of "How fast is it?", made from results.json.

    .venv/bin/python benchmarks/report.py

`make bench` runs this at its end. It needs none of the peers.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from cases import DOPRI5, ODES
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator
from methods import DEFAULT, IN_PLACE, LIMIT_ROW
from ode import ADJOINT, BACKPROP, CHECKPOINT, DIFFRAX, TORCHDIFFEQ
from qp import ARGUMENTS, CVXPYLAYERS, EXACT, OURS, QPTH, TIGHT

from implicit_layers.plotting import COLOURS, table, use_book_style

PLACE = Path(__file__).resolve().parent
FIGURES = PLACE.parent / "chapters" / "figures"

Row = dict[str, Any]
Results = dict[str, Any]
#: Claim, target, what was measured, whether that meets it.
Target = tuple[str, str, str, bool]

GROUP_COLOURS = {
    "ours": COLOURS["implicit"],
    "usual code": COLOURS["explicit"],
    "TorchDEQ": COLOURS["highlight"],
    "jaxopt": COLOURS["fixed point"],
    "Optimistix": COLOURS["fixed point"],
    "limit": COLOURS["theory"],
}
#: Bytes of one state of the case with a given number of iterations.
STATE = 100 * 100 * 4


def cases(results: Results) -> list[Row]:
    """The fixed-point problems, each with a table of methods."""
    return [
        part for part in results.values() if isinstance(part, dict) and "rows" in part
    ]


def by_key(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """The rows by group and name."""
    return {(row["group"], row["name"]): row for row in rows}


def find(rows: Sequence[Row], key: tuple[str, str]) -> Row:
    """The row of a group and name."""
    return by_key(rows)[key]


def ratio(rows: Sequence[Row], slow: tuple[str, str], fast: tuple[str, str]) -> float:
    """How many times longer the first method takes than the second."""
    return find(rows, slow)["ms"] / find(rows, fast)["ms"]


def short(value: float) -> str:
    """Three significant digits, without exponent."""
    return (
        f"{value:.2f}"
        if value < 10
        else f"{value:.1f}"
        if value < 100
        else f"{value:.0f}"
    )


def size(number: int | None) -> str:
    """Bytes for people."""
    if number is None:
        return ""
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.0f} kB"


def work(row: Row) -> str:
    """Evaluations of f, products with its transposed Jacobian, factorisations."""
    counts = f"{row.get('evaluations', '')} / {row.get('products', '')}"
    if "Newton" in row["name"]:
        counts += f", {row['factorisations']} LU"
    return counts


def exact_enough(row: Row, limit: float) -> bool:
    """Whether the gradient is as exact as was asked for; bare products have none."""
    return row.get("error", 0.0) <= limit


def mark(row: Row, limit: float) -> str:
    """What stands behind a number of a method that is not exact enough."""
    return "" if exact_enough(row, limit) else "†"


def full_name(row: Row) -> str:
    """Group and name of a method."""
    return f"{row['group']}: {row['name']}"


def machine_text(results: Results) -> str:
    """Where, when and how the numbers were measured, as a paragraph."""
    m = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    return (
        f"Measured on {m['date']} on {m['cpu']} ({m['instructions']}, {m['system']}); "
        f"cores: {m['cores']}, threads of torch: {m['torch threads']}, load at the "
        f"start: {m['load at the start']}; {versions}. Rounds: {results['rounds']}, in "
        f"one process, {results['minutes']:.0f} minutes in all."
    )


def overview_table(results: Results) -> str:
    """Milliseconds of all methods on all cases."""
    parts, limit = cases(results), results["limit"]
    names: dict[tuple[str, str], str] = {}
    for part in parts:
        names.update({key: full_name(r) for key, r in by_key(part["rows"]).items()})
    columns: dict[str, list[str]] = {"method": list(names.values())}
    for part in parts:
        rows = by_key(part["rows"])
        columns[part["title"]] = [
            short(rows[key]["ms"]) + mark(rows[key], limit) if key in rows else ""
            for key in names
        ]
    return table(columns).data


def winners_table(results: Results) -> str:
    """The fastest exact method of each case, and the fastest of ours."""
    columns: dict[str, list[str]] = {
        name: [] for name in ("map", "fastest", "ms", "fastest of ours", "ms ", "ratio")
    }
    for part in cases(results):
        rows = [
            row
            for row in part["rows"]
            if row["group"] != "limit" and exact_enough(row, results["limit"])
        ]
        best = min(rows, key=lambda row: row["ms"])
        own = min((r for r in rows if r["group"] == "ours"), key=lambda row: row["ms"])
        cells = [part["title"], full_name(best), short(best["ms"]), own["name"]]
        cells += [short(own["ms"]), short(own["ms"] / best["ms"])]
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell)
    return table(columns).data


def method_columns(
    rows: Sequence[Row], limit: float, yardstick: tuple[str, str]
) -> dict[str, list[str]]:
    """What there is to say of each method, its time as a ratio to the yardstick's."""
    unit = find(rows, yardstick)["ms"]
    return {
        "method": [full_name(row) for row in rows],
        "ms": [short(row["ms"]) for row in rows],
        "quartiles": [f"{short(row['low'])} to {short(row['high'])}" for row in rows],
        "ratio": [short(row["ms"] / unit) for row in rows],
        "evaluations / products": [work(row) for row in rows],
        "gradient error": [
            f"{row['error']:.1e}{mark(row, limit)}" if "error" in row else ""
            for row in rows
        ],
        "kept for backward": [size(row.get("bytes")) for row in rows],
    }


def case_table(part: Row, limit: float) -> str:
    """Everything about one fixed-point problem."""
    rows = part["rows"]
    columns = method_columns(rows, limit, DEFAULT)
    columns["tolerance"] = [
        f"{row['tolerance']:.1e}" if "tolerance" in row else "" for row in rows
    ]
    return table(columns).data


def ode_table(part: Row, limit: float) -> str:
    """Everything about one differential equation, whose tolerance all methods share."""
    return table(method_columns(part["rows"], limit, CHECKPOINT)).data


def tolerance_table(points: Sequence[Row]) -> str:
    """Milliseconds and error of some methods at the tolerances of dopri5."""
    columns: dict[str, list[str]] = {
        "relative tolerance": [f"{point['tolerance']:.0e}" for point in points]
    }
    for key in by_key(points[0]["rows"]):
        rows = [find(point["rows"], key) for point in points]
        columns[full_name(rows[0])] = [
            f"{short(row['ms'])} ms, {row['error']:.1e}" for row in rows
        ]
    return table(columns).data


def steps_table(part: Row) -> str:
    """Training steps on MNIST."""
    rows = part["steps"]
    yardstick = find(rows, DEFAULT)["ms"]
    return table(
        {
            "layer": [full_name(row) for row in rows],
            "ms a step": [short(row["ms"]) for row in rows],
            "s an epoch": [short(0.6 * row["ms"]) for row in rows],
            "ratio": [short(row["ms"] / yardstick) for row in rows],
        }
    ).data


def overhead_table(rows: Sequence[Row]) -> str:
    """The share of time outside of f."""
    return table(
        {
            "method": [full_name(row) for row in rows],
            "ms": [short(row["ms"]) for row in rows],
            "f and its products alone": [short(row["alone"]) for row in rows],
            "outside of f and its products": [f"{row['share']:.0%}" for row in rows],
        }
    ).data


def passes_table(rows: Sequence[Row]) -> str:
    """Milliseconds of the passes of an equilibrium, and ratios to our default."""
    unit = find(rows, DEFAULT)
    columns = {"method": [full_name(row) for row in rows]}
    for what, title in (
        ("forward", "forward alone"),
        ("exact", "with the exact gradient"),
        ("one step", "with one step"),
    ):
        times = [(row[what]["ms"], row[what]["ms"] / unit[what]["ms"]) for row in rows]
        columns[title] = [f"{short(ms)} ({short(part)})" for ms, part in times]
    return table(columns).data


def equilibrium_table(rows: Sequence[Row], limit: float) -> str:
    """Work, errors and memory of the two gradients of an equilibrium."""
    exact, cheap = ([row[what] for row in rows] for what in ("exact", "one step"))
    return table(
        {
            "method": [full_name(row) for row in rows],
            "evaluations / products": [work({**row, **row["exact"]}) for row in rows],
            "gradient error": [f"{e['error']:.1e}{mark(e, limit)}" for e in exact],
            "kept for backward": [size(e["bytes"]) for e in exact],
            "gradient error, one step": [f"{c['error']:.2f}" for c in cheap],
            "kept, one step": [size(c["bytes"]) for c in cheap],
        }
    ).data


def qp_cell(row: Row, what: str, unit: float) -> str:
    """Milliseconds of a pass, the ratio to the unit, a mark if it is not exact."""
    ms = row[what]["ms"]
    exact = row["off"] == 0 if what == "forward" else exact_enough(row, EXACT)
    return f"{short(ms)} ({short(ms / unit)}){'' if exact else '†'}"


def qp_table(parts: Sequence[Row], what: str) -> str:
    """Milliseconds on all quadratic programs, and ratios to ours."""
    names = {key: full_name(row) for key, row in by_key(parts[0]["rows"]).items()}
    columns: dict[str, list[str]] = {"method": list(names.values())}
    for part in parts:
        rows = by_key(part["rows"])
        unit = rows[OURS][what]["ms"]
        columns[part["title"]] = [
            qp_cell(rows[key], what, unit) if key in rows else "" for key in names
        ]
    return table(columns).data


def qp_columns(parts: Sequence[Row]) -> tuple[list[Row], dict[str, list[str]]]:
    """All rows of the quadratic programs, and the columns that name them."""
    pairs = [(part["title"], row) for part in parts for row in part["rows"]]
    names = {
        "programs": [title for title, _ in pairs],
        "method": [full_name(row) for _, row in pairs],
    }
    return [row for _, row in pairs], names


def qp_errors_table(parts: Sequence[Row]) -> str:
    """How exact the methods are on quadratic programs, and what they keep."""
    rows, columns = qp_columns(parts)
    columns["gradient error"] = [
        f"{row['error']:.1e}{mark(row, EXACT)}" for row in rows
    ]
    columns["minimisers off"] = [
        f"{row['off']} of {part['batch']}" for part in parts for row in part["rows"]
    ]
    columns["kept for backward"] = [size(row.get("bytes")) for row in rows]
    return table(columns).data


def qp_arguments_table(parts: Sequence[Row]) -> str:
    """The error of the gradient of each argument of a quadratic program."""
    rows, columns = qp_columns(parts)
    for name in ARGUMENTS:
        errors = [row["errors"].get(name) for row in rows]
        columns[f"for ${name}$"] = ["" if e is None else f"{e:.1e}" for e in errors]
    return table(columns).data


def growth_table(points: Sequence[Row], along: str, what: str) -> str:
    """Milliseconds or bytes of the growth measurements."""
    chosen = [point for point in points if point["along"] == along]
    names = {full_name(row): (row["group"], row["name"]) for row in chosen[0]["rows"]}
    columns: dict[str, list[str]] = {along: [str(point["size"]) for point in chosen]}
    for name, key in names.items():
        rows = [by_key(point["rows"]).get(key) for point in chosen]
        show = size if what == "bytes" else short
        columns[name] = ["" if row is None else show(row[what]) for row in rows]
    return table(columns).data


def faster(
    what: str,
    rows: Sequence[Row],
    slow: tuple[str, str],
    fast: tuple[str, str],
    goal: float,
) -> Target:
    """The target that one method is so many times as fast as another."""
    value = ratio(rows, slow, fast)
    return what, f"at least {goal:g} x", f"{value:.2f} x", value >= goal


def map_targets(results: Results) -> list[Target]:
    """How fast the solvers of chapter 1 were meant to be."""
    init, hard, mnist = (results[name]["rows"] for name in ("init", "sym0.99", "mnist"))
    steps = results["mnist"]["steps"]
    loop, anderson = ("usual code", "plain loop, unrolled"), "Anderson"
    hook, newton = ("usual code", "Newton and hook"), ("ours", "Newton")
    deq, deq_anderson = ("TorchDEQ", "fixed point"), ("TorchDEQ", anderson)
    usual = ("usual code", "Anderson and hook")
    ours = [row for row in steps if row["group"] == "ours"]
    best = min(ours, key=lambda row: row["ms"])["name"]
    training = f"training steps on MNIST: {best} against the unrolled loop"
    theirs = "default against TorchDEQ's"
    return [
        faster(f"{theirs} fixed point, default W", init, deq, DEFAULT, 4),
        faster("the same, symmetric 0.99", hard, deq, DEFAULT, 15),
        faster("default against the unrolled loop, default W", init, loop, DEFAULT, 1),
        faster("the same, symmetric 0.99", hard, loop, DEFAULT, 3),
        faster(f"{theirs} Anderson, default W", init, deq_anderson, DEFAULT, 8),
        faster(
            "default against the usual Anderson, default W", init, usual, DEFAULT, 4
        ),
        faster("Newton against the hook, default W", init, hook, newton, 2),
        faster("Newton against the hook, MNIST", mnist, hook, newton, 3),
        faster(training, steps, loop, ("ours", best), 1),
    ]


def cost_targets(results: Results) -> list[Target]:
    """What a solver was meant to cost at most, in time beside f and in memory."""
    value = ratio(results["init"]["rows"], IN_PLACE, LIMIT_ROW)
    points = [point["rows"] for point in results["iterations"]]
    kept = {find(rows, ("ours", "plain iteration"))["bytes"] for rows in points}
    states, steady = max(kept) / STATE, len(kept) == 1
    share = find(results["overhead"], DEFAULT)["share"]
    return [
        (
            "plain iteration, f in place, against its products alone, default W",
            "at most 1.6 x",
            f"{value:.2f} x",
            value <= 1.6,
        ),
        (
            "kept for backward, after 10 and after 320 iterations",
            "the same, at most 2 states",
            f"{'the same' if steady else 'not the same'}, {states:.1f} states",
            steady and states <= 2,
        ),
        (
            "convolutions: time outside of f and its products",
            "below 15 %",
            f"{share:.0%}",
            share < 0.15,
        ),
    ]


def ode_targets(rows: Sequence[Row]) -> list[Target]:
    """What the gradients of a differential equation were meant to reach."""
    peer, peer_adjoint = TORCHDIFFEQ
    own, theirs = find(rows, CHECKPOINT), find(rows, peer)
    part = own["bytes"] / theirs["bytes"]
    return [
        faster(
            "ODE: checkpoint against torchdiffeq's backprop",
            rows,
            peer,
            CHECKPOINT,
            1.5,
        ),
        (
            "the same, gradient error",
            "at most as large",
            f"{own['error']:.1e} against {theirs['error']:.1e}",
            own["error"] <= theirs["error"],
        ),
        ("the same, kept for backward", "at most 10 %", f"{part:.0%}", part <= 0.1),
        faster(
            "ODE: adjoint against torchdiffeq's adjoint",
            rows,
            peer_adjoint,
            ADJOINT,
            3,
        ),
    ]


def qp_targets(parts: Sequence[Row]) -> list[Target]:
    """What the quadratic programs were meant to reach."""
    rows = {
        part["title"]: [{**row, **row["both"]} for row in part["rows"]]
        for part in parts
    }
    error = max(find(part["rows"], OURS)["error"] for part in parts)
    return [
        *(
            faster(f"QP against qpth, {title}", rows[title], QPTH, OURS, goal)
            for title, goal in (
                ("n = 10", 1),
                ("n = 50", 1),
                ("n = 10, shared", 2),
                ("n = 50, shared", 2),
            )
        ),
        *(
            faster(
                f"QP against the faster of cvxpylayers, {title}",
                rows[title],
                min(CVXPYLAYERS, TIGHT, key=lambda key: find(rows[title], key)["ms"]),
                OURS,
                10,
            )
            for title in ("n = 10", "n = 50")
        ),
        (
            "QP: largest gradient error",
            f"at most {EXACT:.0e}",
            f"{error:.1e}",
            error <= EXACT,
        ),
    ]


def targets(results: Results) -> list[Target]:
    """What this book's solvers were meant to reach, and what became of it."""
    return [
        *map_targets(results),
        *cost_targets(results),
        *ode_targets(results["odes"][DOPRI5]["rows"]),
        *qp_targets(results["qp"]),
    ]


def targets_table(results: Results) -> str:
    """The targets and what became of them."""
    what, goal, value, met = zip(*targets(results), strict=True)
    marks = ["yes" if reached else "no" for reached in met]
    return table(
        {"claim": what, "target": goal, "measured": value, "reached": marks}
    ).data


def section(name: str, text: str) -> str:
    """A part of results.md that the page includes by its name."""
    return f"<!-- {name} -->\n\n{text}\n\n<!-- end of {name} -->"


def ode_sections(measured: Row, limit: float) -> list[str]:
    """The tables about differential equations."""
    parts = [measured[kind] for kind in ODES]
    return [
        *(section(part["title"], ode_table(part, limit)) for part in parts),
        section("ODE overhead", overhead_table(measured["overhead"])),
        section("ODE tolerances", tolerance_table(measured["tolerances"])),
    ]


def qp_sections(parts: Sequence[Row]) -> list[str]:
    """The tables about quadratic programs."""
    return [
        section("QP, both passes", qp_table(parts, "both")),
        section("QP, forward", qp_table(parts, "forward")),
        section("QP errors", qp_errors_table(parts)),
        section("QP arguments", qp_arguments_table(parts)),
    ]


def markdown(results: Results) -> str:
    """All tables for which there are results."""
    parts, limit = cases(results), results["limit"]
    texts = [section("machine", machine_text(results)) if "minutes" in results else ""]
    aimed = {"init", "sym0.99", "mnist", "iterations", "overhead", "odes", "qp"}
    if aimed <= set(results):
        texts.append(section("targets", targets_table(results)))
    if parts:
        texts.append(section("winners", winners_table(results)))
        texts.append(section("overview", overview_table(results)))
    for part in parts:
        gain = f"a step of plain iteration leaves {part['rate']:.2f} of the residual"
        heading = f"**{part['title']}** ({gain})"
        texts.append(section(part["title"], f"{heading}\n\n{case_table(part, limit)}"))
    if "mnist" in results:
        texts.append(section("steps", steps_table(results["mnist"])))
    if "overhead" in results:
        texts.append(section("overhead", overhead_table(results["overhead"])))
    if "equilibrium" in results:
        rows = results["equilibrium"]
        texts.append(section("passes", passes_table(rows)))
        texts.append(section("equilibrium", equilibrium_table(rows, limit)))
    if "odes" in results:
        texts.extend(ode_sections(results["odes"], limit))
    if "qp" in results:
        texts.extend(qp_sections(results["qp"]))
    for along, what in (("width", "ms"), ("batch", "ms"), ("iterations", "bytes")):
        points = results.get("iterations" if along == "iterations" else "growth")
        if points:
            texts.append(section(along, growth_table(points, along, what)))
    title = "# Results of `make bench`, written by benchmarks/report.py"
    return "\n\n".join([title, *filter(None, texts)]) + "\n"


def plain_ticks(axis: Axis, ticks: Sequence[float] = ()) -> None:
    """Label a logarithmic axis with plain numbers, at 1, 2 and 5 if not told."""
    locator = FixedLocator(ticks) if ticks else LogLocator(subs=(1, 2, 5), numticks=9)
    axis.set_major_locator(locator)
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())
    axis.set_tick_params(labelsize=8)  # 1000 and 2000 are near neighbours


def draw_methods(results: Results) -> None:
    """A dot for every method, one panel a case."""
    names = [name for name in ("init", "sym0.99", "conv") if name in results]
    order = [(row["group"], row["name"]) for row in results["init"]["rows"]][::-1]
    figure, panels = plt.subplots(1, 3, figsize=(9, 5), sharey=True)
    for axes, name in zip(panels, names, strict=True):
        rows = results[name]["rows"]
        axes.axvline(find(rows, DEFAULT)["ms"], color=GROUP_COLOURS["ours"], lw=1)
        for height, key in enumerate(order):
            row = by_key(rows).get(key)
            if row is not None:
                full = exact_enough(row, results["limit"])
                colour = GROUP_COLOURS[key[0]]
                axes.plot(
                    row["ms"], height, "o", color=colour, mfc=colour if full else "w"
                )
        axes.set(xscale="log", title=results[name]["title"], xlabel="ms")
        plain_ticks(axes.xaxis)
    panels[0].set_yticks(range(len(order)), [f"{g}: {n}" for g, n in order], fontsize=8)
    for label, (group, _) in zip(panels[0].get_yticklabels(), order, strict=True):
        label.set_color(GROUP_COLOURS[group])
    figure.savefig(FIGURES / "how_fast_methods.png", metadata={"Software": None})
    plt.close(figure)


LINES = {
    ("ours", "Anderson (the default)"): ("ours, default", COLOURS["implicit"]),
    ("ours", "plain iteration"): ("ours, plain", COLOURS["implicit"]),
    ("ours", "Newton"): ("ours, Newton", COLOURS["newton"]),
    ("usual code", "plain loop, unrolled"): ("unrolled", COLOURS["explicit"]),
    ("usual code", "Newton and hook"): ("Newton, hook", "black"),
    ("TorchDEQ", "fixed point"): ("TorchDEQ", COLOURS["highlight"]),
    ("jaxopt", "fixed point, BiCGStab"): ("jaxopt", COLOURS["fixed point"]),
}


def draw_lines(axes: Axes, points: Sequence[Row], along: str, what: str) -> None:
    """One line a method on logarithmic axes."""
    chosen = [point for point in points if point["along"] == along]
    scale = 1e-6 if what == "bytes" else 1
    for key, (name, colour) in LINES.items():
        pairs = [(p["size"], by_key(p["rows"]).get(key)) for p in chosen]
        line = [(x, row[what] * scale) for x, row in pairs if row is not None]
        if line:
            axes.loglog(*zip(*line, strict=True), "o-", color=colour, ms=3, label=name)


def draw_growth(results: Results) -> None:
    """Time against width and batch, memory against iterations."""
    figure, panels = plt.subplots(1, 3, figsize=(9, 3.6))
    draw_lines(panels[0], results["growth"], "width", "ms")
    panels[0].set(xlabel="width (batch 100)", ylabel="ms")
    draw_lines(panels[1], results["growth"], "batch", "ms")
    panels[1].set(xlabel="batch (width 100)", ylabel="ms")
    draw_lines(panels[2], results["iterations"], "iterations", "bytes")
    panels[2].set(xlabel="iterations of the solver", ylabel="kept for backward (MB)")
    plain_ticks(panels[0].xaxis, (25, 50, 100, 200, 400, 800))
    plain_ticks(panels[1].xaxis, (1, 10, 100, 1000))
    plain_ticks(panels[2].xaxis, (10, 20, 40, 80, 160, 320))
    for axes in panels:
        axes.yaxis.set_major_formatter("{x:g}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(FIGURES / "how_fast_growth.png", metadata={"Software": None})
    plt.close(figure)


ODE_DOTS = {
    BACKPROP: ("ours, backprop", COLOURS["implicit"], "o"),
    CHECKPOINT: ("ours, checkpoint", COLOURS["implicit"], "s"),
    ADJOINT: ("ours, adjoint", COLOURS["implicit"], "^"),
    TORCHDIFFEQ[0]: ("torchdiffeq, backprop", COLOURS["highlight"], "o"),
    TORCHDIFFEQ[1]: ("torchdiffeq, adjoint", COLOURS["highlight"], "^"),
    DIFFRAX: ("diffrax, checkpoint", COLOURS["fixed point"], "s"),
}


def draw_odes(results: Results) -> None:
    """Time against the error of the gradient, a dot for each tolerance of a method."""
    points = results["odes"]["tolerances"]
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for key, (name, colour, marker) in ODE_DOTS.items():
        rows = [find(point["rows"], key) for point in points]
        dots = [row["error"] for row in rows], [row["ms"] for row in rows]
        axes.loglog(*dots, marker, color=colour, ms=5, label=name)
    axes.set(xlabel="relative error of the gradient", ylabel="ms")
    axes.invert_xaxis()
    plain_ticks(axes.yaxis)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(FIGURES / "how_fast_odes.png", metadata={"Software": None})
    plt.close(figure)


def write(results: Results) -> None:
    """Write results.md beside this file, and the figures beside the page."""
    (PLACE / "results.md").write_text(markdown(results))
    use_book_style()
    FIGURES.mkdir(exist_ok=True)
    draw_methods(results)
    draw_growth(results)
    draw_odes(results)


if __name__ == "__main__":
    write(json.loads((PLACE / "results.json").read_text()))
