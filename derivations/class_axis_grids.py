"""Class axis: what quadrature gives on the grids that the interpolants of the library start from.

`python -m derivations.class_axis_grids [softmax 2 4 ...]` writes `taylor_softmax/_generated/
class_axis_*.npz`: ten minutes for softmax, seconds to minutes for an order (all even ones to 32
without arguments). `tests/test_class_axis.py` computes a few entries anew.

The integral is that of `taylor_softmax/_class_axis/integral.py`, written a second time, in NumPy:
for all numbers of classes at once, since `F` does not depend on them, with as many nodes as a pair
needs, and with functions of one variable tabulated where the library evaluates them.
"""

import dataclasses
import pathlib
import sys

import numpy as np
import scipy.special
from numpy.polynomial import hermite_e

from taylor_softmax._class_axis import interpolant
from taylor_softmax._numerics.quadrature import exponential_rule
from taylor_softmax._numerics.surrogate import Surrogate, parse

TARGET = pathlib.Path(__file__).parents[1] / "taylor_softmax" / "_generated"
ROUNDING = 0.8


@dataclasses.dataclass(frozen=True)
class Design:
    """Of one grid.

    Attributes:
      knee: `w` of the coordinate `sigma / (sigma + w)`.
      variances, correlations, classes: numbers of Chebyshev nodes.
      errors: that packing may make at variances up to 20, 100, 1e4, 1e6.
    """

    knee: float
    variances: int
    correlations: int
    classes: int
    errors: tuple[float, float, float, float]


def design(surrogate: Surrogate) -> Design:
    if surrogate.order is None:
        return Design(5.0, 44, 30, 20, (3e-8, 5e-8, 3e-6, 3e-5))
    if surrogate.order == 2:
        return Design(2.0, 36, 32, 18, (3e-8, 3e-8, 3e-8, 3e-8))
    return Design(2.0 if surrogate.order <= 6 else 4.0, 26, 22, 14, (1e-7, 1e-6, 1e-5, 1e-5))


def nodes(count: int) -> np.ndarray:
    return np.cos(np.pi * (np.arange(count)[::-1] + 0.5) / count)


def sigmas(of: Design) -> np.ndarray:
    whole = np.sqrt(interpolant.LARGEST_VARIANCE)
    v = (nodes(of.variances) + 1) / 2 * whole / (whole + of.knee)
    return of.knee * v / (1 - v)


def numbers_of_classes(of: Design) -> np.ndarray:
    low, high = (np.log(np.log(n) + 0.5) for n in (2, interpolant.LARGEST_N_CLASSES))
    return np.exp(np.exp(low + (high - low) * (nodes(of.classes) + 1) / 2) - 0.5)


def correlation(s: float, sigma1: float, sigma2: float) -> float:
    """The correlation at the coordinate `s`."""
    x_one = sigma1 * sigma2 / np.sqrt((sigma1**2 + ROUNDING) * (sigma2**2 + ROUNDING))
    t = s * x_one / (1 + np.sqrt(1 - x_one**2))
    return 2 * t / (1 + t**2) / x_one


def covariance(
    sigma1: float, rho: float, sigma2: float, n: np.ndarray, surrogate: Surrogate
) -> np.ndarray:
    """`I` for all numbers of classes in `n`, which need not be integers."""
    sigma1, sigma2 = max(sigma1, sigma2), min(sigma1, sigma2)
    if surrogate.order is not None:
        return _polynomial(sigma1, rho, sigma2, n, surrogate)
    if sigma1**2 > 2:
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
    cell: np.ndarray | float,
    n: np.ndarray,
) -> np.ndarray:
    log_f = np.where(
        missing < 0.5, np.log1p(-np.minimum(missing, 0.6)), np.log(np.maximum(f, 1e-300))
    )
    numerator = (f_xy * f - f_x * f_y) * cell
    return np.array([np.sum(numerator * np.exp((each - 2) * log_f)) for each in n])


