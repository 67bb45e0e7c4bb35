"""Softmax over positions against sampling, identities, the class axis and finite networks."""

import functools

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
import pytest
from jax import random

import taylor_softmax
from taylor_softmax import stax
from taylor_softmax._numerics.surrogate import parse
from taylor_softmax._position_axis import moments
from taylor_softmax.methods import Direct, QuasiMonteCarlo, Series

# Bound on |z| of the largest of up to 2,000 entries, most of them correlated: 1e-4 by chance.
LARGEST_Z = 5.5


def covariances(size, kind="random", variance=1.0, rho=0.8, seed=0):
    """`K11, K12, K22` with variances `variance` and cross-correlations around `rho`."""
    rng = np.random.default_rng(seed)
    if kind == "equicorrelated":
        one = variance * (0.5 * np.eye(size) + 0.5)
        return one, rho * one, one
    if kind == "block":
        half = np.kron(np.eye(2), np.ones((size, size)))[:size, :size]
        one = variance * (0.3 * np.eye(size) + 0.7 * half)
        return one, rho * one, one
    # Singular: fewer dimensions than positions, and two of them equal.
    rank = max(1, size // 2) if kind == "singular" else size + 2
    a = rng.standard_normal((2, size, rank))
    a[1] = rho * a[0] + np.sqrt(1 - rho**2) * a[1]
    if kind == "singular":
        a[:, -1] = a[:, 0]
    a *= np.sqrt(variance) / np.linalg.norm(a, axis=-1, keepdims=True)
    return a[0] @ a[0].T, a[0] @ a[1].T, a[1] @ a[1].T


def largest_z(value, estimate):
    return np.max(np.abs((value - estimate.mean) / estimate.stderr))


# Order 2.


@pytest.mark.parametrize("kind", ["random", "equicorrelated", "singular", "block"])
@pytest.mark.parametrize("size", [2, 5, 16, 32])
def test_order_2_sums(size, kind):
    one, cross, two = covariances(size, kind)
    moment = taylor_softmax.joint_second_moment(one, cross, two, order=2)
    np.testing.assert_allclose(np.sum(moment), 1, atol=1e-6)
    # With itself every row sums to the mean of that position.
    rows = np.sum(taylor_softmax.joint_second_moment(one, one, one, order=2), 1)
    columns = np.sum(taylor_softmax.joint_second_moment(two, two, two, order=2), 1)
    np.testing.assert_allclose(np.sum(moment, 1), rows, atol=1e-6)
    np.testing.assert_allclose(np.sum(moment, 0), columns, atol=1e-6)


@pytest.mark.parametrize("kind", ["random", "equicorrelated", "singular", "block"])
def test_order_2_against_sampling(kind):
    # Two equal positions alone have a constant output, with no standard error.
    for size in (5, 16, 32) if kind == "singular" else (2, 5, 16, 32):
        given = covariances(size, kind, variance=2.0)
        estimate = taylor_softmax.monte_carlo.joint_second_moment(
            random.key(size), *given, order=2, n_samples=40_000
        )
        value = taylor_softmax.joint_second_moment(*given, order=2)
        assert largest_z(value, estimate) < LARGEST_Z
        # Negative control: another covariance is found.
        wrong = taylor_softmax.joint_second_moment(given[0], 0.5 * given[1], given[2], order=2)
        assert largest_z(wrong, estimate) > LARGEST_Z


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("size", [2, 3, 10])
def test_order_2_of_independent_positions_is_the_class_kernel(size, dtype):
    a, c, b = 2.0, 1.1, 0.7
    covs = (jnp.asarray(x * np.eye(size), dtype) for x in (a, c, b))
    moment = taylor_softmax.joint_second_moment(*covs, order=2)
    covariance = taylor_softmax.class_covariance(a, c, b, n_classes=size, order=2)
    expected = 1 / size**2 + covariance * (np.eye(size) - 1 / size)
    np.testing.assert_allclose(moment, expected, atol=1e-7 if dtype == jnp.float64 else 1e-5)


# Other orders and softmax.


@pytest.mark.core
@pytest.mark.parametrize("order", [8, None])
@pytest.mark.parametrize(("variance", "limit"), [(1.0, 2e-3), (4.0, 1e-2)])
def test_other_orders_against_sampling(order, variance, limit):
    given = covariances(6, variance=variance, rho=0.9)
    value = taylor_softmax.joint_second_moment(*given, order=order)
    mean, stderr = taylor_softmax.monte_carlo.joint_second_moment(
        random.key(1), *given, order=order, n_samples=200_000
    )
    assert np.all(np.abs(value - mean) < limit * np.max(mean) + 5 * stderr)
    # Negative control: the series alone is worse, another order is found.
    series = taylor_softmax.joint_second_moment(*given, order=order, method=Series())
    assert np.max(np.abs(series - mean)) > np.max(np.abs(value - mean))
    other = taylor_softmax.joint_second_moment(*given, order=2)
    assert not np.all(np.abs(other - mean) < limit * np.max(mean) + 5 * stderr)


def test_softmax_of_independent_positions_is_the_class_kernel():
    size, covs = 4, [x * np.eye(4) for x in (1.0, 0.6, 0.5)]
    moment = taylor_softmax.joint_second_moment(*covs, order=None, method=QuasiMonteCarlo(1 << 14))
    covariance = taylor_softmax.class_covariance(1.0, 0.6, 0.5, n_classes=size, order=None)
    expected = 1 / size**2 + covariance * (np.eye(size) - 1 / size)
    np.testing.assert_allclose(moment, expected, atol=1e-3 * np.max(expected))


@pytest.mark.parametrize("order", [2, 8, None])
def test_sums_to_one_and_is_the_same_every_time(order):
    given = covariances(5, "singular")
    first, second = (taylor_softmax.joint_second_moment(*given, order=order) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(np.sum(first), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("order", "dtype"), [(2, jnp.float32), (8, jnp.float32), (None, jnp.float64)]
)
def test_finite_values_and_gradients_at_the_edges(order, dtype):
    zero = np.zeros((3, 3))
    singular = np.ones((3, 3))

    def total(*covs):
        weights = jnp.arange(9, dtype=dtype).reshape(3, 3)
        moment = taylor_softmax.joint_second_moment(
            *covs, order=order, method=None if order == 2 else QuasiMonteCarlo(64)
        )
        return jnp.sum(weights * moment)

    with_gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2)))
    for given in ((zero, zero, zero), (singular, singular, singular), (1e3 * np.eye(3),) * 3):
        value, gradients = with_gradients(*(jnp.asarray(x, dtype) for x in given))
        assert np.isfinite(value)
        assert all(np.all(np.isfinite(g)) for g in gradients)
    uniform = taylor_softmax.joint_second_moment(zero, zero, zero, order=order)
    np.testing.assert_allclose(uniform, np.full((3, 3), 1 / 9), atol=1e-6)


