"""Pytest plugin: re-execute notebooks and compare their outputs, numbers as numbers.

    python -m pytest -p notebook_check --notebooks chapters

nbval runs the cells; it has no numeric tolerance, so the comparison is made here. A
cell states its own in its metadata, `"check": {"rtol": 0.05, "int_rtol": 0.1, "atol":
1e-12}`, or says why there is nothing to compare, `"check": {"uncompared": "..."}`.
"""

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from queue import Empty
from typing import Any

import nbformat
import pytest
from nbval.kernel import CURRENT_ENV_KERNEL_NAME, RunningKernel
from nbval.plugin import IPyNbCell, IPyNbFile, NbCellError, coalesce_streams

CAPS = {"rtol": 0.2, "int_rtol": 0.2, "atol": 1e-6}
CELL_SECONDS = 3600
FOREIGN_TAG = re.compile(r"nbval-|pytest-validate-|raises-exception$")
FOREIGN_COMMENT = re.compile(r"^\s*(#+\s*(?:NBVAL|PYTEST_VALIDATE)_\w+)", re.MULTILINE)
# Digits in a name (float32, x1), an integer glued to letters (640x480, 2D, 0x7f) and
# versions (2.14.1) are text; a decimal may carry its unit (4.1x, 0.3s).
NUMBER = re.compile(
    r"""(?<![\w.])[-+]?(?:
        (?:nan|inf|infinity)\b
      | (?:\d{1,3}(?:,\d{3})+|\d+)?\.\d+(?:e[-+]?\d+)?(?!\d|\.\d)
      | \d+e[-+]?\d+(?!\w|\.\d)
      | (?:\d{1,3}(?:,\d{3})+|\d+)(?!\w|\.\d)
    )""",
    re.VERBOSE | re.IGNORECASE,
)
INTEGER = re.compile(r"[-+]?[\d,]+")


def cell_problem(cell: Any) -> str:
    """Say in one sentence why this cell cannot be checked; nothing if it can be."""
    if cell.source.strip() and cell.execution_count is None:
        return "the cell was never executed: run `make execute` and commit the result"
    foreign = [tag for tag in cell.metadata.get("tags", []) if FOREIGN_TAG.match(tag)]
    foreign += FOREIGN_COMMENT.findall(cell.source)
    if foreign:
        return f"{foreign[0]!r} is not used in this book: state metadata.check instead"
    check = cell.metadata.get("check", {})
    if not isinstance(check, dict):
        return f"metadata.check is {check!r}, expected a dictionary such as {CAPS}"
    if "uncompared" not in check:
        return next(filter(None, map(tolerance_problem, check, check.values())), "")
    reason = check["uncompared"]
    if len(check) > 1:
        return "'uncompared' excludes every other key of metadata.check: drop one side"
    if not isinstance(reason, str) or len(reason.strip()) < 15:
        return f"'uncompared' is {reason!r}, expected the reason, 15 characters or more"
    return ""


def tolerance_problem(key: str, value: object) -> str:
    """Say what is wrong with one entry of metadata.check; nothing if it is right."""
    if key not in CAPS:
        return f"metadata.check has {key!r}, expected {', '.join(CAPS)} or uncompared"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and 0 <= value <= CAPS[key]:
        return ""
    return f"{key} is {value!r}, expected a number from 0 to its cap {CAPS[key]:g}"


def number_difference(stored: str, fresh: str, check: dict[str, Any]) -> str:
    """Say by how much two printed numbers differ; nothing if by no more than allowed.

    One unit in the last place that either of them prints is allowed to a decimal.
    """
    old, new = (Decimal(token.replace(",", "")) for token in (stored, fresh))
    if not (old.is_finite() and new.is_finite()):
        return "" if stored == fresh else f"{fresh} where {stored} was stored"
    rtol, int_rtol, atol = (Decimal(str(check.get(key, 0))) for key in CAPS)
    printed = ((old, stored), (new, fresh))
    places = [x.as_tuple().exponent for x, t in printed if not INTEGER.fullmatch(t)]
    if places:
        allowed = max(Decimal((0, (1,), min(places))), rtol * abs(old), atol)
    else:
        allowed = max(int_rtol * abs(old), Decimal(1)) if int_rtol else Decimal(0)
    if abs(new - old) <= allowed:
        return ""
    in_force = ", ".join(f"{k}={v}" for k, v in check.items()) or "no tolerance stated"
    gap = f"{fresh} differs from {stored} by {float(abs(new - old)):g}"
    return f"{gap}, allowed {float(allowed):g} ({in_force})"


def words(line: str) -> str:
    """Return a line without its numbers and the padding that aligns them."""
    return re.sub("(?<=\0)  +", " ", re.sub(" +\0", "\0", NUMBER.sub("\0", line)))


def text_differences(stored: str, fresh: str, check: dict[str, Any]) -> Iterator[str]:
    """Yield what differs between two texts, each line beside the stored one."""
    old, new = stored.splitlines(), fresh.splitlines()
    if len(old) != len(new):
        yield f"{len(old)} lines stored, {len(new)} fresh"
        yield from [f"stored: {line}" for line in old]
        yield from [f"fresh:  {line}" for line in new]
        return
    for a, b in zip(old, new, strict=True):
        numbers = NUMBER.findall(a), NUMBER.findall(b)
        if len(numbers[0]) != len(numbers[1]):
            found = [f"{len(numbers[0])} numbers stored, {len(numbers[1])} fresh"]
        elif words(a) != words(b):
            found = ["the text differs"]
        else:
            pairs = zip(*numbers, strict=True)
            found = [text for x, y in pairs if (text := number_difference(x, y, check))]
        if found:
            yield from [f"stored: {a}", f"fresh:  {b}", *(f"  {x}" for x in found)]


def by_kind(outputs: Iterable[Any]) -> dict[str, list[str]]:
    """Sort the outputs of a cell by stream and by MIME type, in order."""
    kinds = defaultdict(list)
    for output in coalesce_streams(outputs):
        if output.output_type == "stream":
            kinds[output.name].append(output.text)
        elif output.output_type == "error":
            kinds["error"].append(f"{output.ename}: {output.evalue}")
        for mime, data in output.get("data", {}).items():
            text = data if isinstance(data, str) else json.dumps(data, sort_keys=True)
            kinds[mime].append(text)
    return kinds


def differences(
    stored: dict[str, list[str]], fresh: dict[str, list[str]], check: dict[str, Any]
) -> Iterator[str]:
    """Yield what differs between the stored and the fresh outputs of a cell."""
    for when, kinds in (("stored", stored), ("fresh", fresh)):
        yield from [f"{when} output on stderr: {text}" for text in kinds["stderr"]]
    if "uncompared" in check:
        if any(stored.values()) != any(fresh.values()):
            where = "the notebook" if any(stored.values()) else "the fresh run"
            yield f"there is output only in {where}"
        return
    for kind in sorted({*stored, *fresh} - {"stderr"}):
        old, new = stored[kind], fresh[kind]
        if len(old) != len(new):
            yield f"{len(old)} outputs of kind {kind} stored, {len(new)} fresh"
            if kind != "image/png":
                yield from [f"stored: {text}" for text in old]
                yield from [f"fresh:  {text}" for text in new]
        elif kind != "image/png":
            for texts in zip(old, new, strict=True):
                yield from text_differences(*texts, check)


class Kernel(RunningKernel):
    """nbval's kernel, which also notices its own death and a trailing semicolon."""

    def execute_cell_input(self, cell_input: str, allow_stdin: Any = None) -> Any:
        # IPython looks for the semicolon in the history, which nbval does not keep
        run = self.kc.execute
        return run(cell_input, allow_stdin=allow_stdin, stop_on_error=False)

    def await_reply(self, msg_id: str, timeout: float = CELL_SECONDS) -> None:
        deadline = time.monotonic() + timeout
        while True:
            try:
                return super().await_reply(msg_id, timeout=2)
            except Empty:
                if not self.is_alive():
                    raise RuntimeError("the kernel died in this cell") from None
                if time.monotonic() > deadline:
                    raise


class CheckedFile(IPyNbFile):
    """A notebook: one test a code cell, all in one fresh kernel."""

    stopped_at = ""

    def collect(self) -> Iterator["CheckedCell"]:
        cells = nbformat.read(self.path, as_version=4).cells
        code = [cell for cell in cells if cell.cell_type == "code"]
        for n, cell in enumerate(code, 1):
            problem = cell_problem(cell)
            # else nbval itself stops at an unexecuted cell that has outputs
            cell.execution_count = n
            item = CheckedCell.from_parent(
                self, name=f"cell {n}", cell_num=n, cell=cell, options=defaultdict(bool)
            )
            item.problem = problem
            yield item

    def setup(self) -> None:
        self.kernel = Kernel(CURRENT_ENV_KERNEL_NAME, cwd=str(self.path.parent))


class CheckedCell(IPyNbCell):
    """A code cell: it runs to its end, then its outputs are compared."""

    problem: str

    def runtest(self) -> None:
        if self.parent.stopped_at:
            pytest.skip(f"{self.parent.stopped_at} did not run to its end")
        self.parent.stopped_at = self.name
        try:
            super().runtest()
        except RuntimeError as error:
            self.raise_cell_error(str(error))
        self.parent.stopped_at = ""
        if self.problem:
            self.raise_cell_error(self.problem)
        stored, fresh = by_kind(self.cell.outputs), by_kind(self.test_outputs)
        found = [*differences(stored, fresh, self.cell.metadata.get("check", {}))]
        if found:
            self.raise_cell_error("the outputs differ", "\n".join(found))

    def repr_failure(self, excinfo: Any) -> str:
        error = excinfo.value
        if not isinstance(error, NbCellError):
            return super().repr_failure(excinfo)
        where = f"{self.path.name}, {self.name}: {error}"
        return f"{where}\n\n{error.source}\n\n{error.inner_traceback or ''}"


def pytest_addoption(parser: pytest.Parser) -> None:
    help_text = "re-execute the notebooks in the given folders, compare their outputs"
    parser.addoption("--notebooks", action="store_true", help=help_text)


def pytest_configure(config: pytest.Config) -> None:
    config.option.nbval_cell_timeout = CELL_SECONDS


def pytest_collect_file(
    file_path: Path, parent: pytest.Collector
) -> CheckedFile | None:
    if parent.config.option.notebooks and file_path.suffix == ".ipynb":
        return CheckedFile.from_parent(parent, path=file_path)
    return None
