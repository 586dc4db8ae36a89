"""What every committed notebook must look like, and that each rule can fail."""

import base64
import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from nbformat.v4.rwbase import rejoin_lines
from notebook_check import cell_problem

Rule = Callable[[Any], Iterator[str]]
Mutation = Callable[[Any], object]
ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "chapters").glob("*.ipynb"))
REPOSITORY = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
SETUP = f"""\
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("implicit_layers") is None:  # in Colab, say
    source = "git+{REPOSITORY["url"]}@{REPOSITORY["branch"]}"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", source]
    subprocess.run(command, check=True)
    importlib.invalidate_caches()"""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "name": "python3"},
    "language_info": {"name": "python"},
}
MAX_NOTEBOOK, MAX_PNG = 1_000_000, 150_000  # bytes
MAX_LINES, MAX_COLUMNS, MIN_ALT = 25, 88, 20
FORBIDDEN = {
    r"\bsys\.path\b": "edits sys.path",
    r"^\s*%\s*(load_ext\s+)?autoreload": "uses autoreload, which Colab does not have",
    r"set_num_threads": "calls set_num_threads, which can hang",
    r"#\s*noqa(?!: [A-Z]+\d)": "silences every rule of the linter",
    r"#\s*ruff:\s*noqa": "silences the linter for the whole notebook",
}
LOCK = (ROOT / "requirements.txt").read_text().splitlines()
FOREIGN = re.compile(r"colab|widget|outputId|executionInfo|ExecuteTime|iopub")


def code_cells(notebook: Any) -> list[tuple[int, Any]]:
    """Return the code cells that hold something, numbered as a reader sees them."""
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    return list(enumerate((c for c in cells if c["source"].strip()), 1))


def outputs(notebook: Any) -> Iterator[tuple[int, Any]]:
    for n, cell in code_cells(notebook):
        yield from ((n, output) for output in cell["outputs"])


def metadata(notebook: Any) -> Iterator[str]:
    """Yield all metadata, and the MIME types of the outputs, as text."""
    yield json.dumps(notebook["metadata"])
    yield from (json.dumps(cell["metadata"]) for cell in notebook["cells"])
    for _, output in outputs(notebook):
        yield json.dumps([output.get("metadata", {}), [*output.get("data", {})]])


def execution(notebook: Any) -> Iterator[str]:
    counts = [cell["execution_count"] for _, cell in code_cells(notebook)]
    if counts != [*range(1, len(counts) + 1)]:
        yield f"cells were executed as {counts}, not in order from 1"
    for n, output in outputs(notebook):
        if output["output_type"] == "error":
            yield f"cell {n} stores an error: {output['ename']}"
        if output.get("name") == "stderr":
            yield f"cell {n} stores a warning: {output['text']}"


def environment(notebook: Any) -> Iterator[str]:
    if {*notebook["metadata"]} != {"kernelspec", "language_info"}:
        yield f"metadata holds {sorted(notebook['metadata'])}"
    name = notebook["metadata"].get("kernelspec", {}).get("name")
    if name != "python3":
        yield f"the kernel is {name!r}, not 'python3'"
    language = notebook["metadata"].get("language_info")
    if language != {"name": "python"}:
        yield f"language_info is {language}, not just the name"
    for text in metadata(notebook):
        if found := FOREIGN.search(text):
            yield f"{found[0]!r} in metadata: {text[:60]}"


def images(notebook: Any) -> Iterator[str]:
    for n, output in outputs(notebook):
        for mime, data in output.get("data", {}).items():
            if mime.startswith("image/") and mime != "image/png":
                yield f"cell {n} stores {mime}, not a PNG"
            if mime == "image/png" and (size := len(base64.b64decode(data))) > MAX_PNG:
                yield f"cell {n} stores a PNG of {size:,} bytes"


def alternatives(notebook: Any) -> Iterator[str]:
    drawing = {n for n, out in outputs(notebook) if "image/png" in out.get("data", {})}
    for n, cell in code_cells(notebook):
        alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
        if n in drawing and len(alt.strip()) < MIN_ALT:
            yield f"cell {n} draws, but its metadata.mystnb.image.alt is {alt!r}"


def sizes(notebook: Any) -> Iterator[str]:
    size = len(nbformat.writes(nbformat.from_dict(notebook)).encode())
    if size > MAX_NOTEBOOK:
        yield f"the notebook has {size:,} bytes"
    for n, cell in code_cells(notebook):
        lines = cell["source"].splitlines()
        if len(lines) > MAX_LINES:
            yield f"cell {n} has {len(lines)} lines"
        longest = max(map(len, lines))
        if longest > MAX_COLUMNS:
            yield f"cell {n} has a line of {longest} characters"


