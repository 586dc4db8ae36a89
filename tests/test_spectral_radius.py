"""Spectral radii against closed forms and the eigenvalues of exact Jacobians."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_solvers import Linear, Scalar, Tanh, numbers, randn, rotation, symmetric
from torch import nn

from implicit_layers import spectral_radius

pytestmark = pytest.mark.filterwarnings("error")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def at_zero(matrix, batch=1, **options):
    """The radius that is found for z -> A z."""
    z = torch.zeros(batch, matrix.shape[-1], dtype=matrix.dtype)
    return spectral_radius(Linear(matrix, z), z, **options)


def agree(actual, expected, rtol):
    np.testing.assert_allclose(actual, expected, rtol=rtol)


@dtypes
def test_diagonal(dtype):
    radius = at_zero(torch.diag(numbers(0.1, -0.8, 0.3)).to(dtype), batch=3)
    assert radius.shape == (3,) and radius.dtype == dtype
    agree(radius, np.full(3, 0.8), rtol=1e-5)


@pytest.mark.parametrize("radius", [1e-3, 0.5, 0.99, 3, 1e3])
def test_symmetric_with_largest_eigenvalues_of_both_signs(radius):
    agree(at_zero(symmetric(7, radius)), [radius], rtol=1e-3)


@dtypes
@pytest.mark.parametrize("times", [0.01, 0.9, 1.3])
def test_rotation_has_the_modulus_of_its_complex_pair(dtype, times):
    for radians in (0.1, 1, np.pi / 2, 3):
        agree(at_zero(rotation(radians, times).to(dtype)), [times], rtol=1e-5)


@pytest.mark.parametrize("stretch", [3, 30])
@pytest.mark.parametrize("radians", [0.3, 1, np.pi / 2, 2.5])
def test_complex_pair_around_which_the_norm_oscillates(stretch, radians):
    # the circle seen as an ellipse: the norm grows up to `stretch` fold in a step
    basis = torch.diag(numbers(stretch, 1))
    matrix = basis @ rotation(radians, 0.9) @ torch.linalg.inv(basis)
    norms = torch.linalg.matrix_norm(matrix, ord=2)
    assert norms > 0.29 * stretch * 0.9
    for iterations in (100, 101, 1000):
        # log(stretch) at most is gained or lost over the half that counts
        bound = np.exp(2 * np.log(stretch) / (iterations // 2)) - 1
        agree(at_zero(matrix, iterations=iterations), [0.9], rtol=bound)


@pytest.mark.parametrize("size", [2, 3])
def test_jordan_block_within_what_its_powers_allow(size):
    # powers grow like k^(size - 1) 0.9^k: from k = n / 2 to n by 2^(size - 1)
    matrix = 0.9 * torch.eye(size, dtype=torch.float64)
    matrix += torch.diag(torch.ones(size - 1, dtype=torch.float64), 1)
    for iterations in (100, 1000):
        bound = 2 ** (2 * (size - 1) / iterations) - 1
        agree(at_zero(matrix, iterations=iterations), [0.9], rtol=1.2 * bound)


@dtypes
def test_zero_and_nilpotent_maps_have_radius_zero(dtype):
    matrix = torch.stack([torch.zeros(3, 3), torch.triu(torch.ones(3, 3), diagonal=1)])
    assert at_zero(matrix.to(dtype), batch=2).tolist() == [0, 0]


def test_map_that_ignores_its_argument_has_radius_zero():
    c = randn(3, 2)
    assert spectral_radius(lambda z: c, c).tolist() == [0, 0, 0]


def test_identity_has_radius_one():
    agree(spectral_radius(lambda z: z, randn(3, 2)), np.ones(3), rtol=1e-12)


def test_each_sample_has_its_own_radius():
    matrix = torch.stack(
        [rotation(1, 0.9), torch.diag(numbers(7, 1)), torch.zeros(2, 2), rotation(2, 3)]
    )
    agree(at_zero(matrix, batch=4), [0.9, 7, 0, 3], rtol=1e-5)


def test_sample_that_is_not_finite_leaves_the_others_alone():
    def f(z):
        return torch.stack([z[0] / 2, torch.sqrt(z[1] - 5), 3 * z[2]])

    radius = spectral_radius(f, numbers(1, 1, 1))
    agree(radius[[0, 2]], [0.5, 3], rtol=1e-9)
    assert not radius[1] >= 0  # a NaN, not a number to be believed


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 12),
    batch=st.integers(1, 4),
    gain=st.sampled_from([0.1, 1, 5]),
    seed=st.integers(0, 10**6),
)
def test_tanh_layer_has_the_largest_eigenvalue_of_its_jacobian(size, batch, gain, seed):
    matrix = gain * randn(size, size, seed=seed) / size**0.5
    f = Tanh(matrix, randn(batch, size, seed=seed + 1))
    z = randn(batch, size, seed=seed + 2)
    slopes = f.jacobian(z)
    values, vectors = torch.linalg.eig(slopes)
    expected = values.abs().amax(dim=1)
    found = spectral_radius(f, z, iterations=400)
    # what is gained and lost over 200 products: the condition of the eigenvectors,
    # and that of the part of the start that lies in the largest ones
    bound = (1e3 * torch.linalg.cond(vectors)).log() / 200
    assert ((found / expected).log().abs() <= bound).all()


def test_convolution_has_the_radius_of_its_matrix():
    z, kernel = randn(2, 2, 4, 5), randn(2, 2, 3, 3, seed=1) / 4

    def f(z):
        return torch.tanh(nn.functional.conv2d(z, kernel, padding=1))

    slopes = torch.func.vmap(torch.func.jacrev(lambda z: f(z[None])[0]))(z)
    expected = torch.linalg.eigvals(slopes.reshape(2, 40, 40)).abs().amax(dim=1)
    radius = spectral_radius(f, z, iterations=1000)
    assert radius.shape == (2,)
    agree(radius, expected, rtol=0.01)


def test_batch_of_numbers_and_empty_batch():
    f = Scalar(torch.cos, lambda z: -torch.sin(z))
    z = numbers(0.5, 1, -2)
    agree(spectral_radius(f, z), np.abs(np.sin(z.numpy())), rtol=1e-12)
    assert spectral_radius(f, z[:0]).shape == (0,)
    assert spectral_radius(f, torch.zeros(0, 3)).shape == (0,)


def test_start_is_chosen_by_the_seed_alone():
    matrix = randn(6, 6)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = at_zero(matrix, iterations=10)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(at_zero(matrix, iterations=10), first)
    assert not torch.equal(at_zero(matrix, iterations=10, seed=1), first)
    agree(
        at_zero(matrix, iterations=600, seed=1),
        at_zero(matrix, iterations=600),
        rtol=0.02,
    )


def test_as_many_products_as_asked_for():
    # two products: the growth in the second one, here from (1, s) A to (1, s) A A
    matrix = torch.diag(numbers(2, 1))
    coarse, fine = (abs(at_zero(matrix, iterations=n).item() - 2) for n in (2, 200))
    assert 1e-6 < coarse < 1 and fine < 1e-12


@pytest.mark.parametrize(
    "context", [torch.enable_grad, torch.no_grad, torch.inference_mode]
)
def test_result_is_a_number_and_gradients_stay_where_they_were(context):
    layer, z = nn.Linear(3, 3), torch.zeros(2, 3, requires_grad=True)
    weight = layer.weight.detach().double().numpy()
    with context():
        radius = spectral_radius(layer, z + 0, iterations=1000)
        assert torch.is_grad_enabled() == (context is torch.enable_grad)
    agree(radius, np.full(2, abs(np.linalg.eigvals(weight)).max()), rtol=0.01)
    assert not radius.requires_grad
    assert z.grad is None and layer.weight.grad is None
    assert not z.detach().any()


@pytest.mark.parametrize(
    ("z", "options", "error", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.long), {}, TypeError, "int64"),
        ([0.0], {}, TypeError, "list"),
        (torch.tensor(1.0), {}, ValueError, "dimension"),
        (torch.tensor([[np.nan]]), {}, ValueError, "NaN"),
        (torch.zeros(2, 2), {"iterations": 1}, ValueError, "iterations.*1"),
        (torch.zeros(2, 2), {"iterations": 2.5}, ValueError, "iterations.*2.5"),
    ],
)
def test_bad_input_is_refused_before_f_is_called(z, options, error, message):
    def f(z):
        raise AssertionError("called")

    with pytest.raises(error, match=message):
        spectral_radius(f, z, **options)


@pytest.mark.parametrize(
    ("f", "what"), [(lambda z: z[:, :1], "shape"), (lambda z: z.double(), "float64")]
)
def test_map_to_something_else_is_refused(f, what):
    with pytest.raises(ValueError, match=what):
        spectral_radius(f, torch.zeros(2, 2))
