"""Attention with infinitely many heads and key channels, by sampling its logits plainly.

The logits of both inputs, `(S, S)` each, are diagonal blocks of one matrix-normal variable whose
rows and columns both have the joint covariance of the `2 S` tokens,

    Cov[H_ij, H_kl] = s K_ik K_jl,      G(x) = H[:S, :S],    G(x') = H[S:, S:].

Kernels are averages over it, without Price's theorem and without polynomials in correlations. The
NTK's terms in the softmax's Jacobian are those of tangents of the logits, matrix normal too:

    2 K (x) K        of query and key weights,
    Theta (x) K + K (x) Theta        of what queries and keys are made of.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random


class Problem(NamedTuple):
    """Two inputs of `S` tokens.

    Attributes:
      keys, values: joint covariances `(2 S, 2 S)` of what queries and keys, and values, see.
      keys_ntk, values_ntk: their NTKs.
      present: which tokens there are, boolean, `(2, S)`.
      scale: `s`.
    """

    keys: np.ndarray
    values: np.ndarray
    keys_ntk: np.ndarray
    values_ntk: np.ndarray
    present: np.ndarray
    scale: float = 1.0


class Kernels(NamedTuple):
    """Means and their standard errors, `(S, S)`."""

    nngp: Array
    nngp_stderr: Array
    ntk: Array
    ntk_stderr: Array


def tokens(
    size: int, *, correlation: float, ratio: float = 1.0, rank: int | None = None, seed: int = 0
) -> np.ndarray:
    """A random joint covariance of the tokens of two inputs, of mean variance about 1.

    Args:
      correlation: between tokens at the same position of the inputs, about.
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
      lengths: numbers of tokens that there are; all by default.
    """
    present = np.arange(size) < np.asarray(lengths or (size, size))[:, None]
    there = np.outer(present, present)
    make = functools.partial(tokens, size, rank=rank)
    return Problem(
        keys=there * make(correlation=correlation, ratio=ratio, seed=seed),
        values=there * make(correlation=0.7, ratio=2.0, seed=seed + 1),
        keys_ntk=there * make(correlation=0.3, ratio=2.0, seed=seed + 2),
        values_ntk=there * make(correlation=0.6, ratio=2.0, seed=seed + 3),
        present=present,
        scale=variance,
    )


def kernels(
    problem: Problem,
    *,
    order: int | None = None,
    causal: bool = False,
    n_samples: int,
    seed: int = 0,
) -> Kernels:
    """NNGP and NTK of attention with weights of variance 1 for values and outputs.

    Args:
      order: of the Taylor softmax; None for softmax.
    """
    size = problem.present.shape[1]
    allowed = np.repeat(problem.present[:, None, :], size, 1)
    if causal:
        allowed = np.tril(allowed)
    roots = tuple(
        _root(x) for x in (problem.keys, problem.keys_ntk, 2 * problem.keys + problem.keys_ntk)
    )
    cross = tuple(
        x[:size, size:] for x in (problem.values, 2 * problem.values + problem.values_ntk)
    )
    at_once = max(1, min(n_samples, (1 << 19) // (2 * size) ** 2))
    n_chunks = -(-n_samples // at_once)
    sums = _sample(
        random.key(seed),
        tuple(np.sqrt(problem.scale) ** 0.5 * x for x in roots),
        cross,
        allowed,
        order,
        at_once,
        n_chunks,
    )
    n = n_chunks * at_once
    results = []
    for total, squares in sums:
        mean = total / n
        results += [mean, jnp.sqrt(jnp.maximum(squares / n - mean**2, 0) / n)]
    return Kernels(*results)


def _root(cov: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(cov)
    return vectors * np.sqrt(np.maximum(values, 0))


@functools.partial(jax.jit, static_argnames=("order", "n", "n_chunks"))
def _sample(
    key: Array,
    roots: tuple[Array, Array, Array],
    cross: tuple[Array, Array],
    allowed: Array,
    order: int | None,
    n: int,
    n_chunks: int,
) -> tuple[tuple[Array, Array], ...]:
    """Sums of samples of both kernels and of their squares."""
    keys, keys_ntk, both = roots
    values, all_values = cross

    def blocks(key: Array, rows: Array, columns: Array) -> Array:
        normal = random.normal(key, (n, len(rows), len(columns)), rows.dtype)
        matrix = jnp.einsum("ai,nij,bj->nab", rows, normal, columns, precision="highest")
        half = len(rows) // 2
        return jnp.stack([matrix[:, :half, :half], matrix[:, half:, half:]], 1)

    def attend(z: Array) -> Array:
        return _softmax(z, allowed, order)

    def product(left: Array, inner: Array, right: Array) -> Array:
        return jnp.einsum("nap,pq,nbq->nab", left, inner, right, precision="highest")

    def add(sums: tuple[Array, ...], key: Array) -> tuple[tuple[Array, ...], None]:
        of_logits, of_queries, of_keys = random.split(key, 3)
        z = blocks(of_logits, keys, keys)
        # 2 K (x) K + Theta (x) K, and K (x) Theta.
        tangent = blocks(of_queries, both, keys) + blocks(of_keys, keys, keys_ntk)
        y, dy = jax.jvp(attend, (z,), (tangent,))
        nngp = product(y[:, 0], values, y[:, 1])
        ntk = product(y[:, 0], all_values, y[:, 1]) + product(dy[:, 0], values, dy[:, 1])
        more = (nngp, nngp**2, ntk, ntk**2)
        return tuple(s + jnp.sum(x, 0) for s, x in zip(sums, more, strict=True)), None

    zeros = (jnp.zeros_like(values),) * 4
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
