"""Softmax of independent Gaussian logits: expectation and covariance of class probabilities.

With `z_j ~ N(mu_j, v_j)`, `phi_j(t) = E[exp(-t f(z_j))]` and `1 / D = int_0^inf exp(-t D) dt` for
the normaliser `D = sum_j f(z_j)`, one integral over `s = log t` has everything. Let `a_j(s)` and
`b_j(s)` be mean and variance of `t f(z_j)` under the weights tilted by `exp(-t f(z_j))`, so that
`a_j = -d log phi_j / ds`, and

    w(s) = prod_j phi_j,    m(s) = sum_j a_j(s),    int w m ds = 1    (w falls from 1 to 0).

Then `p_i = E[y_i] = int w a_i ds` and `E[y_i y_j] = int w (a_i a_j + [i = j] b_i) ds`. To subtract
`p p^T` from that would leave rounding errors where the variances are small. But outputs sum to 1,
which says `int w m a_i ds = p_i - V_i` with `V_i = int w b_i ds`, and so

    Cov[y] = int w (a - m p) (a - m p)^T ds + (Id - p 1^T) diag(V) (Id - 1 p^T):

positive semi-definite terms whose rows sum to 0, each of the order of the variances. Where those
are below the rounding of 1, `a - m p` has digits only if `a` is told from `t f(mu)`: with
`r = y(mu)`, `e_j = a_j - t f(mu_j)` and `q = int w (e - r sum e) ds`

    p = r + q,    a - m p = e - r sum e - m q,

both of the order of the variances.
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
      covariance: `Cov[y]`, `(..., C, C)`, or None.
      total: what `mean` summed to before it was divided by that, `(...)`; 1 but for quadrature.
    """

    mean: Array
    covariance: Array | None
    total: Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def moments(mean: Array, variance: Array, surrogate: Surrogate, covariance: bool) -> Moments:
    """Moments of `y` for logits of the given means and variances, both `(N, C)`.

    A mean of `-inf` excludes its class.
    """
    by_rule = _with_covariance if covariance else _mean
    return in_blocks(by_rule, mean, variance, surrogate)


@moments.defjvp
def _moments_jvp(
    surrogate: Surrogate, covariance: bool, primals: Any, tangents: Any
) -> tuple[Moments, Moments]:
    # The rules see the variance through its root, which has no derivative at 0. A shift by eps
    # makes every derivative at 0 that of the smooth function; the value, which would lose the
    # digits of small covariances, goes without.
    mean, variance = primals
    by_rule = _with_covariance if covariance else _mean

    def shifted(mean: Array, variance: Array) -> Moments:
        return in_blocks(by_rule, mean, off_zero(variance), surrogate)

    return moments(mean, variance, surrogate, covariance), jax.jvp(shifted, primals, tangents)[1]


def integrand(
    logits: Logits, rule: Rule, surrogate: Surrogate, *, second: bool
) -> tuple[Array, Array, Tilted]:
    """Nodes `s` `(outer, P)`, `w` times their weights, and tilted moments `(outer, P, C)`.

    Those are summed over the classes that a column stands for, if it is more than one.
    """
    n_classes = logits.mean.shape[1]
    s, weight = rules.outer_nodes(logits, rule)
    # One long axis: loops over a short one are not vectorised.
    each = tilted(
        logits.mean.ravel(),
        logits.variance.ravel(),
        jnp.repeat(s, n_classes, axis=1),
        rule=rule,
        surrogate=surrogate,
        second=second,
    )
    shape = (rule.outer, *logits.mean.shape)
    each = jax.tree.map(
        lambda x: jnp.where(logits.present, logits.multiplicity * x.reshape(shape), 0), each
    )
    return s, weight * jnp.exp(jnp.sum(each.log_phi, axis=2)), each


def _mean(logits: Logits, rule: Rule, surrogate: Surrogate) -> Moments:
    _, w, each = integrand(logits, rule, surrogate, second=False)
    p = jnp.sum(w[..., None] * each.mean, axis=0)
    total = jnp.sum(p, axis=1)
    return Moments(p / total[:, None], None, total)


def _with_covariance(logits: Logits, rule: Rule, surrogate: Surrogate) -> Moments:
    _, w, each = integrand(logits, rule, surrogate, second=True)
    p = jnp.sum(w[..., None] * each.mean, axis=0)
    total = jnp.sum(p, axis=1)
    p, w = p / total[:, None], w / total

    assert each.deviation is not None
    assert each.variance is not None
    sigma = jnp.sqrt(lax.stop_gradient(logits.variance))
    narrow = jnp.all(sigma <= NARROW, axis=1)[:, None]
    # Beyond NARROW, r = 0 and e = a.
    at_mean = surrogate.softmax(jnp.where(logits.present, logits.mean, 0), where=logits.present)
    r = jnp.where(narrow, at_mean, 0)
    e = jnp.where(narrow, each.deviation, each.mean)
    rest = e - jnp.sum(e, axis=2, keepdims=True) * r
    q = jnp.sum(w[..., None] * rest, axis=0)
    m = jnp.sum(each.mean, axis=2)
    v = jnp.sum(w[..., None] * each.variance, axis=0)
    between = jnp.moveaxis(rest - m[..., None] * q, 0, 1)
    # Its sum is 0 but for rounding, which is taken out: of a class alone the covariance is 0.
    between = between - jnp.sum(between, axis=2, keepdims=True) * p[:, None, :]
    centring = jnp.eye(p.shape[1], dtype=p.dtype) - p[:, None, :]
    return Moments(p, _gram(w.T, between) + _gram(v, centring), total)


def _gram(weight: Array, rows: Array) -> Array:
    """`sum_k weight_k rows_k rows_k^T` by point, symmetric to the last bit."""
    product = einsum("pki,pkj->pij", weight[:, :, None] * rows, rows)
    return (product + jnp.matrix_transpose(product)) / 2
