"""Class axis: what quadrature gives on the grids that the interpolants of the library start from.

`python -m derivations.class_axis_grids [softmax 2 4 ...]` writes `taylor_softmax/_generated/
class_axis_*.npz`: minutes for softmax and low orders, up to half an hour on two cores for order 32
(all even ones to it without arguments). One thread a process (`OMP_NUM_THREADS=1`) is fastest.
`tests/test_class_axis.py` computes a few entries anew.

The integral is that of `taylor_softmax/_class_axis/integral.py`, written a second time, in NumPy:
for all numbers of classes at once, since `F` does not depend on them, with as many nodes as a pair
needs, and with functions of one variable tabulated where the library evaluates them.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import pathlib
import sys
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.special
from numpy.polynomial import chebyshev, hermite_e

from taylor_softmax._class_axis import samples
from taylor_softmax._class_axis.coordinates import Coordinates, n_classes_at
from taylor_softmax._numerics.quadrature import chebyshev_rule, exponential_rule
from taylor_softmax._numerics.surrogate import Surrogate, parse
from taylor_softmax._numerics.surrogate import _quadratic_factors as quadratic_factors

TARGET = pathlib.Path(__file__).parents[1] / "taylor_softmax" / "_generated"

# Forked, the threads of JAX would be lost.
_SPAWN = multiprocessing.get_context("spawn")

# Steps of the rules for polynomials, order 2 and others: in x; in z, where the roots of f are
# closest to the axis, to which two classes are sensitive; and in log f.
X_STEPS, Z_STEPS, LOG_STEPS = (0.3, 0.42), (0.17, 0.32), (0.3, 0.6)


@dataclasses.dataclass(frozen=True)
class Design:
    """What one grid is made of.

    Attributes:
      coordinates: in which variances and correlations are sampled.
      largest: the largest variance.
      variances, seconds, correlations, classes: numbers of Chebyshev nodes.
      scales: the number of nodes in the variance for the scale.
      packing: the errors of slopes that packing may make, at variances up to each of
        `samples.VARIANCE_STEPS`.
      coarser: a factor on the steps of the rules for polynomials. With 1.15 they are half the work,
        and leave 4e-5 (two classes) instead of 1e-6.
    """

    coordinates: Coordinates
    largest: float
    variances: int
    seconds: int
    correlations: int
    classes: int
    scales: int
    packing: tuple[float, float, float, float]
    coarser: float = 1.0


def design_for(surrogate: Surrogate, *, near: bool) -> Design:
    """The grid for softmax or an order.

    At large variances an output changes from one class to another over a fraction 1 / order of the
    logits (softmax: over a constant). That is what `smoothing` says. Where nodes are few it is a
    multiple of this that suits many classes as well. Over two classes slopes at correlation 1 grow
    like the logarithm of the variance, for which `tail` has room; softmax does without, and its
    million classes need nodes where sigma is about 5. The ridge is about 1 / order wide in
    log sigma, where sigma is about a third of the order.
    """
    order, largest = surrogate.order, samples.span(surrogate, near=near)
    if order is None:
        coordinates = Coordinates(4.0, 0.0, 1.4, 0.0)
        counts, packing = (52, 52, 48, 24, 52), (3e-7, 3e-7, 1e-6, 1e-5)
    elif order == 2:
        coordinates = Coordinates(2.0, 0.2, 0.8, 0.75)
        counts, packing = (44, 44, 46, 24, 44), (3e-8, 3e-8, 1e-7, 1e-6)
    elif near:
        coordinates = Coordinates(8.0, 0.05, 0.8, 3 / order**2)
        counts = (42, 42, 44, 22, 42) if order <= 8 else (36, 36, 40, 20, 36)
        packing = 3e-7, 3e-7, 3e-7, 3e-7
    else:
        knee, ridge = 3 + order / 16, 2 + order / 2
        coordinates = Coordinates(knee, 0.04, 0.8, 24 / order**2, ridge)
        packing = (3e-6, 3e-6, 6e-6, 3e-5) if order <= 8 else (1e-5, 1e-5, 2e-5, 1e-4)
        return Design(coordinates, largest, 42, 42, 38, 20, 56, packing, coarser=1.15)
    return Design(coordinates, largest, *counts, packing)


def nodes(count: int) -> np.ndarray:
    return chebyshev_rule(count)[0]


def sigmas(design: Design, count: int) -> np.ndarray:
    """Standard deviations at `count` nodes."""
    largest_v = design.coordinates.v(np.sqrt(design.largest))
    return design.coordinates.sigma((nodes(count) + 1) / 2 * largest_v)


def pairs(design: Design) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviations at the nodes in two variances, the larger one first: `(v, second)`."""
    largest_v = design.coordinates.v(np.sqrt(design.largest))
    v1 = (nodes(design.variances)[:, None] + 1) / 2 * largest_v
    v2 = design.coordinates.smaller_v(v1, nodes(design.seconds), largest_v)
    sigma1 = np.broadcast_to(design.coordinates.sigma(v1), (design.variances, design.seconds))
    return sigma1, np.broadcast_to(design.coordinates.sigma(v2), sigma1.shape)


