"""Softmax over positions against sampling, identities, the class axis and finite networks."""

import functools

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
import pytest
from jax import random

import taylor_softmax
from oracles import position_axis as oracle
from taylor_softmax import stax
from taylor_softmax._numerics import errors
from taylor_softmax._numerics.surrogate import parse
from taylor_softmax._position_axis import closed_form, moments, sampling
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


# Order 2.


SHAPES = ("random", "equicorrelated", "block", "singular")


def batch_of(size, kinds=SHAPES, variance=1.0):
    """The covariances of all `kinds` in one call, which is compiled once."""
    each = [covariances(size, kind, variance) for kind in kinds]
    return tuple(np.stack(covs) for covs in zip(*each, strict=True))


@pytest.mark.parametrize("size", [2, 16, 32])
def test_order_2_sums(size):
    one, cross, two = batch_of(size)
    # With itself every row sums to the mean of that position.
    pairs = (one, one, one), (cross, one, two), (two, two, two)
    of_one, moment, of_two = (
        taylor_softmax.joint_second_moment(left, between, right, order=2)
        for between, left, right in pairs
    )
    np.testing.assert_allclose(np.sum(moment, (1, 2)), 1, atol=1e-6)
    np.testing.assert_allclose(np.sum(moment, 2), np.sum(of_one, 2), atol=1e-6)
    np.testing.assert_allclose(np.sum(moment, 1), np.sum(of_two, 2), atol=1e-6)


@pytest.mark.quick(size=16)
@pytest.mark.parametrize("size", [2, 16, 32])
def test_order_2_against_sampling(size):
    # Two equal positions alone have a constant output, with no standard error.
    given = batch_of(size, SHAPES[:-1] if size == 2 else SHAPES, variance=2.0)
    mean, stderr = taylor_softmax.monte_carlo.joint_second_moment(
        random.key(size), *given, order=2, n_samples=40_000
    )

    def largest_z(value):
        return np.max(np.abs((value - mean) / stderr), (1, 2))

    value = taylor_softmax.joint_second_moment(*given, order=2)
    assert np.all(largest_z(value) < LARGEST_Z)
    # Negative control: another covariance is found.
    wrong = taylor_softmax.joint_second_moment(given[0], 0.5 * given[1], given[2], order=2)
    assert np.all(largest_z(wrong) > LARGEST_Z)


@pytest.mark.parametrize(("size", "dtype"), [(2, jnp.float64), (10, jnp.float32)])
def test_order_2_of_independent_positions_is_the_class_kernel(size, dtype):
    a, c, b = 2.0, 1.1, 0.7
    covs = (jnp.asarray(x * np.eye(size), dtype) for x in (a, c, b))
    moment = taylor_softmax.joint_second_moment(*covs, order=2)
    covariance = taylor_softmax.class_covariance(a, c, b, n_classes=size, order=2, method=Direct())
    expected = 1 / size**2 + covariance * (np.eye(size) - 1 / size)
    np.testing.assert_allclose(moment, expected, atol=1e-7 if dtype == jnp.float64 else 1e-5)


@pytest.mark.quick(variance=1e4, dtype=jnp.float32)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("variance", [4.0, 100.0, 1e4])
def test_order_2_of_proportional_positions_against_quadrature(variance, dtype):
    """Logits `xi w` and `eta w'`: two dimensions, whatever the number of positions."""
    w1, w2, rho = np.array([1.0, 0.999, -0.4]), np.array([0.95, 1.0, 0.7]), 0.9
    x = np.linspace(-7.5, 7.5, 5001)
    weight = np.exp(-(x**2) / 2) / np.sum(np.exp(-(x**2) / 2))

    def outputs(xi, w):
        z = np.sqrt(variance) * xi[..., None] * w
        f = 1 + z + z**2 / 2
        return f / np.sum(f, -1, keepdims=True)

    truth = np.zeros((3, 3))
    for each, share in zip(np.array_split(x, 50), np.array_split(weight, 50), strict=True):
        given = outputs(rho * each[:, None] + np.sqrt(1 - rho**2) * x, w2)
        truth += np.einsum("x,xi,xzj,z->ij", share, outputs(each, w1), given, weight, optimize=True)
    of = (np.outer(w1, w1), rho * np.outer(w1, w2), np.outer(w2, w2))
    covs = [jnp.asarray(variance * each, dtype) for each in of]
    moment = taylor_softmax.joint_second_moment(*covs, order=2)
    limit = errors.promised(errors.POSITIONS_CLOSED_FORM, variance, dtype)
    assert np.max(np.abs(moment - truth)) < limit * np.max(truth)
    # Negative control: positions in another order are found.
    wrong = taylor_softmax.joint_second_moment(
        covs[0], covs[1][:, ::-1], covs[2][::-1, ::-1], order=2
    )
    assert np.max(np.abs(wrong - truth)) > limit * np.max(truth)


# Other orders and softmax.


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
    covariance = taylor_softmax.class_covariance(
        1.0, 0.6, 0.5, n_classes=size, order=None, method=Direct()
    )
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


# A common part is a large variance where a shift matters.
WITHOUT_COMMON_PART = [kind for kind in oracle.KINDS if kind != "common part"]


def both_moments(of, order, dtype=jnp.float64):
    """NNGP and NTK of one pair, as the layer computes them."""
    surrogate = parse(order)
    method = moments.check_method(None, surrogate)
    cov11, cov12, cov22, theta = (jnp.asarray(x, dtype)[None] for x in of)
    present, index = jnp.ones(cov11.shape[:2], dtype), np.zeros(1, int)
    one, two = (
        moments.prepare(cov, present, surrogate=surrogate, method=method) for cov in (cov11, cov22)
    )
    results = moments.second_moments(one, two, index, index, cov12, theta, surrogate, method)
    return [np.asarray(x[0]) for x in (results.value, results.slope)]


@pytest.mark.quick(order=None, kind="common part")
@pytest.mark.parametrize(
    ("order", "size", "variance", "kind"),
    [
        *((2, 4, 4.0, kind) for kind in WITHOUT_COMMON_PART),
        *((8, 5, 1.0, kind) for kind in WITHOUT_COMMON_PART),
        *((None, 8, 4.0, kind) for kind in oracle.KINDS),
    ],
)
def test_nngp_and_ntk_against_sampling(order, size, variance, kind):
    of = oracle.problem(size, kind, variance, rho=-0.9 if size == 5 else 0.95)
    quantities = (
        (errors.POSITIONS_CLOSED_FORM,) * 2
        if order == 2
        else (errors.POSITIONS_NNGP, errors.POSITIONS_NTK)
    )
    wrong = of._replace(cov12=0.5 * of.cov12, theta=0.5 * of.theta)
    for got, far, (mean, stderr), quantity in zip(
        both_moments(of, order),
        both_moments(wrong, order),
        oracle.sample(of, order=order, n_samples=100_000),
        quantities,
        strict=True,
    ):
        limit = errors.promised(quantity, variance) * np.max(np.abs(mean)) + 5 * stderr + 1e-12
        assert np.all(np.abs(got - mean) < limit)
        # Negative control: another correlation is found.
        assert not np.all(np.abs(far - mean) < limit)


@jax.jit
def each_way(present, cov11, cross, cov22, theta):
    """Value and slope at order 2, the value alone, and both by the recursion."""
    one, two = (closed_form.diagonalise(cov, present) for cov in (cov11, cov22))
    plainly = functools.partial(closed_form._sequential, one, two)
    return (
        closed_form.moment_and_slope(one, two, cross, theta),
        closed_form.second_moment(one, two, cross),
        jax.jvp(plainly, (cross,), (theta,)),
    )


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_order_2_in_eigenbases_is_the_plain_recursion(kind):
    of = oracle.problem(5, kind, 2.0)
    present = jnp.asarray([1.0, 1, 0, 1, 1])
    cov11, cross, cov22, theta = (jnp.asarray(x) * present[:, None] * present for x in of)
    got, alone, want = each_way(present, cov11, cross, cov22, theta)
    for value, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-12)
    np.testing.assert_allclose(alone, want[0], atol=1e-12)


@pytest.mark.quick(order=None)
@pytest.mark.parametrize("order", [2, None])
def test_derivatives_are_those_of_the_moment(order):
    # Positive definite, so that there is room for a step.
    covs = [jnp.asarray(x) for x in covariances(4, "equicorrelated")]
    rng = np.random.default_rng(3)
    direction = [jnp.asarray(x + x.T) for x in rng.standard_normal((3, 4, 4))]
    # Of a cross-covariance any.
    direction[1] = jnp.triu(direction[1])
    function = functools.partial(taylor_softmax.joint_second_moment, order=order)
    _, got = jax.jvp(function, tuple(covs), tuple(direction))
    step = 1e-3

    def at(*covs):
        # Differences of estimates are no estimates of the difference: axes of equal variances turn.
        if order == 2:
            return function(*covs)
        return oracle.quadrature(oracle.Problem(*covs, covs[1]), 8)[0]

    ahead, behind = (
        at(*(x + sign * step * d for x, d in zip(covs, direction, strict=True))) for sign in (1, -1)
    )
    want = (ahead - behind) / (2 * step)
    limit = 1e-5 if order == 2 else 5e-3 * np.max(np.abs(want))
    np.testing.assert_allclose(got, want, atol=limit)
    # The NTK is the derivative in the cross-covariance.
    still = jnp.zeros((4, 4))
    _, along = jax.jvp(function, tuple(covs), (still, direction[1], still))
    of = oracle.Problem(*covs, direction[1])
    np.testing.assert_allclose(both_moments(of, order)[1], along, atol=limit)


# Rounding.


def test_two_positions_that_hardly_differ():
    logits = np.array([10, 10.001])
    cov = np.outer(logits, logits)
    moment = taylor_softmax.joint_second_moment(cov, cov, cov)
    np.testing.assert_allclose(moment - 0.25, 1e-6 / 16 * np.array([[1, -1], [-1, 1]]), atol=1e-11)


@pytest.mark.parametrize("size", [3, 28])
def test_a_common_part_that_rounding_exceeds(size):
    """Covariances rounded to float32, used in either precision, against what they were."""
    of, plain = (oracle.problem(size, kind, rho=0.9) for kind in ("common part", "random"))
    # Their eigenvalues are off by what rounding takes off 1e4.
    rounding = np.finfo(np.float32).eps * 1e4 * np.sqrt(size)
    exact = both_moments(plain, None)
    rounded = oracle.Problem(*(np.float32(x) for x in of))
    for dtype in (jnp.float32, jnp.float64):
        for got, want in zip(both_moments(rounded, None, dtype), exact, strict=True):
            np.testing.assert_allclose(got, want, atol=10 * rounding * np.max(np.abs(want)))


def test_points_have_the_covariances_that_they_should():
    """Also where `K12` contradicts `K11` and `K22`; a plain conditional covariance would not."""
    of = oracle.problem(6, "singular", rho=0.9)
    noise = np.random.default_rng(0).standard_normal((3, 6, 6)) * 1e-4
    noise = noise + noise.transpose(0, 2, 1)
    cov11, cov12, cov22 = (jnp.asarray(x + e) for x, e in zip(of[:3], noise, strict=True))
    one, two = (sampling.psd_root(cov, sampling.rounding(cov)) for cov in (cov11, cov22))
    slope, rest = sampling.correlate(one, two, cov12)
    kept = two.root @ two.root.T
    np.testing.assert_allclose(slope.T @ slope + rest @ rest.T, kept, atol=1e-12)
    np.testing.assert_allclose(one.root @ slope, cov12, atol=1e-3)
    # Negative control: what the plain conditional covariance leaves has no root.
    plain = one.inverse @ cov12
    assert np.linalg.eigvalsh(kept - plain.T @ plain)[0] < -1e-5


@pytest.mark.parametrize("order", [2, None])
def test_users_cases_in_float32_are_finite(order):
    pixels = random.uniform(random.key(0), (2, 28, 1), jnp.float32)
    nearly_constant = 5 + 1e-4 * pixels
    method = None if order == 2 else QuasiMonteCarlo(256)
    layer = stax.TaylorSoftmax(order, axis=1, method=method)
    for x, b_std, depth in ((pixels, 0.0, 0), (nearly_constant, 30.0, 0), (pixels, 4.0, 12)):
        body = [stax.Conv(1, (1,), b_std=b_std), stax.Relu()] * depth
        kernel_fn = stax.serial(*body, stax.Conv(1, (1,), b_std=b_std), layer)[2]
        kernel = kernel_fn(x, None)
        for name in ("nngp", "ntk", "cov1"):
            assert np.all(np.isfinite(getattr(kernel, name))), (name, b_std, depth)
        np.testing.assert_allclose(np.sum(kernel.nngp, (-1, -2)), 1, atol=1e-3)


@pytest.mark.parametrize(
    ("order", "kind"),
    [pytest.param(2, "singular", marks=pytest.mark.slow), (None, "common part")],
)
def test_128_positions(order, kind):
    """Beyond what errors are promised for: finite, with gradients, and sums of 1."""
    given = [jnp.asarray(x, jnp.float32) for x in oracle.problem(128, kind)[:3]]
    method = None if order == 2 else QuasiMonteCarlo(64)

    def corner(*given):
        moment = taylor_softmax.joint_second_moment(*given, order=order, method=method)
        return moment[0, 1], moment

    gradients, moment = jax.jit(jax.grad(corner, (0, 1, 2), has_aux=True))(*given)
    np.testing.assert_allclose(np.sum(moment), 1, atol=1e-3)
    for each in (moment, *gradients):
        assert np.all(np.isfinite(each))


