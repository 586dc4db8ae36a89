"""The notebook checker on cells that must pass and on cells that it must refuse."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from notebook_check import NUMBER, cell_problem, number_difference, text_differences

FIGURE = new_output("display_data", {"image/png": "aGk=", "text/plain": "<Figure>"})
DRAW = "display({'image/png': '%s', 'text/plain': '<Figure>'}, raw=True)"
REASON = "seconds, another number on each machine"


@dataclass
class Case:
    """A cell, what is stored with it, and what the checker must say (or nothing)."""

    name: str
    source: str
    stored: str | list[Any] = ""
    says: str = ""
    check: Any = None
    tags: list[str] = field(default_factory=list)
    executed: bool = True

    def cell(self, count: int) -> Any:
        outputs = self.stored
        if isinstance(outputs, str):
            outputs = [new_output("stream", text=outputs)] if outputs else []
        metadata: dict[str, Any] = {"tags": self.tags} if self.tags else {}
        if self.check is not None:
            metadata["check"] = self.check
        return new_code_cell(
            self.source,
            outputs=outputs,
            metadata=metadata,
            execution_count=count if self.executed else None,
        )


def result(data: dict[str, str]) -> list[Any]:
    return [new_output("execute_result", data, execution_count=1)]


PASSES = [
    Case("same text", "print('loss 0.5 after 3')", "loss 0.5 after 3\n"),
    Case("no output", "x = 1"),
    Case("empty cell", "", executed=False),
    Case("trailing semicolon", "x;"),
    Case("result", "x", result({"text/plain": "1"})),
    Case("float within rtol", "print(1.04)", "1.00\n", check={"rtol": 0.05}),
    Case("integer within int_rtol", "print(108)", "100\n", check={"int_rtol": 0.1}),
    Case("integer next to it", "print(4)", "3\n", check={"int_rtol": 0.01}),
    Case("within atol", "print(3e-13)", "-2.1e-13\n", check={"atol": 1e-12}),
    Case("last printed place", "print('0.124')", "0.123\n"),
    Case("the same NaN", "print(float('nan'))", "nan\n"),
    Case("figure redrawn", DRAW % "aGk=", [FIGURE]),
    Case("figure redrawn otherwise", DRAW % "aGo=", [FIGURE]),
    Case("uncompared", "print('a\\nb')", "0.3 s\n", check={"uncompared": REASON}),
    Case("own kernel", "import sys; print(sys.executable)", f"{sys.executable}\n"),
    Case("own folder", "print(open('beside.txt').read())", "beside the notebook\n"),
    Case(
        "streams in pieces",
        "print('a')\nprint('b')",
        [new_output("stream", text="a\n"), new_output("stream", text="b\n")],
    ),
]
FAILS = [
    Case(
        "float outside rtol",
        "print('loss', 1.06)",
        "loss 1.00\n",
        "1.06 differs from 1.00 by 0.06, allowed 0.05 (rtol=0.05)",
        check={"rtol": 0.05},
    ),
    Case("float, none stated", "print('0.125')", "0.123\n", "no tolerance stated"),
    Case(
        "integer outside int_rtol",
        "print(111)",
        "100\n",
        "111 differs from 100 by 11, allowed 10 (int_rtol=0.1)",
        check={"int_rtol": 0.1},
    ),
    Case("integer, none stated", "print(4)", "3\n", "4 differs from 3 by 1, allowed 0"),
    Case(
        "integer under rtol alone",
        "print(101)",
        "100\n",
        "101 differs from 100 by 1, allowed 0 (rtol=0.2)",
        check={"rtol": 0.2},
    ),
    Case("missing line", "print('a')", "a\nb\n", "2 lines stored, 1 fresh"),
    Case("extra line", "print('a\\nb')", "a\n", "1 lines stored, 2 fresh"),
    Case("changed text", "print('up 1')", "down 1\n", "the text differs"),
    Case("changed name", "print('float64')", "float32\n", "the text differs"),
    Case("extra number", "print('1 2')", "1\n", "1 numbers stored, 2 fresh"),
    Case(
        "NaN for a number",
        "print(float('nan'))",
        "0.5\n",
        "nan where 0.5 was stored",
        check={"rtol": 0.2, "int_rtol": 0.2, "atol": 1e-6},
    ),
    Case("number for a NaN", "print(0.5)", "nan\n", "0.5 where nan was stored"),
    Case(
        "infinity for a number",
        "print(float('inf'))",
        "1.5\n",
        "inf where 1.5 was stored",
        check={"rtol": 0.2},
    ),
    Case("lost output", "x", "1\n", "1 outputs of kind stdout stored, 0 fresh"),
    Case("new output", "print(1)", "", "0 outputs of kind stdout stored, 1 fresh"),
    Case(
        "table",
        "display({'text/html': '<td>2.5</td>', 'text/plain': ''}, raw=True)",
        [new_output("display_data", {"text/html": "<td>2.1</td>", "text/plain": ""})],
        "2.5 differs from 2.1 by 0.4",
    ),
    Case(
        "markdown",
        "display({'text/markdown': '| up |', 'text/plain': ''}, raw=True)",
        [new_output("display_data", {"text/markdown": "| no |", "text/plain": ""})],
        "the text differs",
    ),
    Case(
        "figure vanished",
        "display({'text/plain': '<Figure>'}, raw=True)",
        [FIGURE],
        "1 outputs of kind image/png stored, 0 fresh",
    ),
    Case(
        "figure appeared",
        DRAW % "aGk=",
        [],
        "0 outputs of kind image/png stored, 1 fresh",
    ),
    Case(
        "semicolon, but a result is stored",
        "x;",
        result({"text/plain": "1"}),
        "1 outputs of kind text/plain stored, 0 fresh",
    ),
    Case(
        "warning",
        "import warnings; warnings.warn('beware of this')",
        "",
        "beware of this",
    ),
    Case(
        "warning, uncompared",
        "sys.stderr.write('beware of that')\nprint(1)",
        "2\n",
        "fresh output on stderr: beware of that",
        check={"uncompared": REASON},
    ),
    Case(
        "warning stored",
        "x = 1",
        [new_output("stream", name="stderr", text="beware\n")],
        "stored output on stderr: beware",
    ),
    Case(
        "error stored",
        "x = 1",
        [new_output("error", ename="NameError", evalue="y", traceback=[])],
        "1 outputs of kind error stored, 0 fresh",
    ),
    Case(
        "uncompared, output vanished",
        "x = 1",
        "0.3 s\n",
        "there is output only in the notebook",
        check={"uncompared": REASON},
    ),
    Case(
        "uncompared, output appeared",
        "print(1)",
        "",
        "there is output only in the fresh run",
        check={"uncompared": REASON},
    ),
    Case("unexecuted", "x = 2", "", "the cell was never executed", executed=False),
    Case(
        "unexecuted with output",
        "print(2)",
        "2\n",
        "the cell was never executed",
        executed=False,
    ),
]
REFUSED = [
    ({"rtol": 0.21}, "rtol is 0.21, expected a number from 0 to its cap 0.2"),
    ({"int_rtol": 0.3}, "int_rtol is 0.3, expected a number from 0 to its cap 0.2"),
    ({"atol": 2e-6}, "atol is 2e-06, expected a number from 0 to its cap 1e-06"),
    ({"rtol": 1e-3, "atol": 1}, "atol is 1, expected"),
    ({"rtol": -0.1}, "rtol is -0.1, expected"),
    ({"rtol": float("nan")}, "rtol is nan, expected"),
    ({"rtol": True}, "rtol is True, expected"),
    ({"rtol": "0.1"}, "rtol is '0.1', expected"),
    ({"tol": 0.1}, "metadata.check has 'tol', expected rtol, int_rtol, atol or"),
    (0.1, "metadata.check is 0.1, expected a dictionary"),
    ({"uncompared": ""}, "'uncompared' is '', expected the reason"),
    ({"uncompared": "it varies     "}, "expected the reason, 15 characters or more"),
    ({"uncompared": True}, "'uncompared' is True, expected the reason"),
    ({"uncompared": REASON, "rtol": 0.1}, "'uncompared' excludes every other key"),
]
WIRED = [
    Case("refused tolerance", "x = 3", "", REFUSED[0][1], check=REFUSED[0][0]),
    Case("raises", "1 / 0", "", "ZeroDivisionError"),
    Case("after it", "print(1)", "2\n", "did not run to its end"),
]
CASES = [*PASSES, *FAILS, *WIRED]
DEAD = Case("dead", "import os; os._exit(1)", "", "the kernel died in this cell")


def check(folder: Path, *arguments: str) -> str:
    """Run the checker on a folder from elsewhere, as `make test` does."""
    command = [sys.executable, "-m", "pytest", *arguments, str(folder)]
    path = {"PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-c", os.devnull],
        env=os.environ | path,
        capture_output=True,
        text=True,
    )
    return run.stdout + run.stderr


def write(path: Path, cases: list[Case]) -> None:
    cells = [case.cell(n) for n, case in enumerate(cases, 1)]
    nbformat.write(new_notebook(cells=cells), path)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the checker says of each case: nothing if it passes."""
    folder = tmp_path_factory.mktemp("notebooks")
    (folder / "beside.txt").write_text("beside the notebook")
    write(folder / "cases.ipynb", CASES)
    write(folder / "dead.ipynb", [DEAD])
    report = folder / "report.xml"
    check(folder, "-p", "notebook_check", "--notebooks", f"--junitxml={report}")
    tests = list(ElementTree.parse(report).iter("testcase"))
    assert len(tests) == len(CASES) + 1
    names = [case.name for case in [*CASES, DEAD]]
    said = ["".join(x.get("message", "") + (x.text or "") for x in t) for t in tests]
    return dict(zip(names, said, strict=True))