def numbers_of_classes(design: Design) -> np.ndarray:
    return n_classes_at(nodes(design.classes))


def slopes(
    sigma1: float,
    correlations: np.ndarray,
    sigma2: float,
    n: np.ndarray,
    surrogate: Surrogate,
    coarser: float = 1.0,
) -> np.ndarray:
    """`dI / dc`, `(correlation, n)`, for all numbers of classes in `n`, which need not be integers.

    Args:
      coarser: see `Design`.
    """
    sigma1, sigma2 = max(sigma1, sigma2), min(sigma1, sigma2)
    if surrogate.order is not None:
        pair = _Polynomial(sigma1, sigma2, surrogate, coarser)
        return np.array([pair.slope(rho, n) for rho in correlations])
    integrate = _graded if sigma1 > 5 else _plain
    return np.array([integrate(sigma1, rho, sigma2, n) for rho in correlations])


def _rates(log_rate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`1 - exp(-r)` and `r exp(-r)`."""
    rate = np.exp(np.minimum(log_rate, 6.7))
    return -np.expm1(-rate), rate * np.exp(-rate)


def _double_sum(
    one_minus_f: np.ndarray,
    f: np.ndarray,
    f_x: np.ndarray,
    f_y: np.ndarray,
    f_xy: np.ndarray,
    f_c: np.ndarray,
    cell: np.ndarray | float,
    n: np.ndarray,
) -> np.ndarray:
    # Rounding of F below, where the integrand is negligible.
    f = np.maximum(f, 1e-14)
    log_f = np.where(one_minus_f < 0.5, np.log1p(-np.minimum(one_minus_f, 0.6)), np.log(f))
    joint, separate = 2 * f_c * f_xy * cell, f_c * f_x / f * f_y * cell
    return np.array([k * np.sum((joint + (k - 2) * separate) * np.exp((k - 2) * log_f)) for k in n])


def _products(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`1 - F`, F and its derivatives, from `(1 - A, A')`, `(x, X)`, and `(1 - B, B')`, `(y, X)`."""
    shortfall, slope1 = first[0] * weight, first[1] * weight
    value1 = (1 - first[0]) * weight
    one_minus_f = shortfall.sum(1)[:, None] + value1 @ second[0].T
    value2, slope2 = 1 - second[0].T, second[1].T
    return one_minus_f, value1 @ value2, slope1 @ value2, value1 @ slope2, slope1 @ slope2


# Softmax.


def _noise(w: np.ndarray, tau: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`1 - H`, `H'`, `H''` at `w`, H the distribution of a Gumbel variable plus `N(0, tau^2)`."""
    if tau < 1.5:
        z = np.linspace(-8, 8, 81)
        weight = np.exp(-(z**2) / 2)
        log_rate = np.minimum(-(w[..., None] + tau * z), 6.7)
        shortfall, slope = _rates(log_rate)
        weight = weight / weight.sum()
        return shortfall @ weight, slope @ weight, (slope * (np.exp(log_rate) - 1)) @ weight
    log_tau, weight = exponential_rule(60)
    r = (w[..., None] + log_tau) / tau
    density = np.exp(-(r**2) / 2) / np.sqrt(2 * np.pi) / tau
    return scipy.special.ndtr(-r) @ weight, density @ weight, (-r / tau * density) @ weight


class _Noise:
    """`(1 - H, H')` by cubic Hermite interpolation between 1,200 nodes: to 1e-11."""

    def __init__(self, tau: float):
        self.scale = 0.5 * np.sqrt(1.6 + tau**2)
        self.end = np.arcsinh((14 * tau + 60) / self.scale)
        angle = np.linspace(-self.end, self.end, 1200)
        self.step = angle[1] - angle[0]
        stretch = self.scale * np.cosh(angle) * self.step
        shortfall, slope, curvature = _noise(self.scale * np.sinh(angle), tau)
        self.tables = (shortfall, -slope * stretch), (slope, curvature * stretch)

    def __call__(self, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        r = (np.arcsinh(w / self.scale) + self.end) / self.step
        r = np.clip(r, 0, 1199 - 1e-6)
        i = r.astype(int)
        r = r - i
        step, left, right = r * r * (3 - 2 * r), r * (1 - r) ** 2, -r * r * (1 - r)
        shortfall, slope = (
            v[i] + (v[i + 1] - v[i]) * step + d[i] * left + d[i + 1] * right for v, d in self.tables
        )
        return shortfall, slope


def _plain(sigma1: float, rho: float, sigma2: float, n: np.ndarray) -> np.ndarray:
    def equally_spaced(sigma: float) -> np.ndarray:
        low, high = -3 * sigma - 4, 7 * sigma + 31
        return np.linspace(low, high, int(np.ceil((high - low) / 0.35)) + 1)

    x, y = equally_spaced(sigma1), equally_spaced(sigma2)
    normal = np.linspace(-8, 8, int(np.ceil(16 * max(sigma1, 1) / 0.25)) + 1)
    weight = np.exp(-(normal**2) / 2)
    first = _rates(sigma1 * normal - x[:, None])
    w = y[:, None] - rho * sigma2 * normal
    second = _noise(w, sigma2 * np.sqrt(1 - rho**2))[:2]
    cell = (x[1] - x[0]) * (y[1] - y[0])
    products = _products(first, second, weight / weight.sum())
    return _double_sum(*products, products[-1], cell, n)


def _sinh_nodes(count: int, scale: float, reach: float) -> tuple[np.ndarray, np.ndarray]:
    angle = np.linspace(-1, 1, count) * np.arcsinh(reach / scale)
    return scale * np.sinh(angle), scale * np.cosh(angle) * (angle[1] - angle[0])


def _graded(sigma1: float, rho: float, sigma2: float, n: np.ndarray) -> np.ndarray:
    tau = sigma2 * np.sqrt(1 - rho**2)
    xi = np.linspace(-6.5, 8 + 31 / sigma1, 200)
    d, d_weight = _sinh_nodes(171, 0.6 * np.sqrt(1.6 + tau**2), 11 * sigma2 + 30)
    e, e_weight = _sinh_nodes(151, 0.6 / sigma1, 14.5 + 31 / sigma1)
    density = np.exp(-((xi[:, None] - e) ** 2) / 2) / np.sqrt(2 * np.pi) * e_weight
    cell = sigma1 * (xi[1] - xi[0]) * d_weight
    first = _rates(-sigma1 * e)
    second = _Noise(tau)(d[:, None] + rho * sigma2 * e)
    one_minus_f, f, f_x, f_y, f_xy = _products(first, second, density)
    if rho < 0:
        # Where B is steep, A = 1: E[A B] = E[B] - E[(1 - A) B].
        marginal, marginal_slope = _Noise(sigma2)(rho * sigma2 * xi[:, None] + d)
        shortfall, slope = first[0] * density, first[1] * density
        by_marginal = shortfall.sum(1)[:, None] + marginal - shortfall @ second[0].T
        one_minus_f = np.where(d > 0, by_marginal, one_minus_f)
        f = np.where(d > 0, 1 - by_marginal, f)
        f_x = np.where(d > 0, slope.sum(1)[:, None] - slope @ second[0].T, f_x)
        f_y = np.where(d > 0, marginal_slope - shortfall @ second[1].T, f_y)
    return _double_sum(one_minus_f, f, f_x, f_y, f_xy, f_xy, cell, n)


# Polynomials.


def _x_nodes(sigma: float, surrogate: Surrogate, coarser: float) -> np.ndarray:
    ends = np.array([max(surrogate.minimiser, -8.5 * sigma), 6.8 * sigma, -6.8 * sigma])
    lowest, *tops = _log_f(ends, surrogate)[0]
    low, high = lowest - 4, max(tops) + 31
    step = coarser * X_STEPS[surrogate.order != 2]
    return np.linspace(low, high, int(np.ceil((high - low) / step)) + 1)


def _z_nodes(sigma: float, order: int, coarser: float) -> tuple[np.ndarray, np.ndarray]:
    step, log_step = (coarser * steps[order != 2] for steps in (Z_STEPS, LOG_STEPS))
    scale = order * step / log_step
    end = np.arcsinh(8.5 * sigma / scale)
    count = 2 * int(np.ceil(end * scale / min(step, 0.4 * sigma))) + 1
    angle = np.linspace(-end, end, count)
    return scale * np.sinh(angle), scale * np.cosh(angle) * (angle[1] - angle[0])


class _Polynomial:
    """A pair of standard deviations, `sigma1 >= sigma2`: what all correlations share."""

    def __init__(self, sigma1: float, sigma2: float, surrogate: Surrogate, coarser: float):
        order = surrogate.order
        assert order is not None
        self.sigma1, self.sigma2, self.surrogate = sigma1, sigma2, surrogate
        x, self.y = (_x_nodes(sigma, surrogate, coarser) for sigma in (sigma1, sigma2))
        self.cell = (x[1] - x[0]) * (self.y[1] - self.y[0])
        self.u, spacing = _z_nodes(sigma1, order, coarser)
        self.weight = _density(self.u, sigma1) * spacing
        log_f, self.relative_slope = _log_f(self.u, surrogate)
        self.first = _rates(log_f - x[:, None])
        self.v, self.v_spacing = _z_nodes(sigma2, order, coarser)
        log_f, relative = _log_f(self.v, surrogate)
        self.at_v = self._second(log_f - self.y[:, None], relative)

    @staticmethod
    def _second(log_rate: np.ndarray, relative_slope: np.ndarray) -> np.ndarray:
        """`1 - B`, `B'` and `B_v`."""
        shortfall, rate = _rates(log_rate)
        return np.array([shortfall, rate, rate * relative_slope])

    def slope(self, rho: float, n: np.ndarray) -> np.ndarray:
        tau = self.sigma2 * np.sqrt(max(1 - rho**2, 0))
        mean = rho * self.sigma2 / self.sigma1 * self.u
        wide = tau > np.interp(mean, self.v, self.v_spacing)
        second = np.empty((3, self.y.size, self.u.size))
        z, z_weight = hermite_e.hermegauss(14)
        log_f, relative = _log_f(mean[~wide][:, None] + tau * z, self.surrogate)
        narrow = self._second(log_f - self.y[:, None, None], relative)
        second[:, :, ~wide] = narrow @ (z_weight / z_weight.sum())
        if wide.any():
            conditional = _density(self.v[:, None] - mean[wide], tau) * self.v_spacing[:, None]
            second[:, :, wide] = self.at_v @ conditional
        f_c = (self.first[1] * (self.weight * self.relative_slope)) @ second[2].T
        products = _products(self.first, (second[0], second[1]), self.weight)
        return _double_sum(*products, f_c, self.cell, n)


def _density(z: np.ndarray, sigma: float) -> np.ndarray:
    return np.exp(-((z / sigma) ** 2) / 2) / (sigma * np.sqrt(2 * np.pi))


# Grids.


def _log_f(z: np.ndarray, surrogate: Surrogate) -> tuple[np.ndarray, np.ndarray]:
    """`log f` and `f' / f`."""
    assert surrogate.order is not None
    roots = quadratic_factors(surrogate.order)
    value, slope = np.zeros_like(z), np.zeros_like(z)
    for real, imag in zip(roots.real, roots.imag, strict=True):
        value += np.log(((z - real) / roots.unit) ** 2 + (imag / roots.unit) ** 2)
        slope += 2 * (z - real) / ((z - real) ** 2 + imag**2)
    return value, slope


def sample(surrogate: Surrogate, design: Design) -> tuple[np.ndarray, np.ndarray]:
    """K and the logarithm of its scale at the nodes: `(v, second, s, n)` and `(v, n)`."""
    n = numbers_of_classes(design)
    sigma1, sigma2 = pairs(design)
    with concurrent.futures.ProcessPoolExecutor(mp_context=_SPAWN) as pool:
        scales = pool.map(
            functools.partial(_log_scale, surrogate, design), sigmas(design, design.scales)
        )
        rows = pool.map(functools.partial(_row, surrogate, design), range(len(sigma1))[::-1])
        log_scale, values = np.array(list(scales)), np.array(list(rows)[::-1])
    if not design.coordinates.ridge:
        i, j = np.triu_indices(len(values), 1)
        values[i, j] = values[j, i]
    to_coefficients = chebyshev_rule(design.scales)[1]
    largest_v = design.coordinates.v(np.sqrt(design.largest))

    def q(sigma: np.ndarray) -> np.ndarray:
        basis = chebyshev.chebvander(
            2 * design.coordinates.v(sigma) / largest_v - 1, design.scales - 1
        )
        scale = np.exp(basis @ (to_coefficients @ log_scale)) / np.sqrt(n)
        return scale * design.coordinates.saturation(sigma)[..., None]

    values /= (q(sigma1) * q(sigma2))[:, :, None]
    return values, log_scale


def _row(surrogate: Surrogate, design: Design, i: int) -> np.ndarray:
    """`W dI / d rho` at a node of the larger variance: `(second, s, n)`; by symmetry, 0 beyond."""
    n, s = numbers_of_classes(design), nodes(design.correlations)
    values = np.zeros((design.seconds, s.size, n.size))
    for j, pair in enumerate(zip(*(sigma[i] for sigma in pairs(design)), strict=True)):
        if j <= i or design.coordinates.ridge:
            rho, weight, _ = design.coordinates.correlation(s, *pair)
            found = slopes(pair[0], rho, pair[1], n, surrogate, design.coarser)
            values[j] = found * (pair[0] * pair[1] * weight)[:, None]
    return values


def _log_scale(surrogate: Surrogate, design: Design, sigma: float) -> np.ndarray:
    """`log(q (sigma + w) sqrt(n) / sigma)` from slopes at equal variances."""
    n = numbers_of_classes(design)
    s, s_weight = _legendre_rule()
    rho, _, stretch = design.coordinates.correlation(s, sigma, sigma)
    square = (
        sigma**2 * (s_weight * stretch) @ slopes(sigma, rho, sigma, n, surrogate, design.coarser)
    )
    return np.log(np.sqrt(square * n) / design.coordinates.saturation(sigma))


def pack(design: Design, values: np.ndarray, log_scale: np.ndarray) -> dict[str, np.ndarray]:
    """What `samples.load` reads: a Tucker decomposition, its core in integers.

    Entries of the core are left out up to the errors that the design allows, measured at the nodes
    and relative to the slope at correlation 1.

    Args:
      values, log_scale: from `sample`.
    """
    has_ridge = bool(design.coordinates.ridge)
    sigma = sigmas(design, design.variances)
    by_degree = np.einsum("ds,ijsn->ijdn", chebyshev_rule(design.correlations)[1], values)
    ends = np.log(np.sqrt(samples.VARIANCE_STEPS))
    allowed = np.exp(np.interp(np.log(sigma), ends, np.log(design.packing)))
    if has_ridge:
        # The weight is one of the larger variance alone: slopes at correlation 1 differ little.
        to_end = (
            chebyshev.chebvander([-1.0], design.seconds - 1) @ chebyshev_rule(design.seconds)[1]
        )
        on_ridge = np.einsum("j,ijn->in", to_end[0], by_degree.sum(2))
        smallest = np.minimum.accumulate(np.min(on_ridge, 1)[::-1])[::-1]
        weight, second_weight = 1 / (allowed * smallest), np.ones(design.seconds)
    else:
        i = np.arange(sigma.size)
        weight = second_weight = 1 / np.sqrt(allowed * np.min(by_degree[i, i].sum(1), 1))
    weighted = by_degree * weight[:, None, None, None] * second_weight[:, None, None]

    def basis(axis: int) -> np.ndarray:
        unfolded = np.moveaxis(weighted, axis, 0).reshape(weighted.shape[axis], -1)
        vectors, squared, _ = np.linalg.svd(unfolded @ unfolded.T)
        # What is rare in the mean, such as two classes, may be all there is somewhere.
        return vectors[:, np.sqrt(squared) > 0.02]

    first = basis(0)
    bases = first, basis(1) if has_ridge else first, basis(2), basis(3)
    core = np.einsum("ijkl,ia,jb,kc,ld->abcd", weighted, *bases, optimize=True)
    if not has_ridge:
        core = (core + core.swapaxes(0, 1)) / 2
    low, high = 1e-2, 1e3
    for _ in range(14):
        middle = np.sqrt(low * high)
        kept = np.where(np.abs(core) > middle, core, 0)
        rebuilt = np.einsum("abcd,ia,jb,kc,ld->ijkl", kept, *bases, optimize=True)
        remainder = np.max(np.sqrt(np.sum((rebuilt - weighted) ** 2, 2)))
        low, high = (middle, high) if remainder < 1 else (low, middle)
    assert low > 1e-2, "the bases leave more than the design allows"
    unit = low / 2
    integers = np.round(np.where(np.abs(core) > low, core, 0) / unit)
    integers = integers if has_ridge else integers[np.triu_indices(core.shape[0])]
    planes = integers.astype("<i8").reshape(-1, 1).view(np.uint8).T
    of_classes = chebyshev_rule(design.classes)[1]
    packed = {
        "core": np.ascontiguousarray(planes),
        "unit": np.asarray(unit),
        "variance": chebyshev_rule(design.variances)[1] @ (bases[0] / weight[:, None]),
        "correlation": bases[2],
        "classes": of_classes @ bases[3],
        "scale": chebyshev_rule(design.scales)[1] @ log_scale @ of_classes.T,
        "coordinates": np.asarray(design.coordinates),
    }
    if has_ridge:
        packed["second"] = chebyshev_rule(design.seconds)[1] @ bases[1]
    return packed


def _legendre_rule(count: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """On [0, 1]."""
    s, weight = np.polynomial.legendre.leggauss(count)
    return (s + 1) / 2, weight / 2


def measure(surrogate: Surrogate, design: Design, given: samples.Samples) -> np.ndarray:
    """Twice the largest errors found off the nodes: `Samples.errors`; infinite beyond the grid."""
    rng = np.random.default_rng(0)
    n = np.array([[2, 2, 2], [3, 3, 4], [5, 7, 9], [10, 100, 1000], [1e4, 1e5, 9e5]])
    s, s_weight = _legendre_rule(14)
    s = np.concatenate([-s, s, [-1, 1]])
    s_weight = np.concatenate([s_weight, s_weight, [0, 0]])
    degrees = chebyshev.chebvander(s, design.correlations - 1)

    def q(sigma: float) -> np.ndarray:
        scale = np.exp(given.log_scale(design.coordinates.v(np.array([sigma])), n.ravel())[0])
        return scale * design.coordinates.saturation(sigma) / np.sqrt(n.ravel())

    def interpolated(sigma1: float, sigma2: float) -> np.ndarray:
        v1, v2 = (design.coordinates.v(np.array([sigma])) for sigma in (sigma1, sigma2))
        return degrees @ given.slopes(v1, v2[:, None], n.ravel())[0, 0]

    def with_itself(sigma: float) -> np.ndarray:
        weight = design.coordinates.correlation(s, sigma, sigma)[1]
        return interpolated(sigma, sigma)[-1] / weight[-1]

    def errors(sigma1: float, sigma2: float) -> np.ndarray:
        found = interpolated(sigma1, sigma2)
        unit = np.sqrt(with_itself(sigma1) * with_itself(sigma2))
        rho, weight, stretch = design.coordinates.correlation(s, sigma1, sigma2)
        exact = slopes(sigma1, rho, sigma2, n.ravel(), surrogate)
        exact *= sigma1 * sigma2 / (q(sigma1) * q(sigma2))
        error = (found / weight[:, None] - exact).T
        halves = (s_weight * stretch * error)[:, :-2].reshape(n.size, 2, -1).sum(2)
        largest = np.max(np.abs(halves), 1), np.max(np.abs(error), 1) / unit
        return np.max(np.reshape(largest, (2, *n.shape)), 2).T

    found = np.zeros((len(n), 2, len(samples.VARIANCE_STEPS)))
    for k, top in enumerate(samples.VARIANCE_STEPS):
        if top > design.largest:
            found[:, :, k] = np.inf
            continue
        low, high = np.log(samples.VARIANCE_STEPS[k - 1] if k else 1e-3) / 2, np.log(top) / 2
        for largest in (high, high, *rng.uniform(low, high, 5)):
            ridge = largest - rng.uniform(0, 4) / (surrogate.order or 4)
            for smallest in (largest, ridge, rng.uniform(np.log(0.03), largest)):
                error = errors(np.exp(largest), np.exp(smallest))
                found[:, :, k] = np.maximum(found[:, :, k], error)
    return 2 * np.maximum.accumulate(found, 2)


def main(arguments: list[str]) -> None:
    for name in arguments or ["softmax", *map(str, range(2, 34, 2))]:
        surrogate = parse(None if name == "softmax" else int(name))
        for near in (True, False) if samples.has_near_samples(surrogate) else (False,):
            write(surrogate, near=near)


def write(surrogate: Surrogate, *, near: bool) -> None:
    design, file = design_for(surrogate, near=near), samples.file_name(surrogate, near=near)
    arrays: Any = pack(design, *sample(surrogate, design))
    # `measure` does not look at the errors.
    unknown = np.zeros((len(samples.CLASS_STEPS), 2, len(samples.VARIANCE_STEPS)))
    errors = measure(
        surrogate, design, samples.unpack({**arrays, "errors": unknown}, design.largest)
    )
    save(TARGET / file, {**arrays, "errors": errors})
    print(f"{file} written", flush=True)


def save(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """What `np.load` reads. LZMA makes half of what `np.savez_compressed`, DEFLATE, would make."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            # Without the date, so that the same samples make the same file.
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_LZMA
            with archive.open(entry, "w") as stream:
                np.save(stream, array)


if __name__ == "__main__":
    main(sys.argv[1:])
