"""What a chapter writes out against what the module does, on the same numbers."""

import ast
from functools import cache, partial
from pathlib import Path

import nbformat
import pytest
import torch
from programs import program, solved, wanting
from torch.autograd import grad

from implicit_layers import (
    DEQ,
    anderson,
    broyden,
    fixed_point_iteration,
    implicit_fixed_point,
    jacobian_penalty,
    newton,
)

CHAPTERS = Path(__file__).parents[1] / "chapters"
TIGHT = {"atol": 1e-14, "rtol": 1e-14, "max_iter": 1000}
agree = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


@cache
def definitions(chapter):
    """Execute a chapter's imports, functions and classes, and nothing else of it."""
    namespace = {"__name__": chapter}
    kinds = ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef
    notebook = nbformat.read(CHAPTERS / f"{chapter}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            module = ast.parse(cell.source)
            module.body = [node for node in module.body if isinstance(node, kinds)]
            exec(compile(module, chapter, "exec"), namespace)
    return namespace


def problem(size=6, batch=5, norm=0.8):
    """Weights of spectral norm `norm`, inputs and weights of a loss."""
    generator = torch.Generator().manual_seed(0)
    shapes = (size, size), (batch, size), (batch, size)
    weight, x, v = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in shapes
    )
    weight = norm * weight / torch.linalg.matrix_norm(weight, ord=2)
    return weight.requires_grad_(), x.requires_grad_(), v


def tanh_layer(weight, x, **options):
    f = lambda z: torch.tanh(z @ weight.T + x)  # noqa: E731
    return implicit_fixed_point(f, torch.zeros_like(x), **TIGHT | options)[0]


def chapter_layer(layer, weight, x):
    parameters = {"linear.weight": weight}
    return torch.func.functional_call(layer, parameters, (x,))


# chapter, the layer that it defines, what does the same in the module, and up to
# which derivative
LAYERS = [
    ("introduction", "TanhFixedPointLayer", {"solver": fixed_point_iteration}, 2),
    ("introduction", "TanhFixedPointLayer", {"solver": anderson}, 2),
    ("introduction", "TanhNewtonLayer", {"solver": newton}, 2),
    ("introduction", "MendedNewtonLayer", {"solver": newton}, 2),
    ("introduction", "TanhNewtonHookLayer", {"solver": newton}, 1),
    ("introduction", "TanhNewtonImplicitLayer", {"solver": newton}, 2),
    ("introduction", "TanhNewtonImplicitLayer", {"solver": broyden}, 2),
    ("introduction", "UncorrectedLayer", {"solver": newton, "gradient": "jfb"}, 2),
]


@pytest.mark.parametrize(("chapter", "name", "options", "orders"), LAYERS)
def test_layer_of_a_chapter_is_the_layer_of_the_module(chapter, name, options, orders):
    weight, x, v = problem()
    layer = definitions(chapter)[name](len(weight), tol=1e-14, max_iter=1000).double()
    results = []
    for z in (chapter_layer(layer, weight, x), tanh_layer(weight, x, **options)):
        results.append([z.detach()])
        scalar = (v * torch.sin(z)).sum()
        for order in range(orders):
            gradients = grad(scalar, (weight, x), create_graph=order + 1 < orders)
            results[-1] += [gradient.detach() for gradient in gradients]
            scalar = sum(gradient.square().sum() for gradient in gradients)
    assert len(results[0]) == 1 + 2 * orders
    agree(*results)


@pytest.mark.parametrize("order", [1, 2])
def test_one_correction_is_wrong_in_the_same_way(order):
    weight, x, _ = problem()
    chapter = definitions("introduction")["TanhNewtonImplicitLayer"]
    layer = chapter(len(weight), tol=1e-14, order=order).double()
    seconds = []
    exact = tanh_layer(weight, x, order=2)
    for z in (
        chapter_layer(layer, weight, x),
        tanh_layer(weight, x, order=order),
        exact,
    ):
        (slope,) = grad(torch.sin(z).sum(), x, create_graph=True)
        seconds.append(grad(slope.square().sum(), (weight, x)))
    agree(*seconds[:2])
    off = (seconds[0][0] - seconds[2][0]).norm() / seconds[2][0].norm()
    assert off > 0.1 if order == 1 else off < 1e-10


@pytest.mark.parametrize("name", ["newton_solve", "guarded_solve"])
@pytest.mark.parametrize("norm", [0.8, 1.5])
def test_solver_of_a_chapter_finds_the_solution_of_the_module(name, norm):
    weight, x, _ = (tensor.detach() for tensor in problem(norm=norm))
    solve = definitions("introduction")[name]
    z, f, converged, iterations = solve(weight, x, tol=1e-13, max_iter=50)
    assert converged.all()
    assert 1 < iterations < 50
    solution = newton(lambda z: torch.tanh(z @ weight.T + x), torch.tanh(x), **TIGHT)
    assert solution.converged.all()
    agree(solution.z, z)
    agree(solution.z, f)


