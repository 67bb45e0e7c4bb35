"""The class covariance `I` for whole arrays of pairs: shapes, memory and choice of method.

Up to a few units of variance (`largest_near`) Mehler's formula separates the two inputs, `mehler`,
and an interpolant over the range of variances that came is exact to its quadrature, `interpolant`.
Beyond, functions of a logit are too steep for either: `integral` has no scale and is right at every
variance, pair by pair, and `grids` interpolates what it finds, from samples that come with the
package.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float

from taylor_softmax._class_axis import grids, integral, interpolant, mehler
from taylor_softmax._numerics.arguments import Validated, as_real, check_n_classes
from taylor_softmax._numerics.precision import off_zero
from taylor_softmax._numerics.surrogate import Surrogate, parse
from taylor_softmax.methods import Direct, Interpolate, Method, choose

# From this many pairs on, `method=None` tries a table first: a table costs as much as its nodes.
_TABLE_PAIRS = 1024

# Pairs evaluated at once, and of how many second inputs: by quadrature (up to 100 KB a pair, which
# `lax.cond` keeps room for beside the table) and by the derivative of the interpolant (up to 2 KB).
_DIRECT_BLOCK = 256, 16
_TABLE_BLOCK = 1 << 15, 1 << 12

# From this many pairs on the interpolant is evaluated in one fused loop, which compiles in about a
# second for every table more, and takes half the time and memory: 20 ms less at this size.
_FUSED_PAIRS = 1 << 18


class Pairs(NamedTuple):
    """Variances and covariances of pairs of inputs, in shapes that broadcast."""

    var1: Array
    cov12: Array
    var2: Array


def class_covariance(
    var1: Validated[ArrayLike],
    cov12: Validated[ArrayLike],
    var2: Validated[ArrayLike],
    *,
    n_classes: Validated[int],
    order: Validated[int | None] = None,
    method: Validated[Method | None] = None,
) -> Float[Array, "*batch"]:
    """The number `I(a, c, b; n)` that determines the class-by-class second moment of a softmax.

    For logits `(u_i, v_i) ~ N(0, [[a, c], [c, b]])`, i.i.d. over `n` classes, and
    `y(z)_i = f(z_i) / sum_j f(z_j)`:

        E[y(u) y(v)^T] = 1 1^T / n^2 + I (Id - 1 1^T / n),

    so that the same class has `1/n^2 + (1 - 1/n) I`, two classes have `1/n^2 - I/n`, and the
    covariance of the outputs is `I (Id - 1 1^T / n)`. `I` is dimensionless and at most
    `1 / n`. Evaluated from the Laplace identity `I = int int L_ts exp(n L) dt ds` with
    `L(t, s) = log E[exp(-t f(u_1) - s f(v_1))]`, without approximation other than quadrature: see
    the docstring of the module `taylor_softmax._class_axis.integral`.

    Errors, relative to `I` at correlation 1, of `I` and of its slope: the rows on softmax over
    classes in `taylor_softmax._numerics.errors`. Variances of 0, correlations of 1 and (by
    rounding) beyond are fine. Differentiable in all three arguments, to any order. Beyond a
    variance of 1e4 the slope, and with it the NTK of the layers, is NaN: it is not known to be
    right there. Beyond 1e6 `I` is that at 1e6 and the same correlation.

    Args:
      var1: variances `a` of the logits at the first input, nonnegative.
      cov12: covariances `c`, `c^2 <= a b`.
      var2: variances `b` of the logits at the second input, nonnegative.
      n_classes: number `n` of classes.
      order: even order of the Taylor polynomial `f`, or `None` for `f = exp`, softmax itself.
      method: `Direct()` integrates for every entry, at 0.1 ms each for small variances and 1 to
        150 ms beyond (order 2 to order 32). `Interpolate()` interpolates. None, the default,
        interpolates, but integrates fewer than 1024 pairs of small variances, and those for which
        the interpolant estimates its error to be above half of the limits.

    Returns:
      `I`, of the shape that the arguments broadcast to.

    Raises:
      TypeError, ValueError, NotImplementedError: `n_classes`, `order` or `method` is not one of
        the above.
    """
    surrogate = parse(order)
    arrays, dtype = as_real(var1=var1, cov12=cov12, var2=var2)
    ((covariance, _),) = covariances(
        [Pairs(*arrays)],
        n_classes=check_n_classes(n_classes),
        surrogate=surrogate,
        method=check_method(method, surrogate),
    )
    return covariance.astype(dtype)


def methods(surrogate: Surrogate) -> tuple[Method, ...]:
    """What evaluates softmax over classes."""
    return Interpolate(), Direct()


def check_method(method: Any, surrogate: Surrogate) -> Method | None:
    """`method`, or what is wrong with it; None leaves the choice to the pairs that come."""
    if method is None:
        return None
    return choose(method, *methods(surrogate), axis=f"{surrogate} over classes")


def covariances(
    requests: Sequence[Pairs], *, n_classes: int, surrogate: Surrogate, method: Method | None
) -> list[tuple[Float[Array, "..."], Float[Array, "..."]]]:
    """`(I, dI / dc)` for every one of `requests`, which share one table.

    Arguments as those of `class_covariance`; each result has the shape that its request
    broadcasts to.
    """
    dtype = jnp.result_type(float, *(array for request in requests for array in request))
    shapes = [jnp.broadcast_shapes(*(array.shape for array in request)) for request in requests]
    if n_classes == 1:  # the output is constant
        return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for shape in shapes]

    layouts = [_Layout(request, shape) for request, shape in zip(requests, shapes, strict=True)]
    blocks = [
        Pairs(a.astype(dtype), c.astype(dtype), b.astype(dtype))
        for a, c, b in (layout.arrays for layout in layouts)
    ]
    near = _is_near(blocks, n_classes, surrogate, method)
    results = _covariances(
        blocks, n_classes=n_classes, surrogate=surrogate, method=method, near=near
    )
    return [
        (layout.restore(value), layout.restore(slope))
        for layout, (value, slope) in zip(layouts, results, strict=True)
    ]


def largest_near(n_classes: int, surrogate: Surrogate) -> float:
    """The largest variance at which Mehler's formula and the interpolant on it are right."""
    if surrogate.has_closed_form:
        return 20.0
    return 10.0 if n_classes >= 10 else 4.0


