"""MNIST, two series and a novel without a download, and mini-batches of tensors."""

import atexit
import contextlib
import csv
import errno
import functools
import gzip
import hashlib
import os
import secrets
import shutil
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from datetime import date
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

CHECKSUMS = {
    "train-images-idx3-ubyte": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
    ),
    "train-labels-idx1-ubyte": (
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
    ),
    "t10k-images-idx3-ubyte": (
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
    ),
    "t10k-labels-idx1-ubyte": (
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
    ),
}
SERIES_CHECKSUMS = {
    "hare_and_lynx.csv": (
        "51ab3a3912b247c09e12058593abbcf5cbe65f15dd9db7f7e0d5184d655500e4"
    ),
    "mauna_loa_co2.csv": (
        "8129769d831b3390f3be7750eb79f8194f099738b1b63cab099612487f988df6"
    ),
}
TEXT_CHECKSUMS = {
    "persuasion.txt": (
        "8061549557aebd2fd6e353d18d9197cb707029112bd52d4d8b174583a925848a"
    ),
}
VARIABLE = "IMPLICIT_LAYERS_CACHE"
FULL = (errno.ENOSPC, errno.EDQUOT)


def mnist(*, train: bool, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Load one half of MNIST (LeCun et al. 1998) from the files in this package.

    They are unpacked once into the folder named by the environment variable
    ``IMPLICIT_LAYERS_CACHE``, else into the user's cache folder, and checked by
    SHA-256 at every call; a damaged one is replaced, with a warning. A temporary
    folder, removed at exit, stands in for one that cannot be written.

    Parameters
    ----------
    train
        True for the 60,000 training pictures, False for the 10,000 test pictures.
    device
        Where the tensors are put; their values are the same on every device.

    Returns
    -------
    images : Tensor, shape (N, 1, 28, 28), float32
        Grey levels from 0 (background) to 1.
    labels : Tensor, shape (N,), int64
        The digits, 0 to 9.

    Raises
    ------
    TypeError
        If `train` is not a bool.
    OSError
        If there is no room to unpack 55 MB, or no folder that can be written.
    RuntimeError
        If a file in the package is missing or damaged.
    """
    if not isinstance(train, bool):
        raise TypeError(f"train is {train!r}: pass True or False")
    device = torch.device(device)
    root = _root(train)
    # torchvision takes over a second to import: only who loads data waits for it.
    from torchvision.datasets import MNIST

    dataset = MNIST(root, train=train, download=False)
    images = dataset.data.unsqueeze(1).to(torch.float32).div_(255)
    return images.to(device), dataset.targets.to(device)


def hare_and_lynx() -> tuple[Tensor, Tensor]:
    """Load the pelts of hares and lynxes traded at Hudson Bay, 1900 to 1920.

    From the books of the Hudson's Bay Company (Elton and Nicholson 1942), in the copy
    of Howard (2009). They count pelts, not animals, and other copies differ; the
    README beside the file says by how much.

    Returns
    -------
    years : Tensor, shape (21,), float64
        1900 to 1920.
    pelts : Tensor, shape (21, 2), float64
        Thousands of pelts, hares in the first column and lynxes in the second.

    Raises
    ------
    RuntimeError
        If the file in the package is missing or damaged.
    """
    rows = [[float(cell) for cell in row] for row in _series("hare_and_lynx.csv")]
    values = torch.tensor(rows, dtype=torch.float64, device="cpu")
    return values[:, 0].clone(), values[:, 1:].clone()


def mauna_loa_co2() -> tuple[Tensor, Tensor]:
    """Load the weekly carbon dioxide in the air of Mauna Loa (Keeling and Whorf 2004).

    From 29 March 1958 to 29 December 2001. A week without a measurement has no entry:
    of the 2,284 weeks 59 are missing, in 22 gaps, the longest of 18 weeks in 1964.

    Returns
    -------
    times : Tensor, shape (2225,), float64
        Years: 1958 plus the days since 1 January 1958, divided by 365.25. Ascending,
        in steps of whole weeks.
    ppm : Tensor, shape (2225,), float64
        Mean of the week, in parts per million by volume.

    Raises
    ------
    RuntimeError
        If the file in the package is missing or damaged.
    """
    rows = _series("mauna_loa_co2.csv")
    days = [(date.fromisoformat(day) - date(1958, 1, 1)).days for day, _ in rows]
    times = torch.tensor(days, dtype=torch.float64, device="cpu") / 365.25 + 1958
    ppm = [float(value) for _, value in rows]
    return times, torch.tensor(ppm, dtype=torch.float64, device="cpu")


def persuasion() -> str:
    """Load *Persuasion*, the novel by Jane Austen (1818).

    Returns
    -------
    str
        466,854 characters of ASCII, in lines of at most 73 characters that end with
        a newline; an empty line between paragraphs.

    Raises
    ------
    RuntimeError
        If the file in the package is missing or damaged.
    """
    return _text("text", "persuasion.txt", TEXT_CHECKSUMS)


def batches(
    *tensors: Tensor, batch_size: int = 100, seed: int | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors held in memory into mini-batches along their first dimension.

    Parameters
    ----------
    *tensors
        At least one, all with the same first dimension N >= 1, on any device.
    batch_size
        Rows in a batch; the last batch has fewer if N is not a multiple.
    seed
        None keeps the order, and a batch is a view: change nothing in place. An
        integer gives one random order of the rows, the same on every device, and
        leaves the global random state alone; batches are then views of a copy.

    Returns
    -------
    Iterator
        Yields a tuple with one batch of each tensor, each row exactly once.

    Raises
    ------
    TypeError, ValueError
        At the call, before any work, if an argument is not as described.
    """
    _check_batches(tensors, batch_size, seed)
    batch_size = min(batch_size, len(tensors[0]))
    if seed is None:
        return zip(
            *(torch.split(tensor, batch_size) for tensor in tensors), strict=True
        )
    # Drawn on the CPU whatever the default device: generators differ by device.
    generator = torch.Generator(device="cpu").manual_seed(seed)
    order = torch.randperm(len(tensors[0]), generator=generator, device="cpu")
    return zip(*(_rows(tensor, order, batch_size) for tensor in tensors), strict=True)


def _rows(tensor: Tensor, order: Tensor, batch_size: int) -> Iterator[Tensor]:
    # 32 batches a gather: where another program shares the cores, every parallel
    # gather may wait 8 ms for a thread, and 600 an epoch of MNIST took 4.7 s, not 0.2.
    for index in torch.split(order.to(tensor.device), 32 * batch_size):
        yield from torch.split(tensor.index_select(0, index), batch_size)


def _check_batches(
    tensors: tuple[Tensor, ...], batch_size: int, seed: int | None
) -> None:
    if not tensors:
        raise ValueError("batches() got no tensor: pass at least one")
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise TypeError(f"batches() got a {kind}: pass tensors (torch.as_tensor)")
        if tensor.ndim == 0 or len(tensor) == 0:
            shape = tuple(tensor.shape)
            raise ValueError(
                f"a tensor of shape {shape} has no rows: pass at least one"
            )
    lengths = [len(tensor) for tensor in tensors]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"the tensors have {lengths} rows: they must have equally many"
        )
    if type(batch_size) is not int:
        raise TypeError(f"batch_size is {batch_size!r}: pass an int")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: pass 1 or more")
    if seed is None:
        return
    if type(seed) is not int:
        raise TypeError(f"seed is {seed!r}: pass an int, or None to keep the order")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}: pass an int from 0 to 2**63 - 1, or None")


