"""Make the book's environment in .venv, or leave it alone when nothing has changed.

    python3 tools/environment.py [--torch-index URL]

Runs before anything is installed, so it needs the standard library alone. With
--torch-index, torch and torchvision come from that package index and the CUDA packages
of requirements.txt are left out; an empty URL goes back to the ordinary ones. Without
the option an existing environment keeps the kind it has.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "made-from.json"
INPUTS = ("requirements.txt", "pyproject.toml")
TORCH = re.compile(r"(torch|torchvision)==")
CUDA = re.compile(r"(nvidia|cuda|triton)\b")


def fail(problem: str) -> NoReturn:
    """End with one sentence on stderr."""
    sys.exit(f"environment: {problem}")


def digest() -> str:
    """Hash what is installed from, so that a new date alone installs nothing."""
    content = b"\0".join((ROOT / name).read_bytes() for name in INPUTS)
    return hashlib.sha256(content).hexdigest()


def lock_lines(lock: str, torch_index: str) -> tuple[list[str], list[str]]:
    """Split a lock into what the torch index gives and what the usual one gives."""
    lines = [line for line in lock.splitlines() if line and line[0] not in " #"]
    if not torch_index:
        return [], lines
    rest = [line for line in lines if not TORCH.match(line) and not CUDA.match(line)]
    return [line for line in lines if TORCH.match(line)], rest


def run(*command: str | Path, **environment: str) -> None:
    """Run a command; when it fails, show what it said and end with one sentence."""
    result = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True
    )
    if result.returncode == 0:
        return
    said = result.stdout + result.stderr
    # venv hides the reason when not even pip fits
    if "No space left on device" in said or shutil.disk_usage(ROOT).free < 1e7:
        fail("the disk is full: about 7 GB are needed, 2 GB with TORCH_INDEX")
    sys.stderr.write(said)
    fail(f"`{' '.join(map(str, command))}` failed, its own message is above")


def create() -> None:
    """Make an empty virtual environment, in place of any that is there."""
    if importlib.util.find_spec("ensurepip") is None:
        fail(
            f"{sys.executable} cannot make virtual environments: install the package "
            f"python3-venv (or python{sys.version_info[0]}.{sys.version_info[1]}-venv)"
        )
    shutil.rmtree(VENV, ignore_errors=True)
    # a python inside .venv would make an environment that hangs on the one removed
    base = getattr(sys, "_base_executable", sys.executable)
    run(base, "-m", "venv", VENV)


def install(torch_index: str) -> None:
    """Install requirements.txt, then the module itself without its dependencies."""
    pip = (VENV / "bin" / "python", "-m", "pip", "install", "-q")
    torch, rest = lock_lines((ROOT / "requirements.txt").read_text(), torch_index)
    if torch:
        # pip adds the extra indexes of its configuration, and could take torch there
        only = {"PIP_EXTRA_INDEX_URL": torch_index}
        run(*pip, "--no-deps", "--index-url", torch_index, *torch, **only)
    wanted = VENV / "requirements.txt"
    wanted.write_text("\n".join(rest) + "\n")
    run(*pip, "-r", wanted)
    run(*pip, "--no-deps", "--no-build-isolation", "-e", ROOT)


def bring_up_to_date(complete: dict[str, object], same_kind: bool) -> None:
    """Make .venv anew, or in place where only what is installed in it has changed."""
    print(
        "environment: setting up .venv, this takes minutes the first time", flush=True
    )
    try:
        if same_kind:
            STAMP.write_text(json.dumps({**complete, "inputs": "unfinished"}))
        else:
            create()
        install(str(complete["torch_index"]))
        STAMP.write_text(json.dumps(complete))
    except BaseException as error:
        if not same_kind:
            shutil.rmtree(VENV, ignore_errors=True)
        if isinstance(error, OSError):
            fail(str(error))
        raise


def main() -> None:
    """Compare .venv with what it was made from, and set it up where they differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torch-index", metavar="URL")
    asked = parser.parse_args().torch_index
    made_from = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    complete = {
        "python": list(sys.version_info[:2]),
        "place": str(ROOT),
        "torch_index": made_from.get("torch_index", "") if asked is None else asked,
        "inputs": digest(),
    }
    there = (VENV / "bin" / "python").exists()
    if not there or made_from != complete:
        same_inputs = {**made_from, "inputs": complete["inputs"]}
        bring_up_to_date(complete, same_kind=there and same_inputs == complete)


if __name__ == "__main__":
    main()
