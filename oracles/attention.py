"""Attention with infinitely many heads and key channels, by sampling its logits.

The logits of all queries `a` and keys `p` of both inputs are jointly Gaussian,

    Cov[G_ap(x), G_bq(x')] = s Q_ab K_pq rho((p - a) - (q - b)),

with `rho = 1` but for rotary embeddings. Kernels are averages over them, without Price's theorem
and without polynomials in correlations. The NTK's terms in the softmax's Jacobian are those of
tangents of the logits, of covariance

    s (2 Q_ab K_pq + Theta_Q_ab K_pq + Q_ab Theta_pq) rho((p - a) - (q - b)).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.integrate
from jax import Array, lax, random


class Problem(NamedTuple):
    """Two inputs, of `T1` and `T2` keys, and as many queries in self-attention.

    Attributes:
      keys, values: joint covariances, `(T1 + T2, T1 + T2)`, of the inputs of keys and values.
      keys_ntk, values_ntk: their NTKs.
      present: which keys are present, boolean, for each input.
      scale: `s`.
      queries, queries_ntk: the same for queries; None where their inputs are those of keys.
      n_queries: number of queries of the first input.
    """

    keys: np.ndarray
    values: np.ndarray
    keys_ntk: np.ndarray
    values_ntk: np.ndarray
    present: Sequence[np.ndarray]
    scale: float = 1.0
    queries: np.ndarray | None = None
    queries_ntk: np.ndarray | None = None
    n_queries: int = 0

    def of_queries(self) -> tuple[np.ndarray, np.ndarray, int]:
        """The covariance and the NTK of queries, and their number in the first input."""
        if self.queries is None or self.queries_ntk is None:
            return self.keys, self.keys_ntk, len(self.present[0])
        return self.queries, self.queries_ntk, self.n_queries

    def covariances(self) -> dict[str, np.ndarray]:
        """The blocks of the covariances, by the names of `attention_second_moment`."""
        joints = {"cov": (self.keys, "11 12 22"), "values": (self.values, "12")}
        joints |= {"ntk": (self.keys_ntk, "12"), "values_ntk": (self.values_ntk, "12")}
        n = {name: len(self.present[0]) for name in joints}
        if self.queries is not None and self.queries_ntk is not None:
            joints |= {
                "queries": (self.queries, "11 12 22"),
                "queries_ntk": (self.queries_ntk, "12"),
            }
            n |= {"queries": self.n_queries, "queries_ntk": self.n_queries}
        return {
            f"{name}{sides}": joint[
                tuple(slice(n[name]) if side == "1" else slice(n[name], None) for side in sides)
            ]
            for name, (joint, blocks) in joints.items()
            for sides in blocks.split()
        }


class Kernels(NamedTuple):
    """Means and their standard errors, `(A1, A2)`."""

    nngp: Array
    nngp_stderr: Array
    ntk: Array
    ntk_stderr: Array


def tokens(
    size: int, *, correlation: float, ratio: float = 1.0, rank: int | None = None, seed: int = 0
) -> np.ndarray:
    """A random joint covariance of the tokens of two inputs, of mean variance about 1.

    Args:
      correlation: approximate, between tokens at the same position of the inputs.
      ratio: of the largest possible variance to the smallest.
      rank: of the covariance; `2 size` by default.
    """
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((2, size, rank or 2 * size))
    second = correlation * first + np.sqrt(1 - correlation**2) * second
    features = np.concatenate([first, second])
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    features *= ratio ** rng.uniform(-0.25, 0.25, (2 * size, 1))
    return features @ features.T


def random_problem(
    size: int,
    *,
    variance: float,
    correlation: float = 0.5,
    ratio: float = 1.0,
    lengths: tuple[int, int] | None = None,
    rank: int | None = None,
    seed: int = 0,
) -> Problem:
    """A problem with logits of variance about `variance`.

    Args:
      lengths: numbers of tokens that are present in the two inputs; all by default.
    """
    present = np.arange(size) < np.asarray(lengths or (size, size))[:, None]
    both_present = np.outer(present, present)
    make = functools.partial(tokens, size, rank=rank)
    return Problem(
        keys=both_present * make(correlation=correlation, ratio=ratio, seed=seed),
        values=both_present * make(correlation=0.7, ratio=2.0, seed=seed + 1),
        keys_ntk=both_present * make(correlation=0.3, ratio=2.0, seed=seed + 2),
        values_ntk=both_present * make(correlation=0.6, ratio=2.0, seed=seed + 3),
        present=list(present),
        scale=variance,
    )


def crossing_problem(
    n_queries: tuple[int, int], n_keys: tuple[int, int], *, variance: float, seed: int = 0
) -> Problem:
    """A problem of queries and keys of different numbers in both inputs."""

    def cut(joint: np.ndarray, lengths: tuple[int, int]) -> np.ndarray:
        half = len(joint) // 2
        chosen = [*range(lengths[0]), *range(half, half + lengths[1])]
        return joint[np.ix_(chosen, chosen)]

    keys, values, keys_ntk, values_ntk, _, scale, *_ = random_problem(
        max(n_keys), variance=variance, seed=seed
    )
    queries = random_problem(max(n_queries), variance=variance, ratio=2.0, seed=seed + 10)
    return Problem(
        keys=cut(keys, n_keys),
        values=cut(values, n_keys),
        keys_ntk=cut(keys_ntk, n_keys),
        values_ntk=cut(values_ntk, n_keys),
        present=[np.ones(n, bool) for n in n_keys],
        scale=scale,
        queries=cut(queries.keys, n_queries),
        queries_ntk=cut(queries.keys_ntk, n_queries),
        n_queries=n_queries[0],
    )


def kernels(
    problem: Problem,
    *,
    order: int | None = None,
    rows: Sequence[np.ndarray] | None = None,
    rotary: float | None = None,
    n_samples: int,
    seed: int = 0,
) -> Kernels:
    """NNGP and NTK of attention with weights of variance 1 for values and outputs.

    Args:
      order: of the Taylor softmax; None for softmax.
      rows: what is added to the logits of each input, `(A, T)`, `-inf` for keys that a query does
        not attend to; nothing by default.
      rotary: base of the frequencies of rotary embeddings; None without.
    """
    queries, queries_ntk, n_queries = problem.of_queries()
    n_keys = [len(present) for present in problem.present]
    sizes = list(zip((n_queries, len(queries) - n_queries), n_keys, strict=True))
    if rows is None:
        rows = [np.zeros(size) for size in sizes]
    rows = [
        np.where(present, row, -np.inf) for present, row in zip(problem.present, rows, strict=True)
    ]
    # The query of each logit, its key, and the distance from one to the other.
    a, p, distance = (
        np.concatenate([part.ravel() for part in parts])
        for parts in zip(*(_indices(*size) for size in sizes), strict=True)
    )
    a[sizes[0][0] * sizes[0][1] :] += n_queries
    p[sizes[0][0] * sizes[0][1] :] += n_keys[0]
    rho = problem.scale * _rotary(np.subtract.outer(distance, distance), rotary)

    def logits(of_queries: np.ndarray, of_keys: np.ndarray) -> np.ndarray:
        return rho * of_queries[np.ix_(a, a)] * of_keys[np.ix_(p, p)]

    covs = (
        logits(queries, problem.keys),
        logits(2 * queries + queries_ntk, problem.keys) + logits(queries, problem.keys_ntk),
    )
    cross = tuple(
        x[: n_keys[0], n_keys[0] :]
        for x in (problem.values, 2 * problem.values + problem.values_ntk)
    )
    chunk = max(1, min(n_samples, (1 << 21) // len(rho)))
    n_chunks = -(-n_samples // chunk)
    roots = tuple(_root(cov) for cov in covs)
    sums = _sample(random.key(seed), roots, cross, tuple(rows), order, chunk, n_chunks)
    n = n_chunks * chunk
    results = []
    for total, squares in sums:
        mean = total / n
        results += [mean, jnp.sqrt(jnp.maximum(squares / n - mean**2, 0) / n)]
    return Kernels(*results)


def _indices(n_queries: int, n_keys: int) -> tuple[np.ndarray, ...]:
    a, p = np.indices((n_queries, n_keys))
    return a, p, p - a


def _rotary(t: np.ndarray, base: float | None) -> np.ndarray:
    """`int_0^1 cos(base^(-u) t) du` by adaptive quadrature."""
    if base is None:
        return np.ones(t.shape)
    distances, inverse = np.unique(np.abs(t), return_inverse=True)
    values = [
        scipy.integrate.quad(lambda u, d=d: math.cos(base**-u * d), 0, 1, limit=200)[0]
        for d in distances
    ]
    return np.asarray(values)[inverse].reshape(t.shape)


def _root(cov: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(cov)
    return vectors * np.sqrt(np.maximum(values, 0))


@functools.partial(jax.jit, static_argnames=("order", "n", "n_chunks"))
def _sample(
    key: Array,
    roots: tuple[Array, Array],
    cross: tuple[Array, Array],
    rows: tuple[Array, Array],
    order: int | None,
    n: int,
    n_chunks: int,
) -> tuple[tuple[Array, Array], ...]:
    """Sums of samples of both kernels and of their squares."""
    values, all_values = cross
    first = rows[0].size

    def normal(key: Array, root: Array) -> list[Array]:
        z = random.normal(key, (n, len(root)), root.dtype) @ root.T
        return [
            x.reshape(n, *r.shape) for x, r in zip((z[:, :first], z[:, first:]), rows, strict=True)
        ]

    def attend(z: list[Array]) -> list[Array]:
        return [
            _softmax(x + jnp.where(row > -jnp.inf, row, 0), row > -jnp.inf, order)
            for x, row in zip(z, rows, strict=True)
        ]

    def product(left: Array, inner: Array, right: Array) -> Array:
        return jnp.einsum("nap,pq,nbq->nab", left, inner, right, precision="highest")

    def add(sums: tuple[Array, ...], key: Array) -> tuple[tuple[Array, ...], None]:
        of_logits, of_tangents = random.split(key)
        z, tangent = normal(of_logits, roots[0]), normal(of_tangents, roots[1])
        y, dy = jax.jvp(attend, (z,), (tangent,))
        nngp = product(y[0], values, y[1])
        ntk = product(y[0], all_values, y[1]) + product(dy[0], values, dy[1])
        more = (nngp, nngp**2, ntk, ntk**2)
        return tuple(s + jnp.sum(x, 0) for s, x in zip(sums, more, strict=True)), None

    zeros = (jnp.zeros((len(rows[0]), len(rows[1]))),) * 4
    (a, b, c, d), _ = lax.scan(add, zeros, random.split(key, n_chunks))
    return (a, b), (c, d)


def _softmax(z: Array, allowed: Array, order: int | None) -> Array:
    if order is None:
        f = jnp.exp(z)
    else:
        f = functools.reduce(
            lambda total, k: total + z**k / float(math.factorial(k)),
            range(1, order + 1),
            jnp.ones_like(z),
        )
    f = jnp.where(allowed, f, 0)
    total = jnp.sum(f, -1, keepdims=True)
    return f / jnp.where(total > 0, total, 1)