def _is_near(
    blocks: Sequence[Pairs], n_classes: int, surrogate: Surrogate, method: Method | None
) -> bool | None:
    """Whether to evaluate as for small variances; None where only numbers yet to come tell.

    What is known beforehand spares the compilation of the other branch.
    """
    # In float32 the samples of softmax that come with the package are good enough at any variance:
    # 1e-5 of value and 4e-5 of slope, up to 100 (measured, n = 2, 10, 1000).
    single = jnp.finfo(blocks[0].cov12.dtype).bits < 64
    if single and surrogate.is_shift_invariant and method != Direct():
        return False
    largest = _largest_variance(blocks)
    try:
        return bool(largest <= largest_near(n_classes, surrogate))
    except jax.errors.ConcretizationTypeError:
        return None


def _largest_variance(blocks: Sequence[Pairs]) -> Array:
    variances = [array for block in blocks for array in (block.var1, block.var2) if array.size]
    return functools.reduce(jnp.maximum, (jnp.max(array) for array in variances), jnp.zeros(()))


class _Layout:
    """Reshapes pairs to `var1: (z, x)`, `cov12: (z, x, y)`, `var2: (z, y)`.

    Axes along which only `var1` varies are gathered in `x`, those of `var2` in `y`, all others in
    `z`: a kernel of `n1 x n2` inputs has `n1 + n2` inputs to prepare, not `n1 n2`.
    """

    def __init__(self, pairs: Pairs, shape: tuple[int, ...]):
        a, c, b = (array.reshape((1,) * (len(shape) - array.ndim) + array.shape) for array in pairs)
        axes = range(len(shape))
        x = [i for i in axes if a.shape[i] == shape[i] > 1 == b.shape[i]]
        y = [i for i in axes if b.shape[i] == shape[i] > 1 == a.shape[i]]
        z = [i for i in axes if i not in x and i not in y]
        self._order = (*z, *x, *y)
        self._shape = tuple(shape[i] for i in self._order)
        sizes = [math.prod(shape[i] for i in group) for group in (z, x, y)]

        def gather(array: Array, varying: list[int], *sizes: int) -> Array:
            target = [shape[i] if i in varying else 1 for i in axes]
            array = jnp.broadcast_to(array, target)
            return array.transpose(self._order).reshape(sizes)

        self.arrays = Pairs(
            gather(a, z + x, sizes[0], sizes[1]),
            gather(c, list(axes), *sizes),
            gather(b, z + y, sizes[0], sizes[2]),
        )

    def restore(self, array: Array) -> Array:
        inverse = sorted(range(len(self._order)), key=self._order.__getitem__)
        return array.reshape(self._shape).transpose(inverse)


