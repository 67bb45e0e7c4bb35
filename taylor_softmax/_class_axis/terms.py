"""Terms of the class covariance for one number of classes, made of the samples once a process.

For every degree in s the coefficients of the samples' K are a symmetric matrix in the two
variances, of low rank. Its eigenvectors are functions of one variance each, so that

    K = sum_d T_d(s) sum_i +-f_di(v) f_di(v').

The value, divided by its size and by the coordinate r, which takes the root at 0 away,

    G = I / (q(a) q(b) r),

has such a sum, too, in degrees of r: K is integrated along the correlation. Both sums are cut off
where their error, measured on the nodes, reaches a tolerance. They have terms of their own: G needs
fewer, and XLA on a CPU puts value and slope in separate loops, so that shared terms would be summed
twice. All of this is NumPy in float64, whatever the precision that the terms are meant for.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.polynomial import chebyshev

from taylor_softmax._class_axis.coordinates import LARGEST_VARIANCE, Coordinates
from taylor_softmax._class_axis.samples import (
    CLASS_STEPS,
    VARIANCE_STEPS,
    Samples,
    load,
    near_limit,
)
from taylor_softmax._numerics.quadrature import chebyshev_rule
from taylor_softmax._numerics.surrogate import Surrogate

# Numbers of nodes per variance on which terms are found and errors measured: the first of them that
# resolves K is taken.
_NODES = 48, 72, 108, 162, 243, 324

# Degrees in r of the values, before they are cut off.
_VALUE_NODES = 60


@dataclasses.dataclass(frozen=True, eq=False)
class ProductSum:
    """A sum of products, for value or slope; hashed by identity.

    Attributes:
      ranks: number of terms of each degree in s or r.
      signs: of the terms, `(degrees, largest rank)`; 0 where there is none.
      factors: Chebyshev coefficients in v, `(degrees, largest rank, degrees in v)`.
    """

    ranks: tuple[int, ...]
    signs: np.ndarray
    factors: np.ndarray


class Interpolant(NamedTuple):
    """Value and slope for one number of classes and variances up to `largest`.

    Attributes:
      value, slope: their terms.
      scale: Chebyshev coefficients of `log(q (sigma + w) sqrt(n) / sigma)` in v, without the
        logarithm of `sqrt(n)`.
      largest: variance.
    """

    value: ProductSum
    slope: ProductSum
    scale: np.ndarray
    largest: float
    coordinates: Coordinates


@functools.cache
def interpolant(surrogate: Surrogate, n_classes: int, bits: int, *, is_near: bool) -> Interpolant:
    """The terms that an accuracy of `bits` bits is worth.

    Args:
      is_near: for variances up to `near_limit(surrogate)` only.
    """
    samples = load(surrogate, near=is_near)
    largest = near_limit(surrogate) if is_near else LARGEST_VARIANCE

    def allowed(sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tolerances(surrogate, n_classes, largest, sigma, bits)

    v, slope = _on_nodes(samples, n_classes, math.sqrt(largest), lambda sigma: allowed(sigma)[1])
    sigma = samples.coordinates.sigma(v)
    value_tolerance, slope_tolerance = allowed(sigma)
    at_correlation_1 = np.abs(np.diagonal(slope.sum(0)))
    scale = samples.log_scale(v, np.array([n_classes]))[:, 0]
    return Interpolant(
        value=_cut(_integrated(slope, sigma, samples.coordinates), 1 / np.sqrt(value_tolerance)),
        slope=_cut(slope, 1 / np.sqrt(slope_tolerance * at_correlation_1)),
        scale=chebyshev_rule(v.size)[1] @ (scale - np.log(n_classes) / 2),
        largest=largest,
        coordinates=samples.coordinates,
    )


def tolerances(
    surrogate: Surrogate, n_classes: int, largest: float, sigma: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """What terms of value and slope are cut off at, at standard deviations `sigma`.

    They are a part of what is promised, and not below the errors of the samples: terms beyond these
    would fit noise. They are the same up to a variance of 1e4, whatever the pair: a call is as good
    as its largest variance allows. Pairs of unequal variances get the geometric mean.
    """
    is_near = bool(largest <= near_limit(surrogate))
    if bits < 64:
        wanted = [2e-5, 2e-5] if is_near else [1e-4, 3e-4]
    elif surrogate.has_closed_form:
        wanted = [3e-8, 3e-8] if is_near else [3e-7, 3e-6]
    elif surrogate.order is None:
        wanted = [2e-7, 3e-7] if is_near else [2e-5, 2e-4]
    else:
        wanted = [1e-6, 1e-6] if is_near else [1.5e-5, 2e-4]
    samples = load(surrogate, near=is_near)
    spanned = np.array(VARIANCE_STEPS) <= samples.largest
    log_sigma, log_steps = np.log(sigma), np.log(np.array(VARIANCE_STEPS)[spanned]) / 2
    ends = [0.5 * np.log(1e4), 0.5 * np.log(LARGEST_VARIANCE)]
    log_wanted = np.interp(log_sigma, ends, np.log(wanted))
    log_errors = np.log(samples.errors[_class_step(n_classes)][:, spanned] / 4)
    value, slope = (
        np.exp(np.maximum(log_wanted, np.interp(log_sigma, log_steps, log_error)))
        for log_error in log_errors
    )
    return value, slope


def error(surrogate: Surrogate, n_classes: int, bits: int, largest: float) -> tuple[float, float]:
    """Estimates of the largest errors of value and slope in a call of variances up to `largest`.

    Relative to those at correlation 1: what was measured of the samples off their nodes, and what
    terms are cut off at. Rounding comes on top.
    """
    step = np.searchsorted(VARIANCE_STEPS, min(largest, LARGEST_VARIANCE))
    samples = load(surrogate, near=bool(largest <= near_limit(surrogate)))
    sampled = samples.errors[_class_step(n_classes), :, step]
    cut_off = tolerances(surrogate, n_classes, largest, np.sqrt(np.array([largest])), bits)
    # Between the nodes on which they were cut, terms leave up to three times that (measured).
    value, slope = (float(e + 4 * cut[0]) for e, cut in zip(sampled, cut_off, strict=True))
    return value, slope


def _class_step(n_classes: int) -> int:
    return int(np.searchsorted(CLASS_STEPS, n_classes))


def _on_nodes(
    samples: Samples,
    n_classes: int,
    largest_sigma: float,
    allowed: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes in v, and K in coefficients in s on pairs of them: `(v,)` and `(degree, v, v)`.

    Their number is the first of `_NODES` that resolves the ridge, which is narrowest at correlation
    1: the error of interpolation there, halfway between nodes, is compared with what is allowed.

    Args:
      allowed: of standard deviations, relative to K at correlation 1.
    """

    def slopes(v1: np.ndarray, v2: np.ndarray) -> np.ndarray:
        return samples.slopes(v1, v2, np.array([n_classes]))[..., 0]

    end = samples.coordinates.v(largest_sigma)
    v = slope = np.empty(0)
    for count in _NODES:
        nodes, to_coefficients = chebyshev_rule(count)
        v = (nodes + 1) / 2 * end
        lower = np.moveaxis(slopes(v, np.minimum(v, v[:, None])), 2, 0)
        slope = np.tril(lower) + np.tril(lower, -1).swapaxes(1, 2)
        between = (nodes[1:] + nodes[:-1]) / 2
        basis = chebyshev.chebvander(between, count - 1) @ to_coefficients
        interpolated = np.sum(basis @ slope.sum(0) * basis, 1)
        between = (between + 1) / 2 * end
        exact = slopes(between, between[:, None])[:, 0].sum(1)
        error = np.abs(interpolated - exact) / np.abs(exact)
        if np.max(error / allowed(samples.coordinates.sigma(between))) < 1:
            break
    return v, slope