def _series(name: str) -> list[list[str]]:
    """Return the rows below the heading of one embedded table, checked."""
    text = _text("series", name, SERIES_CHECKSUMS)
    return [*csv.reader(text.splitlines())][1:]


def _text(folder: str, name: str, checksums: dict[str, str]) -> str:
    """Return one embedded text, checked."""
    try:
        path = files("implicit_layers").joinpath(folder, name)
        # Universal line ends: a checkout may have turned them into those of Windows.
        text = path.read_text(encoding="utf-8")
        if hashlib.sha256(text.encode()).hexdigest() != checksums[name]:
            raise ValueError("its SHA-256 is not the one it had")
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"{name} in the package implicit_layers is damaged ({error}): "
            "reinstall implicit-layers"
        ) from error
    return text


def _root(train: bool) -> Path:
    """Return a folder where torchvision finds MNIST, the asked half checked."""
    for folder in (_cache_folder, _temporary_folder):
        try:
            root = folder()
            _unpack(root, train)
            return root
        except OSError as error:
            if error.errno in FULL:
                raise
            failure = error
        # Only a person who chose the folder needs to know that it is not used.
        if folder is _cache_folder and os.environ.get(VARIABLE):
            message = f"{VARIABLE} is not used, MNIST goes to a temporary folder"
            warnings.warn(f"{message}: {failure}", stacklevel=3)
    raise OSError(
        f"neither the cache folder nor a temporary one can hold MNIST ({failure}): "
        f"set {VARIABLE} to a folder that can be written"
    ) from failure


def _cache_folder() -> Path:
    """Return the folder named by the variable, else one in the user's cache."""
    try:
        if chosen := os.environ.get(VARIABLE):
            return Path(chosen).expanduser()
        if sys.platform == "win32":
            base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # no home, as for a bare user id in a container
        raise FileNotFoundError(str(error)) from error
    return Path(base) / "implicit-layers"


@functools.cache
def _temporary_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="implicit-layers-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _unpack(root: Path, train: bool) -> None:
    """Write what is missing, and mend what is damaged in the asked half."""
    if (root / "MNIST" / "processed").exists():
        raise FileExistsError(
            f"{root} has a folder MNIST/processed, which torchvision would read "
            "unchecked"
        )
    # torchvision wants all four files to be there, even though it reads only two.
    for name, checksum in CHECKSUMS.items():
        path = root / "MNIST" / "raw" / name
        there = path.is_file()
        if there and name.startswith("train") is not train:
            continue
        if there and _sha256(path) == checksum:
            continue
        try:
            _write(path, _embedded(name))
        finally:
            if there:
                message = f"{path} was damaged (wrong SHA-256): MNIST is unpacked anew"
                warnings.warn(message, stacklevel=4)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _embedded(name: str) -> bytes:
    """Return the uncompressed bytes of one file of the package, checked."""
    try:
        packed = files("implicit_layers").joinpath("mnist", f"{name}.gz").read_bytes()
        content = gzip.decompress(packed)
        if hashlib.sha256(content).hexdigest() != CHECKSUMS[name]:
            raise ValueError("its SHA-256 is not that of MNIST")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise RuntimeError(
            f"{name}.gz in the package implicit_layers is damaged ({error}): "
            "reinstall implicit-layers"
        ) from error
    return content


def _write(path: Path, content: bytes) -> None:
    """Write a whole file or none, whoever else is writing the same one."""
    # Not mkstemp: its files are closed to the others with whom a cache is shared.
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError) and error.errno in FULL:
            message = (
                f"no room left in {path.parent} to unpack MNIST (55 MB): "
                f"free some, or set {VARIABLE} to a folder that has it"
            )
            raise OSError(error.errno, message) from error
        raise
