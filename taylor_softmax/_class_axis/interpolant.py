"""Interpolation of the class covariance between samples that come with the package.

For variances from 0 to 1e6, 2 to 1e6 classes, and one pair of inputs or ten million.

As a function of `rho = c / sqrt(a b)` the covariance has kinks at +-1, like roots or logarithms,
which the noise of the outputs rounds off over 1 / variance. As many Chebyshev nodes as resolve
them are few in the coordinate

    s = y / y_1,  y = x + artanh x,  x = c / sqrt((a + k)(b + k)),  y_1 = y at rho = 1,

part of whose range is linear in rho and part logarithmic in the distance from the kinks: at
variance 1e6, 50 nodes leave 1e-6 of the slope, and 8e-2 in the angle whose sine is x. Values, which
the kinks bend less, take fewer terms in

    r = t / t_1,  t = x / (1 + sqrt(1 - x^2)),  t_1 = t at rho = 1,

the tangent of half that angle. Variances from 0 to 1e6 are an interval in

    v = sigma / (sigma + w) + h log(1 + sigma / w).

Of orders from 4 on, a class with a large negative logit wins from sigma of about a third of the
order on. Two inputs of equal variances get there together, so that K has a ridge along them, of a
width of 1 / order, at correlations close to 1. A polynomial in v and v' would need hundreds of
nodes for it; those for large variances are in v of the larger variance and in

    delta = arsinh(g (v - v')) / arsinh(g v),

from 0 on the ridge to 1 where the smaller variance vanishes: one side of the ridge has no kink.

Sampled is the slope, `dI / d rho`, which quadrature gives without cancellation (`integral`). With
`q(a)^2 = I(a, a, a)`, the integral of it from 0 to 1, and a weight that takes the pole of its limit
away, `W^2 = 1 - rho^2` but for what the noise adds, the quotients

    K = W (dI / d rho) / (q(a) q(b))   and   G = I / (q(a) q(b) r)

are of order 1 at every variance. A value integrated from slopes is better than they are; a slope
differentiated from values would lose a factor of the degree squared.

What quadrature gives at the nodes of a grid in v, v' or delta, s and the number of classes comes
with the package (`derivations` writes it). Here it is put together for one number of classes and a
range of variances, once per process, with NumPy: for every degree in s the coefficients are a
symmetric matrix in the two variances of low rank, so that

    K = sum_d T_d(s) sum_i +-f_di(v) f_di(v'),

and G likewise, cut off where the error, measured on the grid, reaches the tolerance. They have
terms of their own: G needs fewer, and XLA on a CPU puts value and slope in separate loops,
so that shared terms would be summed twice.
"""

import dataclasses
import functools
import importlib.resources
import itertools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from numpy.polynomial import chebyshev

from taylor_softmax._numerics.precision import einsum, matmul
from taylor_softmax._numerics.quadrature import chebyshev_rule
from taylor_softmax._numerics.surrogate import Surrogate

# Numbers of classes that the shipped grids span, and the largest variance: beyond it the kernel is
# that of its limit (of argmax, for softmax) to 2e-3 of its value at correlation 1.
LARGEST_N_CLASSES = 1_000_000
LARGEST_VARIANCE = 1e6

# Orders from this one on have samples of their own for small variances, on as many nodes as others
# have for all. Their samples for all have the coordinate delta.
OWN_NEAR_SAMPLES = 4

# Up to which errors are told apart: variances, and numbers of classes.
VARIANCES = 20.0, 100.0, 1e4, LARGEST_VARIANCE
GROUPS = 2, 4, 9, 1000, LARGEST_N_CLASSES

# What rows of factors may take of a core's cache.
_CACHED_BYTES = 1 << 21

# Pairs of which derivatives are evaluated at a time, and sums by products of matrices: each keeps
# a few arrays of their size.
_CACHED_PAIRS, _LOOPED_PAIRS = 1 << 17, 1 << 20

# Which the loop over them is not worth its while below.
_LEAST_COLUMNS = 32

# Where pairs are many, terms are summed in fused loops over them of at most so many: of 270 LLVM no
# longer vectorises the loop, which takes six times as long as of 240 (measured on a CPU).
_FUSED_TERMS = 240

# From four such loops on, products of matrices for each degree are faster.
_FUSED_LOOPS = 3

# Up to this many terms derivatives are evaluated in one fused loop, too: more would compile for
# several seconds.
_FUSED_DERIVATIVE_TERMS = 150

# Nodes per variance on which terms are found and errors measured: the first that resolve K.
_NODES = 48, 72, 108, 162, 243, 324

# Degrees in r that values have before they are cut off.
_VALUE_NODES = 60


