"""Write the repository's address, owner/name on GitHub, wherever it must stand.

    python3 tools/retarget.py owner/name
    python3 tools/retarget.py --compare owner/name

_config.yml holds the address. The first form changes it there and in every place below;
the second only says, in one line, whether it is another one than the one given. Needs
nothing but Python, so that a fork can be retargeted before anything is installed.
"""

import os
import re
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
# where the address stands, and what stands before it there: a page may well link to
# other people's repositories, the other files do not
COLAB = r"colab\.research\.google\.com/github/"
PLACES = {
    "_config.yml": r"github\.com/",
    "README.md": rf"github\.com/|{COLAB}",
    "CONTRIBUTING.md": rf"github\.com/|{COLAB}",
    "CITATION.cff": r"github\.com/",
    "chapters/*.md": rf"(?:git\+|git clone )https://github\.com/|{COLAB}",
    "chapters/*.ipynb": rf"(?:git\+|git clone )https://github\.com/|{COLAB}",
}
NAME = r"(?:[A-Za-z0-9_-]|\.(?=[A-Za-z0-9_.-])(?!git\b)){1,100}"
ADDRESS = rf"[A-Za-z0-9][A-Za-z0-9_-]{{0,38}}/{NAME}"


def fail(problem: str) -> NoReturn:
    """End with one sentence on stderr and status 2."""
    print(f"retarget: {problem}", file=sys.stderr)
    sys.exit(2)


def places(root: Path) -> list[tuple[Path, re.Pattern[str]]]:
    """List the files that hold the address, each with the pattern of it there."""
    return [
        (path, re.compile(rf"({before})({ADDRESS})"))
        for name, before in PLACES.items()
        for path in sorted(root.glob(name))
    ]


def current(root: Path) -> str:
    """Read owner/name from _config.yml."""
    text = (root / "_config.yml").read_text(encoding="utf-8")
    found = re.search(rf"^  url: https://github\.com/({ADDRESS})$", text, re.MULTILINE)
    if found is None:
        fail("_config.yml has no line `  url: https://github.com/owner/name`")
    return found[1]


def differing(root: Path) -> list[str]:
    """List every address that is not the one of _config.yml, as 'file: address'."""
    expected = current(root)
    return [
        f"{path.relative_to(root)}: {found[2]}"
        for path, pattern in places(root)
        for found in pattern.finditer(path.read_text(encoding="utf-8"))
        if found[2] != expected
    ]


def replace_all(contents: dict[Path, bytes]) -> None:
    """Write several files, or none of them when the disk is full."""
    drafts = {path: path.with_name(path.name + ".new") for path in contents}
    try:
        for path, draft in drafts.items():
            draft.write_bytes(contents[path])
        for path, draft in drafts.items():
            os.replace(draft, path)
    except OSError as error:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
        fail(f"nothing was changed, {error}")


def retarget(root: Path, new: str) -> list[Path]:
    """Write the address `new` everywhere; give the files that changed."""
    link = re.compile(rf"(github\.com/)({re.escape(current(root))})(?![\w-])")
    contents = {}
    for path, pattern in places(root):
        old = path.read_bytes()
        text = old.decode()
        for address in (pattern, link):
            text = address.sub(lambda found: found[1] + new, text)
        if text.encode() != old:
            contents[path] = text.encode()
    replace_all(contents)
    return list(contents)


def main() -> None:
    """Read the command line and retarget or compare."""
    arguments = sys.argv[1:]
    compare = arguments[:1] == ["--compare"]
    new = " ".join(arguments[compare:])
    if not re.fullmatch(ADDRESS, new):
        fail(
            f"{new!r} is not an address on GitHub: give owner/name, for example "
            "make retarget REPO=ada/implicit-layers"
        )
    old = current(ROOT)
    if compare:
        if old.lower() != new.lower():
            print(
                f"retarget: the notebooks install from {old}, this repository is "
                f"{new}: run `make retarget REPO={new}` and commit what it changes"
            )
        return
    changed = retarget(ROOT, new)
    print(f"retarget: {old} -> {new} in {len(changed)} files")


if __name__ == "__main__":
    main()
