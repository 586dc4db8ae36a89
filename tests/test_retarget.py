"""The repository's address stands in one place, `make retarget` writes the others."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import retarget

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def book(tmp_path):
    """Return a small book that holds the address in every kind of place."""
    (tmp_path / "chapters").mkdir()
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "retarget.py", tmp_path / "tools")
    cell = 'source = "git+https://github.com/old/book@main"\n'
    texts = {
        "_config.yml": "repository:\n  url: https://github.com/old/book\n",
        "README.md": "git clone https://github.com/old/book.git, then read\n",
        "CITATION.cff": "repository-code: https://github.com/old/book\n",
        "chapters/index.md": "[source](https://github.com/old/book).\n"
        "[theirs](https://github.com/other/book)\n",
        "chapters/one.ipynb": json.dumps({"source": [cell, "θ = 1\r\n"]}),
        "chapters/two.ipynb": "git+https://github.com/old/book@v1\r\nno newline",
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    return tmp_path


def contents(root):
    """Read every file below root."""
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def command(root, *arguments):
    """Run the script as the Makefile does."""
    script = root / "tools" / "retarget.py"
    return subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True
    )


def test_every_place_changes_and_nothing_else(book):
    before = contents(book)
    assert command(book, "new-owner/my.book").returncode == 0
    after = contents(book)
    for path, text in before.items():
        if path.name == "retarget.py":
            continue
        assert b"old/book" in text
        assert after[path] == text.replace(b"old/book", b"new-owner/my.book"), path
    assert after.keys() == before.keys()


def test_there_and_back_is_the_identity(book):
    before = contents(book)
    retarget.retarget(book, "a/b")
    assert retarget.retarget(book, "a/b") == []
    retarget.retarget(book, "old/book")
    assert contents(book) == before


def test_a_place_left_behind_is_found_and_mended(book):
    readme = book / "README.md"
    readme.write_text(readme.read_text().replace("old/book", "older/book"))
    assert retarget.differing(book) == ["README.md: older/book"]
    retarget.retarget(book, "a/b")
    assert retarget.differing(book) == []


@pytest.mark.parametrize(
    "repo",
    [
        "",
        "owner",
        "owner/",
        "/name",
        "a/b/c",
        "a b/c",
        "-a/b",
        "a/..",
        "a/b.git",
        "a/b\n",
        "https://github.com/a/b",
        "a/$(id)",
        "a/é",
    ],
)
def test_what_is_no_address_is_refused(book, repo):
    before = contents(book)
    result = command(book, repo)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "owner/name" in result.stderr
    assert contents(book) == before


def test_a_full_disk_leaves_every_file_as_it_was(book, monkeypatch):
    before = contents(book)
    write = Path.write_bytes

    def full_at_the_third(path, data):
        if path.name == "index.md.new":
            write(path, data[:3])
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full_at_the_third)
    with pytest.raises(SystemExit) as ended:
        retarget.retarget(book, "a/b")
    assert ended.value.code == 2
    assert contents(book) == before


def test_compare_says_it_in_one_line(book):
    assert command(book, "--compare", "Old/Book").stdout == ""
    other = command(book, "--compare", "a/fork")
    assert other.returncode == 0
    assert other.stdout.count("\n") == 1
    assert "make retarget REPO=a/fork" in other.stdout


def test_the_addresses_of_this_repository_agree():
    assert retarget.differing(ROOT) == []


def test_no_other_file_of_this_repository_holds_the_address():
    address = f"github.com/{retarget.current(ROOT)}"
    known = {path for path, _ in retarget.places(ROOT)}
    here = [ROOT / name for name in ("Makefile", "pyproject.toml", "_toc.yml")]
    for folder in (".github", "_ext", "_static", "src", "tools"):
        here += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    texts = (path for path in here if path.suffix not in {".gz", ".pyc"})
    found = [str(p) for p in texts if address in p.read_text(errors="replace")]
    assert known.isdisjoint(found)
    assert found == []
