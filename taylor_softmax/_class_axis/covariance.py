"""The class covariance `I` for whole arrays of pairs: shapes, memory and choice of method.

`integral` has the mathematics of one pair, `interpolant` the interpolant for many.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from taylor_softmax._class_axis import integral, interpolant
from taylor_softmax._numerics.arguments import Validated, check_n_classes
from taylor_softmax._numerics.surrogate import Surrogate, parse
from taylor_softmax.methods import Direct, Interpolate, Method, choose

# From this many pairs on sums are unrolled into one loop over the pairs, with a cheaper set of
# terms where variances allow: it takes a second more to compile, and saves as much time.
_FUSED_PAIRS = 1 << 18


# Of a list of pairs, so many at once: each brings terms of its own, up to 8 KB, where a matrix of
# pairs brings them for rows and columns only.
_LIST = 4096


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
) -> Array:
    """The number `I(a, c, b; n)` that determines the class-by-class second moment of a softmax.

    For logits `(u_i, v_i) ~ N(0, [[a, c], [c, b]])`, i.i.d. over `n` classes, and
    `y(z)_i = f(z_i) / sum_j f(z_j)`:

        E[y(u) y(v)^T] = 1 1^T / n^2 + I (Id - 1 1^T / n),

    so that the same class has `1/n^2 + (1 - 1/n) I`, two classes have `1/n^2 - I/n`, and the
    covariance of the outputs is `I (Id - 1 1^T / n)`. `I` is dimensionless and at most
    `1 / n`. Evaluated from the Laplace identity `I = int int L_ts exp(n L) dt ds` with
    `L(t, s) = log E[exp(-t f(u_1) - s f(v_1))]`, without approximation other than quadrature: see
    the docstring of the module `taylor_softmax._class_axis.integral`.

    Error relative to `I` at correlation 1, as tested: order 2: 1e-7 at variances up to 20; other
    orders and softmax: 1e-6 at variances up to 4 and `n >= 3`, 1e-4 at variances up to 10 and
    `n >= 10`, and up to 4 for `n = 2`. 1e-4 in float32. Variances of 0, correlations of 1 and
    (by rounding) beyond are fine. Differentiable in all three arguments, to any order.

    Args:
      var1: variances `a` of the logits at the first input, nonnegative.
      cov12: covariances `c`, `c^2 <= a b`.
      var2: variances `b` of the logits at the second input, nonnegative.
      n_classes: number `n` of classes.
      order: even order of the Taylor polynomial `f`, or `None` for `f = exp`, softmax itself.
      method: `Direct()` integrates for every entry. `Interpolate()` interpolates between Chebyshev
        nodes over the range of the variances, whatever that gives. None, the default, interpolates
        for 1024 pairs and more where the interpolant's own error estimate is below half of the
        limits above, and integrates directly otherwise.

    Returns:
      `I`, of the shape that the arguments broadcast to.

    Raises:
      TypeError, ValueError, NotImplementedError: `n_classes`, `order` or `method` is not one of
        the above.
    """
    surrogate = parse(order)
    ((covariance, _),) = covariances(
        [Pairs(jnp.asarray(var1), jnp.asarray(cov12), jnp.asarray(var2))],
        n_classes=check_n_classes(n_classes),
        surrogate=surrogate,
        method=check_method(method, surrogate),
    )
    return covariance


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
) -> list[tuple[Array, Array]]:
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
    results = _covariances(blocks, n_classes=n_classes, surrogate=surrogate, method=method)
    return [
        (layout.restore(value), layout.restore(slope))
        for layout, (value, slope) in zip(layouts, results, strict=True)
    ]


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


@functools.partial(jax.jit, static_argnames=("n_classes", "surrogate", "method"))
def _covariances(
    blocks: list[Pairs], *, n_classes: int, surrogate: Surrogate, method: Method | None
) -> list[tuple[Array, Array]]:
    """`(I, dI / dc)` for blocks, compiled also when called eagerly."""
    if method == Direct() or n_classes > interpolant.LARGEST_N_CLASSES:
        return [_direct(block, n_classes, surrogate) for block in blocks]
    bits = jnp.finfo(blocks[0].cov12.dtype).bits

    fused = sum(block.cov12.size for block in blocks) >= _FUSED_PAIRS

    def interpolate(largest: float) -> list[tuple[Array, Array]]:
        # NumPy, once per process: not part of the graph.
        level = interpolant.level(surrogate, n_classes, bits, largest)
        evaluate = functools.partial(interpolant.evaluate, level, fused=fused)
        return [_by_lists(evaluate, block) for block in blocks]

    if not fused:
        return interpolate(interpolant.LARGEST_VARIANCE)
    variances = [array for block in blocks for array in (block.var1, block.var2) if array.size]
    largest = functools.reduce(jnp.maximum, (jnp.max(array) for array in variances))
    return lax.cond(
        lax.stop_gradient(largest) <= interpolant.NEAR,
        lambda: interpolate(interpolant.NEAR),
        lambda: interpolate(interpolant.LARGEST_VARIANCE),
    )


def _direct(block: Pairs, n_classes: int, surrogate: Surrogate) -> tuple[Array, Array]:
    """One pair after the other: quadrature keeps up to 10 MB for each."""
    pair = functools.partial(integral.pair, n_classes=n_classes, surrogate=surrogate)
    var1, cov12, var2 = jnp.broadcast_arrays(
        block.var1[:, :, None], block.cov12, block.var2[:, None, :]
    )
    flat = tuple(array.ravel() for array in (var1, cov12, var2))
    # Rematerialised in the backward pass, which otherwise would keep every pair's intermediates.
    values, slopes = lax.map(jax.checkpoint(lambda each: pair(*each)), flat)
    return values.reshape(cov12.shape), slopes.reshape(cov12.shape)


def _by_lists(evaluate: Callable[..., tuple[Array, Array]], block: Pairs) -> tuple[Array, Array]:
    """`evaluate(*block)`, `_LIST` entries of the first axis at a time."""
    size = block.cov12.shape[0]
    n_slices = -(-size // _LIST)
    if n_slices <= 1:
        return evaluate(*block)
    length = -(-size // n_slices)

    # The k-th slice has every entry congruent to k, not a run of neighbours: where the axis is
    # sharded over devices, each of them works on its own part of every slice.
    def split(array: Array) -> Array:
        padding = [(0, length * n_slices - size)] + [(0, 0)] * (array.ndim - 1)
        array = jnp.pad(array, padding, mode="edge")
        return jnp.moveaxis(array.reshape(length, n_slices, *array.shape[1:]), 1, 0)

    def merge(stacked: Array) -> Array:
        return jnp.moveaxis(stacked, 0, 1).reshape(-1, *stacked.shape[2:])[:size]

    # Rematerialised in the backward pass, which otherwise would keep every slice's intermediates.
    one = jax.checkpoint(lambda each: evaluate(*each))
    return jax.tree.map(merge, lax.map(one, tuple(map(split, block))))
