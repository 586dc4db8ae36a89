"""tools/execute.py as `make execute` calls it, on a book of two tiny chapters."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebook_check import cell_problem

EXECUTE = Path(__file__).parents[1] / "tools" / "execute.py"
OLD = [new_output("stream", text="old\n")]
SOUND = [
    new_markdown_cell("# Sound"),
    new_code_cell(
        "import sys\nprint('a', flush=True)\nprint('b', flush=True)\nprint(sys.prefix)",
        outputs=OLD,
        metadata={"execution": {"iopub.status.busy": "2026"}, "check": {"rtol": 0.1}},
    ),
    new_code_cell(""),
    new_code_cell("open('beside.txt').read()", execution_count=9),
    new_code_cell("display({'image/png': 'aGk=', 'text/plain': ''}, raw=True)\n1;"),
]
FAILING = [
    new_code_cell("x = 'done before'", outputs=OLD, execution_count=5),
    new_code_cell("\nx + 1"),
    new_code_cell("print('never reached')"),
]
Book = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def book(tmp_path: Path) -> Book:
    """Return a function that runs a copy of the tool on the chapters beside it."""
    for folder in ("tools", "chapters"):
        (tmp_path / folder).mkdir()
    tool = shutil.copy(EXECUTE, tmp_path / "tools")
    (tmp_path / "chapters" / "beside.txt").write_text("beside the notebook")
    for name, cells in (("sound", SOUND), ("failing", FAILING)):
        notebook = new_notebook(cells=cells, metadata={"colab": {"provenance": []}})
        nbformat.write(notebook, tmp_path / "chapters" / f"{name}.ipynb")

    def run(*names: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, tool, *names]
        return subprocess.run(command, cwd="/", capture_output=True, text=True)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_a_chapter_is_stored_as_executed(book: Book, tmp_path: Path) -> None:
    path = tmp_path / "chapters" / "sound.ipynb"
    before = contents(path.parent)
    run = book("sound")
    assert run.returncode == 0, run.stderr
    # a kernel that is stopped may have a last word about its sockets
    assert not [x for x in run.stderr.splitlines() if "signaler.cpp" not in x]
    lines = run.stdout.splitlines()
    assert lines[0] == "sound.ipynb"
    assert lines[1].startswith("  [ 1/3] import sys ")
    assert lines[3].startswith("  [ 3/3] display(")
    assert all(line.endswith(" s") for line in lines[1:])

    notebook: Any = nbformat.read(path, as_version=4)
    _, first, empty, second, third = notebook.cells
    assert [c.execution_count for c in (first, empty, second, third)] == [1, None, 2, 3]
    assert first.outputs == [new_output("stream", text=f"a\nb\n{sys.prefix}\n")]
    assert second.outputs[0].data == {"text/plain": "'beside the notebook'"}
    assert second.outputs[0].execution_count == 2
    assert [[*output.data] for output in third.outputs] == [["image/png", "text/plain"]]
    assert first.metadata == {"check": {"rtol": 0.1}}
    assert {*notebook.metadata} == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info == {"name": "python"}
    assert not any(cell_problem(cell) for cell in (first, empty, second, third))
    after = contents(path.parent)
    assert {*after} == {*before}
    assert after["failing.ipynb"] == before["failing.ipynb"]


def test_a_failure_leaves_the_file_as_it_was(book: Book, tmp_path: Path) -> None:
    before = contents(tmp_path / "chapters")
    run = book("failing")
    assert run.returncode == 1
    assert "x + 1" in run.stderr
    assert "TypeError" in run.stderr
    assert "failing.ipynb is left as it was" in run.stderr
    assert "[ 2/3] x + 1" in run.stdout
    assert "[ 3/3]" not in run.stdout
    assert contents(tmp_path / "chapters") == before


def test_an_unknown_chapter_names_the_pages(book: Book, tmp_path: Path) -> None:
    before = contents(tmp_path / "chapters")
    run = book("sound", "unsound")
    assert run.returncode == 2
    assert run.stderr == "no chapter 'unsound'; there are: failing, sound\n"
    assert run.stdout == ""
    assert contents(tmp_path / "chapters") == before


def test_a_file_that_is_no_notebook_is_said_to_be(book: Book, tmp_path: Path) -> None:
    path = tmp_path / "chapters" / "sound.ipynb"
    path.write_text("<<<<<<< HEAD")
    run = book("sound")
    assert run.returncode == 1
    assert "Notebook does not appear to be JSON: '<<<<<<< HEAD'" in run.stderr
    assert "Traceback" not in run.stderr
    assert path.read_text() == "<<<<<<< HEAD"
