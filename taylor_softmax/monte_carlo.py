"""Kernels by plain sampling, and errors of estimated kernels: means with standard errors."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from jax.typing import ArrayLike

from taylor_softmax._numerics.arguments import (
    Validated,
    as_real,
    broadcast_covariances,
    check_integer,
    check_n_classes,
    check_pairs,
)
from taylor_softmax._numerics.precision import einsum
from taylor_softmax._numerics.statistics import Running, none_yet
from taylor_softmax._numerics.surrogate import Surrogate, parse

__all__ = ["Estimate", "class_second_moment", "joint_second_moment", "replicate"]

# Largest number of random numbers drawn at once, over all pairs: 32 MB in float64.
_CHUNK = 1 << 22


class Estimate(NamedTuple):
    """A Monte Carlo estimate.

    Attributes:
      mean: sample means.
      stderr: standard errors of the means, of the same shape.
    """

    mean: Array
    stderr: Array


def replicate(
    network: Callable[[int], Any],
    x1: Any,
    x2: Any = None,
    get: Validated[str | tuple[str, ...]] = "nngp",
    *,
    n_replicates: Validated[int] = 8,
    **kwargs: Any,
) -> Any:
    """How wrong a network's kernel is: its mean and standard error over independent estimates.

    Softmax over positions and attention estimate their kernels. With another seed they draw other
    points:

        def network(seed):
            method = methods.QuasiMonteCarlo(seed=seed)
            return stax.serial(stax.Conv(64, (3,)), stax.Softmax(axis=1, method=method))

        mean, stderr = monte_carlo.replicate(network, x1, x2, "ntk")

    The error of the mean is about one standard error, that of a single kernel about
    `sqrt(n_replicates)` of them. A network without such layers has standard errors of 0.

    Args:
      network: a function that takes a seed, from 0 to `n_replicates - 1`, and returns
        `(init_fn, apply_fn, kernel_fn)`. Layers of one network may share a seed.
      x1, x2: inputs of `kernel_fn`.
      get: name of a kernel, such as `"nngp"` or `"ntk"`, or a tuple of names.
      n_replicates: number of estimates, at least 2. The function takes the time of so many kernels.
      **kwargs: further arguments of `kernel_fn`, such as `mask_constant`.

    Returns:
      `Estimate(mean, stderr)` of arrays. For a tuple of names, a tuple of such estimates.

    Raises:
      TypeError: `n_replicates` is not an integer, `get` is neither a name nor a tuple of names, or
        `network(seed)` does not return a network.
      ValueError: `n_replicates` is less than 2.
    """
    n_replicates = check_integer("n_replicates", n_replicates, least=2)
    names = get if isinstance(get, tuple) else (get,)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f'`get` must be the name of a kernel or a tuple of names, such as "nngp", got {get!r}.'
        )
    states: list[Running] | None = None
    for seed in range(n_replicates):
        layers = network(seed)
        if not (isinstance(layers, tuple) and len(layers) == 3):
            raise TypeError(
                "`network(seed)` must return a network, `(init_fn, apply_fn, kernel_fn)`, got "
                f"{type(layers).__name__}. Return what `stax.serial` returns."
            )
        kernel_fn = layers[2]
        kernels = [jnp.asarray(kernel) for kernel in kernel_fn(x1, x2, names, **kwargs)]
        states = states or [none_yet(kernel) for kernel in kernels]
        states = [state.add(kernel[None]) for state, kernel in zip(states, kernels, strict=True)]
    assert states is not None
    estimates = tuple(Estimate(state.mean, state.stderr()) for state in states)
    return estimates if isinstance(get, tuple) else estimates[0]


def class_second_moment(
    key: Array,
    var1: Validated[ArrayLike],
    cov12: Validated[ArrayLike],
    var2: Validated[ArrayLike],
    *,
    n_classes: Validated[int],
    order: Validated[int | None] = None,
    n_samples: Validated[int],
) -> Estimate:
    """`E[y(u) y(v)^T]` by sampling i.i.d. pairs of logits, `(u_i, v_i) ~ N(0, [[a, c], [c, b]])`.

    The estimate does not use that classes are exchangeable: each of the `C x C` entries has its own
    samples. They are drawn in chunks on JAX's default device, so that memory is bounded and only
    time limits `n_samples`. The same `key` gives the same samples.

    Args:
      key: `jax.random.key` (or `PRNGKey`).
      var1, var2: variances `a` and `b` of the logits, nonnegative. All three arrays broadcast.
      cov12: covariances `c`. A `c` that exceeds `sqrt(a b)` by rounding is taken as that.
      n_classes: number `C` of classes.
      order: even order of the Taylor softmax, or None for softmax itself.
      n_samples: number of samples, at least 2.

    Returns:
      `Estimate(mean, stderr)`, both of shape `(..., C, C)`. Pairs whose traced arguments are not
      as above are NaN.

    Raises:
      TypeError: `n_classes`, `order` or `n_samples` is not an integer, or an array is not real.
      ValueError: an argument is not as above, or shapes do not broadcast.
      NotImplementedError: `order` is beyond 32.
    """
    n_classes, surrogate = check_n_classes(n_classes), parse(order)
    n_samples = check_integer("n_samples", n_samples, least=2)
    arrays, dtype = as_real(var1=var1, cov12=cov12, var2=var2)
    valid = check_pairs(*arrays, dtype=dtype)
    shape = valid.shape
    var1, cov12, var2 = (jnp.broadcast_to(x, shape).reshape(-1) for x in arrays)

    root = jnp.sqrt(var1)
    # v given u. Where var1 is 0, the slope does not matter, and division by 0 is avoided.
    slope = jnp.where(var1 > 0, cov12 / jnp.where(var1 > 0, root, 1), 0)
    conditional_root = jnp.sqrt(jnp.maximum(var2 - slope**2, 0))

    factors = jnp.stack([root, slope, conditional_root])
    estimate = _second_moment(
        key, factors, _draw_classes, (var1.size, n_classes), surrogate, n_samples, _CHUNK
    )
    shape = *shape, n_classes, n_classes
    estimate = (jnp.where(valid[..., None, None], x.reshape(shape), jnp.nan) for x in estimate)
    return Estimate(*(x.astype(dtype) for x in estimate))


def joint_second_moment(
    key: Array,
    cov11: Validated[ArrayLike],
    cov12: Validated[ArrayLike],
    cov22: Validated[ArrayLike],
    *,
    order: Validated[int | None] = None,
    n_samples: Validated[int],
) -> Estimate:
    """`E[y(u) y(v)^T]` by sampling logits `(u, v) ~ N(0, [[K11, K12], [K12^T, K22]])`.

    Covariances may be singular. Memory and `key` are as in `class_second_moment`.

    Args:
      key: `jax.random.key` (or `PRNGKey`).
      cov11, cov12, cov22: `K11`, `K12`, `K22`, each `(..., S, S)`.
      order: even order of the Taylor softmax, or None for softmax itself.
      n_samples: number of samples, at least 2.

    Returns:
      `Estimate(mean, stderr)`, both of shape `(..., S, S)`.

    Raises:
      TypeError: `order` or `n_samples` is not an integer, or a covariance is not real.
      ValueError: `order` or `n_samples` is not as above; a covariance is not of shape
        `(..., S, S)`, is not finite, or has a negative variance.
      NotImplementedError: `order` is beyond 32.
    """
    surrogate = parse(order)
    n_samples = check_integer("n_samples", n_samples, least=2)
    *covs, dtype = broadcast_covariances(cov11, cov12, cov22)
    shape, size = covs[0].shape, covs[0].shape[-1]
    k11, k12, k22 = (cov.reshape(-1, size, size) for cov in covs)
    sigma = jnp.block([[k11, k12], [jnp.swapaxes(k12, 1, 2), k22]])
    # The root is made of eigenvectors, since Cholesky's needs a positive definite matrix.
    values, vectors = jnp.linalg.eigh(sigma)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None, :]

    estimate = _second_moment(
        key, root, _draw_positions, (len(root), size), surrogate, n_samples, _CHUNK
    )
    return Estimate(*(x.reshape(shape).astype(dtype) for x in estimate))


def _draw_classes(key: Array, factors: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Samples of `u` and `v` from the factors of `class_second_moment`, both of `shape`."""
    root, slope, conditional_root = factors[..., None]
    x, y = random.normal(key, (2, *shape), factors.dtype)
    return root * x, slope * x + conditional_root * y


