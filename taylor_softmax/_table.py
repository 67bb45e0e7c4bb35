"""Chebyshev interpolation of the class covariance, for matrices with more entries than nodes.

`I / c` is smooth in the two variances and the correlation. Its interpolant is built, inside `jit`,
over the range of variances that came; evaluating it takes a small matrix product per degree in the
correlation instead of a double integral per entry. Where it is not good enough, its own last
coefficients say so.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from taylor_softmax import _pair, _quadrature

# The standard deviations enter as log(1 + sigma / knee): I / c is analytic in both at 0 (at a given
# correlation, so not in the variances) and turns into powers of them from about here on.
_KNEE = 0.5

# Smallest half-width of the range in that variable. All variances equal would make it 0, and the
# derivative in the variance needs a range.
_LEAST_HALF_WIDTH = 0.05


def shapes(n_classes: int) -> tuple[tuple[int, int], ...]:
    """Numbers of nodes in each variance and in the correlation, of the tables to try in turn.

    Measured, error of `I` and `dI / dc` over all correlations: order 2, n = 10: 8 nodes 4e-8 where
    variances lie within a factor 4, 20 nodes 4e-10 from 0 to 4, 28 nodes 3e-10 and 1e-7 from 0 to
    20. Order 8, n = 3: 14 nodes 1e-8 within a factor 4, 28 nodes 5e-8 from 0 to 4. The degree in
    the correlation that is needed falls with the number of classes.
    """
    degrees = ((4, (36, 48)), (10, (28, 36)), (100, (20, 28)))
    few, many = next((nodes for limit, nodes in degrees if n_classes < limit), (16, 20))
    return (8, few), (16, many), (28, many)


def tolerance(largest: Array, order: int | None) -> Array:
    """The estimated error up to which a table serves: below that of the rule that it samples.

    Args:
      largest: of the variances.
    """
    if jnp.finfo(largest.dtype).bits < 64:
        return jnp.asarray(1e-5, largest.dtype)
    if order == 2:
        return jnp.asarray(5e-8, largest.dtype)
    return jnp.where(largest <= 4.1, 5e-7, 2e-5).astype(largest.dtype)


class Table(NamedTuple):
    """An interpolant of `I / c`.

    Attributes:
      middle, half_width: of the range in `log(1 + sigma / knee)`.
      coefficients: Chebyshev coefficients, `(correlation, variance, variance)`.
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
        """Coefficients with `variance`, `(z, x)`, put in: `(z, correlation, x, variance)`."""
        return jnp.einsum(
            "zxi,kij->zkxj",
            self.basis(variance),
            self.coefficients,
            precision=lax.Precision.HIGHEST,
        )


def build(
    least: Array,
    largest: Array,
    *,
    n_classes: int,
    order: int | None,
    shape: tuple[int, int],
) -> Table:
    """The interpolant over variances from `least` to `largest` and all correlations.

    Args:
      least, largest: positive scalars.
      shape: number of nodes in each variance, and in the correlation.
    """
    dtype = least.dtype
    n_variances, n_correlations = shape
    low, high = (lax.stop_gradient(_coordinate(x)) for x in (least, largest))
    # The lower end stays at or above 0.
    half_width = jnp.maximum((high - low) / 2, _LEAST_HALF_WIDTH)
    middle = jnp.maximum((high + low) / 2, half_width)

    nodes, to_coefficients = (
        jnp.asarray(x, dtype) for x in _quadrature.chebyshev_rule(n_variances)
    )
    rho, rho_to_coefficients = (
        jnp.asarray(x, dtype) for x in _quadrature.chebyshev_rule(n_correlations)
    )
    variances = (_KNEE * jnp.expm1(middle + half_width * nodes)) ** 2
    inputs = jax.vmap(lambda v: _pair.prepare(v, n_classes=n_classes, order=order))(variances)

    # I is symmetric in the variances: half of the pairs do.
    rows, columns = np.triu_indices(n_variances)

    def correlations(indices: tuple[Array, Array]) -> Array:
        one, two = (jax.tree.map(lambda leaf, i=i: leaf[i], inputs) for i in indices)
        cov12 = rho * jnp.sqrt(one.variance * two.variance)
        return jax.vmap(lambda c: _pair.pair(one, two, c, n_classes=n_classes)[0])(cov12)

    upper = lax.map(correlations, (jnp.asarray(rows), jnp.asarray(columns)))
    where = np.zeros((n_variances, n_variances), dtype=int)
    where[rows, columns] = where[columns, rows] = np.arange(rows.size)
    values = upper[where]

    coefficients = jnp.einsum(
        "kr,ia,jb,abr->kij",
        rho_to_coefficients,
        to_coefficients,
        to_coefficients,
        values,
        precision=lax.Precision.HIGHEST,
    )
    # Rounding leaves a floor under the coefficients, in float32 about eps / 20 (measured). It is no
    # sign of truncation, and the derivative, which weighs degree k by up to k^2, would amplify it.
    size = jnp.abs(coefficients)
    size = jnp.maximum(size - jnp.finfo(dtype).eps / 8 * jnp.max(size), 0)
    coefficients = jnp.where(size > 0, coefficients, 0)
    tail = 2 * _tail(jnp.sum(size, (0, 1))) + n_correlations**2 * _tail(jnp.sum(size, (1, 2)))
    diagonal = jnp.arange(n_variances)
    error = tail / jnp.min(jnp.abs(values[diagonal, diagonal, -1]))
    return Table(middle, half_width, coefficients, error)


def _coordinate(variance: Array) -> Array:
    return jnp.log1p(jnp.sqrt(variance) / _KNEE)


def _tail(size: Array) -> Array:
    """What is missing beyond the last of the coefficients of `size`, if they go on geometrically.

    By twos, since odd and even coefficients can differ in size.
    """
    last, before = size[-1] + size[-2], size[-3] + size[-4]
    ratio = jnp.minimum(last / jnp.maximum(before, jnp.finfo(size.dtype).tiny), 0.5)
    return last * ratio / (1 - ratio)


def evaluate(rows: Array, columns: Array, correlation: Array) -> tuple[Array, Array]:
    """`I / c` and its derivative in the correlation.

    Args:
      rows: `Table.rows` of the first input's variance, `(z, correlation, x, variance)`.
      columns: `Table.basis` of the second's, `(z, y, variance)`.
      correlation: `(z, x, y)`.
    """
    contract = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    # XLA's matrix product with a batch axis is several times slower on a CPU than the one without.
    if rows.shape[0] == 1:
        by_degree = contract("kxj,yj->kxy", rows[0], columns[0])[:, None]
    else:
        by_degree = contract("zkxj,zyj->kzxy", rows, columns)
    # Clenshaw's recurrence and its derivative: monomials in rho would lose digits as 2^degree.
    value = previous = slope = previous_slope = jnp.zeros_like(correlation)
    for coefficient in by_degree[:0:-1]:
        slope, previous_slope = 2 * value + 2 * correlation * slope - previous_slope, slope
        value, previous = coefficient + 2 * correlation * value - previous, value
    slope = value + correlation * slope - previous_slope
    value = by_degree[0] + correlation * value - previous
    return value, slope
