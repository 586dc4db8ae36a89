"""Implicit layers in use: what gradients reach, what stays alive, what is refused."""

import copy
import io
import math
import re
import warnings
import weakref
from functools import partial

import pytest
import torch
from layers import MODES, TIGHT, agree, contraction, numbers, solvers, ways
from torch import nn
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint

from implicit_layers import fixed_point_iteration, implicit_fixed_point

pytestmark = pytest.mark.filterwarnings("error")
modes = pytest.mark.parametrize("mode", MODES)


def root(f, z0, **options):
    return implicit_fixed_point(f, z0, **TIGHT | options)[0]


class TanhLayer(nn.Module):
    """z = tanh(W z + x), and what the solver said the last time."""

    def __init__(self, size=4, seed=0, **options):
        super().__init__()
        self.weight = nn.Parameter(contraction(size, seed))
        self.options = TIGHT | options
        self.solution = None

    def f(self, z, x):
        return torch.tanh(z @ self.weight.T + x)

    def forward(self, x):
        z0 = torch.zeros_like(x)
        z, self.solution = implicit_fixed_point(
            lambda z: self.f(z, x), z0, **self.options
        )
        return z


class UnrolledLayer(TanhLayer):
    """The same by an unrolled loop."""

    def forward(self, x):
        z = torch.zeros_like(x)
        for _ in range(90):
            z = self.f(z, x)
        return z


def first_and_second(network, x):
    """Gradients of a loss for x and the weights, and of their squares' sum."""
    arguments = [x.requires_grad_(), *network.parameters()]
    first = grad(torch.sin(network(x)).sum(), arguments, create_graph=True)
    second = grad(sum(g.square().sum() for g in first), arguments)
    return [g.detach() for g in first], second


# What gradients reach


@modes
def test_gradients_reach_modules_closures_and_several_inputs(mode):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    x, y = numbers(3, 4).requires_grad_(), numbers(3, 1, seed=1).requires_grad_()
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def f(z):
        return torch.tanh(scale * inner(z) + x * y)

    def unrolled(steps):
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(200):
                z = f(z)
        for _ in range(steps):
            z = f(z)
        return z

    arguments = [x, y, scale, *inner.parameters()]
    z = root(f, torch.zeros_like(x), gradient=mode, steps=5, damping=1.0)
    steps = {"implicit": 100, "jfb": 1}.get(mode, 5)
    expected = grad(torch.sin(unrolled(steps)).sum(), arguments)
    agree(grad(torch.sin(z).sum(), arguments), expected)
    assert all(g.abs().max() > 1e-3 for g in expected)


def test_backward_method_accumulates_into_parameters():
    layer, twin = TanhLayer(), UnrolledLayer()
    for network in (layer, twin):
        for seed in (0, 1):
            network(numbers(3, 4, seed=seed)).square().sum().backward()
    agree(layer.weight.grad, twin.weight.grad)


@modes
def test_parameter_of_one_sample_gets_the_gradient_of_that_sample(mode):
    table = numbers(5, 4).requires_grad_()
    rows, weight = torch.tensor([3, 0, 3]), contraction()

    def solve(rows):
        f = lambda z: torch.tanh(z @ weight.T + table[rows])  # noqa: E731
        z0 = torch.zeros(len(rows), 4).double()
        z = root(f, z0, gradient=mode, steps=3)
        return grad(torch.sin(z).sum(), table)[0]

    together = solve(rows)
    assert torch.equal(together[[1, 2, 4]], torch.zeros(3, 4).double())
    agree(together[0], solve(rows[1:2])[0])
    agree(together[3], 2 * solve(rows[:1])[3])


@ways
def test_what_f_does_not_use_gets_no_gradient(way):
    weight, x = contraction(), numbers(3, 4).requires_grad_()
    unused = numbers(4).requires_grad_()
    z = root(lambda z: torch.tanh(z @ weight.T + x), torch.zeros_like(x), **way)
    of_x, of_unused = grad(z.sum(), (x, unused), allow_unused=True)
    assert of_x.abs().min() > 0
    assert of_unused is None