def test_matrices_of_a_chapter_are_the_jacobians_of_torch():
    weight, x, _ = (tensor.detach() for tensor in problem())
    names = definitions("introduction")
    z = names["unrolled"](weight, x)
    agree(tanh_layer(weight, x), z)
    alone = torch.func.jacrev(lambda z, x: torch.tanh(weight @ z + x))
    jacobians = torch.func.vmap(alone)(z, x)
    agree(names["tanh_jacobian"](weight, z), jacobians)
    agree(names["newton_matrix"](weight, z), torch.eye(6).double() - jacobians)


def test_newton_of_the_module_takes_the_jacobian_of_a_chapter():
    weight, x, _ = problem()
    tanh_jacobian = definitions("introduction")["tanh_jacobian"]
    gradients = []
    for jacobian in (
        None,
        lambda z: tanh_jacobian(weight, torch.tanh(z @ weight.T + x)),
    ):
        z = tanh_layer(weight, x, solver=newton, jacobian=jacobian)
        gradients.append(grad(torch.sin(z).sum(), (weight, x)))
    agree(*gradients)


@pytest.mark.parametrize("gradient", ["implicit", "jfb"])
def test_equilibrium_of_a_chapter_is_the_layer_of_the_module(gradient):
    names = definitions("deep_equilibrium_models")
    weight, x, v = problem()
    results = []
    for layer in (names["Equilibrium"], DEQ):
        block = names["TanhBlock"](len(weight)).double()
        layer = layer(block, gradient=gradient, **TIGHT)
        z = torch.func.functional_call(layer, {"f.linear.weight": weight}, (x,))
        results.append([z.detach(), *grad((v * z.sin()).sum(), (weight, x))])
    agree(results[0][0], tanh_layer(weight, x).detach())
    agree(*results)


def test_estimate_of_a_chapter_is_the_penalty_of_the_module():
    names = definitions("deep_equilibrium_models")
    generator = torch.Generator().manual_seed(0)
    weight, z = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)
    f = lambda z: torch.tanh(z @ weight.T)  # noqa: E731
    jacobians = torch.func.vmap(torch.func.jacrev(lambda z: torch.tanh(weight @ z)))(z)
    exact = jacobians.square().sum().item() / 36
    for samples in (
        torch.stack([names["frobenius_estimate"](f, z, generator) for _ in range(999)]),
        torch.stack([jacobian_penalty(f, z, generator=generator) for _ in range(999)]),
    ):
        assert abs(samples.mean() - exact) < 5 * samples.std() / 999**0.5
        assert samples.std() < exact


def gradients_of(z, arguments):
    return grad(z.sin().sum(), [*arguments.values()])


def test_equations_of_a_chapter_are_a_program_of_the_module():
    arguments = wanting(program(m=0))
    equations = {name: arguments[name] for name in "QpAb"}
    matrix, *others = equations.values()
    solve = definitions("differentiable_optimization")["equality_qp"]
    z, nu = solve((matrix + matrix.mT) / 2, *others)
    solution = solved(**arguments)
    agree((z, nu), (solution.z, solution.equality_duals))
    agree(gradients_of(z, equations), gradients_of(solution.z, equations))


def test_interior_point_of_a_chapter_finds_the_solution_of_the_module():
    arguments = program(q=0, n=6, m=12)
    data = {name: arguments[name] for name in "QpGh"}
    page = definitions("differentiable_optimization")
    z, lam, s = page["interior_point"](**data, tol=1e-13)
    solution = solved(**arguments)
    active = solution.inequality_duals > 0
    assert 0 < active.sum() < active.numel()
    agree((z, lam), (solution.z, solution.inequality_duals), rtol=1e-7, atol=1e-7)
    agree(s[active], 0 * s[active], atol=1e-7)


@pytest.mark.parametrize("shared", [(), ("Q", "G", "h")])
def test_program_of_a_chapter_is_the_layer_of_the_module(shared):
    arguments = wanting(program(q=0, shared=shared))
    data = {name: arguments[name] for name in "QpGh"}
    z = definitions("differentiable_optimization")["qp_layer"](**data)
    solution = solved(**arguments)
    agree(z, solution.z, rtol=1e-6, atol=1e-6)
    page, module = gradients_of(z, data), gradients_of(solution.z, data)
    agree(page, module, rtol=1e-4, atol=1e-4)
