"""The class covariance `I` for whole arrays of pairs: shapes and choice of method.

Interpolation serves one pair and ten million. `samples` come with the package, in `coordinates`
that need few of them; `terms` are made of the samples once a process; `evaluation` sums the terms.
Quadrature pair by pair, `integral`, is what they were checked against. It also serves more classes
than the samples span.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float

from taylor_softmax._class_axis import integral
from taylor_softmax._class_axis.coordinates import LARGEST_N_CLASSES
from taylor_softmax._class_axis.evaluation import evaluate
from taylor_softmax._class_axis.samples import near_limit
from taylor_softmax._class_axis.terms import interpolant
from taylor_softmax._numerics.arguments import Validated, as_real, check_n_classes, check_pairs
from taylor_softmax._numerics.surrogate import Surrogate, parse
from taylor_softmax.methods import Direct, Interpolate, Method, choose

# From this many pairs on, few terms are summed in one fused loop. It takes longer to compile, and
# half the time and memory to run.
_MANY_PAIRS = 1 << 14


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

    Errors of `I` and of its slope, relative to the geometric mean of those of either variance at
    correlation 1: the rows on softmax over classes in `taylor_softmax._numerics.errors`. Variances
    of 0, correlations of 1 and (by rounding) beyond are fine. Differentiable in all three
    arguments, to any order. Beyond a variance of 1e6 `I` is that at 1e6 and the same correlation.

    Args:
      var1: variances `a` of the logits at the first input, nonnegative.
      cov12: covariances `c`, `c^2 <= a b`.
      var2: variances `b` of the logits at the second input, nonnegative.
      n_classes: number `n` of classes.
      order: even order of the Taylor polynomial `f`, or `None` for `f = exp`, softmax itself.
      method: `Interpolate()`, which None, the default, stands for up to 1e6 classes, or `Direct()`,
        which integrates for every entry, at 0.5 ms (order 2) to 150 ms (order 32).

    Returns:
      `I`, of the shape that the arguments broadcast to.

    Raises:
      TypeError, ValueError, NotImplementedError: an argument is not one of the above: variances
        negative or not finite, a covariance beyond `sqrt(a b)` by more than rounding. Where values
        are traced, those entries are NaN.
    """
    surrogate = parse(order)
    arrays, dtype = as_real(var1=var1, cov12=cov12, var2=var2)
    valid = check_pairs(*arrays, dtype=dtype)
    ((covariance, _),) = covariances(
        [Pairs(*arrays)],
        n_classes=check_n_classes(n_classes),
        surrogate=surrogate,
        method=check_method(method, surrogate),
        slopes=[False],
    )
    return jnp.where(valid, covariance, jnp.nan).astype(dtype)


def methods(surrogate: Surrogate) -> tuple[Method, ...]:
    """What evaluates softmax over classes."""
    return Interpolate(), Direct()


def check_method(method: Any, surrogate: Surrogate) -> Method | None:
    """`method`, or what is wrong with it; None leaves the choice to the pairs that come."""
    if method is None:
        return None
    return choose(method, *methods(surrogate), axis=f"{surrogate} over classes")


def covariances(
    requests: Sequence[Pairs],
    *,
    n_classes: int,
    surrogate: Surrogate,
    method: Method | None,
    slopes: Sequence[bool],
) -> list[tuple[Float[Array, "..."], Float[Array, "..."] | None]]:
    """`(I, dI / dc)` for every one of `requests`, which are compiled together.

    Arguments as those of `class_covariance`; each result has the shape that its request
    broadcasts to.

    Args:
      slopes: for which requests `dI / dc` is computed; it is None for the others, which take half
        the time to trace and to compile.
    """
    dtype = jnp.result_type(float, *(array for request in requests for array in request))
    shapes = [jnp.broadcast_shapes(*(array.shape for array in request)) for request in requests]
    if n_classes == 1:  # the output is constant
        zeros = [jnp.zeros(shape, dtype) for shape in shapes]
        return [(zero, zero if slope else None) for zero, slope in zip(zeros, slopes, strict=True)]

    layouts = [_Layout(request, shape) for request, shape in zip(requests, shapes, strict=True)]
    blocks = [Pairs(*(array.astype(dtype) for array in layout.arrays)) for layout in layouts]
    if method is None:
        method = Interpolate() if n_classes <= LARGEST_N_CLASSES else Direct()
    is_near = _is_near(blocks, surrogate)
    results = _covariances(
        blocks,
        n_classes=n_classes,
        surrogate=surrogate,
        method=method,
        slopes=tuple(slopes),
        is_near=is_near,
    )
    return [
        (layout.restore(value), None if slope is None else layout.restore(slope))
        for layout, (value, slope) in zip(layouts, results, strict=True)
    ]


def _is_near(blocks: Sequence[Pairs], surrogate: Surrogate) -> bool | None:
    """Whether variances are at most `near_limit`; None where numbers are yet to come.

    Where they are known, the other branch need not be compiled.
    """
    try:
        return bool(_largest_variance(blocks) <= near_limit(surrogate))
    except jax.errors.ConcretizationTypeError:
        return None


def _largest_variance(blocks: Sequence[Pairs]) -> Array:
    variances = [array for block in blocks for array in (block.var1, block.var2) if array.size]
    return functools.reduce(jnp.maximum, map(jnp.max, variances)) if variances else jnp.zeros(())


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


@functools.partial(
    jax.jit, static_argnames=("n_classes", "surrogate", "method", "slopes", "is_near")
)
def _covariances(
    blocks: list[Pairs],
    *,
    n_classes: int,
    surrogate: Surrogate,
    method: Method,
    slopes: tuple[bool, ...],
    is_near: bool | None,
) -> list[tuple[Array, Array | None]]:
    """`(I, dI / dc)` for blocks, compiled also when called eagerly.

    Args:
      is_near: from `_is_near`.
    """
    if isinstance(method, Direct):
        results = (_direct(block, n_classes, surrogate) for block in blocks)
        return [(v, s if slope else None) for (v, s), slope in zip(results, slopes, strict=True)]

    def interpolate(blocks: list[Pairs], is_near: bool) -> list[tuple[Array, Array | None]]:
        bits = jnp.finfo(blocks[0].cov12.dtype).bits
        terms = interpolant(surrogate, n_classes, bits, is_near=is_near)
        return [
            evaluate(terms, *block, slope=slope, many=block.cov12.size >= _MANY_PAIRS)
            for block, slope in zip(blocks, slopes, strict=True)
        ]

    if is_near is not None:
        return interpolate(blocks, is_near)
    traced_is_near = lax.stop_gradient(_largest_variance(blocks)) <= near_limit(surrogate)
    return lax.cond(
        traced_is_near,
        functools.partial(interpolate, is_near=True),
        functools.partial(interpolate, is_near=False),
        blocks,
    )


def _direct(block: Pairs, n_classes: int, surrogate: Surrogate) -> tuple[Array, Array]:
    pair = functools.partial(integral.pair, n_classes=n_classes, surrogate=surrogate)
    pairs = jnp.broadcast_arrays(block.var1[:, :, None], block.cov12, block.var2[:, None, :])
    # One after the other: quadrature keeps up to 10 MB for each. Rematerialised in the backward
    # pass, which otherwise would keep every pair's intermediates.
    flat = tuple(array.ravel() for array in pairs)
    results = lax.map(jax.checkpoint(lambda each: pair(*each)), flat)
    value, slope = (result.reshape(block.cov12.shape) for result in results)
    return value, slope
