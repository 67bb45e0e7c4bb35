"""Timing of compiled functions beside each other."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def seconds(function: Callable[[], Any]) -> float:
    """The duration of one call, until its results are computed."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def interleaved(
    functions: Mapping[Any, Callable[[], Any]], repetitions: int, *, limit: float = float("inf")
) -> dict[Any, list[float]]:
    """Seconds of `repetitions` calls of each function, in rounds that call each of them once.

    So a drift of the machine affects all of them alike. A first round warms up and does not count.

    Args:
      limit: seconds in all after which a function is not called again.
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
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def per_pair(
    make: Callable[[int], Callable[[], Any]], counts: tuple[int, int], repetitions: int
) -> float:
    """Seconds that a kernel takes for each pair of inputs, in the fastest of all repetitions.

    The difference between few inputs and many leaves out what each input costs once, and nearly all
    of what a call costs.

    Args:
      make: a function of the number of inputs that returns the call for the kernel of all pairs.
      counts: the two numbers of inputs, few and many.
    """
    return per_pair_and_input(make, counts, repetitions)[0]


def per_pair_and_input(
    make: Callable[[int], Callable[[], Any]],
    counts: tuple[int, int],
    repetitions: int,
    *,
    limit: float = float("inf"),
) -> tuple[float, float]:
    """`per_pair`, and seconds that each of the inputs of one side adds once.

    Args:
      limit: that of `interleaved`.
    """
    few, many = counts
    times = interleaved({n: make(n) for n in counts}, repetitions, limit=limit)
    best = {n: min(seconds) for n, seconds in times.items()}
    pair = (best[many] - many / few * best[few]) / (many**2 - many * few)
    return pair, best[few] / few - few * pair


def memory(executable: Any) -> int:
    """Bytes that the results and temporaries of a compiled function take."""
    analysis = executable.memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes
