"""Class axis: what quadrature gives on the grids that the interpolants of the library start from.

`python -m derivations.class_axis_grids [softmax 2 4 ...]` writes `taylor_softmax/_generated/
class_axis_*.npz`: minutes for softmax, and up to ten for an order (all even ones to 32
without arguments). `tests/test_class_axis.py` computes a few entries anew.

The integral is that of `taylor_softmax/_class_axis/integral.py`, written a second time, in NumPy:
for all numbers of classes at once, since `F` does not depend on them, with as many nodes as a pair
needs, and with functions of one variable tabulated where the library evaluates them.
"""

import dataclasses
import pathlib
import sys
from typing import Any

import numpy as np
import scipy.special
from numpy.polynomial import chebyshev, hermite_e

from taylor_softmax._class_axis import interpolant
from taylor_softmax._numerics.quadrature import chebyshev_rule, exponential_rule
from taylor_softmax._numerics.surrogate import Surrogate, parse
from taylor_softmax._numerics.surrogate import _quadratic_factors as quadratic_factors

TARGET = pathlib.Path(__file__).parents[1] / "taylor_softmax" / "_generated"

# Steps of the rules for polynomials, order 2 and others: in x; in z, where the roots of f are
# closest to the axis, to which two classes are sensitive; and in log f.
X_STEPS, Z_STEPS, LOG_STEPS = (0.3, 0.42), (0.17, 0.32), (0.3, 0.6)


@dataclasses.dataclass(frozen=True)
class Design:
    """Of one grid.

    Attributes:
      coordinates: in which variances and correlations are sampled.
      largest: variance.
      variances, correlations, classes: numbers of Chebyshev nodes.
      packing: errors that packing may make of slopes at variances up to each of
        `interpolant.VARIANCES`.
    """

    coordinates: interpolant.Coordinates
    largest: float
    variances: int
    correlations: int
    classes: int
    packing: tuple[float, float, float, float]


def design(surrogate: Surrogate, *, near: bool) -> Design:
    """For every order; the costly ones, which few use, on fewer nodes.

    An output at large variances changes from one class to another over a share 1 / order of the
    logits (softmax: over a constant), which is what `smoothing` says. Over two classes slopes at
    correlation 1 grow like the logarithm of the variance, for which `tail` has room; softmax does
    without, and its million classes need nodes where sigma is about 5.
    """
    order, largest = surrogate.order, interpolant.span(surrogate, near=near)
    if order is None:
        coordinates = interpolant.Coordinates(4.0, 0.0, 1.4, 0.0)
        return Design(coordinates, largest, 52, 48, 24, (3e-7, 3e-7, 1e-6, 1e-5))
    if near and interpolant.has_own_near_samples(surrogate):
        coordinates = interpolant.Coordinates(8.0, 0.05, 0.8, 3 / order**2)
        counts = (42, 44, 22) if order <= 8 else (36, 40, 20)
        return Design(coordinates, largest, *counts, (3e-7, 3e-7, 3e-7, 3e-7))
    knee, tail = (2.0, 0.2) if order == 2 else (3.0 if order <= 8 else 4.0, 0.05)
    coordinates = interpolant.Coordinates(knee, tail, 0.8, 3 / order**2)
    if order == 2:
        return Design(coordinates, largest, 44, 46, 24, (3e-8, 3e-8, 1e-7, 1e-6))
    counts = (42, 44, 22) if order <= 8 else (36, 34, 18) if order <= 22 else (32, 30, 16)
    return Design(coordinates, largest, *counts, (1e-6, 1e-6, 3e-6, 1e-5))


def nodes(count: int) -> np.ndarray:
    return chebyshev_rule(count)[0]


def sigmas(of: Design) -> np.ndarray:
    whole = of.coordinates.v(np.sqrt(of.largest))
    return of.coordinates.sigma((nodes(of.variances) + 1) / 2 * whole)


def numbers_of_classes(of: Design) -> np.ndarray:
    low, high = (np.log(np.log(n) + 0.5) for n in (2, interpolant.LARGEST_N_CLASSES))
    return np.exp(np.exp(low + (high - low) * (nodes(of.classes) + 1) / 2) - 0.5)


def slope(
    sigma1: float, rho: float, sigma2: float, n: np.ndarray, surrogate: Surrogate
) -> np.ndarray:
    """`dI / dc` for all numbers of classes in `n`, which need not be integers."""
    sigma1, sigma2 = max(sigma1, sigma2), min(sigma1, sigma2)
    if surrogate.order is not None:
        return _polynomial(sigma1, rho, sigma2, n, surrogate)
    if sigma1 > 5:
        return _graded(sigma1, rho, sigma2, n)
    return _plain(sigma1, rho, sigma2, n)