def test_large_variances_of_taylor_softmax_stay_between_0_and_1():
    of = oracle.problem(3, "common part")
    moment, _ = both_moments(of, 8)
    np.testing.assert_allclose(np.sum(moment), 1, atol=1e-6)
    assert np.min(moment) > 0.05


@pytest.mark.parametrize("order", [2, None])
def test_batches_and_transformations(order):
    given = [np.stack(each) for each in zip(*(covariances(3, seed=s) for s in (0, 1)), strict=True)]
    function = functools.partial(taylor_softmax.joint_second_moment, order=order)
    batch = function(*given)
    alone = [function(*(x[i] for x in given)) for i in (0, 1)]
    np.testing.assert_allclose(batch, np.stack(alone), atol=1e-12)
    np.testing.assert_allclose(jax.jit(jax.vmap(function))(*given), batch, atol=1e-12)


@pytest.mark.quick
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
    for given, error, message in (
        ({"seed": -1}, ValueError, "`seed` must be at least 0"),
        ({"seed": 0.5}, TypeError, "`seed` must be an integer"),
        ({"error": 0.0}, ValueError, "`error` must be positive"),
        ({"error": np.nan}, ValueError, "`error` must be positive and finite"),
        ({"error": "little"}, TypeError, "`error` must be a positive number"),
    ):
        with pytest.raises(error, match=message):
            QuasiMonteCarlo(64, **given)
    with pytest.raises(ValueError, match="`order` must be even"):
        taylor_softmax.joint_second_moment(eye, eye, eye, order=3)


# The layer.

SIZE = 6


def network(order, spatial, end, width=128):
    """With a softmax over all the `spatial` axes, of these sizes."""

    def window(size):
        return tuple(min(size, n) for n in spatial)

    # The pooled softmax sums to 1: a layer in between gives the pool something to average.
    ends = {
        "pool": stax.serial(stax.Conv(64, window(2)), stax.GlobalAvgPool()),
        "flatten": stax.Flatten(),
    }
    return stax.serial(
        stax.Conv(width, window(3), padding="SAME", W_std=1.5, b_std=0.3),
        stax.Relu(),
        stax.Conv(width, window(1), W_std=1.5),
        stax.TaylorSoftmax(order, axis=tuple(range(1, 1 + len(spatial)))),
        ends[end],
        stax.Dense(1),
    )


def inputs(spatial, padding=None):
    x = np.array(random.normal(random.key(0), (3, SIZE, 4)))
    if padding is not None:
        x[0, 4:] = x[1, 3:] = padding
    x = jnp.asarray(x.reshape(3, *spatial, 4))
    return x[:2], x[2:]


@pytest.mark.quick(order=None, end="flatten")
@pytest.mark.parametrize(
    ("order", "end", "spatial", "masked"),
    [
        (2, "pool", (SIZE,), False),
        (None, "flatten", (SIZE,), True),
        (2, "flatten", (1, SIZE), True),
        (None, "pool", (SIZE, 1), True),
    ],
)
def test_kernel_is_that_of_wide_networks(order, end, spatial, masked):
    init_fn, apply_fn, kernel_fn = network(order, spatial, end)
    x1, x2 = inputs(spatial, 100.0 if masked else None)
    constant = {"mask_constant": 100.0} if masked else {}

    @jax.jit
    def sample(key):
        _, params = init_fn(key, x1.shape)

        def f(params, x):
            outputs = apply_fn(params, x, **constant)
            return outputs.masked_value if masked else outputs

        return (
            nt.empirical_nngp_fn(f)(x1, x2, params),
            nt.empirical_ntk_fn(f, vmap_axes=None)(x1, x2, params),
        )

    samples = jax.lax.map(sample, random.split(random.key(1), 100))
    statistics = [(np.mean(x, 0), np.std(x, 0) / np.sqrt(len(x))) for x in samples]

    def agrees(kernel):
        # Width 128 leaves a bias of order 1/width.
        return [
            np.all(np.abs(mean - value) < 4.5 * stderr + 0.03 * np.abs(value))
            for value, (mean, stderr) in zip((kernel.nngp, kernel.ntk), statistics, strict=True)
        ]

    assert all(agrees(kernel_fn(x1, x2, ("nngp", "ntk"), **constant)))
    if masked:
        # Negative control: with ones in the place of what is masked.
        assert not all(agrees(kernel_fn(*inputs(spatial, 1.0), ("nngp", "ntk"))))