@functools.partial(jax.jit, static_argnames=("n_classes", "surrogate", "method", "near"))
def _covariances(
    blocks: list[Pairs],
    *,
    n_classes: int,
    surrogate: Surrogate,
    method: Method | None,
    near: bool | None,
) -> list[tuple[Array, Array]]:
    """`(I, dI / dc)` for blocks, compiled also when called eagerly.

    Args:
      near: whether all variances are within `largest_near`; None where only the numbers tell.
    """

    def close(blocks: list[Pairs]) -> list[tuple[Array, Array]]:
        return _near(blocks, n_classes, surrogate, method)

    def wide(blocks: list[Pairs]) -> list[tuple[Array, Array]]:
        return [_far(block, n_classes, surrogate, method) for block in blocks]

    if near is not None:
        return close(blocks) if near else wide(blocks)
    limit = largest_near(n_classes, surrogate)
    inside = lax.stop_gradient(_largest_variance(blocks)) <= limit

    def close_clipped(blocks: list[Pairs]) -> list[tuple[Array, Array]]:
        # Under `vmap` both branches run: this one must stay finite where it is not chosen.
        return close([Pairs(*(jnp.clip(x, -limit, limit) for x in block)) for block in blocks])

    return lax.cond(inside, close_clipped, wide, blocks)


def _far(
    block: Pairs, n_classes: int, surrogate: Surrogate, method: Method | None
) -> tuple[Array, Array]:
    if method != Direct() and n_classes <= grids.LARGEST_N_CLASSES:
        level = grids.level(surrogate, n_classes, jnp.finfo(block.cov12.dtype).bits)
        value, slope = grids.evaluate(level, *block, fused=block.cov12.size >= _FUSED_PAIRS)
        largest = jnp.maximum(block.var1[:, :, None], block.var2[:, None, :])
        return value, jnp.where(largest <= grids.LARGEST_OF_SLOPES, slope, jnp.nan)
    pair = functools.partial(integral.pair, n_classes=n_classes, surrogate=surrogate)
    pairs = jnp.broadcast_arrays(block.var1[:, :, None], block.cov12, block.var2[:, None, :])
    # One after the other: quadrature keeps up to 10 MB for each. Rematerialised in the backward
    # pass, which otherwise would keep every pair's intermediates.
    flat = tuple(array.ravel() for array in pairs)
    results = lax.map(jax.checkpoint(lambda each: pair(*each)), flat)
    value, slope = (result.reshape(block.cov12.shape) for result in results)
    return value, slope


def _near(
    blocks: list[Pairs], n_classes: int, surrogate: Surrogate, method: Method | None
) -> list[tuple[Array, Array]]:
    # I is a smooth function of (a, c, b) at a = 0, but the rules see a through its root.
    blocks = [Pairs(off_zero(a), c, off_zero(b)) for a, c, b in blocks]
    quotients = _near_quotients(blocks, n_classes, surrogate, method)
    return [
        (quotient * block.cov12, slope)
        for block, (quotient, slope) in zip(blocks, quotients, strict=True)
    ]


def _near_quotients(
    blocks: list[Pairs], n_classes: int, surrogate: Surrogate, method: Method | None
) -> list[tuple[Array, Array]]:
    """`(I / c, dI / dc)` for blocks of positive variances."""
    n_pairs = sum(block.cov12.size for block in blocks)

    def direct() -> list[tuple[Array, Array]]:
        return [_direct(block, n_classes, surrogate) for block in blocks]

    if method == Direct() or (method is None and n_pairs < _TABLE_PAIRS):
        return direct()

    variances = [array for block in blocks for array in (block.var1, block.var2) if array.size]
    least = functools.reduce(jnp.minimum, (jnp.min(array) for array in variances))
    largest = _largest_variance(blocks).astype(least.dtype)
    shapes = interpolant.shapes(n_classes)
    build = functools.partial(
        interpolant.build_if_meant, least, largest, n_classes=n_classes, surrogate=surrogate
    )

    def interpolate(table: interpolant.Table) -> list[tuple[Array, Array]]:
        return [_interpolate(block, table) for block in blocks]

    if method == Interpolate():
        return interpolate(build(shape=shapes[-1]))

    tolerance = interpolant.tolerance(largest, surrogate)

    def first_good(shapes: Sequence[interpolant.Shape]) -> list[tuple[Array, Array]]:
        if not shapes:
            return direct()
        table = build(shape=shapes[0])
        return lax.cond(
            table.error < tolerance, lambda: interpolate(table), lambda: first_good(shapes[1:])
        )

    return first_good(shapes)