def _products(
    one: tuple[np.ndarray, np.ndarray], two: tuple[np.ndarray, np.ndarray], weight: np.ndarray
) -> tuple[np.ndarray, ...]:
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
        low, high = -3 * sigma - 4, 7 * sigma + 27
        return np.linspace(low, high, int(np.ceil((high - low) / 0.35)) + 1)

    x, y = equally_spaced(sigma1), equally_spaced(sigma2)
    normal = np.linspace(-8, 8, int(np.ceil(16 * max(sigma1, 1) / 0.25)) + 1)
    weight = np.exp(-(normal**2) / 2)
    one = _rates(sigma1 * normal - x[:, None])
    w = y[:, None] - rho * sigma2 * normal
    two = _noise(w, sigma2 * np.sqrt(1 - rho**2))[:2]
    cell = (x[1] - x[0]) * (y[1] - y[0])
    return _double_sum(*_products(one, two, weight / weight.sum()), cell, n)


def _sinh_nodes(count: int, scale: float, reach: float) -> tuple[np.ndarray, np.ndarray]:
    angle = np.linspace(-1, 1, count) * np.arcsinh(reach / scale)
    return scale * np.sinh(angle), scale * np.cosh(angle) * (angle[1] - angle[0])


def _graded(sigma1: float, rho: float, sigma2: float, n: np.ndarray) -> np.ndarray:
    tau = sigma2 * np.sqrt(1 - rho**2)
    xi = np.linspace(-6.5, 8 + 27 / sigma1, 132)
    d, d_weight = _sinh_nodes(141, 0.6 * np.sqrt(1.6 + tau**2), 11 * sigma2 + 30)
    e, e_weight = _sinh_nodes(131, 0.6 / sigma1, 14.5 + 27 / sigma1)
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
    return _double_sum(missing, f, f_x, f_y, f_xy, cell, n)


# Polynomials.


def _steps(surrogate: Surrogate, sigma: float) -> tuple[float, float]:
    """Of the rules in x and in z."""
    if surrogate.order == 2:
        return 0.3, 0.35
    return (0.7, 0.8) if sigma > 20 else (0.5, 0.6)


def _x_nodes(sigma: float, surrogate: Surrogate, step: float) -> np.ndarray:
    ends = np.array([max(surrogate.minimiser, -8.5 * sigma), 6.8 * sigma, -6.8 * sigma])
    lowest, *tops = np.asarray(surrogate.log_value(ends))
    low, high = lowest - 4, max(tops) + 27
    return np.linspace(low, high, int(np.ceil((high - low) / step)) + 1)


def _z_nodes(sigma: float, order: int, step: float) -> tuple[np.ndarray, np.ndarray]:
    end = np.arcsinh(8.5 * sigma / order)
    count = 2 * int(np.ceil(end * order / min(step, 1.2 * step * sigma))) + 1
    angle = np.linspace(-end, end, count)
    return order * np.sinh(angle), order * np.cosh(angle) * (angle[1] - angle[0])


def _polynomial(
    sigma1: float, rho: float, sigma2: float, n: np.ndarray, surrogate: Surrogate
) -> np.ndarray:
    order = surrogate.order
    assert order is not None
    x_step, z_step = _steps(surrogate, sigma1)
    x, y = (_x_nodes(sigma, surrogate, x_step) for sigma in (sigma1, sigma2))
    u, spacing = _z_nodes(sigma1, order, z_step)
    weight = np.exp(-((u / sigma1) ** 2) / 2) * spacing / sigma1 / np.sqrt(2 * np.pi)
    one = _rates(np.asarray(surrogate.log_value(u)) - x[:, None])

    tau = sigma2 * np.sqrt(max(1 - rho**2, 0))
    mean = rho * sigma2 / sigma1 * u
    v, v_spacing = _z_nodes(sigma2, order, z_step)
    wide = tau > np.interp(mean, v, v_spacing)
    two = np.empty((2, y.size, u.size))
    z, z_weight = hermite_e.hermegauss(14)
    each = mean[~wide][:, None] + tau * z
    log_f = np.asarray(surrogate.log_value(each))
    for k, part in enumerate(_rates(log_f - y[:, None, None])):
        two[k][:, ~wide] = part @ (z_weight / z_weight.sum())
    if wide.any():
        given = np.exp(-(((v[:, None] - mean[wide]) / tau) ** 2) / 2) * v_spacing[:, None]
        for k, part in enumerate(_rates(np.asarray(surrogate.log_value(v)) - y[:, None])):
            two[k][:, wide] = part @ given / tau / np.sqrt(2 * np.pi)
    cell = (x[1] - x[0]) * (y[1] - y[0])
    return _double_sum(*_products(one, (two[0], two[1]), weight), cell, n)