@pytest.mark.quick(order=2)
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
    # Over one: rows have softmaxes of their own, so that the block of one row is blind to others.
    rows = kernel(2, x)
    others = kernel(2, x.at[:, :1].multiply(3.0))
    np.testing.assert_allclose(rows[:, :, 1:, 1:], others[:, :, 1:, 1:], atol=1e-12)
    assert np.max(np.abs(rows - others)) > 1e-3
    np.testing.assert_allclose(np.sum(rows, (-1, -2)), 1, atol=1e-6)
    turned = kernel(1, jnp.swapaxes(x, 1, 2))
    np.testing.assert_allclose(rows, turned.transpose(0, 1, 4, 5, 2, 3), atol=1e-12)


@pytest.mark.parametrize("order", [2, None])
def test_inputs_of_different_lengths(order):
    """`x2` may be shorter: the kernel is that of `x2` padded to the same length."""
    method = None if order == 2 else QuasiMonteCarlo(1 << 12)
    layer = stax.TaylorSoftmax(order, axis=1, method=method)
    kernel_fn = stax.serial(stax.Conv(8, (1,), b_std=0.5), layer)[2]
    x1 = np.array(random.normal(random.key(0), (2, 5, 3)))
    x2 = np.array(random.normal(random.key(1), (3, 3, 3)))
    padded = np.concatenate([x2, np.full((3, 2, 3), 100.0)], 1)
    kernel = kernel_fn(x1, x2, ("nngp", "ntk", "cov2"))
    long = kernel_fn(x1, padded, ("nngp", "ntk", "cov2"), mask_constant=100.0)
    tolerance = 1e-10 if order == 2 else 3e-3
    assert kernel.nngp.shape == (2, 3, 5, 3)
    np.testing.assert_allclose(kernel.nngp, long.nngp[..., :3], atol=tolerance)
    np.testing.assert_allclose(kernel.ntk, long.ntk[..., :3], atol=tolerance)
    np.testing.assert_allclose(kernel.cov2, long.cov2[..., :3, :3], atol=tolerance)
    # The longer ones second, and no inputs at all.
    swapped = kernel_fn(x2, x1, ("nngp", "ntk"))
    for name in ("nngp", "ntk"):
        want = np.transpose(getattr(kernel, name), (1, 0, 3, 2))
        np.testing.assert_allclose(getattr(swapped, name), want, atol=tolerance)
    for first, second in ((x1, x2[:0]), (x1[:0], x2)):
        empty = kernel_fn(first, second, ("nngp", "ntk"))
        assert empty.nngp.shape == empty.ntk.shape == (len(first), len(second), 5, 3)


def test_order_2_has_derivatives_at_different_lengths():
    of = oracle.problem(5, rho=0.5)
    given = [jnp.asarray(x) for x in (of.cov11, of.cov12[:, :3], of.cov22[:3, :3], of.theta[:, :3])]
    present = jnp.ones(5), jnp.ones(3)
    surrogate, method = parse(2), Direct()

    def both(cov11, cov12, cov22, theta):
        one, two = (
            moments.prepare(cov[None], here[None], surrogate=surrogate, method=method)
            for cov, here in ((cov11, present[0]), (cov22, present[1]))
        )
        index = np.zeros(1, int)
        return moments.second_moments(
            one, two, index, index, cov12[None], theta[None], surrogate, method
        )[:2]

    step = 1e-5
    _, got = jax.jvp(both, tuple(given), tuple(given))
    ahead, behind = (both(*((1 + sign * step) * x for x in given)) for sign in (1, -1))
    for slope, plus, minus in zip(got, ahead, behind, strict=True):
        np.testing.assert_allclose(slope, (plus - minus) / (2 * step), atol=1e-8)


