"""Errors of attention: as promised, as reported, and as asked for.

Tokens of covariance `(1 - c) Id + c 1 1^T` have logits that are i.i.d. but for a common part, which
softmax does not see: the class axis has their kernels exactly, for any number of tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import taylor_softmax
from taylor_softmax import stax
from taylor_softmax._numerics import errors
from taylor_softmax._numerics.surrogate import parse
from taylor_softmax._position_axis import attention_pair, attention_terms, queries
from taylor_softmax._position_axis.attention_rows import Rows
from taylor_softmax._position_axis.estimate import Budget
from taylor_softmax.methods import QuasiMonteCarlo

VARIANCES = (0.1, 0.25, 1.0, 4.0, 20.0, 100.0)
CORRELATIONS = (1.0, 0.95, 0.5, 0.0, -0.5, -1.0)
COMMON = 0.3  # covariance of two tokens of unit variance
OF_QUERIES = np.array([[1.0, 0.85], [0.85, 1.0]])  # covariances of the queries of both inputs
NTK, QUERIES_NTK = (0.8, 0.5), 0.7  # own and common part of that of keys; of queries, over `Q`


def equicorrelated(own, common, size):
    return own * np.eye(size) + common


def of_classes(variance, covariance, size):
    """`E[y_p y'_p]` less `1 / size^2` over `1 - 1 / size`, and its slope, of i.i.d. logits."""

    def of(a, c, b):
        return taylor_softmax.class_covariance(a, c, b, n_classes=size)

    given = jnp.broadcast_arrays(variance, covariance, variance)
    flat = [x.ravel() for x in given]
    both = of(*flat), jax.vmap(jax.grad(of, 1))(*flat)
    return [np.asarray(x).reshape(given[0].shape) for x in both]


class Problems:
    """Pairs of inputs of `size` tokens and two queries of their own, of all variances."""

    def __init__(self, size, variances=VARIANCES):
        grid = np.meshgrid(variances, CORRELATIONS, indexing="ij")
        self.size, (self.variance, self.correlation) = size, [x.ravel() for x in grid]
        self.n = len(self.variance)

    def expected(self):
        """NNGP, NTK, and their scales."""
        tau2, rho = (x[:, None, None] for x in (self.variance / (1 - COMMON), self.correlation))
        size, between = self.size, tau2 * OF_QUERIES

        def moments(covariance, own, common):
            """`F(V)`, and `G(V; Id)` for `V` of an `own` and a `common` part."""
            value, slope = of_classes(self.variance[:, None, None], covariance, size)
            value = common + own * (1 / size + (size - 1) * value)
            return value, own * (size - 1) * slope

        own, (of_ntk, common_of_ntk) = 1 - COMMON, NTK
        covariance = rho * own * between
        nngp, slope = moments(covariance, rho * own, rho * COMMON)
        of_values, _ = moments(covariance, of_ntk, common_of_ntk)
        of_keys = slope * of_ntk
        ntk = 2 * nngp + of_values
        ntk += (2 + QUERIES_NTK) * between * slope * rho * own + between * of_keys
        # Of an input with itself, NTKs having its shape and their size.
        value, slope = moments(own * tau2, own, COMMON)
        whole = np.linalg.norm(equicorrelated(*NTK, size))
        whole /= np.linalg.norm(equicorrelated(own, COMMON, size))
        of_slopes = (2 + QUERIES_NTK + of_ntk / own) * tau2 * slope * own
        scales = value, (2 + whole) * value + of_slopes
        return nngp, ntk, [x[:, 0, 0] for x in scales]

    def given(self, rows):
        tau2 = jnp.asarray(self.variance[:, None] / (1 - COMMON))
        keys = equicorrelated(1 - COMMON, COMMON, self.size)
        there, n_queries = jnp.ones((self.n, self.size)), len(OF_QUERIES)
        side = attention_terms.Inputs(
            jnp.broadcast_to(tau2, (self.n, n_queries)),
            jnp.ones((self.n, n_queries)),
            jnp.broadcast_to(keys, (self.n, *keys.shape)),
            there,
            rows.of(n_queries, self.size, dtype=float),
        )
        between = tau2[:, :, None] * OF_QUERIES
        cross = attention_pair.Cross(
            between,
            jnp.asarray(self.correlation[:, None, None] * keys),
            None,
            QUERIES_NTK * between,
            jnp.broadcast_to(equicorrelated(*NTK, self.size), side.keys.shape),
        )
        each = np.arange(self.n)
        return side, attention_terms.Request(each, each, cross, (0, 0))

    def estimates(self, method, rows=None):
        """`Kernels`; with `rows` every query has a sample of its own."""
        rows = rows or Rows()
        mechanism = attention_terms.mechanism(parse(None), method, rows, None)
        side, request = self.given(rows)
        return attention_terms.evaluate([side], [request], mechanism)[0]


def relative(got, want, scale):
    return np.max(np.abs(got - want), (1, 2)) / scale


NO_BIAS = Rows(bias=lambda n_queries, n_keys: np.zeros((n_queries, n_keys)))
SIZES = [
    pytest.param(5, None, marks=pytest.mark.quick),
    (5, NO_BIAS),
    *(
        pytest.param(size, rows, marks=pytest.mark.slow)
        for size in (2, 3, 16, 33, 64)
        for rows in (None, NO_BIAS)
        if size < 64 or rows is None
    ),
]


@pytest.mark.parametrize(("size", "rows"), SIZES)
def test_errors_are_as_promised_and_as_reported(size, rows):
    of = Problems(size)
    got = of.estimates(QuasiMonteCarlo(), rows)
    nngp, ntk, scales = of.expected()
    quantities = errors.ATTENTION_NNGP, errors.ATTENTION_NTK
    if rows:
        quantities = (errors.ATTENTION_ROWS,) * 2
    for column, (value, want, scale, quantity) in enumerate(
        zip(got[:2], (nngp, ntk), scales, quantities, strict=True)
    ):
        error = relative(value, want, scale)
        limits = [errors.promised(quantity, v) for v in of.variance]
        assert np.all(error < limits), (quantity, error / limits)
        # Up to variance 4, beyond which polynomials in the correlation of queries are off too.
        chosen = (of.variance < 20) & (of.correlation != 0)
        ratio = error[chosen] / got.error[chosen, column]
        assert np.mean(ratio > 2) < 0.1, (quantity, ratio)
        assert np.median(ratio) > 0.02, (quantity, ratio)


@pytest.mark.quick
def test_scales_are_those_of_the_kernel_at_correlation_1():
    of = Problems(5, (0.25, 4.0))
    side, request = of.given(Rows())
    mechanism = attention_terms.mechanism(parse(None), QuasiMonteCarlo(), Rows(), None)
    budget = Budget.of(QuasiMonteCarlo(), default=attention_terms._SHARED)
    prepared = attention_terms._prepare_all(side, mechanism, queries.one_for_all, budget)
    units = jax.vmap(functools.partial(attention_pair.units, mechanism=mechanism))
    got = units(prepared, prepared, request.cross)
    *_, scales = of.expected()
    np.testing.assert_allclose(got, np.stack(scales, 1), rtol=0.02)


def test_asking_for_an_error_reaches_it():
    of = Problems(5, (1.0, 4.0))
    nngp, ntk, scales = of.expected()
    for limit in (1e-2, 2e-3):
        got = of.estimates(QuasiMonteCarlo(error=limit))
        assert np.all(got.error <= limit)
        for value, want, scale in zip(got[:2], (nngp, ntk), scales, strict=True):
            assert np.max(relative(value, want, scale)) < limit
    # Negative control: fewer points are off by more than the last one.
    rough = of.estimates(QuasiMonteCarlo(16)).nngp
    assert np.max(relative(rough, nngp, scales[0])) > limit


@pytest.mark.quick
def test_what_is_not_reached_warns_where_it_is_known():
    x = np.random.default_rng(0).standard_normal((1, 3, 4))

    def kernel(x, **options):
        layer = stax.GlobalSelfAttention(
            4, 4, 4, 2, linear_scaling=False, method=QuasiMonteCarlo(64, **options)
        )
        return layer[2](x, None, "nngp")

    with pytest.warns(UserWarning, match=r"Attention: .*`error=1e-07` is not reached"):
        missed = kernel(x, error=1e-7)
    # Traced values are not known; whoever names a number of points gets them.
    jax.jit(functools.partial(kernel, error=1e-7))(x)
    assert np.max(np.abs(kernel(x, seed=1) - kernel(x))) > 1e-6
    np.testing.assert_allclose(missed, kernel(x), rtol=0.1)
    with pytest.warns(UserWarning, match="estimated error of the NNGP is .* relative to its scale"):
        taylor_softmax.attention_second_moment(*(np.eye(16),) * 3, scale=1e3)