@pytest.mark.core
@pytest.mark.parametrize("order", [2, 8, None])
def test_derivative_is_that_of_the_moment(order):
    # Positive definite, so that there is room for a step.
    one, cross, two = (jnp.asarray(x) for x in covariances(4, "equicorrelated"))
    theta = jnp.asarray(np.random.default_rng(3).standard_normal((4, 4)))
    present, index = jnp.ones((1, 4)), np.zeros(1, int)
    surrogate, method = parse(order), Direct() if order == 2 else QuasiMonteCarlo(1 << 14)
    inputs = [
        moments.prepare(cov[None], present, surrogate=surrogate, method=method)
        for cov in (one, two)
    ]

    def moment(cov12):
        result, _ = moments.second_moments(
            *inputs, index, index, cov12[None], None, surrogate, method
        )
        return result[0]

    _, derivative = moments.second_moments(
        *inputs, index, index, cross[None], theta[None], surrogate, method
    )
    step = 1e-3
    difference = (moment(cross + step * theta) - moment(cross - step * theta)) / (2 * step)
    # Above order 2 these are two different estimates of one expectation.
    limit = 1e-5 if order == 2 else 2e-2 * np.max(np.abs(difference))
    np.testing.assert_allclose(derivative[0], difference, atol=limit)


@pytest.mark.parametrize("order", [2, None])
def test_batches_and_transformations(order):
    given = [np.stack(each) for each in zip(*(covariances(3, seed=s) for s in (0, 1)), strict=True)]
    function = functools.partial(taylor_softmax.joint_second_moment, order=order)
    batch = function(*given)
    alone = [function(*(x[i] for x in given)) for i in (0, 1)]
    np.testing.assert_allclose(batch, np.stack(alone), atol=1e-12)
    np.testing.assert_allclose(jax.jit(jax.vmap(function))(*given), batch, atol=1e-12)


