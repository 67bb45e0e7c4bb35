"""Hyperparameters of the largest evidence."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize

# How far the first step goes: of the logarithms of hyperparameters.
_FIRST = 0.3
# What is no progress: of the evidence per training input, in nats.
_PROGRESS = 2e-3


class Maximum(NamedTuple):
    """Where a search ended.

    Attributes:
      at: the hyperparameters.
      n_iter: iterations of the optimizer.
      failure: why it did not reach a maximum, or None.
    """

    at: dict[str, float]
    n_iter: int
    failure: str | None


def maximise(
    function: Callable[[dict[str, float]], tuple[float, dict[str, float]]],
    start: Mapping[str, float],
    max_iter: int,
) -> Maximum:
    """Maximises in the logarithms of the hyperparameters by L-BFGS-B.

    Args:
      function: of hyperparameters; its value, and slopes in them.
      start: positive values.
      max_iter: the most iterations.
    """
    best: tuple[float, dict[str, float]] | None = None
    n_iter = 0

    def loss(position: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best
        at = dict(zip(start, np.exp(_FIRST * position).tolist(), strict=True))
        value, slopes = function(at)
        slope = _FIRST * np.array([slopes[name] * at[name] for name in start])
        if not (np.isfinite(value) and np.all(np.isfinite(slope))):
            raise FloatingPointError(f"the evidence or its slope is not finite at {shown(at)}")
        if best is None or value > best[0]:
            best = value, at
        return -value, -slope

    def count(_: Any) -> None:
        nonlocal n_iter
        n_iter += 1

    try:
        end = scipy.optimize.minimize(
            loss,
            np.log(list(start.values())) / _FIRST,
            jac=True,
            method="L-BFGS-B",
            callback=count,
            options={"maxiter": max_iter, "ftol": _PROGRESS, "gtol": _PROGRESS},
        )
        failure = None if end.success else str(end.message)
    except FloatingPointError as error:
        failure = str(error)
    if best is None:
        raise ValueError(f"`hyperparameters` must be others to start from: {failure}.")
    return Maximum(best[1], n_iter, failure)


def shown(at: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:.4g}" for name, value in at.items())
