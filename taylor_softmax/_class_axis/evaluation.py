"""The class covariance and its slope from their terms, for one pair of inputs or ten million.

From two variances and a covariance to `I = q q' r G` and `dI / dc = q q' K / (W sigma sigma')`:
each input brings the functions of its variance, `_prepare`; each pair brings its correlation, in
the coordinates s and r of `coordinates`; and the sum over terms runs over the degrees in these, by
Clenshaw's recurrence.

The sum has two forms. Where pairs are many and terms few, one fused elementwise expression, which
takes a quarter of the time and keeps no array of the size of the pairs but the result; otherwise a
loop over the degrees with a product of matrices each, which compiles at once.
"""

import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from taylor_softmax._class_axis.terms import Interpolant, ProductSum
from taylor_softmax._numerics.precision import einsum, matmul

# Bytes of a core's cache that rows of factors may take.
_CACHED_BYTES = 1 << 21

# Pairs at a time, where derivatives are evaluated and where sums are products of matrices: both
# keep a few arrays of this size.
_CACHED_PAIRS, _LOOPED_PAIRS = 1 << 17, 1 << 20

# Columns below which a loop over blocks of them is not worth its while.
_LEAST_COLUMNS = 32

# The most terms that are summed in one fused loop over the pairs. LLVM no longer vectorises a loop
# over 270 terms, which takes six times as long as one over 240 (measured on a CPU). Two or three
# such loops instead of products of matrices would take as long in float32, and a quarter less in
# float64.
_FUSED_TERMS = 240

# The same for derivatives: with more terms the loop would compile for several seconds.
_FUSED_DERIVATIVE_TERMS = 150


def evaluate(
    interpolant: Interpolant, var1: Array, cov12: Array, var2: Array, *, slope: bool, many: bool
) -> tuple[Array, Array | None]:
    """`I` and `dI / dc`, differentiable to any order.

    Derivatives are elementwise in the pairs as the values are, where reverse mode through the sums
    would keep an array of the size of the pairs for every degree.

    Args:
      var1: `(z, x)`, nonnegative.
      cov12: `(z, x, y)`.
      var2: `(z, y)`.
      slope: whether `dI / dc` is asked for; None otherwise.
      many: whether there are so many pairs that `_fused` is worth its compilation.
    """

    def quantity(is_slope: bool) -> Array:
        with_partials: Any = functools.partial(_quantity, interpolant, is_slope, many)
        alone = functools.partial(with_partials, ())
        return _differentiable(lambda *pairs: alone(*pairs)[0], with_partials)(var1, cov12, var2)

    return quantity(is_slope=False), quantity(is_slope=True) if slope else None


