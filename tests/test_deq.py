"""The deep equilibrium layer against closed forms, SciPy and loops, and in use."""

import copy
import io
import math
import pickle
from functools import partial

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import TIGHT, agree, contraction, numbers, solvers, ways
from torch import nn
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef

from implicit_layers import (
    DEQ,
    Solution,
    anderson,
    fixed_point_iteration,
    newton,
)

pytestmark = pytest.mark.filterwarnings("error")


class Block(nn.Module):
    """tanh(W z + U x + b): an input of its own size."""

    def __init__(self, size=4, inputs=3, seed=0, norm=0.7):
        super().__init__()
        self.weight = nn.Parameter(contraction(size, seed, norm))
        self.inject = nn.Parameter(numbers(size, inputs, seed=seed + 1))
        self.bias = nn.Parameter(numbers(size, seed=seed + 2))

    def forward(self, z, x):
        return torch.tanh(z @ self.weight.T + x @ self.inject.T + self.bias)


class Unrolled(nn.Module):
    """The same equilibrium by a loop on the tape."""

    def __init__(self, f, steps=120):
        super().__init__()
        self.f, self.steps = f, steps

    def forward(self, x, z0):
        z = z0
        for _ in range(self.steps):
            z = self.f(z, x)
        return z


def start(x, size=4):
    return torch.zeros(len(x), size, dtype=x.dtype)


def square_layer(seed=0, norm=0.7, **options):
    """A layer whose state has the shape of its input."""
    return DEQ(Block(inputs=4, seed=seed, norm=norm), **TIGHT | options)


# What it computes


@solvers
def test_linear_block_has_the_solution_of_the_linear_system(solver):
    matrix, x = contraction(norm=0.9), numbers(5, 4, seed=1)
    layer = DEQ(lambda z, x: z @ matrix.T + x, solver=solver, **TIGHT)
    expected = np.linalg.solve(np.eye(4) - matrix.numpy(), x.numpy().T).T
    np.testing.assert_allclose(layer(x).detach(), expected, rtol=1e-10)


def scipy_root(block, x):
    weight, inject, bias = (p.detach().numpy() for p in block.parameters())

    def residual(z, x):
        return np.tanh(weight @ z + inject @ x + bias) - z

    rows = x.detach().numpy()
    return np.array(
        [scipy.optimize.root(residual, 0 * bias, r, tol=1e-14).x for r in rows]
    )


@ways
def test_value_is_the_root_that_scipy_finds(way):
    block, x = Block(norm=0.9), numbers(5, 3, seed=5)
    for layer in (DEQ(block, **TIGHT, **way), DEQ(block, **TIGHT, **way).eval()):
        z = layer(x, start(x))
        np.testing.assert_allclose(z.detach(), scipy_root(block, x), atol=1e-10)
        agree(layer.solution.z, z.detach())


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 4),
    size=st.integers(1, 6),
    norm=st.floats(0, 0.95),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 10**6),
)
def test_any_affine_contraction_is_solved_and_differentiated(
    batch, size, norm, scale, seed
):
    matrix = contraction(size, seed, norm)
    x = (scale * numbers(batch, size, seed=seed + 1)).requires_grad_()
    z = DEQ(lambda z, x: z @ matrix.T + x, **TIGHT)(x)
    inverse = torch.linalg.inv(torch.eye(size).double() - matrix)
    close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-9)
    close(z.detach() / scale, x.detach() @ inverse.T / scale)
    v = numbers(batch, size, seed=seed + 2)
    close(grad(z, x, v)[0], v @ inverse)


@pytest.mark.parametrize("training", [True, False])
@solvers
def test_finite_differences_accept_gradients_of_input_and_parameters(solver, training):
    layer = DEQ(Block(size=3, inputs=2), solver=solver, **TIGHT).train(training)
    names = [name for name, _ in layer.named_parameters()]
    assert names == ["f.weight", "f.inject", "f.bias"]

    def function(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x, z0))

    x = numbers(2, 2, seed=5).requires_grad_()
    z0, values = start(x, 3), [p.detach().requires_grad_() for p in layer.parameters()]
    assert gradcheck(function, (x, *values))
    assert gradgradcheck(function, (x, *values))