def _rates(log_rate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`1 - exp(-r)` and `r exp(-r)`."""
    rate = np.exp(np.minimum(log_rate, 6.7))
    return -np.expm1(-rate), rate * np.exp(-rate)


def _double_sum(
    missing: np.ndarray,
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
    log_f = np.where(missing < 0.5, np.log1p(-np.minimum(missing, 0.6)), np.log(f))
    both, each = 2 * f_c * f_xy * cell, f_c * f_x / f * f_y * cell
    return np.array([k * np.sum((both + (k - 2) * each) * np.exp((k - 2) * log_f)) for k in n])


def _products(
    one: tuple[np.ndarray, np.ndarray], two: tuple[np.ndarray, np.ndarray], weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`1 - F`, F and its derivatives, from `(1 - A, A')`, `(x, X)`, and `(1 - B, B')`, `(y, X)`."""
    shortfall, slope = one[0] * weight, one[1] * weight
    value = (1 - one[0]) * weight
    missing = shortfall.sum(1)[:, None] + value @ two[0].T
    there = 1 - two[0].T
    return missing, value @ there, slope @ there, value @ two[1].T, slope @ two[1].T


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
        up, left, right = r * r * (3 - 2 * r), r * (1 - r) ** 2, -r * r * (1 - r)
        first, second = (
            v[i] + (v[i + 1] - v[i]) * up + d[i] * left + d[i + 1] * right for v, d in self.tables
        )
        return first, second


def _plain(sigma1: float, rho: float, sigma2: float, n: np.ndarray) -> np.ndarray:
    def equally_spaced(sigma: float) -> np.ndarray:
        low, high = -3 * sigma - 4, 7 * sigma + 31
        return np.linspace(low, high, int(np.ceil((high - low) / 0.35)) + 1)

    x, y = equally_spaced(sigma1), equally_spaced(sigma2)
    normal = np.linspace(-8, 8, int(np.ceil(16 * max(sigma1, 1) / 0.25)) + 1)
    weight = np.exp(-(normal**2) / 2)
    one = _rates(sigma1 * normal - x[:, None])
    w = y[:, None] - rho * sigma2 * normal
    two = _noise(w, sigma2 * np.sqrt(1 - rho**2))[:2]
    cell = (x[1] - x[0]) * (y[1] - y[0])
    products = _products(one, two, weight / weight.sum())
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
    one = _rates(-sigma1 * e)
    two = _Noise(tau)(d[:, None] + rho * sigma2 * e)
    missing, f, f_x, f_y, f_xy = _products(one, two, density)
    if rho < 0:
        # Where B is steep, A = 1: E[A B] = E[B] - E[(1 - A) B].
        margin, margin_slope = _Noise(sigma2)(rho * sigma2 * xi[:, None] + d)
        rest, slope = one[0] * density, one[1] * density
        mended = rest.sum(1)[:, None] + margin - rest @ two[0].T
        up = d > 0
        missing, f = np.where(up, mended, missing), np.where(up, 1 - mended, f)
        f_x = np.where(up, slope.sum(1)[:, None] - slope @ two[0].T, f_x)
        f_y = np.where(up, margin_slope - rest @ two[1].T, f_y)
    return _double_sum(missing, f, f_x, f_y, f_xy, f_xy, cell, n)


# Polynomials.


def _x_nodes(sigma: float, surrogate: Surrogate) -> np.ndarray:
    ends = np.array([max(surrogate.minimiser, -8.5 * sigma), 6.8 * sigma, -6.8 * sigma])
    lowest, *tops = _log_f(ends, surrogate)[0]
    low, high = lowest - 4, max(tops) + 31
    return np.linspace(low, high, int(np.ceil((high - low) / X_STEPS[surrogate.order != 2])) + 1)


def _z_nodes(sigma: float, order: int) -> tuple[np.ndarray, np.ndarray]:
    step, log_step = Z_STEPS[order != 2], LOG_STEPS[order != 2]
    scale = order * step / log_step
    end = np.arcsinh(8.5 * sigma / scale)
    count = 2 * int(np.ceil(end * scale / min(step, 0.4 * sigma))) + 1
    angle = np.linspace(-end, end, count)
    return scale * np.sinh(angle), scale * np.cosh(angle) * (angle[1] - angle[0])


def _polynomial(
    sigma1: float, rho: float, sigma2: float, n: np.ndarray, surrogate: Surrogate
) -> np.ndarray:
    order = surrogate.order
    assert order is not None
    x, y = (_x_nodes(sigma, surrogate) for sigma in (sigma1, sigma2))
    u, spacing = _z_nodes(sigma1, order)
    weight = np.exp(-((u / sigma1) ** 2) / 2) * spacing / sigma1 / np.sqrt(2 * np.pi)
    log_f, relative_slope = _log_f(u, surrogate)
    one = _rates(log_f - x[:, None])

    tau = sigma2 * np.sqrt(max(1 - rho**2, 0))
    mean = rho * sigma2 / sigma1 * u
    v, v_spacing = _z_nodes(sigma2, order)
    wide = tau > np.interp(mean, v, v_spacing)
    # 1 - B, B' and B_v.
    two = np.empty((3, y.size, u.size))
    z, z_weight = hermite_e.hermegauss(14)
    z_weight = z_weight / z_weight.sum()
    log_f, relative = _log_f(mean[~wide][:, None] + tau * z, surrogate)
    shortfall, rate = _rates(log_f - y[:, None, None])
    two[:, :, ~wide] = shortfall @ z_weight, rate @ z_weight, (rate * relative) @ z_weight
    if wide.any():
        given = np.exp(-(((v[:, None] - mean[wide]) / tau) ** 2) / 2) * v_spacing[:, None]
        given /= tau * np.sqrt(2 * np.pi)
        log_f, relative = _log_f(v, surrogate)
        shortfall, rate = _rates(log_f - y[:, None])
        two[:, :, wide] = shortfall @ given, rate @ given, (rate * relative) @ given
    cell = (x[1] - x[0]) * (y[1] - y[0])
    f_c = (one[1] * (weight * relative_slope)) @ two[2].T
    return _double_sum(*_products(one, (two[0], two[1]), weight), f_c, cell, n)


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


def sample(surrogate: Surrogate, of: Design) -> np.ndarray:
    """`w dI / d rho`, `(v, v', s, n)`, at the nodes."""
    sigma, s, n = sigmas(of), nodes(of.correlations), numbers_of_classes(of)
    values = np.empty((sigma.size, sigma.size, s.size, n.size))
    for i in range(sigma.size):
        for j in range(i + 1):
            rho, weight, _ = of.coordinates.correlation(s, sigma[i], sigma[j])
            for k in range(s.size):
                each = slope(sigma[i], rho[k], sigma[j], n, surrogate)
                values[i, j, k] = values[j, i, k] = each * (sigma[i] * sigma[j] * weight[k])
    return values


def pack(of: Design, slopes: np.ndarray) -> dict[str, np.ndarray]:
    """What `interpolant.grid` reads: a Tucker decomposition, its core in integers.

    Entries of the core are left out up to the errors that the design allows, measured at the nodes
    and relative to the slope at correlation 1.

    Args:
      slopes: from `sample`.
    """
    sigma, n = sigmas(of), numbers_of_classes(of)
    by_degree = np.einsum("ds,ijsn->ijdn", chebyshev_rule(of.correlations)[1], slopes)
    i = np.arange(sigma.size)
    squares = np.empty((sigma.size, n.size))
    s, s_weight = _legendre_rule()
    for each, at in enumerate(sigma):
        _, weight, stretch = of.coordinates.correlation(s, at, at)
        degrees = chebyshev.chebvander(s, of.correlations - 1)
        squares[each] = (s_weight * stretch / weight) @ degrees @ by_degree[each, each]
    by_degree /= np.sqrt(squares[:, None, None] * squares[:, None])
    ends = np.log(np.sqrt(interpolant.VARIANCES))
    allowed = np.exp(np.interp(np.log(sigma), ends, np.log(of.packing)))
    weight = 1 / np.sqrt(allowed * np.min(by_degree[i, i].sum(1), 1))
    weighted = by_degree * weight[:, None, None, None] * weight[:, None, None]

    def basis(axis: int) -> np.ndarray:
        unfolded = np.moveaxis(weighted, axis, 0).reshape(weighted.shape[axis], -1)
        vectors, squared, _ = np.linalg.svd(unfolded @ unfolded.T)
        # What is rare in the mean, such as two classes, may be all there is somewhere.
        return vectors[:, np.sqrt(squared) > 0.02]

    bases = basis(0), basis(0), basis(2), basis(3)
    core = np.einsum("ijkl,ia,jb,kc,ld->abcd", weighted, *bases, optimize=True)
    core = (core + core.swapaxes(0, 1)) / 2
    low, high = 1e-2, 1e3
    for _ in range(14):
        middle = np.sqrt(low * high)
        kept = np.where(np.abs(core) > middle, core, 0)
        rebuilt = np.einsum("abcd,ia,jb,kc,ld->ijkl", kept, *bases, optimize=True)
        left = np.max(np.sqrt(np.sum((rebuilt - weighted) ** 2, 2)))
        low, high = (middle, high) if left < 1 else (low, middle)
    assert low > 1e-2, "the bases leave more than the design allows"
    unit = low / 2
    rows, columns = np.triu_indices(core.shape[0])
    integers = np.round(np.where(np.abs(core) > low, core, 0) / unit)[rows, columns]
    planes = integers.astype("<i8").reshape(-1, 1).view(np.uint8).T
    reduced = np.sqrt(squares) / of.coordinates.saturation(sigma)[:, None]
    logarithm = np.log(reduced * np.sqrt(n))
    return {
        "core": np.ascontiguousarray(planes),
        "unit": np.asarray(unit),
        "variance": chebyshev_rule(of.variances)[1] @ (bases[0] / weight[:, None]),
        "correlation": bases[2],
        "classes": chebyshev_rule(of.classes)[1] @ bases[3],
        "scale": chebyshev_rule(of.variances)[1] @ logarithm @ chebyshev_rule(of.classes)[1].T,
        "coordinates": np.asarray(of.coordinates),
    }


def _legendre_rule(count: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """On [0, 1]."""
    s, weight = np.polynomial.legendre.leggauss(count)
    return (s + 1) / 2, weight / 2


def measure(surrogate: Surrogate, of: Design, given: interpolant.Grid) -> np.ndarray:
    """Twice the largest errors found off the nodes: `Grid.errors`; infinite beyond the grid."""
    rng = np.random.default_rng(0)
    n = np.array([[2, 2, 2], [3, 3, 4], [5, 7, 9], [10, 100, 1000], [1e4, 1e5, 9e5]])
    at = chebyshev.chebvander(interpolant.class_coordinate(n.ravel()), of.classes - 1)
    s, s_weight = _legendre_rule(14)
    s = np.concatenate([-s, s, [-1, 1]])
    s_weight = np.concatenate([s_weight, s_weight, [0, 0]])
    degrees = chebyshev.chebvander(s, of.correlations - 1) @ given.correlation
    whole = of.coordinates.v(np.sqrt(of.largest))

    def rows(sigma: float) -> tuple[np.ndarray, np.ndarray]:
        (basis,) = chebyshev.chebvander([2 * of.coordinates.v(sigma) / whole - 1], of.variances - 1)
        q = np.exp(basis @ given.scale @ at.T) * of.coordinates.saturation(sigma)
        return basis @ given.variance, q / np.sqrt(n.ravel())

    def slopes(one: np.ndarray, two: np.ndarray) -> np.ndarray:
        core = np.einsum("a,abcd,b->cd", one, given.core, two, optimize=True)
        return degrees @ core @ (at @ given.classes).T

    def with_itself(sigma: float) -> np.ndarray:
        one, _ = rows(sigma)
        return slopes(one, one)[-1] / of.coordinates.correlation(s, sigma, sigma)[1][-1]

    def errors(sigma1: float, sigma2: float) -> np.ndarray:
        (one, q1), (two, q2) = rows(sigma1), rows(sigma2)
        found = slopes(one, two)
        unit = np.sqrt(with_itself(sigma1) * with_itself(sigma2))
        rho, weight, stretch = of.coordinates.correlation(s, sigma1, sigma2)
        exact = np.array([slope(sigma1, r, sigma2, n.ravel(), surrogate) for r in rho])
        wrong = (found / weight[:, None] - exact * (sigma1 * sigma2) / (q1 * q2)).T
        halves = (s_weight * stretch * wrong)[:, :-2].reshape(n.size, 2, -1).sum(2)
        each = np.max(np.abs(halves), 1), np.max(np.abs(wrong), 1) / unit
        return np.max(np.reshape(each, (2, *n.shape)), 2).T

    found = np.zeros((len(n), 2, len(interpolant.VARIANCES)))
    for k, top in enumerate(interpolant.VARIANCES):
        if top > of.largest:
            found[:, :, k] = np.inf
            continue
        low, high = np.log(interpolant.VARIANCES[k - 1] if k else 1e-3) / 2, np.log(top) / 2
        for largest in (high, high, *rng.uniform(low, high, 5)):
            for smallest in (largest, rng.uniform(np.log(0.03), largest)):
                each = errors(np.exp(largest), np.exp(smallest))
                found[:, :, k] = np.maximum(found[:, :, k], each)
    return 2 * np.maximum.accumulate(found, 2)


def main(arguments: list[str]) -> None:
    for each in arguments or ["softmax", *map(str, range(2, 34, 2))]:
        surrogate = parse(None if each == "softmax" else int(each))
        for near in (True, False) if interpolant.has_own_near_samples(surrogate) else (False,):
            write(surrogate, near=near)


def write(surrogate: Surrogate, *, near: bool) -> None:
    of, file = design(surrogate, near=near), interpolant.name(surrogate, near=near)
    arrays: Any = pack(of, sample(surrogate, of))
    # Which `measure` does not look at.
    unknown = np.zeros((len(interpolant.GROUPS), 2, len(interpolant.VARIANCES)))
    errors = measure(surrogate, of, interpolant.unpack({**arrays, "errors": unknown}, of.largest))
    np.savez_compressed(TARGET / file, **arrays, errors=errors)
    print(f"{file} written", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
