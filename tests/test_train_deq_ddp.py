"""The example of chapter 4 that trains with several processes, started by torchrun."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

SCRIPT = Path(__file__).parents[1] / "examples" / "train_deq_ddp.py"
pytestmark = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(),
    reason="needs the gloo backend of torch.distributed",
)


def run(*arguments, script=SCRIPT, processes=2):
    """Start the script by torchrun on the CPU; give its return code and output."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += ["--nproc-per-node", str(processes), str(script)]
    # two processes with a pool of threads each would fight for the same cores
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*start, *arguments],
        env=environment,
        text=True,
        capture_output=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


def broken(tmp_path, old, new):
    """A copy of the script with one thing changed."""
    text = SCRIPT.read_text()
    assert text.count(old) == 1
    copy = tmp_path / SCRIPT.name
    copy.write_text(text.replace(old, new))
    return copy


def test_two_processes_have_the_gradient_of_one():
    code, output = run("--check", "--batch-size", "32")
    assert code == 0, output
    assert output.count("gradients differ by") == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "shared = DistributedDataParallel(model)\n    alone",
            "shared = model\n    alone",
        ),
        ("[distributed.get_rank() :: distributed.get_world_size()]", "[:16]"),
    ],
    ids=["gradients that nobody averages", "the same samples for all"],
)
def test_a_wrong_gradient_is_noticed(tmp_path, old, new):
    code, output = run(
        "--check", "--batch-size", "32", script=broken(tmp_path, old, new)
    )
    assert code != 0
    assert "gradients differ by" in output


def test_it_trains_and_says_what_each_process_did():
    code, output = run("--updates", "60")
    assert code == 0, output
    assert "process 0:" in output and "process 1:" in output
    error = float(output.split("test error ")[1].split("%")[0])
    assert error < 30


@pytest.mark.parametrize(
    ("started", "arguments", "message"),
    [
        ({}, "", "start it by torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "--batch-size 3", "multiple of the number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "--updates 0", "at least 1"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "--device tpu", "invalid choice"),
    ],
)
def test_bad_arguments_are_refused(monkeypatch, capsys, started, arguments, message):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as refusal:
        runpy.run_path(str(SCRIPT))["options_of"](arguments.split())
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err