def _differentiable(function: Any, with_partials: Any) -> Any:
    """`function` of `(var1, cov12, var2)` with partial derivatives for its derivative.

    Args:
      with_partials: `(indices, *arguments)` to `function(*arguments)` and its derivatives in the
        arguments of these indices.
    """
    wrapped = jax.custom_jvp(function)

    @functools.partial(wrapped.defjvp, symbolic_zeros=True)
    def rule(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> Any:
        needed = tuple(i for i in range(3) if not isinstance(tangents[i], SymbolicZero))
        with_needed = functools.partial(with_partials, needed)

        def with_more(needed: tuple[int, ...], *arguments: Array) -> Any:
            return _with_partials(
                with_needed, needed, arguments, tuple(map(jnp.ones_like, arguments))
            )

        out, partials = _differentiable(with_needed, with_more)(*primals)
        total = jax.tree.map(jnp.zeros_like, out)
        for i, partial in zip(needed, partials, strict=True):
            tangent = tangents[i]
            direction = (tangent[:, :, None], tangent, tangent[:, None, :])[i]
            total = jax.tree.map(lambda t, p, d=direction: t + p * d, total, partial)
        return out, total

    return wrapped


def _with_partials(
    function: Any, needed: tuple[int, ...], primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, list[Any]]:
    """`function(*primals)` and its derivatives along the needed ones of `tangents`."""

    def partial(i: int) -> Any:
        def of_argument(argument: Any) -> Any:
            return function(*primals[:i], argument, *primals[i + 1 :])

        return jax.jvp(of_argument, (primals[i],), (tangents[i],))[1]

    return function(*primals), [partial(i) for i in needed]


class _Input(NamedTuple):
    """What one of the two inputs contributes: `(z, x)`, and rows of terms `(degree, rank, z, x)`.

    Attributes:
      x: the factor of its variance in x of `coordinates`: the product of both is x at rho = 1.
      rounding_fraction, smoothing_fraction: of `Coordinates`.
    """

    variance: Array
    inverse_sigma: Array
    x: Array
    rounding_fraction: Array
    smoothing_fraction: Array
    rows: Array


def _prepare(interpolant: Interpolant, is_slope: bool, variance: Array) -> _Input:
    # I is smooth in (a, c, b) at a = 0, but not in the root of a. The shift is the relative error
    # it makes, and what derivatives at variance 0 are divided by.
    shift = 3e-8 if jnp.finfo(variance.dtype).bits == 64 else 1e-5
    variance = variance + shift
    sigma = jnp.sqrt(variance)
    # Beyond the largest variance q stays, and the rounding of the kinks goes on.
    largest = math.sqrt(interpolant.largest)
    inside = jnp.minimum(sigma, largest)
    coordinates = interpolant.coordinates
    v = coordinates.v(inside, jnp.log1p)
    node = jnp.minimum(2 * v / float(coordinates.v(largest)) - 1, 1.0)
    basis = _chebyshev(node.ravel(), len(interpolant.scale))

    def rows(coefficients: np.ndarray) -> Array:
        flat = jnp.asarray(coefficients.reshape(-1, len(interpolant.scale)), v.dtype)
        return matmul(flat, basis).reshape(*coefficients.shape[:-1], *v.shape)

    q = jnp.exp(rows(interpolant.scale)) * coordinates.saturation(inside)
    return _Input(
        variance,
        1 / sigma,
        jnp.sqrt(variance / (variance + coordinates.rounding)),
        coordinates.rounding_fraction(variance),
        coordinates.smoothing_fraction(variance),
        q / sigma * rows(interpolant.slope.factors)
        if is_slope
        else q * rows(interpolant.value.factors),
    )


def _chebyshev(x: Array, count: int) -> Array:
    """`T_k(x)`, `(count, *x)`, in the form that suits the backend."""
    return (_by_recurrence if jax.default_backend() == "cpu" else _by_doubling)(x, count)


def _by_recurrence(x: Array, count: int) -> Array:
    """By a loop over the degrees: unrolled, derivatives would take seconds to compile."""

    def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        previous, current = carry
        return (current, 2 * x * current - previous), previous

    return lax.scan(step, (jnp.ones_like(x), x), length=count)[1]


def _by_doubling(x: Array, count: int) -> Array:
    """By `T_(m+j) = 2 T_m T_j - T_(m-j)`, `j` from 1 to `m`: `log2(count)` steps.

    On a GPU every step of a loop is a launch of its own, of which the recurrence has `count`.
    """
    known = jnp.stack([jnp.ones_like(x), x])
    while (m := len(known) - 1) < count - 1:
        known = jnp.concatenate([known, 2 * known[m] * known[1:] - known[m - 1 :: -1]])
    return known[:count]


def _quantity(
    interpolant: Interpolant,
    is_slope: bool,
    many: bool,
    needed: tuple[int, ...],
    var1: Array,
    cov12: Array,
    var2: Array,
) -> tuple[Array, list[Array]]:
    """`I` or `dI / dc`, and its derivatives in the arguments of the indices `needed`."""
    prepare = functools.partial(_prepare, interpolant, is_slope)

    def prepared(variance: Array) -> tuple[_Input, _Input | None]:
        if not needed:
            return prepare(variance), None
        return jax.jvp(prepare, (variance,), (jnp.ones_like(variance),))

    first, second = prepared(var1), prepared(var2)
    z, x, y = cov12.shape
    n_terms = sum((interpolant.slope if is_slope else interpolant.value).ranks)
    fused = many and n_terms <= (_FUSED_DERIVATIVE_TERMS if needed else _FUSED_TERMS)
    # A block has as many columns as have rows of factors that stay in a core's cache: from memory,
    # each pair would read them all again. Products of matrices take more columns. Derivatives take
    # fewer: XLA keeps what their sums share.
    if fused:
        columns = _CACHED_BYTES // (n_terms * cov12.dtype.itemsize)
    else:
        columns = _LOOPED_PAIRS // max(z * x, 1)
    if needed:
        columns = min(columns, _CACHED_PAIRS // max(z * x, 1))
    n_blocks = -(-y // max(columns, _LEAST_COLUMNS)) if many else 1

    def block(first: Any, cov12: Array, second: Any) -> tuple[Array, list[Array]]:
        primals, tangents = zip(first, (cov12, jnp.ones_like(cov12)), second, strict=True)
        of_block = functools.partial(_of_block, interpolant, is_slope, fused)
        return _with_partials(of_block, needed, primals, tangents)

    if n_blocks == 1:
        return block(first, cov12, second)
    length = -(-y // n_blocks)

    def split(array: Array) -> Array:
        padding = [(0, 0)] * (array.ndim - 1) + [(0, n_blocks * length - y)]
        array = jnp.pad(array, padding, mode="edge")
        return jnp.moveaxis(array.reshape(*array.shape[:-1], n_blocks, length), -2, 0)

    def join(blocks: Array) -> Array:
        return jnp.moveaxis(blocks, 0, 2).reshape(z, x, n_blocks * length)[:, :, :y]

    # This is a loop, since XLA would fuse blocks and what follows them into one.
    blocks = jax.tree.map(split, (cov12, second))
    return jax.tree.map(join, lax.map(lambda columns: block(first, *columns), blocks))


def _of_block(
    interpolant: Interpolant,
    is_slope: bool,
    fused: bool,
    first: _Input,
    cov12: Array,
    second: _Input,
) -> Array:
    rho = cov12 * first.inverse_sigma[:, :, None] * second.inverse_sigma[:, None]
    # Quotients, which are 1 where an input meets itself: at variance 1e6 an ulp of float32 less
    # makes 5 % of the slope.
    one_minus_rho_squared = 1 - (cov12 / first.variance[:, :, None]) * (
        cov12 / second.variance[:, None]
    )

    def one_minus_x_squared(fraction1: Array, fraction2: Array) -> tuple[Array, Array]:
        """At rho = 1, and at rho: positive terms, unless rounding takes rho beyond 1."""
        fraction1, fraction2 = fraction1[:, :, None], fraction2[:, None]
        at_one = fraction1 + fraction2 - fraction1 * fraction2
        return at_one, jnp.maximum(at_one + (1 - at_one) * one_minus_rho_squared, at_one / 2)

    at_one, at_rho = one_minus_x_squared(first.rounding_fraction, second.rounding_fraction)
    if not is_slope:
        r = rho * ((1 + jnp.sqrt(at_one)) / (1 + jnp.sqrt(at_rho)))
        return r * _sum_of_products(interpolant.value, first.rows, second.rows, r, fused=fused)
    x_one = first.x[:, :, None] * second.x[:, None]
    s = _y(rho * x_one, at_rho) / _y(x_one, at_one)
    squared_weight = at_rho
    if interpolant.coordinates.smoothing:
        _, squared_weight = one_minus_x_squared(first.smoothing_fraction, second.smoothing_fraction)
    total = _sum_of_products(interpolant.slope, first.rows, second.rows, s, fused=fused)
    return lax.rsqrt(squared_weight) * total


@jax.custom_jvp
def _y(x: Array, one_minus_x_squared: Array) -> Array:
    """`x + artanh x`."""
    size = jnp.abs(x)
    return x + 0.5 * jnp.sign(x) * jnp.log1p(2 * size * (1 + size) / one_minus_x_squared)


@_y.defjvp
def _y_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    # The derivative of `artanh x = arsinh(x / sqrt(1 - x^2))`, which is smooth at 0.
    (x, complement), (x_dot, complement_dot) = primals, tangents
    artanh_dot = x_dot - 0.5 * x * complement_dot / complement
    return _y(x, complement), x_dot + artanh_dot * lax.rsqrt(complement + x * x)


@functools.partial(jax.jit, static_argnames=("terms", "fused"))
def _sum_of_products(
    terms: ProductSum, first: Array, second: Array, s: Array, *, fused: bool
) -> Array:
    """`sum_terms sign first second T_degree(s)`; under `jit`, which traces it once for all calls.

    Args:
      first, second: `rows` of two inputs.
    """
    return (_fused if fused else _looped)(terms, first, second, s)


def _fused(terms: ProductSum, first: Array, second: Array, s: Array) -> Array:
    """The sum in elementwise expressions for XLA to fuse.

    Rows of terms are contiguous in the second input: the other way round the loop over the pairs is
    not vectorised.
    """
    value = previous = jnp.zeros_like(s)
    for degree in range(len(terms.ranks) - 1, -1, -1):
        products = [
            first[degree, r][:, :, None] * (float(sign) * second[degree, r][:, None])
            for r, sign in enumerate(terms.signs[degree, : terms.ranks[degree]])
        ]
        coefficient = functools.reduce(operator.add, products) if products else 0.0
        value, previous = coefficient + (2 if degree else 1) * s * value - previous, value
    return value


def _looped(terms: ProductSum, first: Array, second: Array, s: Array) -> Array:
    """The same as a loop over the degrees, which compiles at once."""

    def step(carry: tuple[Array, Array], degree: tuple[Array, ...]) -> Any:
        value, previous = carry
        factor, first, second = degree
        if min(s.shape[1:]) == 1:
            coefficient = jnp.sum(first[:, :, :, None] * second[:, :, None], 0)
        else:
            coefficient = einsum("rzx,rzy->zxy", first, second)
        return (coefficient + factor * s * value - previous, value), None

    factors = jnp.full(len(terms.ranks), 2, s.dtype).at[0].set(1)
    signs = jnp.asarray(terms.signs, s.dtype)[:, :, None, None]
    zero = jnp.zeros_like(s)
    (value, _), _ = lax.scan(step, (zero, zero), (factors, first, signs * second), reverse=True)
    return value