@ways
def test_map_that_ignores_its_argument_is_a_program(way):
    x = numbers(3, 4).requires_grad_()
    z = root(lambda z: torch.sin(x), torch.zeros(3, 4).double(), damping=1.0, **way)
    agree(z, torch.sin(x))
    results = []
    for output in (z, torch.sin(x)):
        (first,) = grad(torch.sin(output).sum(), x, create_graph=True)
        results.append([first, *grad(first.square().sum(), x)])
    agree(*results)


FROZEN = {"tanh": lambda z: torch.tanh(z / 2 + 1), "constant": torch.ones_like}


@pytest.mark.parametrize("f", FROZEN.values(), ids=FROZEN)
@modes
def test_frozen_map_lets_what_follows_learn(mode, f):
    z = root(f, torch.zeros(3, 4).double(), gradient=mode, max_iter=100)
    weight = numbers(3, 4).requires_grad_()
    (z * weight).sum().backward()
    agree(weight.grad, z.detach())
    agree(z.detach(), f(z.detach()))


@pytest.mark.parametrize("f", FROZEN.values(), ids=FROZEN)
@modes
def test_frozen_map_has_nothing_to_differentiate(request, mode, f):
    if mode in ("implicit", "neumann"):
        why = "backward solves an adjoint system although it leads nowhere"
        request.applymarker(pytest.mark.xfail(reason=why))
    z = root(f, torch.zeros(3, 4).double(), gradient=mode)
    assert not z.requires_grad


@modes
def test_start_gets_no_gradient_and_does_no_harm(mode):
    layer, x = TanhLayer(), numbers(3, 4).requires_grad_()
    leaf = numbers(3, 4, seed=1).requires_grad_()
    options = {"gradient": mode, "steps": 3}

    def solve(z0):
        return root(lambda z: layer.f(z, x), z0, **options)

    expected = grad(solve(torch.zeros_like(x)).sum(), (x, layer.weight))
    for z0 in (leaf, torch.tanh(leaf + x)):
        before = z0.detach().clone()
        actual = grad(solve(z0).sum(), (x, layer.weight, leaf), allow_unused=True)
        agree(actual[:2], expected)
        assert actual[2] is None
        assert torch.equal(z0.detach(), before)


# Life in and outside of a graph


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@ways
def test_no_tape_where_gradients_are_off(way, context):
    layer, x = TanhLayer(**way), numbers(3, 4)
    with_tape = layer(x)
    with context():
        z = layer(x)
        twice = 2 * z
    assert with_tape.requires_grad
    assert not z.requires_grad
    assert z.grad_fn is None
    agree(z, with_tape.detach())
    agree(twice, 2 * with_tape.detach())
    agree(layer.solution.z, z)
    # usable as data of a network that is trained
    head = nn.Linear(4, 1).double()
    head(z.clone()).sum().backward()
    agree(head.weight.grad[0], with_tape.detach().sum(dim=0))


@modes
def test_no_tape_costs_no_evaluation(mode):
    weight, x, calls = contraction(), numbers(3, 4), []

    def f(z):
        calls.append(1)
        return torch.tanh(z @ weight.T + x)

    with torch.no_grad():
        _, solution = implicit_fixed_point(f, torch.zeros_like(x), gradient=mode)
    assert len(calls) == len(solution.trace)


def saved_and_loaded(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved_and_loaded])
@solvers
def test_copy_of_a_layer_is_a_layer_before_and_after_use(duplicate, solver):
    layer, x = TanhLayer(solver=solver), numbers(3, 4)
    expected = first_and_second(UnrolledLayer(), x)
    fresh = duplicate(layer)
    agree(first_and_second(layer, x), expected)
    layer(x).sum().backward()
    used = duplicate(layer)
    layer.weight.data.zero_()
    for other in (fresh, used):
        agree(first_and_second(other, x), expected)


@pytest.mark.parametrize("seeds", [[0, 1], [0, 0]], ids=["stacked", "twice"])
@solvers
def test_two_layers_in_one_graph(seeds, solver):
    networks = []
    for kind in (partial(TanhLayer, solver=solver), UnrolledLayer):
        made = {seed: kind(seed=seed) for seed in seeds}
        networks.append(nn.Sequential(*(made[seed] for seed in seeds)))
    assert len(list(networks[0].parameters())) == len(set(seeds))
    agree(*(first_and_second(network, numbers(3, 4)) for network in networks))


@solvers
def test_backward_can_be_repeated(solver):
    layer, x = TanhLayer(solver=solver), numbers(3, 4).requires_grad_()
    arguments = (x, layer.weight)
    loss = torch.sin(layer(x)).sum()
    once = grad(loss, arguments, retain_graph=True)
    again = grad(loss, arguments, retain_graph=True)
    assert all(map(torch.equal, once, again))
    taped = grad(loss, arguments, create_graph=True)
    agree([g.detach() for g in taped], once)
    square = sum(g.square().sum() for g in taped)
    second = grad(square, arguments, retain_graph=True)
    agree((list(once), second), first_and_second(UnrolledLayer(), x))
    assert all(map(torch.equal, second, grad(square, arguments)))


@modes
def test_graph_that_was_not_retained_cannot_be_used_again(mode):
    layer = TanhLayer(gradient=mode)
    loss = layer(numbers(3, 4)).square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_penalised_steps_and_then_ordinary_ones_train_like_an_unrolled_loop():
    weights = []
    for network in (TanhLayer(), UnrolledLayer()):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        for step in range(8):
            x = numbers(3, 4, seed=step).requires_grad_()
            loss = network(x).square().mean()
            if step < 4:
                (slope,) = grad(loss, x, create_graph=True)
                loss = loss + slope.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weights.append(network.weight.detach())
    agree(*weights)
    assert (weights[0] - contraction()).abs().max() > 0.1


@ways
def test_output_may_be_changed_in_place_or_autograd_says_so(way):
    layer, x = TanhLayer(**way), numbers(3, 4).requires_grad_()
    expected = grad(torch.relu(layer(x)).sum(), (x, layer.weight))
    z = torch.relu_(layer(x))
    try:
        agree(grad(z.sum(), (x, layer.weight)), expected)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        assert way.get("gradient") in ("unrolled", "jfb")  # the output of f itself


@ways
def test_recomputed_in_the_backward_pass(way):
    layer, x = TanhLayer(**way), numbers(3, 4).requires_grad_()
    arguments = (x, layer.weight)
    again = checkpoint(layer, x, use_reentrant=False)
    agree(grad(again.sum(), arguments), grad(layer(x).sum(), arguments))


@ways
def test_functorch_gets_the_gradient_or_an_error(way):
    layer, x = TanhLayer(**way), numbers(3, 4).requires_grad_()
    (expected,) = grad(layer(x).sum(), x)
    try:
        actual = torch.func.grad(lambda x: layer(x).sum())(x)
    except RuntimeError as error:
        assert re.search("functorch|torch.func|generate_vmap_rule", str(error))
    else:
        agree(actual, expected)


@ways
def test_fifty_steps_leave_nothing_behind(live_tensors, way):
    layer = TanhLayer(**way, atol=1e-3, rtol=1e-3)
    counts = []
    for steps in (5, 45):
        for step in range(steps):
            x = numbers(3, 4).requires_grad_()
            loss = layer(x).square().sum()
            if step % 5 == 1:
                loss = loss + grad(loss, x, create_graph=True)[0].square().sum()
            if step % 5:
                layer.weight.grad = grad(loss, layer.weight)[0]
        counts.append(live_tensors())
    assert counts[0] == counts[1]


class Map:
    """A map that can be watched."""

    def __init__(self, weight, x):
        self.weight, self.x = weight, x

    def __call__(self, z):
        return torch.tanh(z @ self.weight.T + self.x)


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@ways
def test_what_took_part_dies_with_its_last_name(way, backward, twice):
    weight, x = contraction().requires_grad_(), numbers(3, 4).requires_grad_()
    f, z0 = Map(weight, x), torch.zeros_like(x)
    z, solution = implicit_fixed_point(f, z0, **TIGHT, **way)
    outputs = [z]
    if twice:
        outputs += grad(z.square().sum(), (weight, x), create_graph=True)
    if backward:
        sum(output.sum() for output in outputs).backward()
    watched = [weakref.ref(thing) for thing in (weight, x, f, z0, solution, *outputs)]
    del weight, x, f, z0, z, solution, outputs
    assert [reference() for reference in watched] == [None] * len(watched)