def test_errors_name_the_argument():
    eye = np.eye(3)
    with pytest.raises(ValueError, match=r"`cov12` \(2, 2\)"):
        taylor_softmax.joint_second_moment(eye, np.eye(2), eye, order=2)
    with pytest.raises(ValueError, match="`n_points` must be at least 1"):
        taylor_softmax.joint_second_moment(eye, eye, eye, method=QuasiMonteCarlo(0))
    with pytest.raises(ValueError, match=r"`method=Direct\(\)` does not apply"):
        taylor_softmax.joint_second_moment(eye, eye, eye, method=Direct())
    with pytest.raises(TypeError, match="`n_points` must be an integer"):
        stax.Softmax(axis=1, method=QuasiMonteCarlo(1.5))
    with pytest.raises(ValueError, match="`order` must be even"):
        taylor_softmax.joint_second_moment(eye, eye, eye, order=3)


# The layer.

SIZE = 6


def network(layer, width=128, end=None):
    return stax.serial(
        stax.Conv(width, (3,), padding="SAME", W_std=1.5, b_std=0.3),
        stax.Relu(),
        stax.Conv(width, (1,), W_std=1.5),
        layer,
        end or stax.GlobalAvgPool(),
    )


def inputs(masked):
    x = np.array(random.normal(random.key(0), (3, SIZE, 4)))
    if masked:
        x[0, 4:] = x[1, 3:] = 100.0
    return jnp.asarray(x[:2]), jnp.asarray(x[2:])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("order", "end"), [(2, "pool"), (None, "flatten")])
def test_kernel_is_that_of_wide_networks(order, end, masked):
    layer = stax.Softmax(axis=1) if order is None else stax.TaylorSoftmax(order, axis=1)
    # The pooled softmax sums to 1: a layer in between gives the pool something to average.
    ends = {
        "pool": stax.serial(stax.Conv(64, (2,)), stax.GlobalAvgPool()),
        "flatten": stax.Flatten(),
    }
    last = stax.serial(ends[end], stax.Dense(1))
    init_fn, apply_fn, kernel_fn = network(layer, end=last)
    x1, x2 = inputs(masked)
    constant = {"mask_constant": 100.0} if masked else {}
    exact = kernel_fn(x1, x2, ("nngp", "ntk"), **constant)

    def sample(key):
        _, params = init_fn(key, x1.shape)

        def f(params, x):
            outputs = apply_fn(params, x, **constant)
            return outputs.masked_value if masked else outputs

        return (
            nt.empirical_nngp_fn(f)(x1, x2, params),
            nt.empirical_ntk_fn(f, vmap_axes=None)(x1, x2, params),
        )

    samples = jax.lax.map(jax.jit(sample), random.split(random.key(1), 100))
    for name, values in zip(("nngp", "ntk"), samples, strict=True):
        value = getattr(exact, name)
        mean, stderr = np.mean(values, 0), np.std(values, 0) / np.sqrt(len(values))
        # Width 128 leaves a bias of order 1/width.
        assert np.all(np.abs(mean - value) < 4.5 * stderr + 0.03 * np.abs(value)), (
            name,
            mean,
            value,
        )


