"""Make .venv-bench: the peers, beside the book's own environment, which it sees.

    .venv/bin/python benchmarks/peer_environment.py

The peers' packages go into .venv-bench alone, without dependencies (requirements.txt is
a complete lock). A .pth file there adds the packages of .venv, so torch is not
installed twice, and nothing in .venv changes.
"""

import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / ".venv-bench"
STAMP = PLACE / "made-from.txt"
LOCK = ROOT / "benchmarks" / "requirements.txt"


def fail(problem: str) -> NoReturn:
    """End with one sentence on stderr."""
    sys.exit(f"bench: {problem}")


def made_from() -> str:
    """What .venv-bench depends on: its place, this Python, the lock of the peers."""
    lock = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    return f"{PLACE}\n{sys.version}\n{lock}\n"


def site_packages(prefix: Path) -> Path:
    """The folder of installed packages below an environment."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    return prefix / "lib" / version / "site-packages"


def create() -> None:
    """Make the environment, and install the peers with the book's own pip."""
    venv.create(PLACE, clear=True, symlinks=True)
    # addsitedir, since a plain path would pass over the .pth of the book's module
    borrow = f"import site; site.addsitedir({str(site_packages(ROOT / '.venv'))!r})\n"
    (site_packages(PLACE) / "book.pth").write_text(borrow)
    pip = [sys.executable, "-m", "pip", "--python", str(PLACE / "bin" / "python")]
    command = [*pip, "install", "-q", "--no-deps", "-r", str(LOCK)]
    if subprocess.run(command).returncode:
        fail("installing benchmarks/requirements.txt failed, pip's message is above")


def main() -> None:
    """Set .venv-bench up, unless it is there and made from the same."""
    if Path(sys.prefix) != ROOT / ".venv":
        fail(f"run it with {ROOT / '.venv' / 'bin' / 'python'}, as `make bench` does")
    if STAMP.exists() and STAMP.read_text() == made_from():
        return
    print("bench: installing the peers in .venv-bench", flush=True)
    try:
        create()
    except BaseException:
        shutil.rmtree(PLACE, ignore_errors=True)
        raise
    STAMP.write_text(made_from())


if __name__ == "__main__":
    main()
