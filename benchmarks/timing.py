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


def per_pair(
    make: Callable[[int], Callable[[], Any]], counts: tuple[int, int], repetitions: int
) -> float:
    """Seconds a pair of inputs, of kernels of all pairs of so many: the best of all repetitions.

    Few inputs beside many: free of what each input costs once, and nearly of what a call does.

    Args:
      make: the number of inputs to a call for the kernel of all pairs of them.
      counts: the two numbers of inputs.
    """
    few, many = counts
    times = interleaved({n: make(n) for n in counts}, repetitions)
    best = {n: min(each) for n, each in times.items()}
    return (best[many] - many / few * best[few]) / (many**2 - many * few)


def memory(executable: Any) -> int:
    """Bytes of results and temporaries of a compiled function."""
    analysis = executable.memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes
