"""Run the book's checks in order, stop at the first that fails, and say what passed.

    python tools/check.py [NAME ...]

With names, only those. A check passes when its command succeeds *and* prints its
closing line, so that a run in which nothing was collected does not count.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTEST = r"\d+ passed.*? in [\d.]+s"
# a file goes to one of two workers, and each has a core: twice two threads are slower
TWO = "OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile"
# name: the command, and its closing line when all is well
CHECKS = {
    "imports": (
        "python -c 'import torchvision as v; print(\"torchvision\", v.__version__)'",
        r"torchvision [\d.]+.*",
    ),
    "lint": ("ruff check", r"All checks passed!"),
    "format": ("ruff format --check", r"\d+ files? already formatted"),
    "types": ("mypy", r"Success: .*"),
    "tests": (f"{TWO} tests", PYTEST),
    "notebooks": (f"{TWO} -v -p notebook_check --notebooks chapters", PYTEST),
    # all pages, since an unchanged page keeps its warnings to itself
    "build": ("jupyter-book build -W -n --keep-going --all .", r"build succeeded"),
    "site": (f"{TWO} tests/site_*.py", PYTEST),
}


def run(command: str) -> tuple[int, str]:
    """Run a shell command in the root, showing its output; give status and output."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with subprocess.Popen(
        command,
        shell=True,
        cwd=ROOT,
        env={**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        output = bytearray()
        while chunk := os.read(process.stdout.fileno(), 65536):
            output += chunk
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
    return process.returncode, output.decode(errors="replace")


def run_checks(checks: dict[str, tuple[str, str]]) -> int:
    """Run checks up to the first failure and print the closing list; 0 if all pass."""
    start = time.monotonic()
    closing: list[str] = []
    passed = failed = 0
    for name, (command, expected) in checks.items():
        print(f"--- {name}: {command}", flush=True)
        status, output = run(command)
        last = [match[0] for match in re.finditer(expected, output)][-1:]
        if status or not last:
            why = f"status {status}" if status else "its closing line is missing"
            closing.append(f"FAILED  {name:<10} {command} ({why})")
            failed = 1
            break
        closing.append(f"passed  {name:<10} {last[0]}")
        count = re.match(r"(\d+) passed", last[0])
        passed += int(count[1]) if count else 1
    print("", *closing, sep="\n")
    outcome = f"{failed} failed, " * failed + f"{passed} passed"
    print(f"===== {outcome} in {time.monotonic() - start:.2f}s =====", flush=True)
    return failed


def main() -> None:
    """Run the checks named on the command line, or all."""
    names = sys.argv[1:] or list(CHECKS)
    if unknown := [name for name in names if name not in CHECKS]:
        sys.exit(f"check: {unknown[0]!r} is not one of {', '.join(CHECKS)}")
    sys.exit(run_checks({name: CHECKS[name] for name in names}))


if __name__ == "__main__":
    main()