# The incoming gradient


def pulled_back(v, x=None, **options):
    """The gradients for weight and x that arrive when v comes in at the output."""
    layer = TanhLayer(**options).to(v.dtype)
    x = (numbers(*v.shape) if x is None else x).to(v.dtype).requires_grad_()
    return grad(layer(x), (layer.weight, x), v)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@ways
def test_nan_that_comes_in_goes_out_at_its_own_sample(way, value):
    v = numbers(3, 4, seed=1)
    _, expected = pulled_back(v, **way)
    v[1, 2] = value
    of_weight, of_x = pulled_back(v, on_failure="ignore", **way)
    agree(of_x[[0, 2]], expected[[0, 2]])
    # the inverse of I - J mixes all entries of a sample; one application of f does not
    reached = slice(2, 3) if way.get("gradient") == "jfb" else slice(None)
    assert not of_x[1, reached].isfinite().any()
    assert not of_weight[reached].isfinite().any()


@ways
def test_no_gradient_in_no_gradient_out(way):
    for order in (1, 2, 3):
        for gradient in pulled_back(torch.zeros(3, 4).double(), order=order, **way):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("scale", [1e-300, 1e-20, 1e20, 1e300])
@solvers
def test_accuracy_is_relative_to_the_incoming_gradient(solver, scale):
    v = numbers(3, 4, seed=1)
    expected = pulled_back(v, solver=solver)
    for small, usual in zip(
        pulled_back(scale * v, solver=solver), expected, strict=True
    ):
        agree(small / scale, usual)
    rows = torch.tensor([[scale], [1.0], [1e3 * scale]], dtype=torch.float64)
    _, of_x = pulled_back(rows * v, solver=solver)
    agree(of_x / rows, expected[1])


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
@solvers
def test_accuracy_is_relative_in_single_precision_too(solver, scale):
    limits = {"solver": solver, "atol": 1e-6, "rtol": 1e-6}
    v = numbers(3, 4, seed=1)
    _, expected = pulled_back(v, solver=solver)
    _, of_x = pulled_back(v.float() * scale, **limits)
    torch.testing.assert_close(of_x / scale, expected.float(), rtol=1e-4, atol=1e-4)


def spoilt(kind, z):
    """A map that drives samples away, throws them out or has no root for them."""
    return {
        "diverges": lambda: 3 * z + 1,
        "turns NaN": lambda: torch.log(z - 2),
        "overflows": lambda: torch.exp(z.exp() + 5),
        "has no root": lambda: z + 1 + z**2,
    }[kind]()


@pytest.mark.parametrize("kind", ["diverges", "turns NaN", "overflows", "has no root"])
@ways
def test_gradient_of_a_solved_sample_ignores_its_neighbours(way, kind):
    bad = torch.tensor([[False], [True], [False]])

    def solve(rows, spoil):
        x, weight = numbers(3, 4)[rows].requires_grad_(), contraction().requires_grad_()

        def f(z):
            fz = torch.tanh(z @ weight.T + x)
            return torch.where(bad[rows], spoilt(kind, z), fz) if spoil else fz

        options = TIGHT | {"max_iter": 200, "on_failure": "ignore"} | way
        z, solution = implicit_fixed_point(f, torch.zeros_like(x), **options)
        assert z.isfinite().all()
        good = z[~bad[rows][:, 0]]
        of_weight, of_x = grad(torch.sin(good).sum(), (weight, x))
        return solution, good, of_x, of_weight

    solution, good, of_x, of_weight = solve([0, 1, 2], spoil=True)
    _, expected, of_x_alone, of_weight_alone = solve([0, 2], spoil=False)
    assert solution.converged[[0, 2]].all()
    assert not solution.converged[1] or kind == "diverges"  # which Newton can solve
    agree(good, expected)
    agree(of_x[[0, 2]], of_x_alone)
    if way.get("gradient") not in ("unrolled", "phantom"):  # several steps may get lost
        assert torch.equal(of_x[1], torch.zeros(4).double())
        agree(of_weight, of_weight_alone)