def first_and_second(network, x, z0):
    """Gradients of a loss for x and the parameters, and of their squares' sum."""
    arguments = [x.requires_grad_(), *network.parameters()]
    first = grad(torch.sin(network(x, z0)).sum(), arguments, create_graph=True)
    second = grad(sum(g.square().sum() for g in first), arguments)
    return [g.detach() for g in first], second


def test_gradients_are_those_of_a_loop_on_the_tape():
    x = numbers(3, 3, seed=5)
    layers = DEQ(Block(), **TIGHT), Unrolled(Block())
    agree(*(first_and_second(layer, x, start(x)) for layer in layers))


def test_one_order_gives_first_derivatives_alone():
    x = numbers(3, 3, seed=5)
    first, second = first_and_second(DEQ(Block(), order=1, **TIGHT), x, start(x))
    expected = first_and_second(Unrolled(Block()), x, start(x))
    agree(first, expected[0])
    assert (second[0] - expected[1][0]).abs().max() > 0.01


def test_jfb_and_neumann_cut_the_series_of_the_inverse():
    a = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    x = numbers(3, 1).requires_grad_()
    for way, terms in (
        ({"gradient": "jfb"}, 1),
        ({"gradient": "neumann", "steps": 4}, 4),
    ):
        z = DEQ(lambda z, x: a * z + x, **TIGHT, **way)(x)
        expected = sum(0.8**k for k in range(terms))
        agree(grad(z.sum(), x)[0], torch.full_like(x, expected))


