"""Softmaxes over positions by sampling and by quadrature in NumPy, and random problems."""

import math
from typing import NamedTuple

import numpy as np

# Least number of batches, from whose spread the standard errors come.
_BATCHES = 40

KINDS = ("random", "singular", "low rank", "common part")


class Problem(NamedTuple):
    """Covariances `K11, K12, K22` of the logits, and the incoming NTK `theta`, each `(S, S)`."""

    cov11: np.ndarray
    cov12: np.ndarray
    cov22: np.ndarray
    theta: np.ndarray


class Estimate(NamedTuple):
    """Means over samples and their standard errors."""

    mean: np.ndarray
    stderr: np.ndarray


def problem(
    size: int, kind: str = "random", variance: float = 1.0, rho: float = 0.8, seed: int = 0
) -> Problem:
    """Logits of variances `variance`, correlated by `rho` between the inputs.

    "singular" has fewer dimensions than positions and two equal positions, "low rank" has two
    dimensions, "common part" adds 1e4 times the variance to all covariances.
    """
    rng = np.random.default_rng(seed)
    rank = {"singular": max(1, size // 2), "low rank": 2}.get(kind, size + 2)

    def features() -> np.ndarray:
        x = rng.standard_normal((2, size, rank))
        x[1] = rho * x[0] + math.sqrt(1 - rho**2) * x[1]
        if kind == "singular":
            x[:, -1] = x[:, 0]
        return x * (math.sqrt(variance) / np.linalg.norm(x, axis=-1, keepdims=True))

    x, of_theta = features(), features()
    common = 1e4 * variance if kind == "common part" else 0.0
    cross = x[0] @ x[1].T
    theta = cross + of_theta[0] @ of_theta[1].T
    return Problem(x[0] @ x[0].T + common, cross + common, x[1] @ x[1].T + common, theta + common)


def _value_and_slope(z: np.ndarray, order: int | None) -> tuple[np.ndarray, np.ndarray]:
    """`f` up to a factor common to a row, and `f'` up to the same."""
    if order is None:
        f = np.exp(z - z.max(-1, keepdims=True))
        return f, f
    powers = np.stack([z**k / math.factorial(k) for k in range(order + 1)])
    return powers.sum(0), powers[:-1].sum(0)


def sample(inputs: Problem, *, order: int | None, n_samples: int, seed: int = 0) -> list[Estimate]:
    """Estimates of `E[y(u) y(v)^T]` and `E[J(u) theta J(v)^T]`, from draws and their negatives."""
    rng, size = np.random.default_rng(seed), len(inputs.cov11)
    joint = np.block([[inputs.cov11, inputs.cov12], [inputs.cov12.T, inputs.cov22]])
    values, vectors = np.linalg.eigh(joint)
    root = vectors * np.sqrt(np.maximum(values, 0))
    # Standard errors need batches; a batch of matrices is bounded in memory.
    batch = max(1, min(n_samples // _BATCHES, 2_000_000 // size**2))
    means = []
    for _ in range(n_samples // batch):
        z = rng.standard_normal((batch, 2 * size)) @ root.T
        total = np.zeros((2, size, size))
        for signed in (z, -z):
            (f, df), (g, dg) = (_value_and_slope(x, order) for x in np.split(signed, 2, 1))
            y, q = f / f.sum(1, keepdims=True), df / f.sum(1, keepdims=True)
            w, p = g / g.sum(1, keepdims=True), dg / g.sum(1, keepdims=True)
            # J theta J'^T for each sample: the product of the matrices, not a sum of its terms.
            first = q[:, :, None] * np.eye(size) - y[:, :, None] * q[:, None, :]
            second = p[:, :, None] * np.eye(size) - w[:, :, None] * p[:, None, :]
            moved = np.matmul(first, inputs.theta)
            total[0] += y.T @ w
            total[1] += np.einsum("nij,nkj->ik", moved, second, optimize=True)
        means.append(total / (2 * batch))
    stacked = np.stack(means)
    error = stacked.std(0, ddof=1) / math.sqrt(len(stacked))
    return [Estimate(stacked.mean(0)[i], error[i]) for i in (0, 1)]


def quadrature(inputs: Problem, n_nodes: int) -> np.ndarray:
    """What `sample` estimates, of softmax over few positions, by Gauss-Hermite quadrature.

    Over the differences of both inputs' logits from the last, `2 (S - 1)` dimensions. The root is
    Cholesky's, which is smooth: differences of such values are differences of the integrals.
    """
    size = len(inputs.cov11)
    nodes, weights = np.polynomial.hermite_e.hermegauss(n_nodes)
    grids = [np.meshgrid(*[x] * (2 * size - 2), indexing="ij") for x in (nodes, weights)]
    z, weight = np.stack(grids[0]), np.prod(grids[1], 0)
    weight /= weight.sum()
    # The other nodes would add less than rounding errors do.
    relevant = weight > 1e-13
    z, weight = z[:, relevant], weight[relevant]

    differences = np.kron(np.eye(2), np.hstack([np.eye(size - 1), -np.ones((size - 1, 1))]))
    joint = np.block([[inputs.cov11, inputs.cov12], [inputs.cov12.T, inputs.cov22]])
    u, v = np.split(np.linalg.cholesky(differences @ joint @ differences.T) @ z, 2)

    def softmax(logits: np.ndarray) -> np.ndarray:
        f = np.exp(np.vstack([logits, np.zeros_like(logits[:1])]))
        return f / f.sum(0)

    y, w = softmax(u), softmax(v)
    slope = np.zeros((size, size))
    for p in range(size):
        # Row p of the Jacobian, times theta.
        moved = inputs.theta.T @ (y[p] * (np.eye(size)[p][:, None] - y))
        for q in range(size):
            row = w[q] * (np.eye(size)[q][:, None] - w)
            slope[p, q] = np.sum(weight * np.sum(moved * row, 0))
    return np.stack([(weight * y) @ w.T, slope])