@pytest.mark.parametrize("kind", ["diverges", "turns NaN", "overflows", "has no root"])
@solvers
def test_output_of_a_failed_sample_is_its_best_iterate(solver, kind):
    x = numbers(3, 4).requires_grad_()
    bad = torch.tensor([[False], [True], [False]])
    z, solution = implicit_fixed_point(
        lambda z: torch.where(bad, spoilt(kind, z) + 0 * x, torch.tanh(z / 2 + x)),
        torch.zeros(3, 4).double(),
        solver=solver,
        on_failure="ignore",
    )
    assert z.isfinite().all()
    failed = ~solution.converged
    assert failed[1] or kind == "diverges"
    agree(z[failed].detach(), solution.z[failed])


# What did not converge says so


def solve_expanding(bad=(1,), **options):
    """Maps z -> a z + row + 1 with a = 3 for the bad rows of three, 0.5 for others.

    The best iterate of a bad row is the start, 0, with row + 1 as its residual.
    """
    a = torch.full((3, 1), 0.5, dtype=torch.float64)
    a[list(bad)] = 3.0
    a.requires_grad_()
    offsets = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    options = {"solver": fixed_point_iteration, "max_iter": 30, **options}
    z0 = torch.zeros(3, 1).double()
    return a, *implicit_fixed_point(lambda z: a * z + offsets, z0, **options)


def only_warning(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    assert [w.category for w in caught] == [RuntimeWarning]
    return str(caught[0].message), result, caught[0].filename


@pytest.mark.parametrize("bad", [(1,), (0, 2)])
@pytest.mark.parametrize("options", [{}, {"on_failure": "warn"}])
@modes
def test_failure_warns_once_a_call_with_counts_and_distance(mode, options, bad):
    def call():
        return solve_expanding(bad=bad, gradient=mode, **options)

    for _ in range(2):  # also the second time from the same place
        message, (_, _, solution), place = only_warning(call)
        assert place == __file__  # where the layer was called
        assert f"{len(bad)} of 3" in message
        written = [float(n) for n in re.findall(r"\d[\d.]*e[+-]?\d+|\d+\.\d+", message)]
        assert max(bad) + 1.0 in written
        assert solution.converged.tolist() == [row not in bad for row in range(3)]


@modes
def test_failure_raises_on_request(mode):
    with pytest.raises(RuntimeError, match="1 of 3"):
        solve_expanding(gradient=mode, on_failure="raise")


@modes
def test_failure_is_ignored_on_request(mode):
    a, z, solution = solve_expanding(gradient=mode, on_failure="ignore")
    assert not solution.converged[1]
    assert z[[0, 2]].isfinite().all()
    z[solution.converged].sum().backward()
    assert a.grad[[0, 2]].isfinite().all()
    agree(a.grad[1], torch.zeros(1).double())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_failure_is_reported_without_a_tape_too(context):
    with context():
        assert "1 of 3" in only_warning(solve_expanding)[0]
        with pytest.raises(RuntimeError, match="1 of 3"):
            solve_expanding(on_failure="raise")
        solve_expanding(on_failure="ignore")


@pytest.mark.parametrize("on_failure", ["warn", "raise", "ignore"])
@modes
def test_success_says_nothing(mode, on_failure):
    a, z, _ = solve_expanding(bad=(), gradient=mode, on_failure=on_failure)
    z.sum().backward()
    assert a.grad.isfinite().all()


@pytest.mark.xfail(reason="it warns once for each of the two orders")
def test_failure_in_a_backward_pass_that_is_differentiated_warns_once():
    a, z, _ = solve_expanding(
        bad=(), max_iter=200, backward_solver=partial(fixed_point_iteration, max_iter=2)
    )
    message, *_ = only_warning(lambda: grad(z.sum(), a, create_graph=True))
    assert "3 of 3" in message


def adjoint_fails(order=2, **options):
    """A sum of outputs whose backward pass solves one sample of three, at most."""
    a = torch.tensor([[0.0], [0.9], [0.5]], dtype=torch.float64, requires_grad=True)
    z0 = torch.zeros(3, 1).double()
    options |= {"backward_solver": partial(fixed_point_iteration, max_iter=2)}
    return root(lambda z: a * z + 1, z0, order=order, **options).sum()


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"on_failure": "warn"}])
@solvers
def test_failure_in_the_backward_pass_warns_once(solver, options, order):
    loss = adjoint_fails(order=order, solver=solver, **options)
    message, *_ = only_warning(loss.backward)
    assert "2 of 3" in message
    assert re.search("backward|adjoint|gradient", message)