def setup(notebook: Any) -> Iterator[str]:
    first = next((cell["source"] for _, cell in code_cells(notebook)), "")
    if first != SETUP:
        yield f"the first code cell is not the setup cell:\n{first}\nbut\n{SETUP}"


def identifiers(notebook: Any) -> Iterator[str]:
    ids = [cell.get("id", "") for cell in notebook["cells"]]
    if not all(ids):
        yield f"cell {ids.index('') + 1} of {len(ids)} has no id"
    elif len({*ids}) < len(ids):
        yield f"ids occur twice: {sorted({i for i in ids if ids.count(i) > 1})}"


def habits(notebook: Any) -> Iterator[str]:
    for n, cell in code_cells(notebook):
        for pattern, why in FORBIDDEN.items():
            if re.search(pattern, cell["source"], re.MULTILINE):
                yield f"cell {n} {why}"


def installs(notebook: Any) -> Iterator[str]:
    for n, cell in code_cells(notebook):
        for package in re.findall(r'"([\w-]+==[\w.]+)"', cell["source"]):
            if package not in LOCK:
                yield f"cell {n} installs {package}, which is not in requirements.txt"


def tolerances(notebook: Any) -> Iterator[str]:
    for n, cell in code_cells(notebook):
        if problem := cell_problem(nbformat.from_dict(cell)):
            yield f"cell {n}: {problem}"


RULES: list[Rule] = [
    execution,
    environment,
    images,
    alternatives,
    sizes,
    setup,
    identifiers,
    habits,
    installs,
    tolerances,
]


def digits(names: list[str]) -> list[str]:
    """Return the names that a reordering of the book would make wrong."""
    return [name for name in names if re.search(r"\d", name)]


def read(path: Path) -> Any:
    """Return a notebook as it is stored: nbformat would mend missing ids in reading."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return rejoin_lines(nbformat.from_dict(notebook))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path, rule: Rule) -> None:
    assert [*rule(read(path))] == []


def test_the_book_has_notebooks() -> None:
    assert NOTEBOOKS, "no chapters/*.ipynb: the tests above looked at nothing"


def test_no_page_is_named_by_its_number() -> None:
    files = [p for p in (ROOT / "chapters").iterdir() if not p.name.startswith(".")]
    assert digits([p.name for p in files]) == []


def test_a_number_in_a_name_is_found() -> None:
    names = ["introduction.ipynb", "01_introduction.ipynb", "chapter2.md"]
    assert digits(names) == names[1:]


PNG = base64.b64encode(b"\x89PNG").decode()
ALT = "The residual falls by half in each step."


def sound() -> Any:
    """Return a small notebook that keeps every rule."""
    figure = new_output("display_data", {"image/png": PNG, "text/plain": "<Figure>"})
    cells = [
        new_markdown_cell("# A page that mentions Colab and sys.path"),
        new_code_cell(SETUP),
        new_code_cell(
            "print(0.5)  # noqa: T201",
            outputs=[new_output("stream", text="0.5\n")],
            metadata={"check": {"rtol": 0.01}},
        ),
        new_code_cell(
            "draw()", outputs=[figure], metadata={"mystnb": {"image": {"alt": ALT}}}
        ),
    ]
    for count, cell in enumerate(cells[1:], 1):
        cell.execution_count = count
    return new_notebook(cells=cells, metadata=copy.deepcopy(METADATA))


def source(text: str) -> Mutation:
    """Return what gives the second code cell this source."""
    return lambda book: book.cells[2].update(source=text)


def state(**check: Any) -> Mutation:
    return lambda book: book.cells[2].metadata.update(check=check)


def store(output_type: str, *data: dict[str, str], **fields: Any) -> Mutation:
    """Return what adds an output to the second code cell."""
    output = new_output(output_type, *data, **fields)
    return lambda book: book.cells[2].outputs.append(output)


def image(alt: str) -> Mutation:
    return lambda book: book.cells[3].metadata.mystnb.image.update(alt=alt)


WIDGET = {"application/vnd.jupyter.widget-view+json": "", "text/plain": "bar"}
LARGE_PNG = base64.b64encode(bytes(MAX_PNG + 1)).decode()
BROKEN: list[tuple[Rule, Mutation, str]] = [
    (execution, lambda b: b.cells[3].update(execution_count=4), "as [1, 2, 4], not"),
    (execution, lambda b: b.cells[1].update(execution_count=None), "as [None, 2, 3]"),
    (execution, lambda b: b.cells.insert(1, b.cells.pop()), "as [3, 1, 2], not"),
    (execution, store("error", ename="OSError", evalue=""), "2 stores an error: OSE"),
    (execution, store("stream", name="stderr", text="beware"), "a warning: beware"),
    (environment, lambda b: b.metadata.update(toc={}), "metadata holds"),
    (environment, lambda b: b.metadata.pop("language_info"), "language_info is None"),
    (environment, lambda b: b.metadata.kernelspec.update(name="torch"), "'torch', not"),
    (environment, lambda b: b.metadata.language_info.update(version="3"), "just the"),
    (environment, lambda b: b.metadata.update(colab={}), "'colab' in metadata"),
    (environment, lambda b: b.cells[0].metadata.update(colab={}), "'colab' in"),
    (environment, lambda b: b.cells[1].metadata.update(outputId="x"), "'outputId' in"),
    (environment, store("display_data", WIDGET), "'widget' in metadata"),
    (environment, lambda b: b.cells[3].outputs[0].metadata.update(colab=1), "'colab'"),
    (images, store("display_data", {"image/svg+xml": "<svg/>"}), "2 stores image/svg"),
    (images, store("display_data", {"image/jpeg": PNG}), "2 stores image/jpeg, not"),
    (images, store("display_data", {"image/png": LARGE_PNG}), "PNG of 150,001 bytes"),
    (alternatives, image("A figure."), "cell 3 draws, but its metadata.mystnb"),
    (alternatives, image(" " * MIN_ALT), "cell 3 draws, but its"),
    (alternatives, lambda b: b.cells[3].metadata.clear(), "image.alt is ''"),
    (alternatives, store("display_data", {"image/png": PNG}), "cell 2 draws, but"),
    (sizes, store("stream", text="x" * MAX_NOTEBOOK), "the notebook has 1,00"),
    (sizes, source("x = 1\n" * (MAX_LINES + 1)), "cell 2 has 26 lines"),
    (sizes, source("x" * (MAX_COLUMNS + 1)), "cell 2 has a line of 89 characters"),
    (setup, lambda b: b.cells.pop(1), "the first code cell is not the setup cell"),
    (setup, lambda b: b.cells[1].update(source=SETUP + "\n"), "not the setup cell"),
    (
        setup,
        lambda b: b.cells[1].update(source=SETUP.replace(REPOSITORY["url"], "else")),
        "not the setup cell",
    ),
    (identifiers, lambda b: b.cells[2].pop("id"), "cell 3 of 4 has no id"),
    (identifiers, lambda b: b.cells[2].update(id=b.cells[1].id), "ids occur twice"),
    (habits, source("import sys\nsys.path.append('..')"), "cell 2 edits sys.path"),
    (habits, source("%load_ext autoreload"), "cell 2 uses autoreload"),
    (habits, source("%autoreload 2"), "cell 2 uses autoreload"),
    (habits, source("torch.set_num_threads(4)"), "cell 2 calls set_num_threads"),
    (habits, source("x=1  # noqa"), "cell 2 silences every rule of the linter"),
    (habits, source("# ruff: noqa: E501"), "cell 2 silences the linter"),
    (installs, source('packages = ["torch==0.1"]'), "2 installs torch==0.1, which"),
    (tolerances, state(rtol=0.5), "cell 2: rtol is 0.5, expected"),
    (tolerances, state(uncompared=""), "cell 2: 'uncompared' is ''"),
    (tolerances, lambda b: b.cells[2].metadata.update(tags=["nbval-skip"]), "nbval-"),
]


def test_a_sound_notebook_keeps_every_rule(tmp_path: Path) -> None:
    path = tmp_path / "sound.ipynb"
    nbformat.write(sound(), path)
    assert {rule.__name__: [*rule(read(path))] for rule in RULES} == {
        rule.__name__: [] for rule in RULES
    }


def test_reading_mends_nothing(tmp_path: Path) -> None:
    path = tmp_path / "sound.ipynb"
    path.write_text(json.dumps(sound()).replace('"id"', '"name"', 1))
    assert [*identifiers(read(path))] == ["cell 1 of 4 has no id"]


@pytest.mark.parametrize(("rule", "mutate", "says"), BROKEN)
def test_a_broken_rule_is_named(rule: Rule, mutate: Mutation, says: str) -> None:
    notebook = sound()
    mutate(notebook)
    assert says in "\n".join(rule(notebook))


def test_every_rule_is_seen_to_fail() -> None:
    assert {rule for rule, _, _ in BROKEN} == {*RULES}
