"""The data against an independent reading of its files, and all that can go wrong."""

import errno
import gzip
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from implicit_layers import data
from implicit_layers.data import (
    batches,
    hare_and_lynx,
    mauna_loa_co2,
    mnist,
    persuasion,
)

pytestmark = pytest.mark.filterwarnings("error:.*MNIST")

EMBEDDED = Path(str(files("implicit_layers"))) / "mnist"
NAMES = [
    f"{half}-{kind}-ubyte"
    for half in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
]
LOADER = """
import sys
from implicit_layers.data import mnist
print("ready", flush=True)
sys.stdin.readline()
images, labels = mnist(train=sys.argv[1] == "train")
print(len(images), int(labels.sum()))
"""


def idx(name: str) -> npt.NDArray[np.uint8]:
    """Read one embedded file without torchvision and without the module."""
    content = gzip.decompress((EMBEDDED / f"{name}.gz").read_bytes())
    kind, dimensions = struct.unpack(">HBB", content[:4])[1:]
    assert kind == 8
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def unpacked() -> Iterator[Path]:
    """A cache that mnist() made; its files are linked, never written."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMPLICIT_LAYERS_CACHE", folder)
        mnist(train=False)
        yield Path(folder)


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("IMPLICIT_LAYERS_CACHE", folder)
        yield Path(folder)


@pytest.fixture
def raw(empty: Path, unpacked: Path) -> Path:
    """The folder of the four files in a cache of one's own."""
    shutil.copytree(unpacked, empty, copy_function=os.link, dirs_exist_ok=True)
    return empty / "MNIST" / "raw"