@solvers
def test_failure_in_the_backward_pass_raises_on_request(solver):
    loss = adjoint_fails(solver=solver, on_failure="raise")
    with pytest.raises(RuntimeError, match="2 of 3"):
        loss.backward()


@solvers
def test_failure_in_the_backward_pass_is_ignored_on_request(solver):
    adjoint_fails(solver=solver, on_failure="ignore").backward()


# What is refused


class Untouched:
    """A map that nobody may call."""

    def __call__(self, z):
        raise AssertionError("f was called before the arguments were refused")


@pytest.mark.parametrize(
    ("options", "error", "given"),
    [
        ({"gradient": "exact"}, ValueError, "exact"),
        ({"gradient": None}, ValueError, "None"),
        ({"order": 0}, ValueError, "0"),
        ({"order": -1}, ValueError, "-1"),
        ({"order": 1.5}, (TypeError, ValueError), "1.5"),
        ({"steps": 0}, ValueError, "0"),
        ({"steps": -2}, ValueError, "-2"),
        ({"damping": 0.0}, ValueError, "0"),
        ({"damping": -0.5}, ValueError, "-0.5"),
        ({"damping": 1.5}, ValueError, "1.5"),
        ({"damping": math.nan}, ValueError, "nan"),
        ({"on_failure": "error"}, ValueError, "error"),
        ({"solver": "anderson"}, TypeError, "anderson"),
        ({"backward_solver": "newton"}, TypeError, "newton"),
        ({"memroy": 3}, TypeError, "memroy"),
        ({"max_iter": 0}, ValueError, "0"),
        ({"rtol": -1.0}, ValueError, "-1"),
    ],
)
@modes
def test_bad_argument_is_refused_before_any_work(mode, options, error, given):
    with pytest.raises(error) as caught:
        implicit_fixed_point(
            Untouched(), torch.zeros(2, 3), **{"gradient": mode} | options
        )
    (name,) = options
    assert name in str(caught.value)
    assert given in str(caught.value)


@pytest.mark.parametrize("option", ["gradient", "on_failure"])
def test_refusal_lists_the_possible_names(option):
    names = {"gradient": MODES, "on_failure": ["warn", "raise", "ignore"]}[option]
    with pytest.raises(ValueError) as caught:
        implicit_fixed_point(Untouched(), torch.zeros(2, 3), **{option: "other"})
    assert all(name in str(caught.value) for name in names)


def test_options_go_to_the_solver():
    seen = []

    def own(f, z0, *, colour, **limits):
        seen.append((colour, limits))
        return fixed_point_iteration(f, z0, **limits)

    layer, x = TanhLayer(), numbers(3, 4).requires_grad_()
    limits = {"atol": 1e-12, "rtol": 1e-12, "max_iter": 300}
    f = lambda z: layer.f(z, x)  # noqa: E731
    z, _ = implicit_fixed_point(f, 0 * x, solver=own, colour="red", **limits)
    agree(grad(z.sum(), x), grad(UnrolledLayer()(x).sum(), x))
    assert seen == [("red", limits)]


