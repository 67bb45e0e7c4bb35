"""Ground truth by sampling, and the errors of estimates, as means with standard errors."""

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

    Layers that estimate, softmax over positions and attention, draw other points with another
    seed:

        def network(seed):
            method = methods.QuasiMonteCarlo(seed=seed)
            return stax.serial(stax.Conv(64, (3,)), stax.Softmax(axis=1, method=method))

        mean, stderr = monte_carlo.replicate(network, x1, x2, "ntk")

    A single kernel is off by about `sqrt(n_replicates)` times the standard error, the mean by one
    of it. A network without such layers has standard errors of 0.

    Args:
      network: takes a seed, from 0 to `n_replicates - 1`, and returns `(init_fn, apply_fn,
        kernel_fn)`. Layers of one network may share a seed.
      x1, x2: inputs of `kernel_fn`.
      get: which kernel, such as `"nngp"` and `"ntk"`, or a tuple of them.
      n_replicates: at least 2; it takes the time of so many kernels.
      **kwargs: for `kernel_fn`, such as `mask_constant`.

    Returns:
      `Estimate(mean, stderr)` of arrays, or for a tuple of names a tuple of such estimates.

    Raises:
      TypeError, ValueError: `n_replicates` is not an integer of at least 2; `get` is neither a
        name nor a tuple of names; `network(seed)` is no network.
    """
    n_replicates = check_integer("n_replicates", n_replicates, least=2)
    names = get if isinstance(get, tuple) else (get,)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`get` must be the name of a kernel or a tuple of names, got {get!r}.")
    states: list[Running] | None = None
    for seed in range(n_replicates):
        of_seed = network(seed)
        if not (isinstance(of_seed, tuple) and len(of_seed) == 3):
            raise TypeError(
                "`network(seed)` must return a network, `(init_fn, apply_fn, kernel_fn)`, got "
                f"{type(of_seed).__name__}."
            )
        arrays = [jnp.asarray(each) for each in of_seed[2](x1, x2, names, **kwargs)]
        states = states or [none_yet(each) for each in arrays]
        states = [state.add(each[None]) for state, each in zip(states, arrays, strict=True)]
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
    n_classes, surrogate = check_n_classes(n_classes), parse(order)
    n_samples = check_integer("n_samples", n_samples, least=2)
    arrays, dtype = as_real(var1=var1, cov12=cov12, var2=var2)
    valid = check_pairs(*arrays, dtype=dtype)
    shape = valid.shape
    var1, cov12, var2 = (jnp.broadcast_to(x, shape).reshape(-1) for x in arrays)

    root = jnp.sqrt(var1)
    # v given u. The guard is for variance 0, where the slope does not matter.
    slope = jnp.where(var1 > 0, cov12 / jnp.where(var1 > 0, root, 1), 0)
    rest = jnp.sqrt(jnp.maximum(var2 - slope**2, 0))

    factors = jnp.stack([root, slope, rest])
    estimate = _second_moment(
        key, factors, _draw_classes, (var1.size, n_classes), surrogate, n_samples, _CHUNK
    )
    shape = *shape, n_classes, n_classes
    found = (jnp.where(valid[..., None, None], x.reshape(shape), jnp.nan) for x in estimate)
    return Estimate(*(x.astype(dtype) for x in found))


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

    Covariances may be singular. Memory and `key` as in `class_second_moment`.

    Args:
      key: `jax.random.key` (or `PRNGKey`).
      cov11, cov12, cov22: `K11`, `K12`, `K22`, each `(..., S, S)`.
      order: even order of the Taylor softmax, or None for softmax itself.
      n_samples: at least 2.

    Returns:
      `(mean, stderr)`, each of shape `(..., S, S)`.

    Raises:
      TypeError, ValueError: `order` or `n_samples` is not one of the above; a covariance is not of
        shape `(..., S, S)`.
    """
    surrogate = parse(order)
    n_samples = check_integer("n_samples", n_samples, least=2)
    *covs, dtype = broadcast_covariances(cov11, cov12, cov22)
    shape, size = covs[0].shape, covs[0].shape[-1]
    k11, k12, k22 = (cov.reshape(-1, size, size) for cov in covs)
    sigma = jnp.block([[k11, k12], [jnp.swapaxes(k12, 1, 2), k22]])
    # A root by eigenvectors: Cholesky's needs a positive definite matrix.
    values, vectors = jnp.linalg.eigh(sigma)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None, :]

    estimate = _second_moment(
        key, root, _draw_positions, (len(root), size), surrogate, n_samples, _CHUNK
    )
    return Estimate(*(x.reshape(shape).astype(dtype) for x in estimate))


def _draw_classes(key: Array, factors: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    root, slope, rest = factors[..., None]
    x, y = random.normal(key, (2, *shape), factors.dtype)
    return root * x, slope * x + rest * y


def _draw_positions(key: Array, root: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
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
    """Mean of `y(u) y(v)^T` and its standard error, `(pairs, C, C)`.

    Args:
      draw: `draw(key, factors, (n, pairs, C))` gives `n` samples of `u` and `v` of that shape.
      shape: `(pairs, C)`.
      at_once: numbers held at a time.
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
