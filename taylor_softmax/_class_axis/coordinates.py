"""Coordinates in which the class covariance is smooth, so that few Chebyshev nodes resolve it.

The covariance `I` depends on two variances `a` and `b`, on the correlation `rho = c / sqrt(a b)`
and on the number of classes. It is not smooth in these themselves.

**Correlation.** `I` has kinks at `rho = +-1`, like roots or logarithms. The noise of the outputs
rounds them off over 1 / variance. Slopes are sampled in

    s = y / y_1,  y = x + artanh x,  x = c / sqrt((a + k)(b + k)),  y_1 = y at rho = 1,

part of whose range is linear in rho and part logarithmic in the distance from the kinks. At
variance 1e6, 50 nodes in it leave 1e-6 of the slope; 50 nodes in the angle whose sine is x leave
8e-2. The kinks bend values less than slopes. Values take fewer terms in

    r = t / t_1,  t = x / (1 + sqrt(1 - x^2)),  t_1 = t at rho = 1,

the tangent of half that angle.

**Variances.** From 0 to 1e6 they are an interval in

    v = sigma / (sigma + w) + h log(1 + sigma / w),  sigma = sqrt(a).

**The ridge.** From order 4 on, a class with a large negative logit wins once sigma exceeds about a
third of the order. Two inputs of equal variances get there together. So the slope has a ridge along
equal variances, of a width of 1 / order, at correlations close to 1. A polynomial in v and v' would
need hundreds of nodes for it. The samples for all variances are therefore in v of the larger
variance and in

    delta = arsinh(g (v - v')) / arsinh(g v),

which is 0 on the ridge and 1 where the smaller variance vanishes: one side of the ridge is smooth.
"""

from typing import Any, NamedTuple

import numpy as np

# The package has samples up to these. Beyond this variance the kernel is that of its limit (of
# argmax, for softmax) to 2e-3 of its value at correlation 1.
LARGEST_N_CLASSES = 1_000_000
LARGEST_VARIANCE = 1e6


class Coordinates(NamedTuple):
    """The coordinates of one set of samples; functions of standard deviations in NumPy.

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
            residual = v - (1 - decay + self.tail * logarithm)
            logarithm = logarithm + residual / (decay + self.tail)
        return self.knee * np.expm1(logarithm)

    def smaller_coordinate(self, v1: np.ndarray, v2: np.ndarray, largest_v: float) -> np.ndarray:
        """The coordinate of the smaller variance, in [-1, 1], from `v1 >= v2`."""
        if not self.ridge:
            return 2 * v2 / largest_v - 1
        return 2 * np.arcsinh(self.ridge * (v1 - v2)) / np.arcsinh(self.ridge * v1) - 1

    def smaller_v(self, v1: np.ndarray, coordinate: np.ndarray, largest_v: float) -> np.ndarray:
        """`v2`, the inverse of `smaller_coordinate`."""
        if not self.ridge:
            return (coordinate + 1) / 2 * largest_v
        delta = (coordinate + 1) / 2
        return v1 - np.sinh(delta * np.arcsinh(self.ridge * v1)) / self.ridge

    def correlation(
        self, s: np.ndarray, sigma1: Any, sigma2: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The correlation at the coordinate `s`, the weight there, and `d rho / d s`."""
        fraction1, fraction2 = (self.smoothing_fraction(sigma**2) for sigma in (sigma1, sigma2))
        # `W^2` at rho = 1.
        squared_weight = fraction1 + fraction2 - fraction1 * fraction2
        x_one = self._x_one(sigma1, sigma2)
        y = np.abs(s) * (x_one + np.arctanh(x_one))
        # `tanh z + z = y`, from below as above.
        z = y / 2
        for _ in range(8):
            z = z + (y - np.tanh(z) - z) / (1 + 1 / np.cosh(z) ** 2)
        one_minus_x_squared = 1 / np.cosh(z) ** 2
        rho = np.minimum(np.tanh(z) / x_one, 1)
        weight = np.sqrt(squared_weight + (1 - squared_weight) * (1 - rho) * (1 + rho))
        stretch = (x_one + np.arctanh(x_one)) / x_one
        return np.sign(s) * rho, weight, stretch * one_minus_x_squared / (1 + one_minus_x_squared)

    def s(self, r: np.ndarray, sigma1: Any, sigma2: Any) -> np.ndarray:
        """The coordinate s at the coordinate r."""
        x_one = self._x_one(sigma1, sigma2)
        t = r * x_one / (1 + np.sqrt(1 - x_one**2))
        return (2 * t / (1 + t**2) + 2 * np.arctanh(t)) / (x_one + np.arctanh(x_one))

    def _x_one(self, sigma1: Any, sigma2: Any) -> Any:
        return sigma1 * sigma2 / np.sqrt((sigma1**2 + self.rounding) * (sigma2**2 + self.rounding))

    def rounding_fraction(self, variance: Any) -> Any:
        """`k / (a + k)`: the fraction of `k` in the rounded variance of x."""
        return self.rounding / (variance + self.rounding)

    def smoothing_fraction(self, variance: Any) -> Any:
        """`(l a + k) / (a + l a + k)`: the fraction of what is added, in the weight."""
        added = self.rounding + self.smoothing * variance
        return added / (variance + added)


def class_coordinate(n_classes: Any) -> Any:
    """In [-1, 1] for 2 to `LARGEST_N_CLASSES` classes."""
    low, high = (np.log(np.log(n) + 0.5) for n in (2, LARGEST_N_CLASSES))
    return 2 * (np.log(np.log(n_classes) + 0.5) - low) / (high - low) - 1


def n_classes_at(coordinate: np.ndarray) -> np.ndarray:
    """The inverse of `class_coordinate`; not rounded to integers."""
    low, high = (np.log(np.log(n) + 0.5) for n in (2, LARGEST_N_CLASSES))
    return np.exp(np.exp(low + (high - low) * (coordinate + 1) / 2) - 0.5)