@pytest.mark.core
@pytest.mark.parametrize("order", [2, None])
def test_masked_positions_are_absent(order):
    layer = stax.Softmax(axis=1) if order is None else stax.TaylorSoftmax(order, axis=1)
    _, apply_fn, kernel_fn = stax.serial(stax.Conv(8, (1,)), layer)
    x = np.array(random.normal(random.key(0), (2, SIZE, 3)))
    padded = x.copy()
    padded[:, 4:] = 100.0
    long = kernel_fn(jnp.asarray(padded), None, mask_constant=100.0)
    short = kernel_fn(jnp.asarray(x[:, :4]), None)
    for name in ("nngp", "ntk", "cov1"):
        np.testing.assert_allclose(
            getattr(long, name)[..., :4, :4],
            getattr(short, name),
            atol=1e-12 if order == 2 else 5e-3,
        )
        assert not np.any(getattr(long, name)[..., 4:, :])
        assert not np.any(getattr(long, name)[..., :, 4:])
    _, apply_fn, _ = layer
    outputs = apply_fn((), jnp.asarray(padded), mask_constant=100.0)
    np.testing.assert_allclose(outputs.masked_value[:, :4], apply_fn((), jnp.asarray(x[:, :4])))
    assert not np.any(outputs.masked_value[:, 4:])


def test_axes_of_images():
    x = random.normal(random.key(0), (2, 2, 3, 4))
    body = stax.Conv(8, (1, 1), W_std=1.5)

    def kernel(axis, x):
        return stax.serial(body, stax.TaylorSoftmax(2, axis=axis))[2](x, None, "nngp")

    # Over both axes: the positions of one long axis.
    flat = kernel(1, x.reshape(2, 6, 1, 4)).reshape(2, 2, 2, 3, 2, 3)
    both = kernel((1, 2), x)
    np.testing.assert_allclose(both, flat.transpose(0, 1, 2, 4, 3, 5), atol=1e-12)
    # Over one: rows have softmaxes of their own, so the block of one row is that of it alone.
    rows = kernel(2, x)
    alone = kernel(2, x[:, 1:])
    np.testing.assert_allclose(rows[:, :, 1:, 1:], alone, atol=1e-12)
    np.testing.assert_allclose(np.sum(rows, (-1, -2)), 1, atol=1e-6)
    turned = kernel(1, jnp.swapaxes(x, 1, 2))
    np.testing.assert_allclose(rows, turned.transpose(0, 1, 4, 5, 2, 3), atol=1e-12)


def test_full_batch_covariance_has_the_diagonal():
    x = random.normal(random.key(0), (2, 3, 4))
    _, _, kernel_fn = stax.serial(stax.Conv(8, (1,)), stax.TaylorSoftmax(2, axis=1))
    full, diagonal = (kernel_fn(x, None, ("nngp", "cov1"), diagonal_batch=d) for d in (False, True))
    np.testing.assert_allclose(full.nngp, diagonal.nngp, atol=1e-12)
    np.testing.assert_allclose(full.cov1[[0, 1], [0, 1]], diagonal.cov1, atol=1e-12)


def test_unsupported_axes_say_what_to_use():
    x = random.normal(random.key(0), (2, 3, 4))
    with pytest.raises(NotImplementedError, match="over the channel axis"):
        stax.serial(stax.Conv(8, (1,)), stax.Softmax(axis=(1, 2)))[2](x, None)
    with pytest.raises(NotImplementedError, match="Use `infinite_width=False`"):
        stax.serial(stax.Conv(8, (1,)), stax.Softmax(axis=1, infinite_width=True))[2](x, None)