def _integrated(slope: np.ndarray, sigma: np.ndarray, coordinates: Coordinates) -> np.ndarray:
    """G from K, both `(degree, v, v)`, G in degrees of r."""
    rows, columns = np.triu_indices(sigma.size)
    pairs = sigma[rows], sigma[columns]
    s, to_coefficients = chebyshev_rule(2 * len(slope))
    _, weight, stretch = coordinates.correlation(s[:, None], *pairs)
    slope = chebyshev.chebvander(s, len(slope) - 1) @ slope[:, rows, columns]
    integral = chebyshev.chebint(to_coefficients @ (slope * stretch / weight), lbnd=0)
    r, to_coefficients = chebyshev_rule(_VALUE_NODES)
    s_at_r = coordinates.s(r[:, None], *pairs)
    mean = to_coefficients @ (chebyshev.chebval(s_at_r, integral, tensor=False) / r[:, None])
    out = np.empty((r.size, sigma.size, sigma.size))
    out[:, rows, columns] = out[:, columns, rows] = mean
    return out


def _cut(matrices: np.ndarray, weight: np.ndarray) -> ProductSum:
    """The fewest terms that leave an error of at most `1 / (weight weight')`, by bisection.

    Args:
      matrices: `(degree, v, v)`, symmetric.
    """
    weighted = matrices * weight[:, None] * weight
    values, vectors = np.linalg.eigh((weighted + weighted.swapaxes(1, 2)) / 2)
    size = np.abs(values) * np.max(vectors**2, axis=1)
    basis = chebyshev.chebvander(np.cos(np.linspace(0, np.pi, 61)), len(matrices) - 1)

    def rebuilt(least: float) -> np.ndarray:
        return (vectors * np.where(size > least, values, 0)[:, None]) @ vectors.swapaxes(1, 2)

    sizes = np.sort(size, axis=None)
    low, high = 0, sizes.size - 1
    while high - low > 1:
        middle = (low + high) // 2
        remainder = np.tensordot(basis, weighted - rebuilt(sizes[middle]), 1)
        low, high = (middle, high) if np.max(np.abs(remainder)) <= 1 else (low, middle)
    kept = size > sizes[low]
    ranks = kept.sum(1)[: np.flatnonzero(kept.any(1))[-1] + 1]
    signs = np.zeros((ranks.size, ranks.max()))
    factors = np.zeros((ranks.size, ranks.max(), weight.size))
    for d, rank in enumerate(ranks):
        signs[d, :rank] = np.sign(values[d, kept[d]])
        root = np.sqrt(np.abs(values[d, kept[d]]))
        factors[d, :rank] = (vectors[d][:, kept[d]] * root / weight[:, None]).T
    _, to_coefficients = chebyshev_rule(weight.size)
    return ProductSum(tuple(map(int, ranks)), signs, factors @ to_coefficients.T)
