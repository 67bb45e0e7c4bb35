"""Estimates over positions: their errors, the errors that they report, and their derivatives.

Of i.i.d. positions the class axis has everything exactly; softmax does not see a part that is
common to all positions, which makes equicorrelated ones of them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

import taylor_softmax
from oracles import position_axis as oracle
from taylor_softmax import monte_carlo, stax
from taylor_softmax._numerics import errors
from taylor_softmax._numerics.surrogate import parse
from taylor_softmax._position_axis import derivatives, estimate, moments, sampling
from taylor_softmax.methods import QuasiMonteCarlo

VARIANCES = (0.1, 0.25, 1.0, 4.0, 20.0, 100.0)
CORRELATIONS = (1.0, 0.95, 0.5, 0.0, -0.5, -1.0)


class Problems:
    """Pairs of inputs of `size` i.i.d. positions: equal and unequal variances, all correlations."""

    def __init__(self, size, variances=VARIANCES):
        n = len(variances)
        first, step, correlation = (
            x.ravel() for x in np.meshgrid(range(n), (0, 1), CORRELATIONS, indexing="ij")
        )
        self.first, self.second = first.astype(int), (first + step).astype(int) % n
        self.size, self.variances = size, np.array(variances)
        self.var1, self.var2 = self.variances[self.first], self.variances[self.second]
        self.scale = np.sqrt(self.var1 * self.var2)
        self.cov = correlation * self.scale
        self.largest = np.maximum(self.var1, self.var2)

    def class_axis(self, derivative):
        """A derivative in `(a, c, b)` of the covariance of classes, at each pair and its inputs."""

        def of(a, c, b):
            return taylor_softmax.class_covariance(a, c, b, n_classes=self.size)

        of = functools.reduce(lambda f, i: jax.grad(f, i), derivative, of)
        v = self.variances
        at, own = jax.vmap(of)(self.var1, self.cov, self.var2), jax.vmap(of)(v, v, v)
        return np.asarray(at), np.asarray(own)

    def expected(self, derivative):
        """The matrix that belongs to such a derivative, and its scale."""
        at, own = self.class_axis(derivative)
        own = own * (1 - 1 / self.size)
        matrix = at[:, None, None] * (np.eye(self.size) - 1 / self.size)
        if not derivative:
            matrix, own = matrix + 1 / self.size**2, own + 1 / self.size**2
        own = np.abs(own)
        return matrix, np.sqrt(own[self.first] * own[self.second])

    def estimates(self, method, shift=(0.0, 0.0, 0.0)):
        """`Moments` with `Theta = scale Id`, at covariances moved by `shift` times the identity."""
        eye, surrogate = np.eye(self.size), parse(None)

        def prepared(move):
            # A part common to all positions.
            covs = (self.variances[:, None, None] + move) * eye + 0.7
            present = jnp.ones((len(covs), self.size))
            return moments.prepare(jnp.asarray(covs), present, surrogate=surrogate, method=method)

        cov12 = jnp.asarray((self.cov[:, None, None] + shift[1]) * eye + 0.7)
        theta = jnp.asarray(self.scale[:, None, None] * eye)
        return moments.second_moments(
            prepared(shift[0]),
            prepared(shift[2]),
            self.first,
            self.second,
            cov12,
            theta,
            surrogate,
            method,
        )


def relative(got, want, scale):
    return np.max(np.abs(got - want), (1, 2)) / scale


SIZES = [
    pytest.param(5, marks=pytest.mark.quick),
    16,
    *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 3, 33, 64)),
]


@pytest.mark.parametrize("size", SIZES)
def test_errors_are_as_promised_and_as_reported(size):
    of = Problems(size)
    got = of.estimates(QuasiMonteCarlo())
    quantities = errors.POSITIONS_NNGP, errors.POSITIONS_NTK
    if size > 16:
        quantities = errors.POSITIONS_MANY_NNGP, errors.POSITIONS_MANY_NTK
    for column, (value, derivative, factor, quantity) in enumerate(
        zip((got.value, got.slope), ((), (1,)), (1, of.scale), quantities, strict=True)
    ):
        matrix, scale = of.expected(derivative)
        factor = np.broadcast_to(factor, of.cov.shape)
        error = relative(value, factor[:, None, None] * matrix, factor * scale)
        limits = [errors.promised(quantity, v) for v in of.largest]
        assert np.all(error < limits), (quantity, error / limits)
        # Reported is twice the largest standard error, more of few scramblings. Few pairs are off
        # by more than three, and most by more than a tenth.
        ratio = 2 * error / np.maximum(got.error[:, column], 1e-9)
        assert np.mean(ratio > 3) < 0.05, (quantity, ratio)
        assert np.median(ratio) > 0.3, (quantity, ratio)


@pytest.mark.parametrize("size", [3, pytest.param(16, marks=pytest.mark.slow)])
def test_derivatives_are_those_of_what_is_estimated(size):
    """At all correlations, 1 too, where those of an estimate are off by tens of per cent."""
    of = Problems(size, (0.25, 1.0, 4.0, 20.0))
    method = QuasiMonteCarlo()
    jacobian = jax.jacfwd(lambda shift: of.estimates(method, shift)[:2])(jnp.zeros(3))
    # Derivatives in K11, K12, K22 are in the unit of that in K12 at correlation 1.
    quantities = errors.POSITIONS_NNGP, errors.POSITIONS_NTK
    for i, quantity in enumerate(quantities):
        below, factor = ((1,),) * i, of.scale**i
        _, scale = of.expected((1, *(1,) * i))
        for argument in (0, 1, 2):
            matrix, _ = of.expected((*(1,) * i, argument))
            got = jacobian[i][..., argument]
            error = relative(got, factor[:, None, None] * matrix, factor * scale)
            limit = [3 * errors.promised(quantity, v) for v in of.largest]
            assert np.all(error < limit), (quantity, argument, below, error / limit)


@pytest.mark.quick
def test_derivatives_along_any_direction():
    """Of NNGP and NTK in each covariance, against differences of quadrature; 3 positions."""
    of, rng = oracle.problem(3, rho=0.5), np.random.default_rng(0)
    along = rng.standard_normal((3, 3, 3))
    along[[0, 2]] += np.swapaxes(along[[0, 2]], 1, 2)
    surrogate, method, index = parse(None), QuasiMonteCarlo(4096), np.zeros(1, int)

    def estimated(*covs):
        one, two = (
            moments.prepare(cov[None], jnp.ones((1, 3)), surrogate=surrogate, method=method)
            for cov in (covs[0], covs[2])
        )
        theta = jnp.asarray(of.theta)[None]
        of_pair = moments.second_moments(
            one, two, index, index, covs[1][None], theta, surrogate, method
        )
        return jnp.concatenate([of_pair.value, of_pair.slope])

    @jax.jit
    def derivatives_along(directions):
        covs = tuple(jnp.asarray(x) for x in of[:3])
        return jax.vmap(lambda *d: jax.jvp(estimated, covs, d)[1])(*directions)

    each = np.eye(3)[:, :, None, None] * along
    got = derivatives_along(tuple(jnp.asarray(x) for x in np.swapaxes(each, 0, 1)))
    step, scale = 1e-3, np.max(oracle.quadrature(of, 8), (1, 2))

    def error(got, directions):
        ahead, behind = (
            oracle.quadrature(oracle.Problem(*(np.array(of[:3]) + x), of.theta), 16)
            for x in (step * directions, -step * directions)
        )
        return np.max(np.abs(got - (ahead - behind) / (2 * step)), (1, 2)) / scale

    for i in range(3):
        assert np.all(error(got[i], each[i]) < 5e-3), (i, error(got[i], each[i]))
    # Negative control: the transposed direction is another.
    assert np.all(error(got[1], np.swapaxes(each[1], 1, 2)) > 5e-3)


@pytest.mark.parametrize("order", [4, None])
def test_products_of_derivatives_against_plain_ones(order):
    """At points, with arrays of three axes by `jax.jacfwd`, and other sizes of the two inputs."""
    surrogate, rng = parse(order), np.random.default_rng(0)
    size, other, n = 4, 3, 2
    u, v = (jnp.asarray(rng.standard_normal((k, n))) for k in (size, other))
    theta, cross = jnp.asarray(rng.standard_normal((2, size, other)))
    own = jnp.asarray(rng.standard_normal((size, size)))
    jacobian = jax.jacfwd(surrogate.softmax)

    def ntk(u, v):
        return jacobian(u) @ theta @ jacobian(v).T

    @functools.partial(jax.vmap, in_axes=1)
    def plainly(u, v):
        crossed = jax.jacfwd(jax.jacfwd(ntk, 0), 1)(u, v)
        curved = jax.jacfwd(jax.jacfwd(ntk, 0), 0)(u, v)
        second = jnp.einsum("ijk,jk->i", jax.jacfwd(jacobian)(u), own)
        return (
            jnp.einsum("pqjk,jk->pq", crossed, cross),
            jnp.einsum("pqjk,jk->pq", curved, own),
            second,
        )

    at_one, at_two = (
        functools.partial(sampling.outputs_at, present=jnp.ones(k), surrogate=surrogate)
        for k in (size, other)
    )
    crossed, curved, second = plainly(u, v)
    got = derivatives.cross_jacobian_product(at_one(u), at_two(v), theta, cross)
    np.testing.assert_allclose(got, jnp.mean(crossed, 0), atol=1e-13)
    got = derivatives.curved_jacobian_product(at_one, u, at_two(v), own, theta)
    np.testing.assert_allclose(got, jnp.mean(curved, 0), atol=1e-13)
    np.testing.assert_allclose(derivatives.curved(at_one(u), own), second.T, atol=1e-13)


def small(method=None):
    of = oracle.problem(3, rho=0.5)
    method = method or QuasiMonteCarlo(64)

    def function(*covs):
        return taylor_softmax.joint_second_moment(*covs, method=method)

    return function, tuple(jnp.asarray(x) for x in of[:3])


def test_reverse_mode_is_the_transpose_of_forward_mode():
    function, given = small()
    rng = np.random.default_rng(0)
    *tangents, cotangent = (jnp.asarray(x) for x in rng.standard_normal((4, 3, 3)))
    _, forward = jax.jvp(function, given, tuple(tangents))
    _, transpose = jax.vjp(function, *given)
    backward = sum(jnp.sum(x * y) for x, y in zip(transpose(cotangent), tangents, strict=True))
    np.testing.assert_allclose(backward, jnp.sum(cotangent * forward), rtol=1e-12)

    def total(*given):
        return jnp.sum(cotangent * function(*given))

    # A second derivative is none of an estimate of the first, in whatever is derived by.
    for argument in (0, 1):
        for second in (jax.jacfwd(jax.grad(total, argument)), jax.jacrev(jax.grad(total, 0))):
            with pytest.raises(NotImplementedError, match="Second derivatives of estimates"):
                second(*given)


def test_scramblings_end_where_the_error_is_reached():
    noise = jnp.asarray(np.random.default_rng(0).standard_normal(64))
    points = noise.reshape(64, 1, 1, 1)

    def drawn(limit, error):
        budget = estimate.Budget(1, limit, seed=0, error=error, by_need=False)
        of_points = functools.partial(estimate.average, lambda z: 1 + z[0], points, budget)
        mean, stderr, n = of_points(jnp.ones(()), lambda state: state.stderr().ravel())
        return float(mean.item()), float(stderr.item()), n

    mean, stderr, n = drawn(64, None)
    assert n == 64
    np.testing.assert_allclose(mean, 1 + np.mean(noise))
    np.testing.assert_allclose(stderr, np.std(noise, ddof=1) / 8)
    assert drawn(5, None)[2] == 5
    # What is reached is nine tenths of what is asked for.
    _, stderr, n = drawn(64, 0.14)
    assert 4 < n < 64
    assert stderr <= 0.9 * 0.14
    # No fewer than four, and no more than there are.
    assert drawn(64, 1e3)[2] == 4
    assert drawn(64, 1e-9)[2] == 64


def test_asking_for_an_error_reaches_it():
    of = Problems(5, (1.0, 4.0))
    loose, tight = (of.estimates(QuasiMonteCarlo(error=error)) for error in (1e-2, 2e-3))
    for got, limit in ((loose, 1e-2), (tight, 2e-3)):
        assert np.all(got.error <= limit)
        # What is reported is not exceeded in 19 cases of 20, and then not by much.
        matrix, scale = of.expected(())
        of_value = relative(got.value, matrix, scale) / limit
        matrix, scale = of.expected((1,))
        of_slope = relative(got.slope / of.scale[:, None, None], matrix, scale) / limit
        assert np.all(np.mean([of_value, of_slope], 1) < 0.6)
        assert np.mean([of_value > 1, of_slope > 1]) < 0.05
        assert np.max([of_value, of_slope]) < 1.5
    assert np.median(loose.error) > np.median(tight.error)


def test_seeds_are_independent_estimates():
    function, given = small()
    other, _ = small(QuasiMonteCarlo(64, seed=1))
    assert np.max(np.abs(function(*given) - other(*given))) > 1e-6
    np.testing.assert_array_equal(function(*given), small()[0](*given))


def test_what_is_not_reached_warns_where_it_is_known():
    function, given = small(QuasiMonteCarlo(64, error=1e-7))
    with pytest.warns(UserWarning, match=r"`error=1e-07` is not reached. `method=.*error=1e-07"):
        function(*given)
    # Traced values are not known; whoever names a number of points gets them.
    jax.jit(function)(*given)
    small()[0](*given)
    x = 20 * random.normal(random.key(0), (1, 16, 64))
    layer = stax.serial(stax.Conv(1, (1,)), stax.Softmax(axis=1))[2]
    with pytest.warns(UserWarning, match="estimated error of the NNGP is .* relative to its scale"):
        layer(x, None, "nngp")


def test_replicates_tell_the_error_of_a_kernel():
    size, variance = 4, 2.0
    x = np.sqrt(size * variance) * np.eye(size)[None]

    def network(seed):
        method = QuasiMonteCarlo(64, seed=seed)
        return stax.serial(stax.Conv(1, (1,)), stax.Softmax(axis=1, method=method))

    nngp, ntk = monte_carlo.replicate(network, x, None, ("nngp", "ntk"), n_replicates=6)
    covariance = taylor_softmax.class_covariance(variance, variance, variance, n_classes=size)
    want = 1 / size**2 + covariance * (np.eye(size) - 1 / size)
    assert nngp.mean.shape == nngp.stderr.shape == ntk.mean.shape == (1, 1, size, size)
    assert np.all(nngp.stderr > 0)
    assert np.max(np.abs(nngp.mean[0, 0] - want) / nngp.stderr[0, 0]) < 8
    # Negative control: an error of a per cent of the largest entry is found.
    assert np.max(np.abs(nngp.mean[0, 0] - 1.1 * want) / nngp.stderr[0, 0]) > 8
    alone = monte_carlo.replicate(network, x, n_replicates=2)
    assert alone.mean.shape == nngp.mean.shape


def test_wrong_replicates_say_what_is_wrong():
    with pytest.raises(ValueError, match="`n_replicates` must be at least 2"):
        monte_carlo.replicate(lambda seed: stax.Softmax(), np.ones((1, 2)), n_replicates=1)
    with pytest.raises(TypeError, match=r"`network\(seed\)` must return a network"):
        monte_carlo.replicate(lambda seed: None, np.ones((1, 2)))
    with pytest.raises(TypeError, match="`get` must be the name of a kernel"):
        monte_carlo.replicate(lambda seed: stax.Softmax(), np.ones((1, 2)), get=None)
