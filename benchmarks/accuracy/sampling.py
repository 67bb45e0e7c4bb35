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

# Random numbers in a chunk of draws: on a CPU as many as its caches hold, elsewhere so many that
# all cores have work.
_CACHED_CHUNK, _LARGE_CHUNK = 1 << 19, 1 << 24


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

    def with_more(self, other: "Estimate") -> "Estimate":
        """From the draws of both."""
        n = self.n_draws + other.n_draws
        mean = self.mean + (other.mean - self.mean) * (other.n_draws / n)
        deviation = sum(
            each.stderr**2 * each.n_draws * (each.n_draws - 1)
            + each.n_draws * (each.mean - mean) ** 2
            for each in (self, other)
        )
        return Estimate(mean, np.sqrt(deviation / (n - 1) / n), n)


class Sampler:
    """Draws of one problem, at least `n_samples` at a time, a share of them on each of `devices`.

    Args:
      entries: estimate all entries of the `(positions, positions)` matrices, in place of the sum
        with `problem.weights`.
    """

    def __init__(self, problem: Problem, n_samples: int, devices: Sequence[Any], *, entries: bool):
        self._problem, self._devices = problem, devices
        self._units = problem.units(n_samples)
        share = -(-problem.n_draws(n_samples) // len(devices))
        at_once = _CACHED_CHUNK if devices[0].platform == "cpu" else _LARGE_CHUNK
        self._chunk = max(1, min(share, at_once // problem.numbers_per_draw(self._units)))
        self._n_chunks = -(-share // self._chunk)
        self._weights = None if entries else jnp.asarray(problem.weights())

    def compile(self) -> None:
        """So that the first draws take no longer than others."""
        self._sums(random.key(0), 0)

    def draw(self, key: Array) -> Estimate:
        # The devices' moments together (Chan, Golub & LeVeque 1983).
        means, deviations = map(np.asarray, self._sums(key, self._n_chunks))
        mean, n_share = np.mean(means, 0), self._n_chunks * self._chunk
        deviation = np.sum(deviations, 0) + n_share * np.sum((means - mean) ** 2, 0)
        n = n_share * len(self._devices)
        return Estimate(mean, np.sqrt(deviation / (n - 1) / n), n)

    def _sums(self, key: Array, n_chunks: int) -> tuple[Array, Array]:
        mesh = Mesh(np.array(self._devices), ("devices",))
        keys = random.split(key, len(self._devices))
        keys = jax.device_put(keys, NamedSharding(mesh, PartitionSpec("devices")))
        problem = self._problem
        statics = problem.template(), self._chunk, self._units
        sums = _sums(keys, problem.parameters(), self._weights, n_chunks, *statics)
        if (used := sums[0].sharding.device_set) != set(self._devices):
            raise RuntimeError(
                f"Samples were to be drawn on {self._devices}, but were drawn on {used}."
            )
        return sums


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