@pytest.fixture
def spare(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary folders are made, with none made yet."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        data._temporary_folder.cache_clear()
        yield Path(folder)
    data._temporary_folder.cache_clear()


@pytest.mark.parametrize("half", ["train", "t10k"])
def test_agrees_with_an_independent_reading(unpacked: Path, half: str) -> None:
    images, labels = mnist(train=half == "train")
    pixels, digits = idx(f"{half}-images-idx3-ubyte"), idx(f"{half}-labels-idx1-ubyte")
    assert images.shape == (len(pixels), 1, 28, 28)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    expected = pixels[:, None].astype(np.float32) / np.float32(255)
    assert np.array_equal(images.numpy(), expected)
    assert np.array_equal(labels.numpy(), digits)


def test_is_mnist(unpacked: Path) -> None:
    images, labels = mnist(train=True)
    assert len(labels) == 60_000
    assert labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert images.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert images.std().item() == pytest.approx(0.3081, abs=5e-5)
    assert (images.min().item(), images.max().item()) == (0, 1)
    assert len(mnist(train=False)[1]) == 10_000


def test_goes_to_the_device(unpacked: Path) -> None:
    images, labels = mnist(train=False, device="meta")
    assert (images.device.type, labels.device.type) == ("meta", "meta")


def test_refuses_a_train_that_is_no_bool() -> None:
    with pytest.raises(TypeError, match="train is 'test': pass True or False"):
        mnist(train="test")  # type: ignore[arg-type]


def said_of_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Bytes and SHA-256 of each file, by the README beside it."""
    rows = re.findall(
        r"^\| `(\S+)` \| ([\d,]+) \| `([0-9a-f]{64})` \|$",
        (folder / "README.md").read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    return {name: (int(size.replace(",", "")), digest) for name, size, digest in rows}


def test_checksums_of_readme_files_and_module_agree() -> None:
    found = {}
    for name in NAMES:
        packed = (EMBEDDED / f"{name}.gz").read_bytes()
        for key, content in (f"{name}.gz", packed), (name, gzip.decompress(packed)):
            found[key] = (len(content), hashlib.sha256(content).hexdigest())
    assert said_of_files(EMBEDDED) == found
    assert {name: found[name][1] for name in NAMES} == data.CHECKSUMS


def test_unpacks_once(raw: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in raw.iterdir()}
    mnist(train=False)
    mnist(train=True)
    assert {path: path.stat().st_mtime_ns for path in raw.iterdir()} == before
    assert contents(raw) == sorted(NAMES)


def test_others_may_read_the_cache(empty: Path) -> None:
    (empty / "own").touch()
    mnist(train=False)
    modes = {path.stat().st_mode for path in empty.rglob("*") if path.is_file()}
    assert modes == {(empty / "own").stat().st_mode}


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied", "foreign"])
def test_a_damaged_file_is_mended_and_said_so(raw: Path, damage: str) -> None:
    path = raw / "t10k-images-idx3-ubyte"
    sound = path.read_bytes()
    path.unlink()
    path.write_bytes(
        {
            "flipped": sound[:-1] + bytes([sound[-1] ^ 1]),
            "truncated": sound[:-1],
            "emptied": b"",
            "foreign": b"<html>not found</html>",
        }[damage]
    )
    with pytest.warns(UserWarning, match="images-idx3-ubyte was damaged") as caught:
        images, _ = mnist(train=False)
    assert [warning.filename for warning in caught] == [__file__]
    assert len(images) == 10_000
    assert path.read_bytes() == sound
    mnist(train=False)  # silent, for a warning is an error here


def test_a_missing_file_is_written_again(raw: Path) -> None:
    (raw / "train-labels-idx1-ubyte").unlink()
    mnist(train=False)
    assert contents(raw) == sorted(NAMES)


def test_the_other_half_is_not_checked(raw: Path) -> None:
    (raw / "train-images-idx3-ubyte").unlink()
    (raw / "train-images-idx3-ubyte").write_bytes(b"damaged")
    assert len(mnist(train=False)[0]) == 10_000


def test_no_other_data_is_read_in_place_of_mnist(raw: Path, spare: Path) -> None:
    processed = raw.parent / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(1, 28, 28), torch.zeros(1)), processed / name)
    with pytest.warns(UserWarning, match="MNIST/processed, which torchvision would"):
        assert len(mnist(train=False)[0]) == 10_000


def unwritable(folder: Path) -> list[Path]:
    (folder / "file").touch()
    return [folder / "file", folder / "file" / "below", folder / ("x" * 300)]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_temporary_folder_stands_in(
    empty: Path, spare: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    chosen = str(unwritable(empty)[which])
    monkeypatch.setenv("IMPLICIT_LAYERS_CACHE", chosen)
    for _ in range(2):
        with pytest.warns(UserWarning, match="IMPLICIT_LAYERS_CACHE is not used"):
            assert len(mnist(train=False)[0]) == 10_000
    assert contents(spare) == sorted(NAMES)
    assert contents(empty) == ["file"]


def test_the_default_cache_gives_way_silently(
    empty: Path, spare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IMPLICIT_LAYERS_CACHE")
    monkeypatch.setattr(data, "_cache_folder", lambda: unwritable(empty)[1])
    assert len(mnist(train=False)[0]) == 10_000
    assert contents(spare) == sorted(NAMES)


def test_says_what_to_do_when_nothing_can_be_written(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = unwritable(empty)[1]
    monkeypatch.setenv("IMPLICIT_LAYERS_CACHE", str(nowhere))
    monkeypatch.setattr(data, "_temporary_folder", lambda: nowhere)
    with (
        pytest.warns(UserWarning, match="not used"),
        pytest.raises(OSError, match=r"^neither .* set IMPLICIT_LAYERS_CACHE"),
    ):
        mnist(train=False)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_nothing_half_written(
    empty: Path, spare: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    whole = Path.write_bytes

    def half(path: Path, content: bytes) -> int:
        whole(path, content[: len(content) // 2])
        raise OSError(number, "simulated")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(
        OSError, match=r"no room left in .* set IMPLICIT_LAYERS_"
    ) as got:
        mnist(train=False)
    assert got.value.errno == number
    assert str(empty) in str(got.value)
    assert contents(empty) == contents(spare) == []


def test_a_full_disk_at_the_first_folder(
    empty: Path, spare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "simulated")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match=r"no room left in .* set IMPLICIT_LAYERS_CACHE"):
        mnist(train=False)


def test_an_interruption_leaves_nothing_half_written(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        mnist(train=False)
    assert contents(empty) == []


def mounted(options: str, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command with a small file system of its own at /mnt, seen by it alone."""
    script = f'mount -t tmpfs -o {options} tmpfs /mnt && exec "$@"'
    shell = ["unshare", "-rm", "sh", "-c", script, "sh", *command]
    environment = {**os.environ, "IMPLICIT_LAYERS_CACHE": "/mnt"}
    return subprocess.run(
        shell, input="\n", capture_output=True, text=True, env=environment, timeout=60
    )


def can_mount() -> bool:
    return bool(shutil.which("unshare")) and not mounted("size=1m", ["true"]).returncode


@pytest.mark.skipif(not can_mount(), reason="this system lets nobody mount a tmpfs")
def test_a_disk_that_is_really_full() -> None:
    script = (
        f'"{sys.executable}" -c "$1" t10k; echo $?; find /mnt -type f -printf " %f"'
    )
    result = mounted("size=50m", ["sh", "-c", script, "sh", LOADER])
    assert "OSError: [Errno 28] no room left in /mnt/MNIST/raw" in result.stderr
    # "ready", the exit status, and the files that had room: they are whole
    assert sorted(result.stdout.split()) == ["1", "ready", *sorted(NAMES[:2])]


@pytest.mark.skipif(not can_mount(), reason="this system lets nobody mount a tmpfs")
def test_a_disk_that_is_really_read_only(tmp_path: Path) -> None:
    command = ["env", f"TMPDIR={tmp_path}", sys.executable, "-c", LOADER, "t10k"]
    result = mounted("ro", command)
    assert "IMPLICIT_LAYERS_CACHE is not used" in result.stderr
    assert "Read-only file system" in result.stderr
    assert result.stdout.splitlines()[1].startswith("10000 ")
    assert list(tmp_path.iterdir()) == []  # removed at exit


def test_processes_that_start_at_once(empty: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOADER, half],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for half in ("train", "t10k")
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for half, process in zip(("train", "t10k"), processes, strict=True):
        answer, complaint = process.communicate(timeout=60)
        digits = idx(f"{half}-labels-idx1-ubyte")
        assert answer == f"{len(digits)} {digits.sum()}\n"
        assert "MNIST" not in complaint
    found = {path.name: path.read_bytes() for path in empty.rglob("*ubyte*")}
    checksums = {name: hashlib.sha256(found[name]).hexdigest() for name in found}
    assert checksums == data.CHECKSUMS


@pytest.mark.parametrize(
    "damage", ["cut", "flipped", "garbled", "foreign", "missing", "other"]
)
def test_a_damaged_package_says_reinstall(
    empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(data, "files", lambda package: tmp_path)
    (tmp_path / "mnist").mkdir()
    for name in NAMES:
        packed = (EMBEDDED / f"{name}.gz").read_bytes()
        middle = len(packed) // 2
        flipped = bytes([packed[middle] ^ 255])
        wrong = {
            "cut": packed[:-100],
            "flipped": packed[:middle] + flipped + packed[middle + 1 :],
            "garbled": packed[:3] + bytes(7) + b"\x07",  # no such kind of block
            "foreign": b"version https://git-lfs.github.com/spec/v1\n",
            "other": gzip.compress(b"other data"),
        }
        if damage != "missing":
            (tmp_path / "mnist" / f"{name}.gz").write_bytes(wrong[damage])
    with pytest.raises(RuntimeError, match=r"\.gz in .* reinstall implicit-layers"):
        mnist(train=False)
    assert contents(empty) == []


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/c"}, "/c/implicit-layers"),
        ("linux", {"XDG_CACHE_HOME": ""}, "/h/.cache/implicit-layers"),
        ("darwin", {}, "/h/Library/Caches/implicit-layers"),
        ("win32", {"LOCALAPPDATA": "/c"}, "/c/implicit-layers"),
        ("win32", {}, "/h/AppData/Local/implicit-layers"),
        ("linux", {"IMPLICIT_LAYERS_CACHE": "/mine"}, "/mine"),
        ("linux", {"IMPLICIT_LAYERS_CACHE": "~/mine"}, "/h/mine"),
        ("linux", {"IMPLICIT_LAYERS_CACHE": ""}, "/h/.cache/implicit-layers"),
    ],
)
def test_where_the_cache_is(
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    variables: dict[str, str],
    expected: str,
) -> None:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "IMPLICIT_LAYERS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/h", "USERPROFILE": "/h", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert data._cache_folder() == Path(expected)


