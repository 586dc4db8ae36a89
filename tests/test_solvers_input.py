"""What a solver refuses, when, and in which words."""

import numpy as np
import pytest
import torch
from test_solvers import every_solver

from implicit_layers import anderson, broyden, newton


def never(z):
    raise AssertionError("f was called")


@every_solver
@pytest.mark.parametrize(
    ("z0", "error", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.long), TypeError, "z0.*int64.*float"),
        (torch.zeros(2, 3, dtype=torch.bool), TypeError, "z0.*bool.*float"),
        (torch.zeros(2, 3, dtype=torch.complex64), TypeError, "z0.*complex64.*float"),
        (np.zeros((2, 3)), TypeError, "z0.*ndarray.*tensor"),
        ([0.0], TypeError, "z0.*list.*tensor"),
        (None, TypeError, "z0.*NoneType.*tensor"),
        (torch.tensor(1.0), ValueError, "z0.*dimension.*batch"),
        (torch.tensor([[0, np.nan]]), ValueError, "z0.*NaN"),
        (torch.tensor([[0, -np.inf]]), ValueError, "z0.*infinity"),
        (torch.tensor([np.inf, -np.inf]), ValueError, "z0.*infinity"),
    ],
    ids=str,
)
def test_bad_start_is_refused_before_f_is_called(solver, z0, error, message):
    with pytest.raises(error, match=message):
        solver(never, z0)


@every_solver
def test_start_whose_sum_overflows_is_not_refused(solver):
    z0 = torch.full((1, 2), 3e38)
    assert solver(lambda z: 0 * z, z0).converged.all()


@every_solver
@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((option, v) for option in ("atol", "rtol") for v in (-1e-9, np.nan, np.inf)),
        ("max_iter", 0),
        ("max_iter", -3),
        ("max_iter", 2.5),
    ],
)
def test_bad_option_is_refused_before_f_is_called(solver, option, value):
    with pytest.raises(ValueError, match=f"{option}.*{value}"):
        solver(never, torch.zeros(2, 3), **{option: value})


@pytest.mark.parametrize(
    ("solver", "option", "value"),
    [
        (anderson, "memory", 0),
        (anderson, "memory", 1.5),
        (broyden, "memory", 0),
        (broyden, "memory", -1),
        (anderson, "ridge", -1e-9),
        (anderson, "ridge", np.nan),
        (newton, "patience", -1),
        (newton, "patience", 0.5),
    ],
)
def test_bad_option_of_one_solver_is_refused_before_f_is_called(solver, option, value):
    with pytest.raises(ValueError, match=f"{option}.*{value}"):
        solver(never, torch.zeros(2, 3), **{option: value})
    with pytest.raises((TypeError, ValueError), match="z0"):
        solver(never, None, **{option: {"ridge": 0}.get(option, 1)})


@every_solver
@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (lambda z: z[:, :2], ValueError, r"shape.*3, 2.*3, 4"),
        (lambda z: z[0], ValueError, "shape"),
        (lambda z: z.sum(dim=1, keepdim=True), ValueError, "shape"),  # would broadcast
        (lambda z: z[None], ValueError, "shape"),
        (lambda z: z.double(), ValueError, "dtype.*float64.*float32"),
        (lambda z: z.to("meta"), ValueError, "device.*meta.*cpu"),
        (lambda z: z.numpy(), TypeError, "f.*ndarray.*tensor"),
        (lambda z: None, TypeError, "f.*NoneType.*tensor"),
    ],
)
def test_map_to_something_else_is_refused_at_its_first_value(solver, f, error, message):
    calls = []

    def counted(z):
        calls.append(z)
        return f(z)

    with pytest.raises(error, match=message):
        solver(counted, torch.zeros(3, 4))
    assert len(calls) == 1


@every_solver
def test_column_and_row_of_numbers_are_not_confused(solver):
    # (B,) against (B, 1) would broadcast to (B, B)
    with pytest.raises(ValueError, match="shape"):
        solver(lambda z: z[:, 0], torch.zeros(3, 1))
    with pytest.raises(ValueError, match="shape"):
        solver(lambda z: z[:, None], torch.zeros(3))


@pytest.mark.parametrize(
    "shape", [(3, 4), (3, 4, 3), (4, 4), (1, 4, 4), (3, 1, 4), (3, 2, 2, 2, 2)]
)
def test_jacobian_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"jacobian.*\(3, 4, 4\)"):
        newton(
            lambda z: -3 * z + 1,
            torch.zeros(3, 2, 2),
            jacobian=lambda z: torch.zeros(shape),
        )


@every_solver
def test_error_of_the_map_itself_comes_through(solver):
    def f(z):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        solver(f, torch.zeros(2, 2))
    assert torch.is_grad_enabled()