# Shapes, sizes and number formats


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
@ways
def test_no_samples_and_samples_without_entries(way, shape):
    x = numbers(*shape).requires_grad_()
    weight = contraction().requires_grad_()[: shape[1], : shape[1]]
    f, z0 = Map(weight, x), torch.zeros_like(x)
    z, solution = implicit_fixed_point(f, z0, **TIGHT, **way)
    assert z.shape == shape
    assert solution.converged.shape == shape[:1]
    of_x, of_weight = grad(z.sum(), (x, weight))
    assert of_x.shape == shape
    assert torch.equal(of_weight, torch.zeros_like(weight))


@ways
def test_sample_alone_has_the_gradient_it_has_in_a_batch(way):
    v = numbers(3, 4, seed=1)
    of_weight, of_x = pulled_back(v, **way)
    x = numbers(3, 4)
    alone = [pulled_back(v[i : i + 1], x[i : i + 1], **way) for i in range(3)]
    agree(torch.cat([gradients[1] for gradients in alone]), of_x)
    agree(sum(gradients[0] for gradients in alone), of_weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@ways
def test_number_format_is_kept_and_its_accuracy_reached(way, dtype):
    v, x = numbers(3, 4, seed=1), numbers(3, 4)
    exact = pulled_back(v, x, **way)
    limits = {} if dtype == torch.float64 else {"atol": 1e-6, "rtol": 1e-6}
    layer = TanhLayer(**way, **limits).to(dtype)
    x = x.to(dtype).requires_grad_()
    z = layer(x)
    gradients = grad(z, (layer.weight, x), v.to(dtype))
    assert z.dtype == layer.solution.residual.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    for actual, expected in zip(gradients, exact, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(
            actual, expected.to(dtype), rtol=tolerance, atol=tolerance
        )


@ways
def test_numbers_in_any_shape_are_the_numbers_in_a_row(way):
    v = numbers(3, 12, seed=1)

    def gradients(*shape):
        x = numbers(3, 12).requires_grad_()
        weight = contraction(12).requires_grad_()

        def f(z):
            rows = z.reshape(3, 12) @ weight.T + x
            return torch.tanh(rows).reshape(z.shape)

        z = root(f, torch.zeros(3, *shape).double(), **way)
        assert z.shape == (3, *shape)
        return grad(z, (weight, x), v.reshape(z.shape))

    flat = gradients(12)
    for shape in ((2, 6), (3, 2, 2), (1, 12, 1, 1)):
        agree(gradients(*shape), flat)


@ways
def test_batch_of_numbers(way):
    x = numbers(5).requires_grad_()

    def solve(x):
        return root(lambda z: torch.tanh(0.6 * z) + x, torch.zeros_like(x), **way)

    (of_flat,) = grad(torch.sin(solve(x)).sum(), x)
    column = x.detach()[:, None].requires_grad_()
    (of_column,) = grad(torch.sin(solve(column)).sum(), column)
    agree(of_flat, of_column[:, 0])


@ways
def test_channels_last_changes_nothing(way):
    torch.manual_seed(0)
    convolution = nn.Conv2d(2, 2, 3, padding=1).double()

    def gradients(layout):
        x = numbers(2, 2, 3, 4).contiguous(memory_format=layout).requires_grad_()
        f = lambda z: torch.tanh(convolution(z) / 4 + x)  # noqa: E731
        z = root(f, torch.zeros_like(x), **way)
        v = numbers(2, 2, 3, 4, seed=1).contiguous(memory_format=layout)
        return z.detach(), *grad(z, (x, *convolution.parameters()), v)

    plain = gradients(torch.contiguous_format)
    for actual, expected in zip(gradients(torch.channels_last), plain, strict=True):
        agree(actual, expected, check_stride=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@ways
def test_cuda_agrees_with_the_cpu(way):
    layer = TanhLayer(**way)
    on_gpu, x = copy.deepcopy(layer).cuda(), numbers(3, 4)
    for actual, expected in zip(
        first_and_second(on_gpu, x.cuda()), first_and_second(layer, x), strict=True
    ):
        agree([g.cpu() for g in actual], list(expected))