def test_trains_like_an_unrolled_loop():
    weights, losses = [], []
    for network in (DEQ(Block(), **TIGHT), Unrolled(Block())):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
        for _ in range(8):
            x = numbers(6, 3)
            loss = (network(x, start(x)).sum(dim=1) - x[:, 0]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        weights.append([p.detach() for p in network.parameters()])
    agree(*weights)
    assert losses[7] < 0.8 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@ways
def test_number_format_is_kept_and_its_accuracy_reached(way, dtype):
    exact, v = square_layer(**way), numbers(3, 4, seed=7)
    limits = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {}
    layer = square_layer(**way | limits).to(dtype)
    results = []
    for network, kind in ((exact, torch.float64), (layer, dtype)):
        x = numbers(3, 4, seed=5, dtype=kind).requires_grad_()
        z = network(x)
        results.append([z.detach(), *grad(z, (x, network.f.weight), v.to(kind))])
        assert z.dtype == network.solution.z.dtype == kind
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    for expected, actual in zip(*results, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(
            actual.double(), expected, rtol=tolerance, atol=tolerance
        )


def test_layer_changes_its_number_format_after_use():
    layer, x = square_layer(), numbers(3, 4)
    first = layer(x).detach()
    layer.float().settings.update(atol=1e-6, rtol=1e-6)
    assert layer(x.float()).dtype == torch.float32
    torch.testing.assert_close(
        layer(x.float()).double().detach(), first, rtol=1e-4, atol=1e-5
    )
    assert layer.double()(x).dtype == torch.float64


# Settings of training and of evaluation


def recorder(seen):
    """A solver that notes its name, start and limits."""

    def own(f, z0, *, colour="none", **limits):
        seen.append((colour, z0.clone(), limits))
        return anderson(f, z0, **limits)

    return own


def test_each_mode_uses_its_settings_whenever_it_is_switched_to():
    seen = []
    layer = DEQ(
        Block(inputs=4),
        solver=recorder(seen),
        colour="red",
        evaluation={"colour": "blue", "rtol": 1e-2},
        **TIGHT,
    )
    x = numbers(3, 4)
    for mode in (True, False, True, False):
        layer.train(mode)(x)
    assert [colour for colour, *_ in seen] == ["red", "blue", "red", "blue"]
    expected = [TIGHT, TIGHT | {"rtol": 1e-2}] * 2
    assert [limits for *_, limits in seen] == expected


@pytest.mark.parametrize("evaluation", [None, {}])
def test_evaluation_is_training_unless_told_otherwise(evaluation):
    seen = []
    options = TIGHT | {"max_iter": 77, "colour": "red"}
    layer = square_layer(solver=recorder(seen), evaluation=evaluation, **options)
    x = numbers(3, 4)
    first, second = layer(x), layer.eval()(x)
    assert torch.equal(first, second)
    (_, _, limits), (_, _, in_evaluation) = seen
    assert limits == in_evaluation == TIGHT | {"max_iter": 77}


def test_evaluation_may_be_looser():
    layer = square_layer(evaluation={"rtol": 1e-2, "atol": 0.0})
    x = numbers(3, 4)
    exact = layer(x).detach()
    training = layer.solution
    loose = layer.eval()(x).detach()
    assert len(layer.solution.trace) < len(training.trace) / 2
    assert training.residual.max() < 1e-12 < 1e-5 < layer.solution.residual.max()
    assert 1e-6 < (loose - exact).abs().max() < 0.1


def test_evaluation_may_take_another_solver_and_another_gradient():
    evaluation = {"solver": newton, "gradient": "jfb"}
    layer = DEQ(lambda z, x: -3 * z + x, evaluation=evaluation, **TIGHT)
    x = numbers(3, 1).requires_grad_()
    agree(grad(layer(x).sum(), x)[0], torch.full((3, 1), 0.25).double())
    many = len(layer.solution.trace)
    agree(grad(layer.eval()(x).sum(), x)[0], torch.ones(3, 1).double())
    assert len(layer.solution.trace) <= 4 and many >= 4
    agree(layer.solution.z, x.detach() / 4)


def test_settings_are_copied_from_the_dictionary():
    seen, evaluation = [], {"colour": "blue"}
    layer = square_layer(solver=recorder(seen), evaluation=evaluation)
    evaluation["colour"] = "green"
    layer(numbers(3, 4))
    layer.eval()(numbers(3, 4))
    assert [colour for colour, *_ in seen] == ["none", "blue"]
    assert evaluation == {"colour": "green"}


def test_mode_of_the_block_follows_that_of_the_layer():
    layer = square_layer()
    network = nn.Sequential(layer)
    for mode in (False, True):
        network.train(mode)
        assert layer.f.training == layer.training == mode


# Warm starts


@ways
@pytest.mark.parametrize("training", [True, False])
def test_no_call_influences_the_next(way, training):
    layer = square_layer(**way).train(training)
    x, other = numbers(3, 4), 10 * numbers(3, 4, seed=8)
    first = layer(x)
    solution = layer.solution
    layer(other)
    with torch.no_grad():
        layer(other)
    second = layer(x)
    assert torch.equal(first, second)
    assert torch.equal(solution.trace, layer.solution.trace)
    assert len(solution.trace) > 4
    weights = grad(first.sum(), layer.f.weight), grad(second.sum(), layer.f.weight)
    assert torch.equal(weights[0][0], weights[1][0])


def test_start_is_zero_unless_given():
    seen = []
    layer, x = square_layer(solver=recorder(seen)), numbers(3, 4)
    z0 = numbers(3, 4, seed=8)
    for given_start in (None, z0, None, layer.solution and layer.solution.z):
        layer(x, given_start)
    starts = [z for _, z, _ in seen]
    for zeros in (starts[0], starts[2], starts[3]):
        assert torch.equal(zeros, torch.zeros_like(x))
    assert torch.equal(starts[1], z0)
    assert torch.equal(z0, numbers(3, 4, seed=8))


@pytest.mark.parametrize(
    "context", [torch.enable_grad, torch.no_grad, torch.inference_mode]
)
@solvers
def test_warm_start_from_the_solution_needs_one_evaluation(solver, context):
    layer, x = square_layer(solver=solver, atol=1e-9, rtol=1e-9), numbers(3, 4)
    with context():
        cold = layer(x)
    evaluations = len(layer.solution.trace)
    x.requires_grad_()
    warm = layer(x, layer.solution.z)
    assert len(layer.solution.trace) == 1 < evaluations
    agree(warm.detach(), cold.detach(), atol=1e-8, rtol=0)
    agree(grad(warm.sum(), x), grad(square_layer()(x).sum(), x), atol=1e-7, rtol=0)


@ways
def test_start_gets_no_gradient_and_changes_none(way):
    layer, x = square_layer(**way), numbers(3, 4).requires_grad_()
    leaf = numbers(3, 4, seed=8).requires_grad_()
    expected = grad(layer(x).sum(), (x, layer.f.weight))
    for z0 in (leaf, torch.tanh(leaf + x)):
        arguments = (x, layer.f.weight, leaf)
        *actual, of_start = grad(layer(x, z0).sum(), arguments, allow_unused=True)
        agree(actual, list(expected))
        assert of_start is None


# What stays


@ways
@pytest.mark.parametrize("training", [True, False])
def test_solution_is_no_part_of_a_graph(way, training):
    layer = square_layer(**way).train(training)
    assert layer.solution is None
    x = numbers(3, 4).requires_grad_()
    z = layer(x)
    assert z.requires_grad
    assert isinstance(layer.solution, Solution)
    assert layer.solution.converged.all()
    for field in vars(layer.solution).values():
        assert field is None or (not field.requires_grad and field.grad_fn is None)


def test_factors_of_newton_go_with_the_graph():
    x = numbers(3, 4)
    layer = DEQ(lambda z, x: -2 * z + x, solver=newton)
    layer(x)
    assert layer.solution.factors is None


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("backward", [False, True])
@ways
def test_graph_dies_with_the_output(way, backward):
    block, storages = Block(inputs=4), []

    def f(z, x):
        fz = block(z, x)
        if torch.is_grad_enabled() and not storages:  # held by tanh for its backward
            storages.append(StorageWeakRef(fz.untyped_storage()))
        return fz

    # newton asks for Jacobians on a tape of its own: here plain steps do
    layer, x = DEQ(f, **TIGHT | way), numbers(3, 4).requires_grad_()
    z = layer(x)
    if way.get("solver") is not newton:
        assert not storages[0].expired()
    if backward:
        z.square().sum().backward()
    del z
    assert storages[0].expired()
    assert layer.solution.z.isfinite().all()


@ways
def test_twenty_steps_leave_nothing_behind(live_tensors, way):
    layer = square_layer(**way)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    warm, counts = None, []
    for steps in (3, 20):
        for step in range(steps):
            x = numbers(3, 4, seed=step).requires_grad_()
            z = layer.train(step % 3 > 0)(x, warm if step % 2 else None)
            warm = layer.solution.z
            optimizer.zero_grad()
            if step % 5:
                z.square().sum().backward()
                optimizer.step()
        counts.append(live_tensors())
    assert counts[0] == counts[1]


def saved(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved, pickled])
@ways
def test_copy_is_a_layer_before_and_after_use(duplicate, way):
    layer, x = square_layer(evaluation={"rtol": 1e-2}, **way), numbers(3, 4)
    expected = layer(x).detach()
    fresh = duplicate(square_layer(evaluation={"rtol": 1e-2}, **way))
    layer(x).sum().backward()
    of_weight = layer.f.weight.grad.clone()
    used = duplicate(layer)
    agree(used.solution.z, layer.solution.z)
    layer.f.weight.data.zero_()
    for other in (fresh, used):
        other.zero_grad()
        z = other(x)
        z.sum().backward()
        agree(z.detach(), expected)
        agree(other.f.weight.grad, of_weight)
        assert other.settings == layer.settings
        assert other.evaluation == {"rtol": 1e-2}


def test_state_is_that_of_the_block():
    layer, x = square_layer(), numbers(3, 4)
    before = set(layer.state_dict())
    expected = layer(x).detach()
    state = layer.state_dict()
    assert set(state) == before == {"f.weight", "f.inject", "f.bias"}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other = square_layer(seed=9)
    assert not torch.allclose(other(x).detach(), expected)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    agree(other(x).detach(), expected)


def test_function_brings_no_parameters_but_gets_gradients():
    weight = contraction().requires_grad_()
    layer = DEQ(lambda z, x: torch.tanh(z @ weight.T + x), **TIGHT)
    assert list(layer.parameters()) == []
    layer(numbers(3, 4)).sum().backward()
    assert weight.grad.abs().max() > 0.1


def test_frozen_parameters_get_no_gradient_and_the_others_keep_theirs():
    layer, x = square_layer(), numbers(3, 4)
    (expected,) = grad(layer(x).sum(), layer.f.bias)
    layer.f.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.f.weight.grad is None
    agree(layer.f.bias.grad, expected)


# In and outside of a graph


def test_same_layer_twice_in_one_graph():
    layer, loop, x = square_layer(), Unrolled(Block(inputs=4)), numbers(3, 4)

    def twice(network):
        return lambda x, z0: network(network(x, z0), z0) + network(2 * x, z0)

    results = []
    for network in (layer, loop):
        x = numbers(3, 4).requires_grad_()
        arguments = [x, *network.parameters()]
        y = twice(network)(x, torch.zeros_like(x))
        first = grad(torch.sin(y).sum(), arguments, create_graph=True)
        second = grad(sum(g.square().sum() for g in first), arguments)
        results.append([[y.detach(), *(g.detach() for g in first)], list(second)])
    agree(*results)
    # what is kept is of the last call
    with torch.no_grad():
        agree(layer.solution.z, layer(2 * x))


def test_layer_within_the_block_of_a_layer():
    inner = square_layer(norm=0.4)

    def f(z, x):
        return inner(z / 2 + x) / 2

    layer = DEQ(f, **TIGHT | {"atol": 1e-11, "rtol": 1e-11})
    x = numbers(2, 4).requires_grad_()
    z = layer(x)
    agree(f(z, x), z, atol=1e-9, rtol=0)
    y = torch.zeros_like(x)
    for _ in range(60):
        u = torch.zeros_like(x)
        for _ in range(40):
            u = inner.f(u, y / 2 + x)
        y = u / 2
    arguments = (x, inner.f.weight)
    close = partial(agree, atol=1e-8, rtol=0)
    close(grad(z.sum(), arguments), grad(y.sum(), arguments))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@ways
def test_no_tape_where_gradients_are_off(way, context):
    layer, calls = square_layer(**way), []
    handle = layer.f.register_forward_hook(lambda *_: calls.append(1))
    x = numbers(3, 4).requires_grad_()
    with_tape = layer(x).detach()
    calls.clear()
    with context():
        z = layer(x)
    handle.remove()
    assert not z.requires_grad
    assert z.grad_fn is None
    agree(z, with_tape)
    if way.get("solver") is not newton:  # whose Jacobians cost evaluations as well
        assert len(calls) == len(layer.solution.trace)


@pytest.mark.parametrize(
    "context", [torch.enable_grad, torch.no_grad, torch.inference_mode]
)
@ways
def test_change_of_the_output_in_place_is_no_change_of_the_solution(way, context):
    layer, x = square_layer(**way), numbers(3, 4)
    with context():
        z = layer(x)
        expected = layer.solution.z.clone()
        z.mul_(0)
    assert torch.equal(layer.solution.z, expected)
    assert expected.abs().min() > 0


# Shapes


@ways
def test_sample_alone_has_what_it_has_in_a_batch(way):
    layer, x = square_layer(**way), numbers(4, 4).requires_grad_()
    z = layer(x)
    (of_x,) = grad(torch.sin(z).sum(), x)
    for i in range(4):
        row = x[i : i + 1].detach().requires_grad_()
        alone = layer(row)
        agree(alone.detach(), z[i : i + 1].detach())
        agree(grad(torch.sin(alone).sum(), row)[0], of_x[i : i + 1])


@settings(max_examples=15, deadline=None)
@given(
    order=st.permutations(range(5)),
    keep=st.integers(1, 5),
    norm=st.floats(0.1, 2),
    seed=st.integers(0, 10**6),
)
def test_samples_do_not_see_each_other(order, keep, norm, seed):
    rows = list(order)[:keep]
    layer = square_layer(norm=norm, seed=seed, solver=newton, on_failure="ignore")
    x = 3 * numbers(5, 4, seed=seed)
    with torch.no_grad():
        everyone, solved = layer(x), layer.solution.converged
        agree(layer(x[rows])[solved[rows]], everyone[rows][solved[rows]], rtol=1e-8)
        assert torch.equal(layer.solution.converged, solved[rows])


def test_no_samples():
    layer, x = square_layer(), numbers(0, 4).requires_grad_()
    z = layer(x)
    assert z.shape == (0, 4)
    z.sum().backward()
    assert torch.equal(layer.f.weight.grad, torch.zeros(4, 4).double())


class Paired(nn.Module):
    """An input of two parts."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4).double()
        self.linear.weight.data = contraction()

    def forward(self, z, x):
        shift, scale = x
        return torch.tanh(self.linear(z) * scale + shift)


def test_input_may_be_a_tuple():
    shift = numbers(3, 4, seed=1).requires_grad_()
    scale = torch.rand(3, 1).double().requires_grad_()
    z0 = torch.zeros_like(shift)
    block = Paired()
    results = []
    for network in (DEQ(block, **TIGHT), Unrolled(block)):
        z = network((shift, scale), z0)
        wanted = (shift, scale, block.linear.weight)
        results.append([z.detach(), *grad(torch.sin(z).sum(), wanted)])
    agree(*results)


def test_input_may_be_nothing():
    layer = DEQ(lambda z, x: torch.cos(z), **TIGHT)
    z = layer(None, torch.zeros(2, 1).double())
    agree(z, torch.full_like(z, 0.7390851332151607))


def test_integers_as_input_of_an_embedding():
    torch.manual_seed(0)
    table = nn.Embedding(5, 4).double()
    layer = DEQ(lambda z, x: torch.tanh(z / 2 + table(x)), **TIGHT)
    tokens = torch.tensor([3, 0, 3])
    z = layer(tokens, start(tokens.double()))
    z.sum().backward()
    assert torch.equal(z[0], z[2])
    assert (table.weight.grad.abs().amax(dim=1) > 0).tolist() == [1, 0, 0, 1, 0]


def test_images_of_another_number_of_channels():
    torch.manual_seed(0)

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(4, 4, 3, padding=1)
            self.inject = nn.Conv2d(2, 4, 3, padding=1)
            self.norm = nn.GroupNorm(2, 4)

        def forward(self, z, x):
            return self.norm(torch.relu(self.inner(z) / 8 + self.inject(x)))

    block = Residual().double()
    layer, loop = DEQ(block, **TIGHT), Unrolled(block, steps=200)
    x = numbers(2, 2, 5, 3).requires_grad_()
    z0 = torch.zeros(2, 4, 5, 3).double()
    agree(layer(x, z0), loop(x, z0))
    assert layer.solution.z.shape == (2, 4, 5, 3)
    arguments = [x, *block.parameters()]
    of_both = [grad(torch.sin(net(x, z0)).sum(), arguments) for net in (layer, loop)]
    agree(*of_both, rtol=1e-8, atol=1e-8)


# Samples without an equilibrium


def spoilt(kind, z):
    return {
        "diverges": lambda: 3 * z + 1,
        "turns NaN": lambda: torch.log(z - 2),
        "has no root": lambda: z + 1 + z**2,
    }[kind]()


@pytest.mark.parametrize("kind", ["diverges", "turns NaN", "has no root"])
@ways
def test_sample_without_equilibrium_leaves_its_neighbours_alone(way, kind):
    block, x = Block(inputs=4), numbers(3, 4).requires_grad_()

    def f(z, x, bad):
        return torch.where(bad, spoilt(kind, z), block(z, x))

    bad = torch.tensor([[False], [True], [False]])
    options = TIGHT | {"max_iter": 200, "on_failure": "ignore"} | way
    layer = DEQ(lambda z, pair: f(z, *pair), **options)
    z = layer((x, bad), torch.zeros_like(x))
    assert z.isfinite().all()
    assert layer.solution.converged[[0, 2]].all()
    assert kind == "diverges" or not layer.solution.converged[1]
    (of_x,) = grad(torch.sin(z[[0, 2]]).sum(), x)
    few = x[[0, 2]].detach().requires_grad_()
    alone = DEQ(block, **options)(few)
    agree(z[[0, 2]], alone)
    agree(of_x[[0, 2]], grad(torch.sin(alone).sum(), few)[0])


@pytest.mark.parametrize("training", [True, False])
def test_failure_warns_raises_or_keeps_quiet_as_asked(training):
    options = {"solver": fixed_point_iteration, "max_iter": 20}
    x = torch.tensor([[1.0], [0.0], [2.0]])
    layer = DEQ(lambda z, x: 2 * z + x, **options).train(training)
    with pytest.warns(RuntimeWarning, match="2 of 3"):
        z = layer(x)
    assert z.isfinite().all()
    assert layer.solution.converged.tolist() == [False, True, False]
    silent = {"on_failure": "ignore"}
    DEQ(lambda z, x: 2 * z + x, **options | silent).train(training)(x)
    strict = {"on_failure": "raise"}
    layer = DEQ(lambda z, x: 2 * z + x, **options | strict).train(training)
    with pytest.raises(RuntimeError, match="2 of 3"):
        layer(x)


def test_evaluation_may_ask_for_an_error_where_training_warns():
    layer = DEQ(
        lambda z, x: 2 * z + x,
        solver=fixed_point_iteration,
        max_iter=20,
        on_failure="ignore",
        evaluation={"on_failure": "raise"},
    )
    layer(torch.ones(2, 1))
    with pytest.raises(RuntimeError, match="2 of 2"):
        layer.eval()(torch.ones(2, 1))


# What is refused


NORMS = [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.BatchNorm3d(4), nn.SyncBatchNorm(4)]
NORMS += [nn.LazyBatchNorm1d()]
DROPOUTS = [nn.Dropout(), nn.Dropout1d(), nn.Dropout2d(), nn.Dropout3d(0.1)]
DROPOUTS += [nn.AlphaDropout(), nn.FeatureAlphaDropout()]
DROPOUTS += [
    nn.MultiheadAttention(4, 2, dropout=0.1),
    nn.GRU(4, 4, num_layers=2, dropout=0.1),
    nn.TransformerEncoderLayer(4, 2),
]


def kind(module):
    return type(module).__name__


@pytest.mark.parametrize("module", NORMS, ids=kind)
def test_batch_normalisation_is_refused_wherever_it_hides(module):
    nested = Wrapped(nn.Sequential(nn.Linear(4, 4), module))
    with pytest.raises(ValueError, match=r"batch normalisation.*itself"):
        DEQ(module)
    for evaluated in (nested, nested.eval()):
        with pytest.raises(ValueError, match=r"batch normalisation \(inner\.1"):
            DEQ(evaluated)


class Wrapped(nn.Module):
    """A block with something in it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, z, x):
        return torch.tanh(self.inner(z) / 2 + x)


