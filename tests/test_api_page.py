"""The page on the module: what is public stands there, and is described in full."""

import inspect
import pkgutil
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

import implicit_layers

PAGE = (Path(__file__).parents[1] / "chapters" / "api.md").read_text(encoding="utf-8")
MODULES = [
    import_module(f"implicit_layers.{module.name}")
    for module in pkgutil.iter_modules(implicit_layers.__path__)
]


def public(module):
    """The functions and classes that a module defines for others, in their order.

    Of a module from which the package exports something, those that it exports; of
    any other, those without an underscore.
    """
    names = [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) or inspect.isclass(value)
        if value.__module__ == module.__name__ and not name.startswith("_")
    ]
    return [name for name in names if name in implicit_layers.__all__] or names


def shown(page):
    """The functions and classes on the page, for each module that defines some."""
    names = {}
    for kind, name in re.findall(r"^\.\. (\w+):: (\S+)$", page, flags=re.M):
        if kind == "currentmodule":
            source = import_module(name)
        elif kind in ("autofunction", "autoclass"):
            names.setdefault(getattr(source, name).__module__, []).append(name)
    return names


def described(docstring, section):
    """The names to which a section of a docstring gives an indented text."""
    parts = re.split(r"^(\w+)\n-{3,}\n", docstring, flags=re.M)
    body = dict(zip(parts[1::2], parts[2::2], strict=True)).get(section, "")
    heads = re.findall(r"^(\S.*)\n {4}\S", body, flags=re.M)
    names = [head.split(" : ")[0].split(", ") for head in heads]
    return [name.lstrip("*") for group in names for name in group]


def problems(value):
    """What the docstring of a function or of a class lacks."""
    docstring = inspect.cleandoc(value.__doc__ or "")
    if not re.match(r".+\.(\n\n|$)", docstring):
        yield "no summary of one line"
    if inspect.isclass(value):
        section, expected = "Attributes", [*inspect.get_annotations(value)]
        members = {n: m for n, m in vars(value).items() if not n.startswith("_")}
        yield from (
            f"{name} has no docstring"
            for name, member in members.items()
            if name not in expected and not member.__doc__
        )
    else:
        signature = inspect.signature(value)
        section, expected = "Parameters", [*signature.parameters]
        returns = signature.return_annotation is not None
        if returns != bool(described(docstring, "Returns")):
            yield "Returns does not fit the annotation"
    if (names := described(docstring, section)) != expected:
        yield f"{section} describes {names}, not {expected}"


def test_page_shows_each_public_name_once_and_in_the_order_of_the_source():
    names = shown(PAGE)
    assert names == {module.__name__: public(module) for module in MODULES}
    assert {*implicit_layers.__all__} <= set().union(*names.values())


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_docstrings_describe_what_there_is_and_nothing_else(module):
    values = {name: getattr(module, name) for name in public(module)}
    assert values
    found = [f"{name}: {p}" for name, value in values.items() for p in problems(value)]
    assert not found, "\n".join(found)


def test_a_name_that_is_missing_or_twice_on_the_page_is_seen():
    line = ".. autofunction:: broyden\n"
    assert line in PAGE
    counts = [
        shown(PAGE.replace(line, line * n))["implicit_layers.solvers"].count("broyden")
        for n in range(3)
    ]
    assert counts == [0, 1, 2]


def complete(x: Tensor, *, tol: float = 0.0) -> Tensor:
    """Give x back.

    Parameters
    ----------
    x
        What comes back.
    tol
        Of no use.

    Returns
    -------
    Tensor
        The same.
    """
    return x


@dataclass
class Pair:
    """Two numbers.

    Attributes
    ----------
    first, second
        The numbers.
    """

    first: float
    second: float

    @property
    def total(self) -> float:
        """Their sum."""
        return self.first + self.second


FAULTS = [
    (complete, complete.__doc__, None),
    (complete, "Give x back.", ""),
    (complete, "    tol\n        Of no use.\n", ""),
    (complete, "        Of no use.\n", ""),
    (complete, "    tol\n", "    tol, order\n"),
    (complete, "    x\n", "    y\n"),
    (complete, "    Returns\n    -------\n    Tensor\n        The same.\n", ""),
    (Pair, Pair.__doc__, None),
    (Pair, "first, second", "first"),
    (Pair, "first, second", "first, second, third"),
]


@pytest.mark.parametrize(("value", "old", "new"), FAULTS)
def test_what_is_wrong_in_a_docstring_is_seen(monkeypatch, value, old, new):
    assert not [*problems(value)]
    assert old in value.__doc__
    text = None if new is None else value.__doc__.replace(old, new)
    monkeypatch.setattr(value, "__doc__", text)
    assert [*problems(value)]


def test_a_member_without_a_docstring_is_seen(monkeypatch):
    monkeypatch.setattr(Pair, "total", property(lambda self: self.first))
    assert [*problems(Pair)] == ["total has no docstring"]


def test_example_of_the_page_runs_and_its_gradient_is_that_of_the_root(capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.M | re.S)
    names = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(code, names)
    assert capsys.readouterr().out.startswith("tensor([True, True")
    linear, x, root = names["linear"], names["x"], names["x"]
    for _ in range(200):
        root = torch.tanh(linear(root) + x)
    torch.testing.assert_close(names["z"], root, rtol=0, atol=1e-4)
    (gradient,) = grad(root.square().sum(), linear.weight)
    error = (linear.weight.grad - gradient).norm() / gradient.norm()
    assert error < 1e-4
