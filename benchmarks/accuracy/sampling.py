"""Means over draws of a problem, on all devices, with standard errors."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.accuracy.problems import Problem
from taylor_softmax._numerics.statistics import Running, none_yet

# Random numbers in a chunk of draws.
_CHUNK = 1 << 19


class Estimate(NamedTuple):
    """NNGP and NTK by sampling.

    Attributes:
      mean: `(2, ...)`, of NNGP and NTK.
      stderr: their standard errors.
      n_draws: of all positions and units.
    """

    mean: np.ndarray
    stderr: np.ndarray
    n_draws: int


def sample(
    problem: Problem, key: Array, n_samples: int, devices: Sequence[Any], *, entries: bool
) -> Estimate:
    """Estimates from at least `n_samples` draws, a share of them on each of `devices`.

    Args:
      entries: estimate all entries of the `(positions, positions)` matrices, in place of the sum
        with `problem.weights`.
    """
    units, n_draws = problem.units(n_samples), problem.n_draws(n_samples)
    share = -(-n_draws // len(devices))
    chunk = max(1, min(share, _CHUNK // problem.numbers_per_draw(units)))
    n_chunks = -(-share // chunk)

    over_devices = NamedSharding(Mesh(np.array(devices), ("devices",)), PartitionSpec("devices"))
    keys = jax.device_put(random.split(key, len(devices)), over_devices)
    weights = None if entries else jnp.asarray(problem.weights())
    sums = _sums(keys, problem.parameters(), weights, n_chunks, problem.template(), chunk, units)
    if (used := sums[0].sharding.device_set) != set(devices):
        raise RuntimeError(f"Samples were to be drawn on {devices}, but were drawn on {used}.")

    # The devices' moments together (Chan, Golub & LeVeque 1983).
    means, deviations = (np.asarray(each) for each in sums)
    mean, n_share = np.mean(means, 0), n_chunks * chunk
    deviation = np.sum(deviations, 0) + n_share * np.sum((means - mean) ** 2, 0)
    n = n_share * len(devices)
    return Estimate(mean, np.sqrt(deviation / (n - 1) / n), n)


@functools.partial(jax.jit, static_argnames=("problem", "chunk", "units"))
def _sums(
    keys: Array,
    parameters: Array,
    weights: Array | None,
    n_chunks: int,
    problem: Problem,
    chunk: int,
    units: int,
) -> tuple[Array, Array]:
    """Means and sums of squared deviations, each `(devices, 2, ...)`, in float64."""

    def one_device(key: Array) -> tuple[Array, Array]:
        def add(i: Array, state: Running) -> Running:
            drawn = problem.draw(random.fold_in(key, i), parameters, chunk, units)
            values = jnp.stack(drawn, axis=1).astype(jnp.float64)
            if weights is not None:
                values = jnp.einsum("nkpq,pq->nk", values, weights)
            return state.add(values)

        n_positions = problem.n_positions
        shape = (2,) if weights is not None else (2, n_positions, n_positions)
        start = none_yet(jnp.zeros(shape, jnp.float64))
        _, mean, deviation = lax.fori_loop(0, n_chunks, add, start)
        return mean, deviation

    return jax.vmap(one_device)(keys)
