"""Softmax of independent Gaussian logits: expectation and covariance of class probabilities.

With `z_j ~ N(mu_j, v_j)`, `phi_j(t) = E[exp(-t f(z_j))]` and `1 / D = int_0^inf exp(-t D) dt` for
the normaliser `D = sum_j f(z_j)`, all moments are integrals over `s = log t`. Let `a_j(s)` and
`b_j(s)` be mean and variance of `t f(z_j)` under weights tilted by `exp(-t f(z_j))`, so that
`a_j = -d log phi_j / ds`, and

    w(s) = prod_j phi_j,    m(s) = sum_j a_j(s),    int w m ds = 1    (w falls from 1 to 0).

Then `p_i = E[y_i] = int w a_i ds` and `E[y_i y_j] = int w (a_i a_j + [i = j] b_i) ds`. Subtracting
`p p^T` from the latter would leave nothing but rounding errors where the variances are small.
Outputs sum to 1, so `int w m a_i ds = p_i - V_i` with `V_i = int w b_i ds`. Therefore

    Cov[y] = int w (a - m p) (a - m p)^T ds + (Id - p 1^T) diag(V) (Id - 1 p^T):

These terms are positive semi-definite, their rows sum to 0, and each is of the order of the
variances. Where variances are below the rounding of 1, `a - m p` keeps its digits only if it is
formed from deviations from `t f(mu)`. With `r = y(mu)`, `e_j = a_j - t f(mu_j)` and
`q = int w (e - r sum e) ds`,

    p = r + q,    a - m p = e - r sum e - m q.

Both `q` and `a - m p` are of the order of the variances.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from taylor_softmax._numerics.precision import einsum, off_zero
from taylor_softmax._numerics.surrogate import Surrogate
from taylor_softmax._probabilities import rules
from taylor_softmax._probabilities.blocks import in_blocks
from taylor_softmax._probabilities.rules import Logits, Rule
from taylor_softmax._probabilities.transform import NARROW, Tilted, tilted


class Moments(NamedTuple):
    """Moments of class probabilities `y`.

    Attributes:
      mean: `E[y]`, `(..., C)`.
      covariance: `Cov[y]`, `(..., C, C)`; None if it was not asked for.
      total: sum of the means before they were divided by it, `(...)`. It differs from 1 by the
        error of the quadrature.
    """

    mean: Array
    covariance: Array | None
    total: Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def moments(mean: Array, variance: Array, surrogate: Surrogate, covariance: bool) -> Moments:
    """Moments of `y` for independent logits of the given means and variances, both `(N, C)`.

    Args:
      mean: a mean of `-inf` excludes its class.
      surrogate: function that the softmax normalises.
      covariance: whether to compute `Cov[y]`.
    """
    by_rule = _with_covariance if covariance else _mean
    return in_blocks(by_rule, mean, variance, surrogate)


@moments.defjvp
def _moments_jvp(
    surrogate: Surrogate, covariance: bool, primals: Any, tangents: Any
) -> tuple[Moments, Moments]:
    # The rules take the root of the variance, which has no derivative at 0. A shift of the variance
    # by eps makes every derivative at 0 that of the smooth function. The value is computed without
    # the shift, which would cost small covariances their digits.
    mean, variance = primals
    by_rule = _with_covariance if covariance else _mean

    def shifted(mean: Array, variance: Array) -> Moments:
        return in_blocks(by_rule, mean, off_zero(variance), surrogate)

    return moments(mean, variance, surrogate, covariance), jax.jvp(shifted, primals, tangents)[1]


def integrand(
    logits: Logits, rule: Rule, surrogate: Surrogate, *, second: bool
) -> tuple[Array, Array, Tilted]:
    """The nodes of the outer integral, and the integrand there.

    Args:
      second: whether to compute deviations and variances.

    Returns:
      Nodes `s`, `(outer, P)`; `w` times their weights, `(outer, P)`; and tilted moments,
      `(outer, P, C)`. A column that stands for several classes has the sum of their moments.
    """
    n_classes = logits.mean.shape[1]
    s, weight = rules.outer_nodes(logits, rule)
    # One long axis: XLA does not vectorise loops over a short one.
    of_classes = tilted(
        logits.mean.ravel(),
        logits.variance.ravel(),
        jnp.repeat(s, n_classes, axis=1),
        rule=rule,
        surrogate=surrogate,
        second=second,
    )
    shape = (rule.outer, *logits.mean.shape)
    of_classes = jax.tree.map(
        lambda x: jnp.where(logits.present, logits.multiplicity * x.reshape(shape), 0), of_classes
    )
    return s, weight * jnp.exp(jnp.sum(of_classes.log_phi, axis=2)), of_classes


def _mean(logits: Logits, rule: Rule, surrogate: Surrogate) -> Moments:
    """The mean alone, as `in_blocks` calls it."""
    _, w, of_classes = integrand(logits, rule, surrogate, second=False)
    p = jnp.sum(w[..., None] * of_classes.mean, axis=0)
    total = jnp.sum(p, axis=1)
    return Moments(p / total[:, None], None, total)


def _with_covariance(logits: Logits, rule: Rule, surrogate: Surrogate) -> Moments:
    """Mean and covariance, as `in_blocks` calls it; names as in the docstring of the module."""
    _, w, of_classes = integrand(logits, rule, surrogate, second=True)
    p = jnp.sum(w[..., None] * of_classes.mean, axis=0)
    total = jnp.sum(p, axis=1)
    p, w = p / total[:, None], w / total

    assert of_classes.deviation is not None
    assert of_classes.variance is not None
    sigma = jnp.sqrt(lax.stop_gradient(logits.variance))
    narrow = jnp.all(sigma <= NARROW, axis=1)[:, None]
    # Beyond NARROW, r = 0 and e = a.
    softmax_of_mean = surrogate.softmax(
        jnp.where(logits.present, logits.mean, 0), where=logits.present
    )
    r = jnp.where(narrow, softmax_of_mean, 0)
    e = jnp.where(narrow, of_classes.deviation, of_classes.mean)
    rest = e - jnp.sum(e, axis=2, keepdims=True) * r
    q = jnp.sum(w[..., None] * rest, axis=0)
    m = jnp.sum(of_classes.mean, axis=2)
    v = jnp.sum(w[..., None] * of_classes.variance, axis=0)
    between = jnp.moveaxis(rest - m[..., None] * q, 0, 1)
    # The sum over classes is 0 up to rounding. The rounding is subtracted, so that the covariance
    # of a single class is exactly 0.
    between = between - jnp.sum(between, axis=2, keepdims=True) * p[:, None, :]
    centring = jnp.eye(p.shape[1], dtype=p.dtype) - p[:, None, :]
    return Moments(p, _gram(w.T, between) + _gram(v, centring), total)


def _gram(weight: Array, rows: Array) -> Array:
    """`sum_k weight_k rows_k rows_k^T` for each point, symmetric to the last bit.

    Args:
      weight: `(P, K)`.
      rows: `(P, K, C)`.
    """
    product = einsum("pki,pkj->pij", weight[:, :, None] * rows, rows)
    return (product + jnp.matrix_transpose(product)) / 2