def test_no_home_is_no_obstacle(spare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("IMPLICIT_LAYERS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert len(mnist(train=False)[0]) == 10_000
    assert contents(spare) == sorted(NAMES)


@settings(deadline=None)  # the time of a busy machine is no finding
@given(
    rows=st.integers(1, 300),
    batch_size=st.integers(1, 400),
    seed=st.none() | st.integers(0, 2**63 - 1),
)
def test_batches_are_a_partition(rows: int, batch_size: int, seed: int | None) -> None:
    labels = torch.arange(rows)
    inputs = torch.stack([labels, -labels], dim=1).double()
    found = list(batches(inputs, labels, batch_size=batch_size, seed=seed))
    sizes = [len(y) for _, y in found]
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    assert 1 <= sizes[-1] <= batch_size
    order = torch.cat([y for _, y in found])
    assert torch.equal(order.sort().values, labels)
    assert torch.equal(torch.cat([x for x, _ in found]), inputs[order])
    if seed is None:
        assert torch.equal(order, labels)


def order(seed: int) -> list[int]:
    rows = torch.arange(1000)
    return [row for (batch,) in batches(rows, seed=seed) for row in batch.tolist()]


def test_the_seed_alone_fixes_the_order() -> None:
    torch.manual_seed(0)
    first = order(7)
    torch.manual_seed(1)
    assert order(7) == first
    assert order(8) != first
    assert first != sorted(first)


def test_the_order_is_drawn_on_the_cpu_whatever_the_default_device() -> None:
    expected = order(7)
    rows = torch.arange(1000)
    with torch.device("meta"):
        drawn = [batch for (batch,) in batches(rows, seed=7)]
    assert torch.cat(drawn).tolist() == expected


def test_batches_stay_on_the_device_of_their_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = torch.Tensor.index_select

    def strict(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
        assert index.device == tensor.device  # as an accelerator wants it
        return whole(tensor, dim, index)

    monkeypatch.setattr(torch.Tensor, "index_select", strict)
    here, there = torch.zeros(5, 2), torch.zeros(5, device="meta")
    for x, y in batches(here, there, batch_size=2, seed=0):
        assert (x.device.type, y.device.type) == ("cpu", "meta")


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    order(7)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_data_cannot_be_changed_through_a_shuffled_batch() -> None:
    rows = torch.ones(500)
    for (batch,) in batches(rows, batch_size=3, seed=0):
        assert torch.equal(batch, torch.ones_like(batch))
        batch.zero_()
    assert torch.equal(rows, torch.ones(500))


@pytest.mark.parametrize(
    ("tensors", "options", "error", "sentence"),
    [
        ([], {}, ValueError, "no tensor: pass at least one"),
        ([[1, 2]], {}, TypeError, "got a list: pass tensors"),
        ([torch.tensor(1)], {}, ValueError, r"shape \(\) has no rows"),
        ([torch.zeros(0, 3)], {}, ValueError, r"shape \(0, 3\) has no rows"),
        ([torch.zeros(3), torch.zeros(4)], {}, ValueError, r"have \[3, 4\] rows"),
        ([torch.zeros(3)], {"batch_size": 0}, ValueError, "batch_size is 0: pass 1"),
        ([torch.zeros(3)], {"batch_size": -1}, ValueError, "batch_size is -1"),
        ([torch.zeros(3)], {"batch_size": 2.0}, TypeError, "batch_size is 2.0"),
        ([torch.zeros(3)], {"batch_size": True}, TypeError, "batch_size is True"),
        ([torch.zeros(3)], {"batch_size": None}, TypeError, "batch_size is None"),
        ([torch.zeros(3)], {"seed": 1.5}, TypeError, "seed is 1.5: pass an int"),
        ([torch.zeros(3)], {"seed": True}, TypeError, "seed is True: pass an int"),
        ([torch.zeros(3)], {"seed": -1}, ValueError, "seed is -1: pass an int from 0"),
        ([torch.zeros(3)], {"seed": 2**63}, ValueError, "seed is 9223372036854775808"),
    ],
)
def test_bad_input_is_refused_at_the_call(
    tensors: list[object],
    options: dict[str, object],
    error: type[Exception],
    sentence: str,
) -> None:
    with pytest.raises(error, match=sentence):
        batches(*tensors, **options)  # type: ignore[arg-type]


def test_a_batch_may_be_larger_than_anything() -> None:
    assert [len(x) for (x,) in batches(torch.zeros(3), batch_size=2**70)] == [3]
    assert [len(x) for (x,) in batches(torch.zeros(3), batch_size=2**70, seed=0)] == [3]


# The two series.

PACKAGE = Path(str(files("implicit_layers")))
SERIES = PACKAGE / "series"
LOADERS = {"hare_and_lynx.csv": hare_and_lynx, "mauna_loa_co2.csv": mauna_loa_co2}
Loader = Callable[[], tuple[torch.Tensor, torch.Tensor]]


def columns(name: str) -> list[list[str]]:
    """Read one table without the module."""
    lines = (SERIES / name).read_text(encoding="utf-8").splitlines()
    rows = [line.split(",") for line in lines[1:]]
    return [list(column) for column in zip(*rows, strict=True)]


def test_hare_and_lynx_agree_with_the_file_and_with_what_is_known() -> None:
    years, pelts = hare_and_lynx()
    assert years.dtype == pelts.dtype == torch.float64
    assert years.tolist() == list(range(1900, 1921))
    assert pelts.shape == (21, 2)
    _, hares, lynxes = columns("hare_and_lynx.csv")
    assert pelts.T.tolist() == [[float(n) for n in hares], [float(n) for n in lynxes]]
    assert pelts[[0, 12, 20]].tolist() == [[30, 4], [57, 12.3], [24.7, 8.6]]
    assert years[pelts.argmax(dim=0)].tolist() == [1903, 1904]


def test_carbon_dioxide_agrees_with_the_file_and_with_what_is_known() -> None:
    times, ppm = mauna_loa_co2()
    assert times.dtype == ppm.dtype == torch.float64
    assert times.shape == ppm.shape == (2225,)
    days, values = columns("mauna_loa_co2.csv")
    assert (days[0], days[-1]) == ("1958-03-29", "2001-12-29")
    assert ppm.tolist() == [float(value) for value in values]
    assert (ppm[0].item(), ppm[-1].item()) == (316.1, 371.5)
    start = date(1958, 1, 1)
    numbers = ((times - 1958) * 365.25).round().tolist()
    found = [start + timedelta(number) for number in numbers]
    assert [day.isoformat() for day in found] == days
    assert {day.weekday() for day in found} == {5}


def test_gaps_of_the_carbon_dioxide_are_those_of_its_docstring() -> None:
    weeks = mauna_loa_co2()[0].diff() * 365.25 / 7
    assert torch.allclose(weeks, weeks.round(), rtol=0, atol=1e-6)
    missing = weeks.round().int() - 1
    assert (missing >= 0).all()
    gaps = missing[missing > 0]
    assert (len(gaps), gaps.sum().item(), gaps.max().item()) == (22, 59, 18)
    said = mauna_loa_co2.__doc__
    assert said is not None
    assert [int(n) for n in re.findall(r"\b(59|22|18)\b", said)] == [59, 22, 18]


def test_checksums_of_the_series_agree_in_readme_files_and_module() -> None:
    found = {}
    for path in SERIES.glob("*.csv"):
        content = path.read_bytes().replace(b"\r\n", b"\n")
        found[path.name] = len(content), hashlib.sha256(content).hexdigest()
    assert said_of_files(SERIES) == found
    assert {name: found[name][1] for name in LOADERS} == data.SERIES_CHECKSUMS


def test_each_call_gives_tensors_of_its_own() -> None:
    for load in LOADERS.values():
        for tensor in load():
            tensor.zero_()
        assert all(tensor.min() > 0 for tensor in load())


def test_the_series_are_there_whatever_the_default_device_and_dtype() -> None:
    try:
        torch.set_default_dtype(torch.float16)
        with torch.device("meta"):
            tensors = [tensor for load in LOADERS.values() for tensor in load()]
    finally:
        torch.set_default_dtype(torch.float32)
    assert {(str(t.device), t.dtype) for t in tensors} == {("cpu", torch.float64)}


@pytest.mark.parametrize(("name", "load"), LOADERS.items())
@pytest.mark.parametrize("damage", ["cut", "changed", "garbled", "missing"])
def test_a_damaged_series_says_reinstall(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    load: Loader,
    damage: str,
) -> None:
    monkeypatch.setattr(data, "files", lambda package: tmp_path)
    (tmp_path / "series").mkdir()
    whole = (SERIES / name).read_bytes()
    wrong = {
        "cut": whole[:-6],
        "changed": whole.replace(b".1", b".2", 1),
        "garbled": b"\xff" + whole,
    }
    if damage != "missing":
        (tmp_path / "series" / name).write_bytes(wrong[damage])
    with pytest.raises(RuntimeError, match=rf"^{name} in .* reinstall implicit-layers"):
        load()


def test_a_checkout_with_the_line_ends_of_windows_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {name: load() for name, load in LOADERS.items()}
    monkeypatch.setattr(data, "files", lambda package: tmp_path)
    (tmp_path / "series").mkdir()
    for name in LOADERS:
        content = (SERIES / name).read_bytes().replace(b"\r\n", b"\n")
        (tmp_path / "series" / name).write_bytes(content.replace(b"\n", b"\r\n"))
    for name, load in LOADERS.items():
        for tensor, known in zip(load(), expected[name], strict=True):
            assert torch.equal(tensor, known)


# The novel.

NOVEL = PACKAGE / "text" / "persuasion.txt"


def test_the_novel_is_the_one_of_its_readme_and_docstring() -> None:
    text = persuasion()
    content = NOVEL.read_bytes().replace(b"\r\n", b"\n")
    assert text.encode("ascii") == content
    found = {NOVEL.name: (len(content), hashlib.sha256(content).hexdigest())}
    assert said_of_files(NOVEL.parent) == found
    assert {NOVEL.name: found[NOVEL.name][1]} == data.TEXT_CHECKSUMS
    lines = text.split("\n")
    assert lines[0] == "Persuasion" and lines[-2:] == ["Finis", ""]
    assert sum(line.startswith("Chapter ") for line in lines) == 24
    assert "half agony, half" in text and "Gutenberg" not in text
    readme = (NOVEL.parent / "README.md").read_text(encoding="utf-8")
    assert f"{len(lines) - 1:,} lines of at most {max(map(len, lines))} " in readme
    assert persuasion.__doc__ is not None
    assert f"{len(text):,} characters of ASCII" in persuasion.__doc__
    assert f"at most {max(map(len, lines))} characters" in persuasion.__doc__


@pytest.mark.parametrize("damage", ["cut", "changed", "garbled", "missing"])
def test_a_damaged_novel_says_reinstall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(data, "files", lambda package: tmp_path)
    (tmp_path / "text").mkdir()
    whole = NOVEL.read_bytes()
    wrong = {
        "cut": whole[:-6],
        "changed": whole.replace(b"agony", b"irony", 1),
        "garbled": b"\xff" + whole,
    }
    if damage != "missing":
        (tmp_path / "text" / NOVEL.name).write_bytes(wrong[damage])
    expected = rf"^{NOVEL.name} in .* reinstall implicit-layers"
    with pytest.raises(RuntimeError, match=expected):
        persuasion()


def test_a_novel_with_the_line_ends_of_windows_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = persuasion()
    monkeypatch.setattr(data, "files", lambda package: tmp_path)
    (tmp_path / "text").mkdir()
    lines = NOVEL.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    (tmp_path / "text" / NOVEL.name).write_bytes(lines)
    assert persuasion() == expected


def test_a_wheel_takes_the_data_along() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    patterns = tomllib.loads(text)["tool"]["setuptools"]["package-data"]
    packed = {
        path for glob in patterns["implicit_layers"] for path in PACKAGE.glob(glob)
    }
    for folder in ("mnist", "series", "text"):
        assert {*(PACKAGE / folder).iterdir()} <= packed