def _direct(block: Pairs, n_classes: int, surrogate: Surrogate) -> tuple[Array, Array]:
    prepare = functools.partial(mehler.expand, n_classes=n_classes, surrogate=surrogate)
    pair = functools.partial(mehler.pair, n_classes=n_classes)
    return _by_blocks(
        block,
        jax.vmap(jax.vmap(prepare)),
        jax.vmap(jax.vmap(prepare)),
        jax.vmap(jax.vmap(jax.vmap(pair, (None, 0, 0)), (0, None, 0))),
        *_DIRECT_BLOCK,
    )


@jax.custom_jvp
def _interpolate(block: Pairs, table: interpolant.Table) -> tuple[Array, Array]:
    """`(I / c, dI / dc)` for all pairs at once, which needs no memory but for the results."""
    rows, columns = table.rows(block.var1), table.basis(block.var2)
    fused = block.cov12.size >= _FUSED_PAIRS
    return _evaluate((block.var1, rows), (block.var2, columns), block.cov12, fused=fused)


@_interpolate.defjvp
def _interpolate_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    # By blocks, since the derivative keeps an array of the size of the pairs for every degree.
    def by_blocks(block: Pairs, table: interpolant.Table) -> tuple[Array, Array]:
        return _by_blocks(
            block,
            lambda var1: (var1, table.rows(var1)),
            lambda var2: (var2, table.basis(var2)),
            functools.partial(_evaluate, fused=False),
            *_TABLE_BLOCK,
        )

    return _interpolate(*primals), jax.jvp(by_blocks, primals, tangents)[1]


def _evaluate(
    one: tuple[Array, Array], two: tuple[Array, Array], cov12: Array, *, fused: bool
) -> tuple[Array, Array]:
    """`(I / c, dI / dc)` from the variances and what `Table` makes of them."""
    (var1, rows), (var2, columns) = one, two
    rho = cov12 * lax.rsqrt(var1[:, :, None] * var2[:, None, :])
    value, slope = (interpolant.evaluate(each, columns, rho, fused=fused) for each in rows)
    return value, slope


def _by_blocks(
    pairs: Pairs,
    prepare_rows: Callable[[Array], Any],
    prepare_columns: Callable[[Array], Any],
    evaluate: Callable[[Any, Any, Array], Any],
    n_pairs: int,
    n_columns: int,
) -> Any:
    """`evaluate(prepare_rows(var1), prepare_columns(var2), cov12)`, about `n_pairs` at a time."""
    z, x, y = pairs.cov12.shape
    y_step = max(1, min(y, n_columns))
    x_step = max(1, min(x, n_pairs // y_step))
    z_step = max(1, min(z, n_pairs // (x_step * y_step)))

    def over_z(a: Array, c: Array, b: Array) -> Any:
        def over_x(a: Array, c: Array) -> Any:
            one = prepare_rows(a)

            def over_y(c: Array, b: Array) -> Any:
                return evaluate(one, prepare_columns(b), c)

            return _map_slices(over_y, (c, b), (2, 1), 2, y_step)

        return _map_slices(over_x, (a, c), (1, 1), 1, x_step)

    return _map_slices(over_z, tuple(pairs), (0, 0, 0), 0, z_step)


def _map_slices(
    fn: Callable[..., Any],
    arrays: tuple[Array, ...],
    axes: tuple[int, ...],
    out_axis: int,
    length: int,
) -> Any:
    """`fn(*arrays)` by slices of about `length` along `axes`, one after the other.

    The k-th slice has every entry congruent to k, not a run of neighbours: where the axis is
    sharded over devices, each of them works on its own part of every slice.

    Rematerialised in the backward pass, which otherwise would keep every slice's intermediates.
    """
    size = arrays[0].shape[axes[0]]
    n_slices = -(-size // length)
    if n_slices <= 1:
        return fn(*arrays)
    length = -(-size // n_slices)

    def split(array: Array, axis: int) -> Array:
        padding = [(0, 0)] * array.ndim
        padding[axis] = (0, length * n_slices - size)
        array = jnp.pad(array, padding, mode="edge")
        shape = (*array.shape[:axis], length, n_slices, *array.shape[axis + 1 :])
        return jnp.moveaxis(array.reshape(shape), axis + 1, 0)

    def merge(stacked: Array) -> Array:
        array = jnp.moveaxis(stacked, 0, out_axis + 1)
        shape = (*array.shape[:out_axis], length * n_slices, *array.shape[out_axis + 2 :])
        return lax.slice_in_dim(array.reshape(shape), 0, size, axis=out_axis)

    slices = tuple(split(array, axis) for array, axis in zip(arrays, axes, strict=True))
    return jax.tree.map(merge, lax.map(jax.checkpoint(lambda args: fn(*args)), slices))
