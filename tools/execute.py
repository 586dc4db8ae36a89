"""Run chapters and store their outputs: `python tools/execute.py [CHAPTER ...]`.

A chapter's file changes only if every cell of it ran to its end.
"""

import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat.reader import NotJSONError

CHAPTERS = Path(__file__).resolve().parents[1] / "chapters"
CELL_SECONDS = 3600
METADATA = {
    "kernelspec": {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}
FAILURES = (
    CellExecutionError,
    CellTimeoutError,
    DeadKernelError,
    NotJSONError,
    OSError,
)
# what editors and earlier runs leave in a cell, none of it part of the book
TRANSIENT = ("execution", "ExecuteTime", "collapsed", "scrolled", "trusted")


def is_code(cell: Any) -> bool:
    """Whether a cell holds code to run."""
    return bool(cell.cell_type == "code" and cell.source.strip())


def merged(outputs: list[Any]) -> list[Any]:
    """Join stream outputs of the same name that follow each other."""
    joined: list[Any] = []
    for output in outputs:
        last: Any = joined[-1] if joined else {}
        if output.output_type == "stream" and last.get("name") == output.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def run(notebook: Any, folder: Path) -> None:
    """Execute the code cells in a fresh kernel, a line of progress for each.

    Raises
    ------
    CellExecutionError, CellTimeoutError, DeadKernelError
        If a cell raises, takes longer than an hour or ends the kernel.
    """
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        timeout=CELL_SECONDS,
        record_timing=False,
    )
    code = [(i, cell) for i, cell in enumerate(notebook.cells) if is_code(cell)]
    # encrypted, or the kernel warns on the terminal that it is not
    with client.setup_kernel(transport_encryption="auto"):
        for count, (index, cell) in enumerate(code, 1):
            first = cell.source.strip().splitlines()[0][:60]
            print(f"  [{count:>2}/{len(code)}] {first:<60}", end="", flush=True)
            start = time.monotonic()
            try:
                client.execute_cell(cell, index)
            finally:
                print(f" {time.monotonic() - start:6.1f} s", flush=True)
            cell.outputs = merged(cell.outputs)


def tidy(notebook: Any) -> None:
    """Empty the outputs and drop what editors add to the metadata, in place."""
    notebook.metadata = nbformat.from_dict(METADATA)  # type: ignore[no-untyped-call]
    for cell in notebook.cells:
        for key in TRANSIENT:
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None


def execute(path: Path) -> None:
    """Run one chapter in its folder and replace its file by the executed one."""
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    tidy(notebook)
    run(notebook, path.parent)
    part = path.with_name(f".{path.name}.part")
    try:
        nbformat.write(notebook, part)  # type: ignore[no-untyped-call]
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def main(names: list[str]) -> int:
    """Run the named chapters, or all; return the exit status."""
    pages = sorted(path.stem for path in CHAPTERS.glob("*.ipynb"))
    unknown = [name for name in names if name not in pages]
    if unknown:
        known = ", ".join(pages) or "none yet"
        print(f"no chapter {unknown[0]!r}; there are: {known}", file=sys.stderr)
        return 2
    for name in names or pages:
        path = CHAPTERS / f"{name}.ipynb"
        print(path.name, flush=True)
        try:
            execute(path)
        except FAILURES as error:
            print(f"{error}\n{path.name} is left as it was", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