@pytest.mark.parametrize("case", PASSES, ids=lambda case: case.name)
def test_passes(case: Case, outcomes: dict[str, str]) -> None:
    assert outcomes[case.name] == ""


@pytest.mark.parametrize("case", [*FAILS, *WIRED, DEAD], ids=lambda case: case.name)
def test_fails_and_says_why(case: Case, outcomes: dict[str, str]) -> None:
    assert case.says in outcomes[case.name]


def test_a_failure_shows_the_cell_and_both_lines(outcomes: dict[str, str]) -> None:
    said = outcomes["float outside rtol"]
    number = CASES.index(next(c for c in CASES if c.name == "float outside rtol")) + 1
    assert f"cases.ipynb, cell {number}: the outputs differ" in said
    assert "print('loss', 1.06)" in said
    assert "stored: loss 1.00\nfresh:  loss 1.06" in said


def test_notebooks_are_collected_only_when_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "cases.ipynb", [PASSES[0]])
    assert "no tests ran" in check(tmp_path, "-p", "notebook_check")


@pytest.mark.parametrize(("stated", "says"), REFUSED)
def test_no_cell_can_switch_the_check_off(stated: object, says: str) -> None:
    assert says in cell_problem(Case("", "x = 1", check=stated).cell(1))


@pytest.mark.parametrize("stated", [{}, {"rtol": 0}, {"rtol": 0.2, "atol": 1e-6}])
def test_tolerances_up_to_the_cap_are_taken(stated: object) -> None:
    assert cell_problem(Case("", "x = 1", check=stated).cell(1)) == ""