def _draw_positions(key: Array, root: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Samples of `u` and `v` from the root of their joint covariance, both of `shape`."""
    *leading, size = shape
    x = random.normal(key, (*leading, 2 * size), root.dtype)
    z = einsum("bij,nbj->nbi", root, x)
    return z[..., :size], z[..., size:]


@functools.partial(jax.jit, static_argnames=("draw", "shape", "surrogate", "n_samples", "at_once"))
def _second_moment(
    key: Array,
    factors: Array,
    draw: Callable[[Array, Array, tuple[int, ...]], tuple[Array, Array]],
    shape: tuple[int, int],
    surrogate: Surrogate,
    n_samples: int,
    at_once: int,
) -> tuple[Array, Array]:
    """Mean of `y(u) y(v)^T` and its standard error, both `(pairs, C, C)`.

    Args:
      factors: what `draw` needs of the covariances.
      draw: `draw(key, factors, (n, pairs, C))` returns `n` samples of `u` and of `v`.
      shape: `(pairs, C)`.
      at_once: largest number of random numbers in memory.
    """
    n_pairs, size = shape
    chunk = max(1, min(n_samples, at_once // (max(1, n_pairs) * size * (size + 2))))
    n_chunks, remainder = divmod(n_samples, chunk)

    def draw_more(state: Running, key: Array, n: int) -> Running:
        left, right = (surrogate.softmax(z) for z in draw(key, factors, (n, *shape)))
        return state.add(left[..., :, None] * right[..., None, :])

    state = none_yet(jnp.zeros((n_pairs, size, size), factors.dtype))
    state = lax.fori_loop(
        0, n_chunks, lambda i, state: draw_more(state, random.fold_in(key, i), chunk), state
    )
    if remainder:
        state = draw_more(state, random.fold_in(key, n_chunks), remainder)
    return state.mean, state.stderr()
