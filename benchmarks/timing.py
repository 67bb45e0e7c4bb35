"""Timing of compiled functions beside each other."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def seconds(function: Callable[[], Any]) -> float:
    """Of one call, until its results are there."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def interleaved(
    functions: Mapping[Any, Callable[[], Any]], repetitions: int, *, limit: float = float("inf")
) -> dict[Any, list[float]]:
    """Seconds of `repetitions` calls of each function, one round of all after the other.

    So drift of the machine hits all of them alike. A first round warms up and does not count.

    Args:
      limit: seconds after which a function is called no more.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[Any, list[float]] = {name: [] for name in functions}
    for _ in range(repetitions):
        for name, function in functions.items():
            if sum(times[name]) < limit:
                times[name].append(seconds(function))
    return times


def medians(times: Mapping[Any, list[float]]) -> dict[Any, float]:
    return {name: statistics.median(each) for name, each in times.items()}