@pytest.mark.parametrize(
    ("source", "tag"),
    [
        ("x = 1", "nbval-ignore-output"),
        ("x = 1", "nbval-skip"),
        ("x = 1", "raises-exception"),
        ("# NBVAL_IGNORE_OUTPUT\nx = 1", ""),
        ("x = 1\n  #NBVAL_SKIP", ""),
        ("# PYTEST_VALIDATE_IGNORE_OUTPUT", ""),
    ],
)
def test_the_switches_of_nbval_are_refused(source: str, tag: str) -> None:
    case = Case("", source, tags=[tag or "hide-input"])
    assert "is not used in this book" in cell_problem(case.cell(1))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("1,234 of 60,000", ["1,234", "60,000"]),
        ("1,234.5 and [1, 234]", ["1,234.5", "1", "234"]),
        ("3.2e-05, 1E5, .5", ["3.2e-05", "1E5", ".5"]),
        ("x=-0.5, +3 (-2)", ["-0.5", "+3", "-2"]),
        ("4.1\u00d7 or 4.1x, 10 % or 10%", ["4.1", "4.1", "10", "10"]),
        ("float32 x1 W2 _3 640x480 2D 0x7f sha256", []),
        ("torch 2.14.1, v1.2", []),
        ("3-5 steps, 1/2, 10^-4", ["3", "5", "1", "2", "10", "-4"]),
        ("It took 15.", ["15"]),
        ("nan, -inf, NaN updates; nance, info", ["nan", "-inf", "NaN"]),
        ("<td>7</td>|8|$9$", ["7", "8", "9"]),
        ("1.5+2.5j", ["1.5", "2.5"]),
    ],
)
def test_what_counts_as_a_number(text: str, numbers: list[str]) -> None:
    assert NUMBER.findall(text) == numbers


@pytest.mark.parametrize(
    ("stored", "fresh", "stated", "equal"),
    [
        ("0.123", "0.124", {}, True),
        ("0.123", "0.125", {}, False),
        ("9.99", "10.0", {}, True),
        ("0.123457", "0.12346", {}, False),
        ("3.2e-05", "3.3e-05", {}, True),
        ("3.2e-05", "3.2e-04", {}, False),
        ("-0.5", "0.5", {"rtol": 0.2}, False),
        ("1e+05", "100000", {}, True),
        ("1,000", "1,100", {"int_rtol": 0.1}, True),
        ("1,000", "1,101", {"int_rtol": 0.1}, False),
        ("0", "1", {"int_rtol": 0.1}, True),
        ("0", "2", {"int_rtol": 0.1}, False),
        ("0", "1", {"int_rtol": 0}, False),
        ("100", "101", {"atol": 1e-6}, False),
        ("1.000e-09", "-9.000e-07", {"atol": 1e-6}, True),
        ("1.000e-09", "-9.000e-07", {"rtol": 0.2}, False),
        ("NaN", "nan", {"rtol": 0.2}, False),
        ("inf", "-inf", {"rtol": 0.2}, False),
        ("0.30000000000000004", "0.3", {}, False),
    ],
)
def test_when_two_numbers_are_equal(
    stored: str, fresh: str, stated: dict[str, float], equal: bool
) -> None:
    assert (number_difference(stored, fresh, stated) == "") is equal


@pytest.mark.parametrize(
    ("stored", "fresh", "equal"),
    [
        ("error   9.9 %", "error  10.0 %", True),
        ("[ 0.10  0.2]", "[ 0.11 -0.0]", False),
        ("[ 0.0 1.0]", "[-0.0 1.0]", True),
        ("| 9.9  |", "| 10.0 |", True),
        ("a  b 1", "a b 1", False),
        ("10 %", "10%", False),
        ("1 2", "12", False),
    ],
)
def test_padding_is_not_text(stored: str, fresh: str, equal: bool) -> None:
    assert (not list(text_differences(stored, fresh, {}))) is equal