class Coordinates(NamedTuple):
    """In which variances and correlations are sampled.

    Attributes:
      knee, tail: `w` and `h` of the coordinate v.
      rounding: `k` of x.
      smoothing: `l` of the weight, `W^2 = 1 - c^2 / ((a + l a + k)(b + l b + k))`.
      ridge: `g` of the coordinate delta, or 0 where each variance has a coordinate of its own.
    """

    knee: float
    tail: float
    rounding: float
    smoothing: float
    ridge: float = 0.0

    def saturation(self, sigma: Any) -> Any:
        return sigma / (sigma + self.knee)

    def v(self, sigma: Any, log1p: Any = np.log1p) -> Any:
        return self.saturation(sigma) + self.tail * log1p(sigma / self.knee)

    def sigma(self, v: np.ndarray) -> np.ndarray:
        """The inverse of `v`, by Newton's method in the logarithm of `1 + sigma / w`."""
        # Concave, and steepest at 0: every step stays below the root.
        logarithm = np.zeros_like(v)
        for _ in range(60):
            decay = np.exp(-logarithm)
            missing = v - (1 - decay + self.tail * logarithm)
            logarithm = logarithm + missing / (decay + self.tail)
        return self.knee * np.expm1(logarithm)

    def second(self, v1: np.ndarray, v2: np.ndarray, whole: float) -> np.ndarray:
        """In [-1, 1]: the coordinate of the smaller variance, given those of both."""
        if not self.ridge:
            return 2 * v2 / whole - 1
        return 2 * np.arcsinh(self.ridge * (v1 - v2)) / np.arcsinh(self.ridge * v1) - 1

    def smaller(self, v1: np.ndarray, second: np.ndarray, whole: float) -> np.ndarray:
        """`v2`, the inverse of `second`."""
        if not self.ridge:
            return (second + 1) / 2 * whole
        delta = (second + 1) / 2
        return v1 - np.sinh(delta * np.arcsinh(self.ridge * v1)) / self.ridge

    def correlation(
        self, s: np.ndarray, sigma1: Any, sigma2: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The correlation at the coordinate `s`, the weight there, and `d rho / d s`."""
        share1, share2 = self.weight_share(sigma1**2), self.weight_share(sigma2**2)
        rest_weight = share1 + share2 - share1 * share2
        x_one = self._x_one(sigma1, sigma2)
        y_one = x_one + np.arctanh(x_one)
        y = np.abs(s) * y_one
        # `tanh z + z = y`, from below as above.
        z = y / 2
        for _ in range(8):
            z = z + (y - np.tanh(z) - z) / (1 + 1 / np.cosh(z) ** 2)
        rest = 1 / np.cosh(z) ** 2
        rho = np.minimum(np.tanh(z) / x_one, 1)
        weight = np.sqrt(rest_weight + (1 - rest_weight) * (1 - rho) * (1 + rho))
        return np.sign(s) * rho, weight, y_one / x_one * rest / (1 + rest)

    def s(self, r: np.ndarray, sigma1: Any, sigma2: Any) -> np.ndarray:
        """The coordinate s at the coordinate r."""
        x_one = self._x_one(sigma1, sigma2)
        t = r * x_one / (1 + np.sqrt(1 - x_one**2))
        return (2 * t / (1 + t**2) + 2 * np.arctanh(t)) / (x_one + np.arctanh(x_one))

    def _x_one(self, sigma1: Any, sigma2: Any) -> Any:
        return sigma1 * sigma2 / np.sqrt((sigma1**2 + self.rounding) * (sigma2**2 + self.rounding))

    def share(self, variance: Any) -> Any:
        """What `rounding` makes of a variance with it."""
        return self.rounding / (variance + self.rounding)

    def weight_share(self, variance: Any) -> Any:
        more = self.rounding + self.smoothing * variance
        return more / (variance + more)


class Grid(NamedTuple):
    """What the package ships for one surrogate; everything in Chebyshev coefficients.

    Attributes:
      core: `(R, D, S, N)`; symmetric in the first two axes where both are of variances.
      variance: `(degrees in v, R)`, of the larger variance.
      second: `(degrees in v or delta, D)`, of the smaller one; `variance` itself without a ridge.
      correlation: `(degrees in s, S)`.
      classes: `(degrees in the number of classes, N)`.
      scale: `log(q (sigma + w) sqrt(n) / sigma)`, `(degrees in v, degrees in n)`.
      errors: of value and slope, relative to those at correlation 1, for numbers of classes up to
        each of `GROUPS` and variances up to each of `VARIANCES`, `(5, 2, 4)`: twice the largest
        found off the nodes when the grid was made.
      largest: variance that it spans.
    """

    core: np.ndarray
    variance: np.ndarray
    second: np.ndarray
    correlation: np.ndarray
    classes: np.ndarray
    scale: np.ndarray
    coordinates: Coordinates
    errors: np.ndarray
    largest: float

    @property
    def whole(self) -> float:
        """The coordinate v of the largest variance."""
        return float(self.coordinates.v(math.sqrt(self.largest)))

    def log_scale(self, v: np.ndarray, n_classes: Any) -> np.ndarray:
        """`log(q (sigma + w) sqrt(n) / sigma)`, `(v, n)`."""
        of_classes = chebyshev.chebvander(class_coordinate(n_classes), self.scale.shape[1] - 1)
        of_variances = chebyshev.chebvander(2 * v / self.whole - 1, len(self.scale) - 1)
        return of_variances @ self.scale @ of_classes.T

    def slopes(self, v1: np.ndarray, v2: np.ndarray, n_classes: Any) -> np.ndarray:
        """K in Chebyshev coefficients in s, `(x, y, degree, n)`, of `v1: (x,) >= v2: (x, y)`."""
        of_classes = chebyshev.chebvander(class_coordinate(n_classes), len(self.classes) - 1)
        one = chebyshev.chebvander(2 * v1 / self.whole - 1, len(self.variance) - 1)
        second = self.coordinates.second(v1[:, None], v2, self.whole)
        two = chebyshev.chebvander(second, len(self.second) - 1)
        core = self.correlation @ (self.core @ (of_classes @ self.classes).T)
        by_first = np.tensordot(one @ self.variance, core, 1)
        both = (two @ self.second) @ by_first.reshape(*by_first.shape[:2], -1)
        return both.reshape(*v2.shape, *by_first.shape[2:])


@dataclasses.dataclass(frozen=True, eq=False)
class ProductSum:
    """A sum of products, for value or slope; hashed by identity.

    Attributes:
      ranks: number of terms of each degree in s.
      signs: of the terms, `(degrees in s, largest rank)`; 0 where there is none.
      factors: Chebyshev coefficients in v, `(degrees in s, largest rank, degrees in v)`.
    """

    ranks: tuple[int, ...]
    signs: np.ndarray
    factors: np.ndarray


class Level(NamedTuple):
    """Interpolants for one number of classes, with what they need of the grid.

    Attributes:
      value, slope: their terms.
      scale: Chebyshev coefficients of `log(q (sigma + w) sqrt(n) / sigma)` in v.
      largest: variance.
    """

    value: ProductSum
    slope: ProductSum
    scale: np.ndarray
    largest: float
    coordinates: Coordinates


def near_limit(surrogate: Surrogate) -> float:
    """The variance up to which fewer terms do, or other samples: most data are within it."""
    return 100.0 if surrogate.order is None or surrogate.order <= 8 else 20.0


def has_own_near_samples(surrogate: Surrogate) -> bool:
    return surrogate.order is not None and surrogate.order >= OWN_NEAR_SAMPLES


def span(surrogate: Surrogate, *, near: bool) -> float:
    """Largest variance of the grid that serves small ones, or all."""
    own = near and has_own_near_samples(surrogate)
    return near_limit(surrogate) if own else LARGEST_VARIANCE


def name(surrogate: Surrogate, *, near: bool) -> str:
    """Of the file that holds that grid."""
    of = "softmax" if surrogate.order is None else f"order_{surrogate.order}"
    own = near and has_own_near_samples(surrogate)
    return f"class_axis_{of}{'_near' if own else ''}.npz"


def class_coordinate(n: Any) -> Any:
    """In [-1, 1] for 2 to `LARGEST_N_CLASSES` classes."""
    low, high = (np.log(np.log(each) + 0.5) for each in (2, LARGEST_N_CLASSES))
    return 2 * (np.log(np.log(n) + 0.5) - low) / (high - low) - 1


@functools.cache
def grid(surrogate: Surrogate, *, near: bool) -> Grid:
    file = importlib.resources.files("taylor_softmax._generated") / name(surrogate, near=near)
    with file.open("rb") as stream, np.load(stream) as stored:
        return unpack(stored, span(surrogate, near=near))


def unpack(stored: Mapping[str, np.ndarray], largest: float) -> Grid:
    """The grid of a file, which spans variances up to `largest`."""
    coordinates = Coordinates(*stored["coordinates"].tolist())
    variance, correlation, classes = (stored[k] for k in ("variance", "correlation", "classes"))
    second = stored["second"] if coordinates.ridge else variance
    sizes = second.shape[1], correlation.shape[1], classes.shape[1]
    # Bytes by significance: the high ones compress to nothing.
    planes = np.ascontiguousarray(stored["core"].T)
    core = planes.view(np.int64).reshape(-1, *sizes[1:]) * stored["unit"]
    if coordinates.ridge:
        core = core.reshape(-1, *sizes)
    else:
        rows, columns = np.triu_indices(sizes[0])
        half, core = core, np.zeros((sizes[0], *sizes))
        core[rows, columns] = core[columns, rows] = half
    scale, errors = stored["scale"], stored["errors"]
    return Grid(core, variance, second, correlation, classes, scale, coordinates, errors, largest)


def tolerances(
    surrogate: Surrogate, n_classes: int, largest: float, sigma: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """What terms of value and slope are cut off at, at standard deviations `sigma`.

    A part of what is promised, and not below what the samples are known to, which would be terms
    for noise. The same up to a variance of 1e4, whatever the pair: a call is as good as its largest
    variance allows. Pairs of unequal variances get the geometric mean.
    """
    is_near = bool(largest <= near_limit(surrogate))
    if bits < 64:
        steps = [2e-5, 2e-5] if is_near else [1e-4, 3e-4]
    elif surrogate.has_closed_form:
        steps = [3e-8, 3e-8] if is_near else [3e-7, 3e-6]
    elif surrogate.order is None:
        steps = [2e-7, 3e-7] if is_near else [2e-5, 2e-4]
    else:
        steps = [1e-6, 1e-6] if is_near else [1.5e-5, 2e-4]
    ends = [0.5 * np.log(1e4), 0.5 * np.log(LARGEST_VARIANCE)]
    given = grid(surrogate, near=is_near)
    spanned = np.array(VARIANCES) <= given.largest
    at, places = np.log(sigma), np.log(np.array(VARIANCES)[spanned]) / 2
    least = np.interp(at, ends, np.log(steps))
    known = np.log(given.errors[_group(n_classes)][:, spanned] / 4)
    value, slope = (np.exp(np.maximum(least, np.interp(at, places, each))) for each in known)
    return value, slope


def _group(n_classes: int) -> int:
    return int(np.searchsorted(GROUPS, n_classes))


@functools.cache
def level(surrogate: Surrogate, n_classes: int, bits: int, *, is_near: bool) -> Level:
    """The interpolant for one number of classes, in float64 whatever the `bits` it is meant for.

    Args:
      is_near: for variances up to `near_limit(surrogate)` only.
    """
    given = grid(surrogate, near=is_near)
    largest = near_limit(surrogate) if is_near else LARGEST_VARIANCE
    of_classes = np.array([n_classes])

    def allowed(sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tolerances(surrogate, n_classes, largest, sigma, bits)

    v, slope = _on_nodes(given, of_classes, math.sqrt(largest), lambda sigma: allowed(sigma)[1])
    sigma = given.coordinates.sigma(v)
    of_value, of_slope = allowed(sigma)
    one = np.abs(np.diagonal(slope.sum(0)))
    scale = given.log_scale(v, of_classes)[:, 0]
    return Level(
        value=_cut(_integrated(slope, sigma, given.coordinates), 1 / np.sqrt(of_value)),
        slope=_cut(slope, 1 / np.sqrt(of_slope * one)),
        scale=chebyshev_rule(v.size)[1] @ (scale - np.log(n_classes) / 2),
        largest=largest,
        coordinates=given.coordinates,
    )


def _on_nodes(
    given: Grid, n_classes: np.ndarray, largest: float, allowed: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes in v, and K in coefficients in s on pairs of them: `(v,)` and `(degree, v, v)`.

    The first of `_NODES` that resolve a ridge, which is narrowest at correlation 1: halfway between
    nodes what interpolation leaves there is compared with what is allowed.

    Args:
      n_classes: one number.
      largest: standard deviation.
      allowed: of standard deviations, relative to K at correlation 1.
    """
    end = given.coordinates.v(largest)
    v = slope = np.empty(0)
    for count in _NODES:
        nodes, to_coefficients = chebyshev_rule(count)
        v = (nodes + 1) / 2 * end
        pairs = np.moveaxis(given.slopes(v, np.minimum(v, v[:, None]), n_classes)[..., 0], 2, 0)
        slope = np.tril(pairs) + np.tril(pairs, -1).swapaxes(1, 2)
        between = (nodes[1:] + nodes[:-1]) / 2
        basis = chebyshev.chebvander(between, count - 1) @ to_coefficients
        found = np.sum(basis @ slope.sum(0) * basis, 1)
        between = (between + 1) / 2 * end
        want = given.slopes(between, between[:, None], n_classes)[:, 0, :, 0].sum(1)
        wrong = np.abs(found - want) / np.abs(want) / allowed(given.coordinates.sigma(between))
        if np.max(wrong) < 1:
            break
    return v, slope


def error(surrogate: Surrogate, n_classes: int, bits: int, largest: float) -> tuple[float, float]:
    """Estimates of the largest errors of value and slope in a call of variances up to `largest`.

    Relative to those at correlation 1: what was measured off the nodes of the grid when it was
    made, and what its terms are cut off at. Rounding comes on top.
    """
    step = np.searchsorted(VARIANCES, min(largest, LARGEST_VARIANCE))
    is_near = bool(largest <= near_limit(surrogate))
    known = grid(surrogate, near=is_near).errors[_group(n_classes), :, step]
    cut_off = tolerances(surrogate, n_classes, largest, np.sqrt(np.array([largest])), bits)
    # Between the nodes on which they were cut, terms leave up to three times that (measured).
    value, slope = (float(each + 4 * cut[0]) for each, cut in zip(known, cut_off, strict=True))
    return value, slope


def _cut(matrices: np.ndarray, weight: np.ndarray) -> ProductSum:
    """The fewest terms that leave an error of at most `1 / (weight weight')`, by bisection.

    Args:
      matrices: `(degree, v, v)`, symmetric.
    """
    weighted = matrices * weight[:, None] * weight
    values, vectors = np.linalg.eigh((weighted + weighted.swapaxes(1, 2)) / 2)
    size = np.abs(values) * np.max(vectors**2, axis=1)
    at = chebyshev.chebvander(np.cos(np.linspace(0, np.pi, 61)), len(matrices) - 1)

    def rebuilt(least: float) -> np.ndarray:
        return (vectors * np.where(size > least, values, 0)[:, None]) @ vectors.swapaxes(1, 2)

    sizes = np.sort(size, axis=None)
    low, high = 0, sizes.size - 1
    while high - low > 1:
        middle = (low + high) // 2
        left = np.tensordot(at, weighted - rebuilt(sizes[middle]), 1)
        low, high = (middle, high) if np.max(np.abs(left)) <= 1 else (low, middle)
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


def _integrated(slope: np.ndarray, sigma: np.ndarray, of: Coordinates) -> np.ndarray:
    """G from K, both `(degree, v, v)`, G in degrees of r."""
    rows, columns = np.triu_indices(sigma.size)
    sigma1, sigma2 = sigma[rows], sigma[columns]
    s, to_coefficients = chebyshev_rule(2 * len(slope))
    _, weight, stretch = of.correlation(s[:, None], sigma1, sigma2)
    slope = chebyshev.chebvander(s, len(slope) - 1) @ slope[:, rows, columns]
    integral = chebyshev.chebint(to_coefficients @ (slope * stretch / weight), lbnd=0)
    r, to_coefficients = chebyshev_rule(_VALUE_NODES)
    at = of.s(r[:, None], sigma1, sigma2)
    mean = to_coefficients @ (chebyshev.chebval(at, integral, tensor=False) / r[:, None])
    out = np.empty((r.size, sigma.size, sigma.size))
    out[:, rows, columns] = out[:, columns, rows] = mean
    return out


def evaluate(
    level: Level, var1: Array, cov12: Array, var2: Array, *, slope: bool, many: bool
) -> tuple[Array, Array | None]:
    """`I` and `dI / dc`, differentiable to any order.

    Derivatives are elementwise in the pairs as the values are, where reverse mode through the sums
    would keep an array of the size of the pairs for every degree.

    Args:
      var1: `(z, x)`, nonnegative.
      cov12: `(z, x, y)`.
      var2: `(z, y)`.
      slope: whether `dI / dc` is asked for; None otherwise.
      many: whether pairs are so many that `_fused` is worth its compilation.
    """

    def quantity(is_slope: bool) -> Array:
        with_partials: Any = functools.partial(_quantity, level, is_slope, many)
        alone = functools.partial(with_partials, ())
        return _differentiable(lambda *pairs: alone(*pairs)[0], with_partials)(var1, cov12, var2)

    value = quantity(is_slope=False)
    if not slope:
        return value, None
    return value, quantity(is_slope=True)


def _differentiable(function: Any, with_partials: Any) -> Any:
    """`function` of `(var1, cov12, var2)` with partial derivatives for its derivative.

    Args:
      with_partials: `(indices, *arguments)` to `function(*arguments)` and its derivatives in the
        arguments of these indices.
    """
    wrapped = jax.custom_jvp(function)

    @functools.partial(wrapped.defjvp, symbolic_zeros=True)
    def rule(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> Any:
        needed = tuple(i for i in range(3) if not isinstance(tangents[i], SymbolicZero))
        here = functools.partial(with_partials, needed)

        def with_more(needed: tuple[int, ...], *arguments: Array) -> Any:
            return _with_partials(here, needed, arguments, tuple(map(jnp.ones_like, arguments)))

        out, partials = _differentiable(here, with_more)(*primals)
        total = jax.tree.map(jnp.zeros_like, out)
        for i, partial in zip(needed, partials, strict=True):
            each = tangents[i]
            each = (each[:, :, None], each, each[:, None, :])[i]
            total = jax.tree.map(lambda t, p, each=each: t + p * each, total, partial)
        return out, total

    return wrapped


def _with_partials(
    function: Any, needed: tuple[int, ...], primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, list[Any]]:
    """`function(*primals)` and its derivatives along those of `tangents` that are needed."""

    def partial(i: int) -> Any:
        def along(argument: Any) -> Any:
            return function(*primals[:i], argument, *primals[i + 1 :])

        return jax.jvp(along, (primals[i],), (tangents[i],))[1]

    return function(*primals), [partial(i) for i in needed]


class _Input(NamedTuple):
    """What one of the two inputs brings: `(z, x)`, and rows of terms `(degree, rank, z, x)`."""

    variance: Array
    inverse_sigma: Array
    x: Array
    share: Array
    weight_share: Array
    rows: Array


def _prepare(level: Level, is_slope: bool, variance: Array) -> _Input:
    # I is smooth in (a, c, b) at a = 0, but not in the root of a. The shift is the relative error
    # it makes, and what derivatives at variance 0 are divided by.
    shift = 3e-8 if jnp.finfo(variance.dtype).bits == 64 else 1e-5
    variance = variance + shift
    sigma = jnp.sqrt(variance)
    # Beyond the largest variance q stays, and the rounding of the kinks goes on.
    inside = jnp.minimum(sigma, math.sqrt(level.largest))
    of = level.coordinates
    v = of.v(inside, jnp.log1p)
    x = jnp.minimum(2 * v / float(of.v(math.sqrt(level.largest))) - 1, 1.0)
    basis = _chebyshev(x.ravel(), len(level.scale))

    def rows(coefficients: np.ndarray) -> Array:
        flat = jnp.asarray(coefficients.reshape(-1, len(level.scale)), v.dtype)
        return matmul(flat, basis).reshape(*coefficients.shape[:-1], *v.shape)

    q = jnp.exp(rows(level.scale)) * of.saturation(inside)
    return _Input(
        variance,
        1 / sigma,
        jnp.sqrt(variance / (variance + of.rounding)),
        of.share(variance),
        of.weight_share(variance),
        q / sigma * rows(level.slope.factors) if is_slope else q * rows(level.value.factors),
    )


def _chebyshev(x: Array, count: int) -> Array:
    """`T_k(x)`, `(count, *x)`: a loop, since its derivatives unrolled take seconds to compile."""

    def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        below, here = carry
        return (here, 2 * x * here - below), below

    return lax.scan(step, (jnp.ones_like(x), x), length=count)[1]


def _quantity(
    level: Level,
    is_slope: bool,
    many: bool,
    needed: tuple[int, ...],
    var1: Array,
    cov12: Array,
    var2: Array,
) -> tuple[Array, list[Array]]:
    """`I` or `dI / dc`, and its derivatives in the arguments of the indices `needed`."""
    prepare = functools.partial(_prepare, level, is_slope)

    def prepared(variance: Array) -> tuple[_Input, _Input | None]:
        if not needed:
            return prepare(variance), None
        return jax.jvp(prepare, (variance,), (jnp.ones_like(variance),))

    one, two = prepared(var1), prepared(var2)
    z, x, y = cov12.shape
    terms = level.slope if is_slope else level.value
    n_rows = sum(terms.ranks)
    fused = many and _n_loops(terms) <= _FUSED_LOOPS
    # As many columns at a time as have rows that stay in a core's cache: from memory, each pair
    # would read them all again. Of products of matrices, more. Of derivatives, fewer: XLA keeps
    # what their sums share.
    if fused:
        columns = _CACHED_BYTES // (n_rows * cov12.dtype.itemsize)
    else:
        columns = _LOOPED_PAIRS // max(z * x, 1)
    if needed:
        columns = min(columns, _CACHED_PAIRS // max(z * x, 1))
    n_blocks = -(-y // max(columns, _LEAST_COLUMNS)) if many else 1

    def block(one: Any, cov12: Array, two: Any) -> tuple[Array, list[Array]]:
        inputs, along = zip(one, (cov12, jnp.ones_like(cov12)), two, strict=True)
        return _with_partials(
            functools.partial(_of_block, level, is_slope, fused), needed, inputs, along
        )

    if n_blocks == 1:
        return block(one, cov12, two)
    length = -(-y // n_blocks)

    def split(array: Array) -> Array:
        padding = [(0, 0)] * (array.ndim - 1) + [(0, n_blocks * length - y)]
        array = jnp.pad(array, padding, mode="edge")
        return jnp.moveaxis(array.reshape(*array.shape[:-1], n_blocks, length), -2, 0)

    def join(blocks: Array) -> Array:
        return jnp.moveaxis(blocks, 0, 2).reshape(z, x, n_blocks * length)[:, :, :y]

    # A loop, since XLA would fuse blocks and what follows into one.
    split_up = jax.tree.map(split, (cov12, two))
    return jax.tree.map(join, lax.map(lambda each: block(one, *each), split_up))


def _of_block(
    level: Level, is_slope: bool, fused: bool, one: _Input, cov12: Array, two: _Input
) -> Array:
    rho = cov12 * one.inverse_sigma[:, :, None] * two.inverse_sigma[:, None]
    # Quotients, which are 1 where an input meets itself: at variance 1e6 an ulp of float32 less
    # makes 5 % of the slope.
    off = 1 - (cov12 / one.variance[:, :, None]) * (cov12 / two.variance[:, None])

    def rests(share1: Array, share2: Array) -> tuple[Array, Array]:
        """`1 - x^2` at rho = 1, and at rho: positive terms, unless rounding takes rho beyond 1."""
        share1, share2 = share1[:, :, None], share2[:, None]
        at_one = share1 + share2 - share1 * share2
        return at_one, jnp.maximum(at_one + (1 - at_one) * off, at_one / 2)

    at_one, rest = rests(one.share, two.share)
    if not is_slope:
        r = rho * ((1 + jnp.sqrt(at_one)) / (1 + jnp.sqrt(rest)))
        return r * _sum_of_products(level.value, fused)(one.rows, two.rows, r)
    x_one = one.x[:, :, None] * two.x[:, None]
    s = _y(rho * x_one, rest) / _y(x_one, at_one)
    if level.coordinates.smoothing:
        _, rest = rests(one.weight_share, two.weight_share)
    return lax.rsqrt(rest) * _sum_of_products(level.slope, fused)(one.rows, two.rows, s)


@jax.custom_jvp
def _y(x: Array, rest: Array) -> Array:
    """`x + artanh x`, given `rest = 1 - x^2`."""
    size = jnp.abs(x)
    return x + 0.5 * jnp.sign(x) * jnp.log1p(2 * size * (1 + size) / rest)


@_y.defjvp
def _y_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    # The derivative of `artanh x = arsinh(x / sqrt(rest))`, which is smooth at 0.
    (x, rest), (x_dot, rest_dot) = primals, tangents
    along = (x_dot - 0.5 * x * rest_dot / rest) * lax.rsqrt(rest + x * x)
    return _y(x, rest), x_dot + along


def _sum_of_products(terms: ProductSum, fused: bool, derivative: int = 0, depth: int = 0) -> Any:
    """`sum_terms sign first second (d/ds)^k T_degree(s)`, a function of `first, second, s`.

    Its derivatives are sums of the same kind and as cheap; those of a loop over the degrees would
    carry tangents through every step.

    Args:
      derivative: `k`.
      depth: how often what was asked for has been differentiated.
    """
    # Unrolled, many terms and second derivatives would take many seconds to compile.
    few = sum(terms.ranks) <= _FUSED_DERIVATIVE_TERMS
    unrolled = fused and (depth == 0 or (depth == 1 and few))
    evaluated = _series(terms, derivative, unrolled)

    @jax.custom_jvp
    def wrapped(first: Array, second: Array, s: Array) -> Array:
        return evaluated(first, second, s)

    @functools.partial(wrapped.defjvp, symbolic_zeros=True)
    def rule(primals: tuple[Array, Array, Array], tangents: tuple[Any, Any, Any]) -> Any:
        first, second, s = primals
        of_first, of_second, of_s = tangents
        tangent = jnp.zeros_like(s)
        same = _sum_of_products(terms, fused, derivative, depth + 1)
        if not isinstance(of_first, SymbolicZero):
            tangent += same(of_first, second, s)
        if not isinstance(of_second, SymbolicZero):
            tangent += same(first, of_second, s)
        if not isinstance(of_s, SymbolicZero):
            tangent += of_s * _sum_of_products(terms, fused, derivative + 1, depth + 1)(*primals)
        return wrapped(*primals), tangent

    return wrapped


@functools.cache
def _series(terms: ProductSum, derivative: int, unrolled: bool) -> Any:
    """What `_sum_of_products` evaluates: under `jit`, which traces it once for all that call it."""
    if derivative >= len(terms.ranks):
        return lambda first, second, s: jnp.zeros_like(s)
    series = _Series.of(terms, derivative)

    def evaluated(first: Array, second: Array, s: Array) -> Array:
        evaluate = _fused if unrolled else _looped
        return evaluate(series, first[derivative:], second[derivative:], s)

    return jax.jit(evaluated)


class _Series(NamedTuple):
    """Products of each degree `d` with polynomials `P_d`, `P_{d+1} = a_d s P_d - b_d P_{d-1}`.

    Attributes:
      ranks, signs: as of `ProductSum`.
      times, less: `a` and `b`.
    """

    ranks: tuple[int, ...]
    signs: np.ndarray
    times: np.ndarray
    less: np.ndarray

    @classmethod
    def of(cls, terms: ProductSum, derivative: int) -> "_Series":
        """With Gegenbauer polynomials, `(d/ds)^k T_{d+k} = (d + k) 2^(k-1) (k-1)! C^(k)_d`."""
        k, ranks, signs = derivative, terms.ranks[derivative:], terms.signs[derivative:]
        d = np.arange(len(ranks) + 1)
        if k == 0:
            return cls(ranks, signs, np.where(d == 0, 1.0, 2.0), np.ones(d.size))
        scale = (d[:-1] + k) * 2 ** (k - 1) * math.factorial(k - 1)
        return cls(ranks, scale[:, None] * signs, 2 * (d + k) / (d + 1), (d + 2 * k - 1) / (d + 1))


def _fused(series: _Series, first: Array, second: Array, s: Array) -> Array:
    """`sum_terms sign first second P_degree(s)` in elementwise expressions for XLA to fuse.

    No array of the size of the pairs is kept but the result. Rows of terms are contiguous in the
    second input: the other way round the loop over the pairs is not vectorised.
    """
    n_loops = _n_loops(series)
    if n_loops == 1:
        return _fused_loop(series, first, second, s)
    degrees, ranks = np.arange(len(series.ranks))[:, None], _shares(series, n_loops)
    terms = np.arange(n_loops)[:, None, None] * np.array(ranks)[:, None] + np.arange(max(ranks))
    there = terms < np.array(series.ranks)[:, None]
    terms = np.where(there, terms, 0)
    # Signs differ between loops: they are in the rows.
    signs = jnp.asarray(np.where(there, series.signs[degrees, terms], 0), s.dtype)
    share = series._replace(ranks=ranks, signs=np.ones((len(ranks), max(ranks))))

    def add(total: Array, rows: tuple[Array, Array]) -> tuple[Array, None]:
        return total + _fused_loop(share, *rows, s), None

    rows = first[degrees, terms], signs[..., None, None] * second[degrees, terms]
    return lax.scan(add, jnp.zeros_like(s), rows)[0]


def _n_loops(terms: "ProductSum | _Series") -> int:
    """How many loops of at most `_FUSED_TERMS` make up the sum, an equal share of each degree."""
    return next(
        n
        for n in itertools.count(1)
        if n >= max(terms.ranks) or sum(_shares(terms, n)) <= _FUSED_TERMS
    )


def _shares(terms: "ProductSum | _Series", n_loops: int) -> tuple[int, ...]:
    return tuple(-(-rank // n_loops) for rank in terms.ranks)


def _fused_loop(series: _Series, first: Array, second: Array, s: Array) -> Array:
    value = previous = jnp.zeros_like(s)
    for degree in range(len(series.ranks) - 1, -1, -1):
        products = [
            first[degree, r][:, :, None] * (float(sign) * second[degree, r][:, None])
            for r, sign in enumerate(series.signs[degree, : series.ranks[degree]])
        ]
        coefficient = functools.reduce(operator.add, products) if products else 0.0
        times, less = float(series.times[degree]), float(series.less[degree + 1])
        value, previous = coefficient + times * s * value - less * previous, value
    return value


def _looped(series: _Series, first: Array, second: Array, s: Array) -> Array:
    """The same as a loop over the degrees, which compiles at once."""

    def step(carry: tuple[Array, Array], each: tuple[Array, ...]) -> Any:
        value, previous = carry
        times, less, first, second = each
        if min(s.shape[1:]) == 1:
            coefficient = jnp.sum(first[:, :, :, None] * second[:, :, None], 0)
        else:
            coefficient = einsum("rzx,rzy->zxy", first, second)
        return (coefficient + times * s * value - less * previous, value), None

    numbers = jnp.asarray([series.times[:-1], series.less[1:]], s.dtype)
    signs = jnp.asarray(series.signs, s.dtype)[:, :, None, None]
    zero = jnp.zeros_like(s)
    (value, _), _ = lax.scan(step, (zero, zero), (*numbers, first, signs * second), reverse=True)
    return value
