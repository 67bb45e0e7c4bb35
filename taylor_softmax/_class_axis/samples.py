"""Samples of the class covariance that come with the package, and how they are read.

What is sampled is the slope `dI / d rho`, which quadrature gives without cancellation (`integral`).
A value integrated from slopes is better than they are; a slope differentiated from values would
lose a factor of the degree squared. With `q(a)^2 = I(a, a, a)`, the integral of the slope from 0 to
1, and the weight `W` of `coordinates`, which takes the pole of the limit away, the quotient

    K = W (dI / d rho) / (q(a) q(b))

is of order 1 at every variance. `derivations/class_axis_grids.py` samples K at Chebyshev nodes in
the two variances, the correlation and the number of classes, compresses what it finds (a Tucker
decomposition, with a core of integers) and measures its errors between the nodes.

Softmax and order 2 have one set of samples. Orders from 4 on have another set for small
variances, where the samples for all variances, in the coordinate delta, are 2 to 10 times worse: in
float64 up to 30 times at order 32, and 100 times over more than 1,000 classes.
"""

import functools
import importlib.resources
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.polynomial import chebyshev

from taylor_softmax._class_axis.coordinates import (
    LARGEST_N_CLASSES,
    LARGEST_VARIANCE,
    Coordinates,
    class_coordinate,
)
from taylor_softmax._numerics.surrogate import Surrogate

# Errors are measured for variances and numbers of classes up to each of these.
VARIANCE_STEPS = 20.0, 100.0, 1e4, LARGEST_VARIANCE
CLASS_STEPS = 2, 4, 9, 1000, LARGEST_N_CLASSES


class Samples(NamedTuple):
    """One file of samples; everything in Chebyshev coefficients.

    Attributes:
      core: `(R, D, S, N)`; symmetric in the first two axes where both are of variances.
      variance: `(degrees in v, R)`, of the larger variance.
      second: `(degrees in v or delta, D)`, of the smaller one; `variance` itself without a ridge.
      correlation: `(degrees in s, S)`.
      classes: `(degrees in the number of classes, N)`.
      scale: `log(q (sigma + w) sqrt(n) / sigma)`, `(degrees in v, degrees in n)`.
      errors: of value and slope, relative to those at correlation 1, for numbers of classes up to
        each of `CLASS_STEPS` and variances up to each of `VARIANCE_STEPS`, `(5, 2, 4)`: twice the
        largest that were found off the nodes.
      largest: the largest variance that they span.
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
    def largest_v(self) -> float:
        """The coordinate v of the largest variance."""
        return float(self.coordinates.v(math.sqrt(self.largest)))

    def log_scale(self, v: np.ndarray, n_classes: Any) -> np.ndarray:
        """`log(q (sigma + w) sqrt(n) / sigma)`, `(v, n)`."""
        of_classes = chebyshev.chebvander(class_coordinate(n_classes), self.scale.shape[1] - 1)
        of_variances = chebyshev.chebvander(2 * v / self.largest_v - 1, len(self.scale) - 1)
        return of_variances @ self.scale @ of_classes.T

    def slopes(self, v1: np.ndarray, v2: np.ndarray, n_classes: Any) -> np.ndarray:
        """K in Chebyshev coefficients in s, `(x, y, degree, n)`, of `v1: (x,) >= v2: (x, y)`."""
        of_classes = chebyshev.chebvander(class_coordinate(n_classes), len(self.classes) - 1)
        of_larger = chebyshev.chebvander(2 * v1 / self.largest_v - 1, len(self.variance) - 1)
        smaller = self.coordinates.smaller_coordinate(v1[:, None], v2, self.largest_v)
        of_smaller = chebyshev.chebvander(smaller, len(self.second) - 1)
        core = self.correlation @ (self.core @ (of_classes @ self.classes).T)
        by_larger = np.tensordot(of_larger @ self.variance, core, 1)
        flat = (of_smaller @ self.second) @ by_larger.reshape(*by_larger.shape[:2], -1)
        return flat.reshape(*v2.shape, *by_larger.shape[2:])


def near_limit(surrogate: Surrogate) -> float:
    """The variance up to which fewer terms, or other samples, do: most data stay below it."""
    return 100.0 if surrogate.order is None or surrogate.order <= 8 else 20.0


def has_near_samples(surrogate: Surrogate) -> bool:
    """Whether small variances have samples of their own, on about as many nodes."""
    return surrogate.order is not None and surrogate.order >= 4


def span(surrogate: Surrogate, *, near: bool) -> float:
    """Largest variance that the samples span: those for small variances, or those for all."""
    if near and has_near_samples(surrogate):
        return near_limit(surrogate)
    return LARGEST_VARIANCE


def file_name(surrogate: Surrogate, *, near: bool) -> str:
    function = "softmax" if surrogate.order is None else f"order_{surrogate.order}"
    suffix = "_near" if near and has_near_samples(surrogate) else ""
    return f"class_axis_{function}{suffix}.npz"


@functools.cache
def load(surrogate: Surrogate, *, near: bool) -> Samples:
    """The samples for small variances, or those for all."""
    folder = importlib.resources.files("taylor_softmax._generated")
    with (folder / file_name(surrogate, near=near)).open("rb") as stream, np.load(stream) as stored:
        return unpack(stored, span(surrogate, near=near))


def unpack(stored: Mapping[str, np.ndarray], largest: float) -> Samples:
    """The samples of a file, which span variances up to `largest`."""
    coordinates = Coordinates(*stored["coordinates"].tolist())
    variance, correlation, classes = (stored[k] for k in ("variance", "correlation", "classes"))
    second = stored["second"] if coordinates.ridge else variance
    sizes = second.shape[1], correlation.shape[1], classes.shape[1]
    # Bytes are ordered by significance: the high ones compress to nothing.
    planes = np.ascontiguousarray(stored["core"].T)
    core = planes.view(np.int64).reshape(-1, *sizes[1:]) * stored["unit"]
    if coordinates.ridge:
        core = core.reshape(-1, *sizes)
    else:
        rows, columns = np.triu_indices(sizes[0])
        upper, core = core, np.zeros((sizes[0], *sizes))
        core[rows, columns] = core[columns, rows] = upper
    scale, errors = stored["scale"], stored["errors"]
    return Samples(
        core, variance, second, correlation, classes, scale, coordinates, errors, largest
    )
