"""Chebyshev interpolation of the class covariance, for matrices with more entries than nodes.

`I / c` and `dI / dc` are smooth in the two variances and the correlation. Their interpolants are
built, inside `jit`, over the range of variances that came; evaluating one takes a few hundred
multiplications per entry instead of a double integral. Where they are not good enough, their own
last coefficients say so.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from taylor_softmax._class_axis import mehler
from taylor_softmax._numerics import quadrature
from taylor_softmax._numerics.precision import einsum
from taylor_softmax._numerics.surrogate import Surrogate

# The standard deviations enter as log(1 + sigma / knee): I / c is analytic in both at 0 (at a given
# correlation, so not in the variances) and turns into powers of them from about here on.
_KNEE = 0.5

# Smallest half-width of the range in that variable. All variances equal would make it 0, and the
# derivative in the variance needs a range.
_LEAST_HALF_WIDTH = 0.01


class Shape(NamedTuple):
    """Of a table, and the half-width of the range of variances that it is meant for."""

    variances: int
    correlations: int
    half_width: float


def shapes(n_classes: int) -> tuple[Shape, ...]:
    """The tables to try in turn, those meant for a range as wide as the data's and larger ones.

    Measured, nodes in each variance for the tolerances below at n = 2 to 1000: order 2, order 8
    and softmax 4, 4 and 4 for equal variances, 13, 19 (14 from n = 10) and 14 for a factor 10, 24,
    30 (22) and 22 for six decades up to 4, 30, 27 and 30 from 0 to 20. In the correlation: for
    variances up to 4: 37 at n = 2, 31 at n = 3, 21 from n = 10; up to 20: 63, 58, 39.
    """
    degrees = ((3, (38, 60)), (10, (32, 50)))
    few, many = next((nodes for limit, nodes in degrees if n_classes < limit), (21, 32))
    return (
        Shape(5, few, 1.1 * _LEAST_HALF_WIDTH),
        Shape(14, few, 0.42),
        Shape(24, few, 0.85),
        Shape(30, many, np.inf),
    )


def tolerance(largest: Array, surrogate: Surrogate) -> Array:
    """The estimated error up to which a table serves: below that of the rule that it samples.

    Args:
      largest: of the variances.
    """
    if jnp.finfo(largest.dtype).bits < 64:
        # Rounding alone makes the estimate up to 3e-5 (n = 2, variances over six decades).
        return jnp.asarray(5e-5, largest.dtype)
    if surrogate.has_closed_form:
        return jnp.asarray(5e-8, largest.dtype)
    return jnp.where(largest <= 4.1, 5e-7, 2e-5).astype(largest.dtype)


class Table(NamedTuple):
    """Interpolants of `I / c` and of `dI / dc`.

    Each has its own samples: the derivative of an interpolant of degree `k` would amplify the
    rounding of the first by up to `k^2`, in float32 to 6e-4 (measured).

    Attributes:
      middle, half_width: of the range in `log(1 + sigma / knee)`.
      coefficients: Chebyshev coefficients, `(2, correlation, variance, variance)`.
      error: estimate of the error of `I` and `dI / dc`, relative to their values at correlation 1.
    """

    middle: Array
    half_width: Array
    coefficients: Array
    error: Array

    def basis(self, variance: Array) -> Array:
        """Chebyshev polynomials at `variance`, shape `(*variance.shape, n_nodes)`."""
        x = (_coordinate(variance) - self.middle) / self.half_width
        polynomials = [jnp.ones_like(x), x]
        while len(polynomials) < self.coefficients.shape[-1]:
            polynomials.append(2 * x * polynomials[-1] - polynomials[-2])
        return jnp.stack(polynomials, -1)

    def rows(self, variance: Array) -> Array:
        """Coefficients with `variance` put in, `(2, *variance.shape, correlation, n_nodes)`."""
        return einsum(
            "...i,qkij->q...kj",
            self.basis(variance),
            self.coefficients,
        )


def build_if_meant(
    least: Array, largest: Array, *, n_classes: int, surrogate: Surrogate, shape: Shape
) -> Table:
    """`build`, or a table with an infinite error where the range is wider than `shape` is for."""
    make = functools.partial(
        build, least, largest, n_classes=n_classes, surrogate=surrogate, shape=shape
    )
    # Finite: under `vmap` both branches of every `cond` run, and are differentiated.
    none = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), jax.eval_shape(make))
    none = none._replace(error=jnp.full_like(none.error, jnp.inf))
    half_width = (_coordinate(largest) - _coordinate(least)) / 2
    return lax.cond(half_width <= shape.half_width, make, lambda: none)


def build(
    least: Array, largest: Array, *, n_classes: int, surrogate: Surrogate, shape: Shape
) -> Table:
    """The interpolant over variances from `least` to `largest`, scalars, and all correlations."""
    dtype = least.dtype
    n_variances, n_correlations, _ = shape
    low, high = (lax.stop_gradient(_coordinate(x)) for x in (least, largest))
    # The lower end stays at or above 0.
    half_width = jnp.maximum((high - low) / 2, _LEAST_HALF_WIDTH)
    middle = jnp.maximum((high + low) / 2, half_width)

    nodes, to_coefficients = (jnp.asarray(x, dtype) for x in quadrature.chebyshev_rule(n_variances))
    rho, rho_to_coefficients = (
        jnp.asarray(x, dtype) for x in quadrature.chebyshev_rule(n_correlations)
    )
    variances = (_KNEE * jnp.expm1(middle + half_width * nodes)) ** 2
    inputs = jax.vmap(lambda v: mehler.expand(v, n_classes=n_classes, surrogate=surrogate))(
        variances
    )

    # I is symmetric in the variances: half of the pairs do.
    rows, columns = np.triu_indices(n_variances)

    def correlations(indices: tuple[Array, Array]) -> tuple[Array, Array]:
        one, two = (jax.tree.map(lambda leaf, i=i: leaf[i], inputs) for i in indices)
        cov12 = rho * jnp.sqrt(one.variance * two.variance)
        return jax.vmap(lambda c: mehler.pair(one, two, c, n_classes=n_classes))(cov12)

    upper = jnp.stack(lax.map(correlations, (jnp.asarray(rows), jnp.asarray(columns))))
    where = np.zeros((n_variances, n_variances), dtype=int)
    where[rows, columns] = where[columns, rows] = np.arange(rows.size)
    values = upper[:, where]

    coefficients = einsum(
        "kr,ia,jb,qabr->qkij",
        rho_to_coefficients,
        to_coefficients,
        to_coefficients,
        values,
    )
    size = jnp.abs(coefficients)
    tail = 2 * _tail(jnp.sum(size, (1, 2))) + _tail(jnp.sum(size, (2, 3)))
    diagonal = jnp.arange(n_variances)
    error = tail / jnp.min(jnp.abs(values[:, diagonal, diagonal, -1]), axis=1)
    return Table(middle, half_width, coefficients, jnp.max(error))


def _coordinate(variance: Array) -> Array:
    return jnp.log1p(jnp.sqrt(variance) / _KNEE)


def _tail(size: Array) -> Array:
    """What is missing beyond the last of the coefficients of `size`, if they go on geometrically.

    Along the last axis, by twos: odd and even coefficients can differ in size.
    """
    last, before = size[..., -1] + size[..., -2], size[..., -3] + size[..., -4]
    ratio = jnp.minimum(last / jnp.maximum(before, jnp.finfo(size.dtype).tiny), 0.5)
    return last * ratio / (1 - ratio)


def evaluate(rows: Array, columns: Array, correlation: Array, *, fused: bool) -> Array:
    """`I / c` or `dI / dc`.

    Args:
      rows: one of the two of `Table.rows` of the first input's variance,
        `(z, x, correlation, variance)`.
      columns: `Table.basis` of the second's, `(z, y, variance)`.
      correlation: `(z, x, y)`.
      fused: elementwise in the pairs, so that XLA compiles one loop over them that keeps its
        intermediates in registers. A product of matrices writes an array as large as the
        correlations for every degree and reads it again, which takes twice the time (measured on a
        CPU), but compiles, and above all differentiates, much faster.
    """
    if fused:
        first = [rows[:, :, None, :, j] for j in range(rows.shape[-1])]
        second = [columns[:, None, :, j] for j in range(columns.shape[-1])]
        coefficients = [
            functools.reduce(
                operator.add, (a[..., k] * b for a, b in zip(first, second, strict=True))
            )
            for k in range(rows.shape[-2])
        ]
    else:
        coefficients = einsum("zxkj,zyj->kzxy", rows, columns)
    # Clenshaw's recurrence: monomials in rho would lose digits as 2^degree.
    twice = 2 * correlation
    value = previous = jnp.zeros_like(correlation)
    for coefficient in coefficients[:0:-1]:
        value, previous = twice * value + (coefficient - previous), value
    return correlation * value + (coefficients[0] - previous)
