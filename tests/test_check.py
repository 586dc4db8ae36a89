"""The runner of `make test`: what fails, fails the whole."""

import pytest
from check import run_checks

GOOD = ("echo 3 passed in 0.1s", r"\d+ passed in [\d.]+s")


def test_all_passed(capfd):
    assert run_checks({"tests": GOOD, "lint": ("echo All good", "All good")}) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[-3:-1] == [
        "passed  tests      3 passed in 0.1s",
        "passed  lint       All good",
    ]
    assert lines[-1].startswith("===== 4 passed in ")


@pytest.mark.parametrize(
    "command",
    ["echo 3 passed in 0.1s; exit 5", "echo no tests ran in 0.1s", "no-such-command"],
)
def test_a_failure_stops_the_run(command, capfd):
    checks = {"first": GOOD, "second": (command, GOOD[1]), "third": GOOD}
    assert run_checks(checks) == 1
    out = capfd.readouterr().out
    assert "FAILED  second" in out
    assert "third" not in out
    assert out.splitlines()[-1].startswith("===== 1 failed, 3 passed in ")