@pytest.mark.parametrize("module", DROPOUTS, ids=kind)
def test_dropout_is_refused_wherever_it_hides(module):
    with pytest.raises(ValueError, match=r"dropout \("):
        DEQ(module)
    nested = Wrapped(nn.Sequential(nn.Linear(4, 4), module))
    for evaluated in (nested, nested.eval()):
        with pytest.raises(ValueError, match=r"dropout \(inner\.1"):
            DEQ(evaluated)


def test_dropout_of_nothing_is_allowed():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0), nn.AlphaDropout(0.0))
    layer, x = DEQ(Wrapped(inner).double(), **TIGHT), numbers(3, 4)
    agree(layer(x), layer(x))
    DEQ(nn.MultiheadAttention(4, 2))
    DEQ(nn.LSTM(4, 4, num_layers=2))


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.Identity()], ids=kind
)
def test_normalisation_within_a_sample_is_allowed(norm):
    layer, x = DEQ(Wrapped(norm).double(), **TIGHT), numbers(3, 4)
    agree(layer(x)[:1], layer(x[:1]))


def test_transformer_without_dropout_has_an_equilibrium():
    torch.manual_seed(0)
    inner = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    layer = DEQ(Wrapped(inner).double(), **TIGHT)
    x = numbers(2, 3, 4)
    z = layer(x)
    agree(layer.f(z, x), z)
    agree(layer(x[1:]), z[1:])


