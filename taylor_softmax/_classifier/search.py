"""The search for the hyperparameters with the largest evidence."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize

# Length of the first step, in the logarithms of the hyperparameters.
_FIRST_STEP = 0.3
# The search ends at a smaller gain of the evidence per training input, in nats.
_LEAST_GAIN = 2e-3


class Maximum(NamedTuple):
    """Where a search ended.

    Attributes:
      hyperparameters: those with the largest evidence that was found.
      n_iter: iterations of the optimizer.
      failure: why the search did not reach a maximum, or None.
    """

    hyperparameters: dict[str, float]
    n_iter: int
    failure: str | None


def maximise(
    function: Callable[[dict[str, float]], tuple[float, dict[str, float]]],
    start: Mapping[str, float],
    max_iter: int,
) -> Maximum:
    """Maximises a function of hyperparameters by L-BFGS-B in their logarithms.

    Args:
      function: returns its value and its slopes at hyperparameters.
      start: the hyperparameters to start from, positive.
      max_iter: the largest number of iterations.
    """
    best: tuple[float, dict[str, float]] | None = None
    n_iter = 0

    def loss(position: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best
        values = np.exp(_FIRST_STEP * position).tolist()
        hyperparameters = dict(zip(start, values, strict=True))
        value, slopes = function(hyperparameters)
        gradient = _FIRST_STEP * np.array([slopes[k] * hyperparameters[k] for k in start])
        if not (np.isfinite(value) and np.all(np.isfinite(gradient))):
            where = shown(hyperparameters)
            raise FloatingPointError(f"the evidence or its slope is not finite at {where}")
        if best is None or value > best[0]:
            best = value, hyperparameters
        return -value, -gradient

    def count(_: Any) -> None:
        nonlocal n_iter
        n_iter += 1

    try:
        end = scipy.optimize.minimize(
            loss,
            np.log(list(start.values())) / _FIRST_STEP,
            jac=True,
            method="L-BFGS-B",
            callback=count,
            options={"maxiter": max_iter, "ftol": _LEAST_GAIN, "gtol": _LEAST_GAIN},
        )
        failure = None if end.success else str(end.message)
    except FloatingPointError as error:
        failure = str(error)
    if best is None:
        raise ValueError(f"`hyperparameters` must be others to start from: {failure}.")
    return Maximum(best[1], n_iter, failure)


def shown(hyperparameters: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:.4g}" for name, value in hyperparameters.items())
