"""The likelihoods of the labels: two ways from a kernel to a posterior and its evidence."""

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from taylor_softmax._probabilities import inference, regression
from taylor_softmax._probabilities.arguments import InducingKernels
from taylor_softmax._probabilities.posterior import CategoricalPosterior, categorical_inference
from taylor_softmax._probabilities.priors import padded, padded_size

Kernels = np.ndarray | InducingKernels


def _one_hot(labels: np.ndarray, n_classes: int, posterior: CategoricalPosterior) -> Any:
    return np.eye(n_classes, dtype=posterior.alpha.dtype)[labels]


@dataclasses.dataclass(frozen=True)
class Categorical:
    """Labels with the probabilities `softmax(logits)`, by `categorical_inference`.

    Attributes:
      labels: the classes of the training inputs, `(N,)`.
      n_classes: the number of classes; `labels` need not have all of them.
      tol, max_iterations, progress: as in `categorical_inference`.
    """

    labels: np.ndarray
    n_classes: int
    tol: float
    max_iterations: int
    progress: bool

    def posterior(
        self, kernels: Kernels, init: CategoricalPosterior | None = None
    ) -> CategoricalPosterior:
        with _quietly():
            return categorical_inference(
                kernels,
                self.labels,
                n_classes=self.n_classes,
                tol=self.tol,
                max_iterations=self.max_iterations,
                init=init,
                progress=self.progress,
            )

    def slope(self, posterior: CategoricalPosterior) -> np.ndarray:
        """The slope of the evidence in the kernel, `(N, N)`."""
        y = _one_hot(self.labels, self.n_classes, posterior)
        n, size = len(y), padded_size(len(y))
        y, alpha, precision = (
            padded(x, size, self.n_classes) for x in (y, posterior.alpha, posterior.site_precision)
        )
        slope = inference.slope(posterior.prior.padded(size), y, inference.Sites(alpha, precision))
        return np.asarray(slope.kernel)[:n, :n]

    def scale(self, posterior: CategoricalPosterior) -> float:
        """The factor by which logits of the posterior are to be multiplied."""
        del posterior
        return 1.0


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Shows progress on stderr, and leaves out a warning that repeats what the posterior says."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.filterwarnings("ignore", ".*has not converged", UserWarning)
        yield
        jax.effects_barrier()


@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """Regression on labels, by `taylor_softmax._probabilities.regression`.

    Attributes are those of `Categorical`.
    """

    labels: np.ndarray
    n_classes: int

    def posterior(
        self, kernels: Kernels, init: CategoricalPosterior | None = None
    ) -> CategoricalPosterior:
        del init
        return regression.posterior(kernels, self.labels, self.n_classes)

    def slope(self, posterior: CategoricalPosterior) -> np.ndarray:
        y = _one_hot(self.labels, self.n_classes, posterior)
        return np.asarray(regression.slope(posterior, y))

    def scale(self, posterior: CategoricalPosterior) -> float:
        return regression.scale(posterior, _one_hot(self.labels, self.n_classes, posterior))