@pytest.mark.parametrize(
    ("f", "options", "error", "message"),
    [
        (None, {}, TypeError, "f is None"),
        ("tanh", {}, TypeError, "f is 'tanh'"),
        (torch.ones(2), {}, TypeError, "block"),
        (Block(), {"evaluation": "loose"}, TypeError, "evaluation.*'loose'"),
        (Block(), {"evaluation": 0}, TypeError, "evaluation.*0"),
        (Block(), {"evaluation": [("rtol", 1)]}, TypeError, "evaluation.*dictionary"),
    ],
)
def test_bad_construction_is_refused(f, options, error, message):
    with pytest.raises(error, match=message):
        DEQ(f, **options)


def untouched(z, x):
    raise AssertionError("f was called before the arguments were refused")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gradient": "exact"}, ValueError, "gradient.*exact"),
        ({"solver": "anderson"}, TypeError, "solver.*anderson"),
        ({"order": 0}, ValueError, "order.*0"),
        ({"steps": 0}, ValueError, "steps.*0"),
        ({"memroy": 3}, TypeError, "memroy"),
        ({"rtol": -1.0}, ValueError, "rtol.*-1"),
        ({"on_failure": "error"}, ValueError, "on_failure.*error"),
    ],
)
def test_bad_setting_is_refused_before_any_work(options, error, message):
    x = torch.zeros(2, 3)
    with pytest.raises(error, match=message):
        DEQ(untouched, **options)(x)
    layer = DEQ(untouched, evaluation=options).eval()
    with pytest.raises(error, match=message):
        layer(x)