def test_images_of_different_shapes():
    """The layout of neural_tangents: `(..., H1, H2, W1, W2)`."""
    x1, x2 = (
        random.normal(random.key(i), (2, *shape, 4)) for i, shape in ((0, (2, 3)), (1, (3, 1)))
    )
    body = stax.Conv(8, (1, 1), W_std=1.5)

    def kernel(axis, x1, x2):
        return stax.serial(body, stax.TaylorSoftmax(2, axis=axis))[2](x1, x2, ("nngp", "ntk"))

    both, flat = kernel((1, 2), x1, x2), kernel(1, x1.reshape(2, 6, 1, 4), x2)
    for got, want in ((both.nngp, flat.nngp), (both.ntk, flat.ntk)):
        assert got.shape == (2, 2, 2, 3, 3, 1)
        want = want.reshape(2, 2, 2, 3, 3, 1).transpose(0, 1, 2, 4, 3, 5)
        np.testing.assert_allclose(got, want, atol=1e-12)
    # Over one axis: each row has the kernel that it has alone.
    rows = kernel(1, x1, x2)
    assert rows.nngp.shape == both.nngp.shape
    for i in range(3):
        alone = kernel(1, x1[:, :, i : i + 1], x2)
        np.testing.assert_allclose(rows.nngp[:, :, :, :, i], alone.nngp[:, :, :, :, 0], atol=1e-12)


def test_full_batch_covariance_has_the_diagonal():
    x = random.normal(random.key(0), (2, 3, 4))
    _, _, kernel_fn = stax.serial(stax.Conv(8, (1,)), stax.TaylorSoftmax(2, axis=1))
    full, diagonal = (kernel_fn(x, None, ("nngp", "cov1"), diagonal_batch=d) for d in (False, True))
    np.testing.assert_allclose(full.nngp, diagonal.nngp, atol=1e-12)
    np.testing.assert_allclose(full.cov1[[0, 1], [0, 1]], diagonal.cov1, atol=1e-12)


@pytest.mark.quick
def test_unsupported_axes_say_what_to_use():
    x = random.normal(random.key(0), (2, 3, 4))
    with pytest.raises(NotImplementedError, match="over the channel axis"):
        stax.serial(stax.Conv(8, (1,)), stax.Softmax(axis=(1, 2)))[2](x, None)
    with pytest.raises(NotImplementedError, match="Use `infinite_width=False`"):
        stax.serial(stax.Conv(8, (1,)), stax.Softmax(axis=1, infinite_width=True))[2](x, None)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((2, 1, 6, 3), (1, 2)), ((2, 6, 1, 3), (1, 2)), ((2, 6, 1, 3), 1), ((2, 6, 3), (1, 2))],
)
def test_masked_positions_leave_the_sum_for_every_set_of_axes(shape, axis):
    along = shape.index(6)
    x = np.array(random.normal(random.key(1), shape))
    short = np.take(x, range(4), along)
    padded = x.copy()
    np.moveaxis(padded, along, 0)[4:] = 100.0
    init_fn, apply_fn, _ = stax.serial(
        stax.Conv(4, (1,) * (len(shape) - 2)), stax.Softmax(axis=axis)
    )
    _, params = init_fn(random.key(0), shape)
    outputs = apply_fn(params, jnp.asarray(padded), mask_constant=100.0).masked_value
    expected = apply_fn(params, jnp.asarray(short))
    np.testing.assert_allclose(np.take(outputs, range(4), along), expected, atol=1e-12)


def test_fully_masked_rows_are_finite():
    x = jnp.full((2, 6, 3), 100.0).at[1, :3].set(0.5)
    net = stax.serial(stax.Conv(4, (1,)), stax.Softmax(axis=1, method=QuasiMonteCarlo(64)))
    _, params = net[0](random.key(0), x.shape)
    assert np.all(np.isfinite(net[1](params, x, mask_constant=100.0).masked_value))
    kernel = net[2](x, None, mask_constant=100.0)
    assert np.all(np.isfinite(kernel.nngp))
    assert np.all(np.isfinite(kernel.ntk))


def test_channels_first():
    x = random.normal(random.key(0), (2, 3, 2, 4))
    numbers = ("NCHW", "OIHW", "NCHW")
    layer = stax.TaylorSoftmax(2, axis=-1)
    first = stax.serial(stax.Conv(8, (1, 1), dimension_numbers=numbers), layer)[2]
    last = stax.serial(stax.Conv(8, (1, 1)), stax.TaylorSoftmax(2, axis=2))[2]
    np.testing.assert_allclose(
        first(x, None, "nngp"), last(jnp.moveaxis(x, 1, -1), None, "nngp"), atol=1e-12
    )
    # Where nothing behind needs positions, those before leave them out.
    flat = stax.serial(
        stax.Conv(8, (1, 1), dimension_numbers=numbers), layer, stax.Flatten(), stax.Dense(1)
    )[2]
    with pytest.raises(ValueError, match="Write `axis=3`"):
        flat(x, None)
