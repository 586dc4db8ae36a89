"""The same gradients from TorchDEQ and jaxopt, where one of them is installed."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.autograd import grad

from implicit_layers import (
    anderson,
    broyden,
    fixed_point_iteration,
    implicit_fixed_point,
    newton,
)

torchdeq, jax, jaxopt = map(pytest.importorskip, ("torchdeq", "jax", "jaxopt"))
SOLVERS = [fixed_point_iteration, anderson, broyden, newton]
TIGHT = {"atol": 1e-13, "rtol": 1e-13, "max_iter": 1000}
agree = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


def problem():
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 5, generator=generator).double() for n in (5, 3))
    weight = 0.7 * weight / torch.linalg.matrix_norm(weight, ord=2)
    return weight.requires_grad_(), x.requires_grad_()


def tanh_map(weight, x):
    return lambda z: torch.tanh(z @ weight.T + x)


def our_gradients(weight, x, **options):
    z, _ = implicit_fixed_point(
        tanh_map(weight, x), torch.zeros_like(x), **TIGHT | options
    )
    return grad(torch.sin(z).sum(), (weight, x), create_graph=True)


def deq_gradients(weight, x, **options):
    limits = {"f_tol": 1e-13, "b_tol": 1e-13, "f_max_iter": 500, "b_max_iter": 500}
    deq = torchdeq.get_deq(f_stop_mode="rel", b_stop_mode="rel", **limits, **options)
    z = deq(tanh_map(weight, x), torch.zeros_like(x))[0][-1]
    return grad(torch.sin(z).sum(), (weight, x), create_graph=True)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("peer", ["fixed_point_iter", "anderson", "broyden"])
def test_exact_gradient_is_that_of_torchdeq(solver, peer):
    arguments = problem()
    theirs = deq_gradients(*arguments, ift=True, f_solver=peer, b_solver=peer)
    agree(our_gradients(*arguments, solver=solver), theirs)


@pytest.mark.parametrize("damping", [0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_phantom_gradient_is_that_of_torchdeq(steps, damping):
    arguments = problem()
    options = {"f_solver": "fixed_point_iter", "ift": False}
    theirs = deq_gradients(*arguments, grad=steps, tau=damping, **options)
    ours = {"gradient": "phantom", "steps": steps, "damping": damping}
    agree(our_gradients(*arguments, **ours), theirs)
    if damping == 1:
        agree(our_gradients(*arguments, gradient="unrolled", steps=steps), theirs)
        agree(our_gradients(*arguments, gradient="neumann", steps=steps), theirs)


def test_second_derivative_is_that_of_jaxopt_and_not_that_of_torchdeq():
    arguments = problem()
    weight, x = (tensor.detach().numpy() for tensor in arguments)

    def second(gradients):
        square = sum(gradient.square().sum() for gradient in gradients)
        return grad(square, arguments)

    ours = second(our_gradients(*arguments))
    with jax.enable_x64():
        theirs = jax.grad(jax_square_of_gradient, (0, 1))(weight, x)
        agree(ours, [torch.tensor(np.asarray(array)) for array in theirs])
    solver = {"f_solver": "fixed_point_iter", "b_solver": "fixed_point_iter"}
    wrong = second(deq_gradients(*arguments, ift=True, **solver))
    assert (wrong[0] - ours[0]).norm() > 0.1 * ours[0].norm()


def jax_loss(solver, weight, x):
    # by default it solves the adjoint system to about 1e-6
    adjoint = partial(jaxopt.linear_solve.solve_normal_cg, tol=1e-14, maxiter=500)
    solve = getattr(jaxopt, solver)(
        lambda z, weight, x: jax.numpy.tanh(z @ weight.T + x),
        tol=1e-14,
        maxiter=500,
        implicit_diff_solve=adjoint,
    )
    return jax.numpy.sin(solve.run(jax.numpy.zeros_like(x), weight, x).params).sum()


def jax_square_of_gradient(weight, x):
    loss = partial(jax_loss, "FixedPointIteration")
    return sum((g**2).sum() for g in jax.grad(loss, (0, 1))(weight, x))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("peer", ["FixedPointIteration", "AndersonAcceleration"])
def test_exact_gradient_is_that_of_jaxopt(solver, peer):
    arguments = problem()
    weight, x = (tensor.detach().numpy() for tensor in arguments)
    with jax.enable_x64():
        theirs = jax.grad(partial(jax_loss, peer), (0, 1))(weight, x)
        expected = [torch.tensor(np.asarray(array)) for array in theirs]
    actual = [g.detach() for g in our_gradients(*arguments, solver=solver)]
    agree(actual, expected)