@pytest.mark.parametrize(
    ("x", "z0", "error", "message"),
    [
        ((torch.zeros(2, 3),), None, TypeError, "x is tuple.*z0"),
        (None, None, TypeError, "x is NoneType.*z0"),
        (torch.zeros(2, 3).long(), None, TypeError, "x is torch.int64.*z0"),
        (torch.zeros(2, 3), torch.zeros(2, 3).long(), TypeError, "z0 is torch.int64"),
        (torch.zeros(2, 3), [0.0], TypeError, "z0 is list"),
        (torch.zeros(2, 3), torch.tensor(0.0), ValueError, "z0 has no dimension"),
        (torch.zeros(2, 3), torch.full((2, 3), math.nan), ValueError, "z0 holds a NaN"),
    ],
)
def test_bad_call_is_refused_before_f_is_called(x, z0, error, message):
    layer = DEQ(untouched)
    with pytest.raises(error, match=message):
        layer(x, z0)
    assert layer.solution is None


@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (lambda z, x: [z], TypeError, "list"),
        (lambda z, x: z[:, :1], ValueError, "shape"),
        (lambda z, x: z.double(), ValueError, "float64"),
    ],
)
def test_block_that_is_no_map_of_the_state_is_refused(f, error, message):
    with pytest.raises(error, match=message):
        DEQ(f)(torch.zeros(2, 3))


def test_start_of_another_batch_than_the_input_is_refused():
    layer = DEQ(Block(), **TIGHT)
    with pytest.raises(ValueError, match=r"shape.*\[3, 4\].*\[1, 4\]"):
        layer(numbers(3, 3), torch.zeros(1, 4).double())


def test_call_that_is_refused_leaves_the_last_solution():
    layer, x = square_layer(), numbers(3, 4)
    layer(x)
    solution = layer.solution
    with pytest.raises(ValueError):
        layer(x, torch.full_like(x, math.nan))
    assert layer.solution is solution