# Grids.


def sample(surrogate: Surrogate) -> tuple[np.ndarray, np.ndarray]:
    """`I / (rho q q')`, `(v, v', s, n)`, and `q^2`, `(v, n)`, at the nodes."""
    of = design(surrogate)
    sigma, s, n = sigmas(of), nodes(of.correlations), numbers_of_classes(of)
    squares = np.array([covariance(each, 1.0, each, n, surrogate) for each in sigma])
    values = np.empty((sigma.size, sigma.size, s.size, n.size))
    for i in range(sigma.size):
        for j in range(i + 1):
            for k, each in enumerate(s):
                rho = correlation(each, sigma[i], sigma[j])
                whole = covariance(sigma[i], rho, sigma[j], n, surrogate)
                values[i, j, k] = whole / rho / np.sqrt(squares[i] * squares[j])
            values[j, i] = values[i, j]
    return values, squares


def to_coefficients(count: int) -> np.ndarray:
    matrix = 2 / count * np.cos(np.outer(np.arange(count), np.arccos(nodes(count))))
    matrix[0] /= 2
    return matrix


def pack(surrogate: Surrogate, values: np.ndarray, squares: np.ndarray) -> dict[str, np.ndarray]:
    """What `interpolant.grid` reads: a Tucker decomposition, its core in integers.

    Entries of the core are left out up to the errors that the design allows, measured at the nodes.
    """
    of = design(surrogate)
    sigma, n = sigmas(of), numbers_of_classes(of)
    ends = np.log(np.sqrt([20.0, 100.0, 1e4, 1e6]))
    weight = np.exp(-np.interp(np.log(sigma), ends, np.log(of.errors)) / 2)
    weighted = values * weight[:, None, None, None] * weight[:, None, None]

    def basis(axis: int) -> np.ndarray:
        unfolded = np.moveaxis(weighted, axis, 0).reshape(weighted.shape[axis], -1)
        vectors, squared, _ = np.linalg.svd(unfolded @ unfolded.T)
        return vectors[:, np.sqrt(squared / unfolded.shape[1]) > 0.02]

    bases = basis(0), basis(0), basis(2), basis(3)
    core = np.einsum("ijkl,ia,jb,kc,ld->abcd", weighted, *bases, optimize=True)
    core = (core + core.swapaxes(0, 1)) / 2
    low, high = 1e-2, 1e3
    for _ in range(14):
        middle = np.sqrt(low * high)
        kept = np.where(np.abs(core) > middle, core, 0)
        rebuilt = np.einsum("abcd,ia,jb,kc,ld->ijkl", kept, *bases, optimize=True)
        low, high = (middle, high) if np.max(np.abs(rebuilt - weighted)) < 1 else (low, middle)
    unit = low / 2
    rows, columns = np.triu_indices(core.shape[0])
    integers = np.round(np.where(np.abs(core) > low, core, 0) / unit)[rows, columns]
    planes = integers.astype("<i8").reshape(-1, 1).view(np.uint8).T
    logarithm = np.log(np.sqrt(squares) * ((sigma + of.knee) / sigma)[:, None] * np.sqrt(n))
    return {
        "core": np.ascontiguousarray(planes),
        "unit": np.asarray(unit),
        "variance": to_coefficients(of.variances) @ (bases[0] / weight[:, None]),
        "correlation": to_coefficients(of.correlations) @ bases[2],
        "classes": to_coefficients(of.classes) @ bases[3],
        "scale": to_coefficients(of.variances) @ logarithm @ to_coefficients(of.classes).T,
        "knee": np.asarray(of.knee),
        "rounding": np.asarray(ROUNDING),
        "errors": np.array([of.errors, of.errors]),
    }


def main(arguments: list[str]) -> None:
    import jax

    jax.config.update("jax_enable_x64", True)
    for each in arguments or ["softmax", *map(str, range(2, 34, 2))]:
        surrogate = parse(None if each == "softmax" else int(each))
        np.savez_compressed(
            TARGET / interpolant.name(surrogate), **pack(surrogate, *sample(surrogate))
        )
        print(f"{interpolant.name(surrogate)} written", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
