"""Ground truth by sampling, with standard errors."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from jax.typing import ArrayLike

from taylor_softmax import _surrogate
from taylor_softmax._classes import check_n_classes

# Numbers drawn at once, over all pairs: 32 MB in float64.
_CHUNK = 1 << 22


class Estimate(NamedTuple):
    """A Monte Carlo estimate.

    Attributes:
      mean: sample means.
      stderr: their standard errors, of the same shape.
    """

    mean: Array
    stderr: Array


def class_second_moment(
    key: Array,
    var1: ArrayLike,
    cov12: ArrayLike,
    var2: ArrayLike,
    *,
    n_classes: int,
    order: int | None = None,
    n_samples: int,
) -> Estimate:
    """`E[y(u) y(v)^T]` by sampling the logits: `(u_i, v_i) ~ N(0, [[a, c], [c, b]])`, i.i.d.

    Makes no use of exchangeability: each of the `C x C` entries has its own estimate. Samples are
    drawn in chunks of bounded memory, so that `n_samples` is limited by time alone, on JAX's
    default device. The same `key` gives the same samples.

    Args:
      key: `jax.random.key` (or `PRNGKey`).
      var1, cov12, var2: `a`, `c`, `b`, arrays that broadcast; `c` is taken as at most
        `sqrt(a b)` in size.
      n_classes: number `C` of classes.
      order: even order of the Taylor softmax, or None for softmax itself.
      n_samples: at least 2.

    Returns:
      `(mean, stderr)`, each of shape `(..., C, C)`.

    Raises:
      TypeError, ValueError: `n_classes`, `order` or `n_samples` is not one of the above.
    """
    n_classes, order = check_n_classes(n_classes), _surrogate.check_order(order)
    if isinstance(n_samples, bool) or not hasattr(n_samples, "__index__"):
        raise TypeError(f"`n_samples` must be an integer, got {n_samples!r}.")
    if n_samples < 2:
        raise ValueError(f"`n_samples` must be at least 2 for a standard error, got {n_samples}.")
    arrays = tuple(jnp.asarray(x) for x in (var1, cov12, var2))
    dtype = jnp.result_type(float, *arrays)
    shape = jnp.broadcast_shapes(*(x.shape for x in arrays))
    var1, cov12, var2 = (jnp.broadcast_to(x.astype(dtype), shape).reshape(-1) for x in arrays)

    per_sample = max(1, var1.size) * n_classes * (n_classes + 2)
    chunk = max(1, min(int(n_samples), _CHUNK // per_sample))
    n_chunks, remainder = divmod(int(n_samples), chunk)
    moments = _class_moments(key, var1, cov12, var2, n_classes, order, chunk, n_chunks, remainder)
    return Estimate(*(x.reshape(*shape, n_classes, n_classes) for x in moments))


@functools.partial(
    jax.jit, static_argnames=("n_classes", "order", "chunk", "n_chunks", "remainder")
)
def _class_moments(
    key: Array,
    var1: Array,
    cov12: Array,
    var2: Array,
    n_classes: int,
    order: int | None,
    chunk: int,
    n_chunks: int,
    remainder: int,
) -> tuple[Array, Array]:
    root = jnp.sqrt(var1)
    # v given u. The guard is for variance 0, where the slope does not matter.
    slope = jnp.where(var1 > 0, cov12 / jnp.where(var1 > 0, root, 1), 0)
    rest = jnp.sqrt(jnp.maximum(var2 - slope**2, 0))

    def products(key: Array, n: int) -> Array:
        """`y(u) y(v)^T` of `n` samples, `(n, pairs, C, C)`."""
        x, y = random.normal(key, (2, n, n_classes, var1.size), var1.dtype)
        u, v = root * x, slope * x + rest * y
        left, right = (_surrogate.softmax(z, order=order, axis=1) for z in (u, v))
        return jnp.einsum("sip,sjp->spij", left, right)

    # Chan's update of mean and sum of squared deviations: sums of squares would cancel.
    def merge(state: tuple[Array, Array, Array], key: Array, n: int) -> tuple[Array, Array, Array]:
        count, mean, deviation = state
        samples = products(key, n)
        chunk_mean = jnp.mean(samples, 0)
        chunk_deviation = jnp.sum((samples - chunk_mean) ** 2, 0)
        total, step = count + n, chunk_mean - mean
        mean = mean + step * (n / total)
        deviation = deviation + chunk_deviation + step**2 * (count * (n / total))
        return total, mean, deviation

    zeros = jnp.zeros((var1.size, n_classes, n_classes), var1.dtype)
    state = (jnp.zeros((), var1.dtype), zeros, zeros)
    state = lax.fori_loop(0, n_chunks, lambda i, s: merge(s, random.fold_in(key, i), chunk), state)
    if remainder:
        state = merge(state, random.fold_in(key, n_chunks), remainder)
    count, mean, deviation = state
    return mean, jnp.sqrt(deviation / (count - 1) / count)
