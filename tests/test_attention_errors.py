"""Errors of attention: as promised, as reported, and as asked for.

Two kinds of tokens have kernels that are known exactly, for any number of them. Tokens of
covariance `(1 - c) Id + c 1 1^T` have logits that are i.i.d. but for a common part, which softmax
does not see: the class axis has their kernels. Tokens of rank 1, multiples of one vector, have
kernels that are integrals over two numbers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import taylor_softmax
from taylor_softmax import stax
from taylor_softmax._attention import evaluation, inputs, queries
from taylor_softmax._attention.rows import Rows
from taylor_softmax._numerics import errors
from taylor_softmax._numerics.surrogate import parse
from taylor_softmax._position_axis.estimate import Budget
from taylor_softmax.methods import QuasiMonteCarlo

VARIANCES = (0.1, 0.25, 1.0, 4.0, 20.0, 100.0)
CORRELATIONS = (1.0, 0.95, 0.5, 0.0, -0.5, -1.0)
COMMON = 0.3  # covariance of two tokens of unit variance
OF_QUERIES = np.array([[1.0, 0.85], [0.85, 1.0]])  # covariances of the queries of both inputs
NTK, QUERIES_NTK = (0.8, 0.5), 0.7  # own and common part of that of keys; of queries, over `Q`


def equicorrelated(own, common, size):
    return own * np.eye(size) + common


def of_classes(variance1, covariance, variance2, size):
    """`E[y_p y'_p]` less `1 / size^2` over `1 - 1 / size`, and its slope, of i.i.d. logits."""

    def of(a, c, b):
        return taylor_softmax.class_covariance(a, c, b, n_classes=size)

    given = jnp.broadcast_arrays(variance1, covariance, variance2)
    flat = [x.ravel() for x in given]
    both = of(*flat), jax.vmap(jax.grad(of, 1))(*flat)
    return [x.reshape(given[0].shape) for x in both]


class Problems:
    """Pairs of inputs of `size` tokens and two queries of their own, of all variances."""

    def __init__(self, size, variances=VARIANCES):
        grid = np.meshgrid(variances, CORRELATIONS, indexing="ij")
        self.size, (self.variance, self.correlation) = size, [x.ravel() for x in grid]
        self.n = len(self.variance)

    def moments(self, variance1, covariance, variance2, own, common):
        """`F(V)`, and `G(V; Id)` for `V` of an `own` and a `common` part."""
        value, slope = of_classes(variance1, covariance, variance2, self.size)
        value = common + own * (1 / self.size + (self.size - 1) * value)
        return value, own * (self.size - 1) * slope

    def exact(self, shifts=((0.0, 0.0, 0.0), (0.0, 0.0))):
        """NNGP and NTK, `(2, pairs, queries, queries)`.

        Args:
          shifts: of the correlation, of the logarithm of covariances of the first keys, and of that
            of covariances of queries; and of the logarithms of variances of the first queries.
        """
        (by, wider, closer), own_queries = shifts
        variance, rho = (x[:, None, None] for x in (self.variance, self.correlation + by))
        tau2, (own, common) = variance / (1 - COMMON), (1 - COMMON, COMMON)
        between = tau2 * OF_QUERIES * jnp.exp(closer)
        first = variance * jnp.exp(wider + jnp.asarray(own_queries)[:, None])
        given = first, rho * own * between, variance
        nngp, slope = self.moments(*given, rho * own, rho * common)
        of_values, of_keys = self.moments(*given, *NTK)
        ntk = 2 * nngp + of_values
        ntk += (2 + QUERIES_NTK) * between * slope * rho * own + between * rho * own * of_keys
        return jnp.stack([nngp, ntk])

    def expected(self):
        """NNGP, NTK, and their scales."""
        nngp, ntk = self.exact()
        # Of an input with itself, NTKs having its shape and their size.
        own, tau2 = 1 - COMMON, self.variance / (1 - COMMON)
        value, slope = self.moments(self.variance, own * tau2, self.variance, own, COMMON)
        whole = np.linalg.norm(equicorrelated(*NTK, self.size))
        whole /= np.linalg.norm(equicorrelated(own, COMMON, self.size))
        of_slopes = (2 + QUERIES_NTK + NTK[0] / own) * tau2 * slope * own
        return nngp, ntk, [value, (2 + whole) * value + of_slopes]

    def given(self, rows, shifts=((0.0, 0.0, 0.0), (0.0, 0.0)), *, with_ntk=True):
        (by, wider, closer), own_queries = shifts
        tau2 = jnp.asarray(self.variance[:, None] / (1 - COMMON))
        keys = equicorrelated(1 - COMMON, COMMON, self.size)
        there, n_queries = jnp.ones((self.n, self.size)), len(OF_QUERIES)

        def side(of_keys, of_queries):
            return evaluation.Inputs(
                tau2 * jnp.exp(jnp.asarray(of_queries)),
                jnp.ones((self.n, n_queries)),
                jnp.broadcast_to(jnp.exp(of_keys) * keys, (self.n, *keys.shape)),
                there,
                rows.of(n_queries, self.size, dtype=float),
            )

        between = tau2[:, :, None] * OF_QUERIES * jnp.exp(closer)
        cross = inputs.Cross(
            between,
            (self.correlation + by)[:, None, None] * keys,
        )
        if with_ntk:
            of_keys = jnp.broadcast_to(equicorrelated(*NTK, self.size), (self.n, *keys.shape))
            cross = cross._replace(queries_ntk=QUERIES_NTK * between, keys_ntk=of_keys)
        each = np.arange(self.n)
        sides = [side(wider, own_queries), side(0.0, (0.0, 0.0))]
        return sides, evaluation.Request(each, each, cross, (0, 1))

    def estimates(self, method, rows=None, **options):
        """`Kernels`; with `rows` every query has a sample of its own."""
        rows = rows or Rows()
        mechanism = evaluation.mechanism(parse(None), method, rows, None)
        sides, request = self.given(rows, **options)
        return evaluation.evaluate(sides, [request], mechanism)[0]


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
    # Tokens of other covariances come to all of what is promised, i.i.d. ones to a third.
    limits = np.array([errors.promised(errors.ATTENTION, v) for v in of.variance]) / 3
    for column, (value, want, scale) in enumerate(zip(got[:2], (nngp, ntk), scales, strict=True)):
        error = relative(value, want, scale)
        assert np.all(error < limits), error / limits
        chosen = of.correlation != 0
        ratio = error[chosen] / got.error[chosen, column]
        assert np.mean(ratio > 2) < 0.1, ratio
        assert np.median(ratio) > 0.02, ratio


@pytest.mark.parametrize(
    ("size", "rows", "n_results"),
    [
        pytest.param(3, None, 1, marks=pytest.mark.quick),
        (3, NO_BIAS, 2),
        *(
            pytest.param(size, rows, 2, marks=pytest.mark.slow)
            for size in (2, 5, 16)
            for rows in (None, NO_BIAS)
        ),
    ],
)
def test_derivatives_have_errors_as_promised_of_values(size, rows, n_results):
    """Along covariances of keys and queries; also where queries that share a softmax part."""
    of = Problems(size, (0.25, 1.0, 4.0, 20.0))
    at = jnp.zeros(5)
    directions = jnp.concatenate([jnp.eye(5), jnp.asarray([[0.3, 1.0, 0.5, 1.0, -0.5]])])

    def slopes(of_shifts):
        def along(direction):
            def moved(x):
                return of_shifts((tuple(x[:3]), tuple(x[3:])))[:n_results]

            return jax.jvp(moved, (at,), (direction,))[1]

        return np.asarray(jax.jit(jax.vmap(along))(directions))

    def estimated(shifts):
        kernels = of.estimates(QuasiMonteCarlo(), rows, shifts=shifts, with_ntk=n_results > 1)
        return jnp.stack([x for x in kernels[:2] if x is not None])

    got, want = slopes(estimated), slopes(of.exact)
    *_, scales = of.expected()
    # Errors are relative to what there is at correlation 1.
    largest = np.max(np.abs(want), (3, 4)).reshape(*want.shape[:2], -1, len(CORRELATIONS))
    unit = np.repeat(largest[..., 0], len(CORRELATIONS), -1)
    unit = np.maximum(unit, np.stack(scales)[:n_results])
    limits = np.array([errors.promised(errors.ATTENTION, v) for v in of.variance])
    error = np.max(np.abs(got - want), (3, 4)) / unit
    assert np.all(error < limits), np.max(error / limits, 2)
    # A negative control: those of queries that are less alike.
    at = at.at[2].set(-0.2)
    other = np.max(np.abs(slopes(of.exact) - want), (3, 4)) / unit
    assert np.all(np.max(other / limits, (1, 2)) > 2)


def test_reverse_mode_is_the_transpose_of_forward_mode():
    rng = np.random.default_rng(0)
    root1, root2, bias = rng.standard_normal((3, 3, 3))
    given = tuple(jnp.asarray(x) for x in (root1 @ root1.T, root1 @ root2.T, root2 @ root2.T, bias))

    def kernel(cov11, cov12, cov22, bias):
        options = {"bias": bias, "method": QuasiMonteCarlo(64)}
        return taylor_softmax.attention_second_moment(cov11, cov12, cov22, **options).nngp

    *tangents, cotangent = (jnp.asarray(x) for x in rng.standard_normal((5, 3, 3)))
    _, forward = jax.jvp(kernel, given, tuple(tangents))
    _, transpose = jax.vjp(kernel, *given)
    backward = sum(jnp.sum(x * y) for x, y in zip(transpose(cotangent), tangents, strict=True))
    np.testing.assert_allclose(backward, jnp.sum(cotangent * forward), rtol=1e-10)

    def total(*given):
        return jnp.sum(cotangent * kernel(*given))

    # A derivative is an estimate of its own, which has no derivative.
    for argument in (0, 1):
        with pytest.raises(NotImplementedError, match="Second derivatives of estimates"):
            jax.jacfwd(jax.grad(total, argument))(*given)


class OfRankOne:
    """Pairs of inputs whose tokens are multiples of one vector.

    With tokens `t`, the logits of query `a` are `t_a t_p g`, with a standard normal `g` for each
    input. At correlation `c` of the inputs those of both have the correlation `c^2`. So with
    `m_a(g) = y_a^T t`, and `s_a(g) = t^T J_a t`, behind a dense layer

        nngp = c E[m_a m'_b],    ntk = 3 nngp + 4 c^3 t_a t'_b E[s_a s'_b].
    """

    VARIANCES = np.array([1.0, 4.0, 20.0, 100.0])
    CORRELATIONS = (1.0, 0.8, -1.0)
    NODES = np.linspace(-9, 9, 241)

    def __init__(self, size, ratio, seed):
        """Args: `ratio` of the variances of tokens, whose signs are random."""
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size)
        signs[:2] = 1, -1
        tokens = signs * np.sqrt(np.geomspace(1 / ratio, 1, size))
        # Logits have the product of the variances of a query and of a key.
        self.tokens = tokens * self.VARIANCES[:, None] ** 0.25
        self.allowed = np.ones((size, size), bool)

    def at(self, g):
        """`m` and `s`, `(variances, queries, *g)`."""
        t = self.tokens[:, None, :, None]
        logits = np.swapaxes(t, 1, 2) * t * np.ravel(g)
        y = np.where(
            self.allowed[:, :, None], np.exp(logits - np.max(np.abs(logits), 2)[:, :, None]), 0
        )
        y /= np.sum(y, 2, keepdims=True)
        mean = np.sum(y * t, 2)
        both = mean, np.sum(y * t**2, 2) - mean**2
        return [x.reshape(*x.shape[:2], *np.shape(g)) for x in both]

    def expected(self):
        """NNGP and NTK, `(inputs, inputs, queries, queries)`, and scales, `(inputs, inputs)`."""
        weights = np.exp(-(self.NODES**2) / 2)
        weights /= np.sum(weights)
        first = self.at(self.NODES)
        queries = self.tokens[:, None, :, None] * self.tokens[None, :, None, :]
        value, slope = (
            np.max(x**2 @ weights * of, 1) for x, of in zip(first, (1, self.tokens**2), strict=True)
        )
        value, slope = (np.sqrt(np.multiply.outer(x, x)) for x in (value, slope))
        nngp, ntk, scales = [], [], []
        for c in self.CORRELATIONS:
            rest = np.sqrt(1 - c**4)
            given = self.at(c**2 * self.NODES[:, None] + rest * self.NODES)
            values, slopes = (
                np.einsum("vag,wbg,g->vwab", x, y @ weights, weights)
                for x, y in zip(first, given, strict=True)
            )
            nngp.append(c * values)
            ntk.append(3 * c * values + 4 * c**3 * queries * slopes)
            # Of an NTK of the incoming one's size.
            scales.append((value, (2 + abs(c)) * value + (2 + 2 * abs(c)) * slope))
        joined = [np.concatenate(x, 1) for x in (nngp, ntk)]
        return *joined, [np.concatenate(x, 1) for x in zip(*scales, strict=True)]

    def estimates(self, **options):
        """NNGP and NTK of the layer behind a dense one."""
        attend = stax.GlobalSelfAttention(1, 1, 1, 1, linear_scaling=False, **options)
        kernel_fn = stax.serial(stax.Conv(1, (1,)), attend)[2]
        first = np.stack([self.tokens, 0 * self.tokens], -1)
        second = [
            np.stack([c * self.tokens, np.sqrt(1 - c**2) * self.tokens], -1)
            for c in self.CORRELATIONS
        ]
        # Two features, whose mean square is the variance.
        inputs = (jnp.asarray(np.sqrt(2) * x) for x in (first, np.concatenate(second)))
        kernel = jax.jit(functools.partial(kernel_fn, get=("nngp", "ntk")))(*inputs)
        return np.asarray(kernel.nngp), np.asarray(kernel.ntk)


def alone(n):
    """A mask that leaves out a neighbour: queries have rows of their own."""
    return np.where(np.abs(np.subtract.outer(np.arange(n), np.arange(n))) == 1, -np.inf, 0.0)


RANK_ONE = [
    pytest.param(8, 1.0, {}, marks=pytest.mark.quick),
    pytest.param(8, 1.0, {"causal": True}, marks=pytest.mark.quick),
    *(
        pytest.param(size, ratio, options, marks=pytest.mark.slow)
        for size in (2, 4, 16)
        for ratio in (1.0, 6.0)
        for options in ({}, {"causal": True}, {"bias": alone})
    ),
]


@pytest.mark.parametrize(("size", "ratio", "options"), RANK_ONE)
def test_errors_of_tokens_of_rank_1_are_as_promised(size, ratio, options):
    of = OfRankOne(size, ratio, seed=size)
    if "causal" in options:
        of.allowed = np.tri(size) > 0
    elif "bias" in options:
        of.allowed = options["bias"](size) == 0
    *expected, scales = of.expected()
    larger = np.maximum.outer(of.VARIANCES, np.tile(of.VARIANCES, len(of.CORRELATIONS)))
    limits = np.vectorize(functools.partial(errors.promised, errors.ATTENTION))(larger)
    for value, want, scale in zip(of.estimates(**options), expected, scales, strict=True):
        error = np.max(np.abs(value - want), (2, 3)) / scale
        assert np.all(error < limits), error / limits


@pytest.mark.quick
def test_tokens_of_rank_1_with_one_of_another_sign_have_another_kernel():
    """A negative control: what is promised tells them apart."""
    of = OfRankOne(8, 1.0, seed=8)
    nngp, _, (scale, _) = of.expected()
    of.tokens[:, -1] *= -1
    other, *_ = of.expected()
    assert np.all(np.max(np.abs(other - nngp), (2, 3)) / scale > 0.15)


@pytest.mark.quick
def test_scales_are_those_of_the_kernel_at_correlation_1():
    of = Problems(5, (0.25, 4.0))
    (side, _), request = of.given(Rows())
    mechanism = evaluation.mechanism(parse(None), QuasiMonteCarlo(), Rows(), None)
    budget = Budget.of(QuasiMonteCarlo(), default=evaluation._DEFAULT)
    prepared = evaluation._prepare_all(side, mechanism, queries.one_for_all, budget)
    units = jax.vmap(functools.partial(inputs.units, mechanism=mechanism))
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
    jax.eval_shape(functools.partial(kernel, error=1e-7), x)
    assert np.max(np.abs(kernel(x, seed=1) - kernel(x))) > 1e-6
    np.testing.assert_allclose(missed, kernel(x), rtol=0.1)
    with pytest.warns(UserWarning, match="estimated error of the NNGP is .* relative to its scale"):
        taylor_softmax.attention_second_moment(*(np.eye(16),) * 3, scale=1e3)
