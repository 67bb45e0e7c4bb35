"""Whether the differences from sampling are those of chance: a test that a biased kernel fails."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

# Chance of a false alarm, of each of the tests.
LEVEL = 1e-3


class Result(NamedTuple):
    """One kernel of one problem.

    Attributes:
      name: of the problem.
      group: of problems that belong together.
      kernel: "nngp" or "ntk".
      analytic, mean, stderr: the number that is compared.
      scale: what errors are relative to, see `LayerProblem.scales`.
      entries: that the compared one is the worst of; 1 where it was chosen beforehand.
      tolerance: documented error over `scale`; 0 of an exact kernel.
      n_draws: of Monte Carlo.
      departure: the largest difference from the kernel of softmax itself; None of networks.
      problem: the settings.
    """

    name: str
    group: str
    kernel: str
    analytic: float
    mean: float
    stderr: float
    scale: float
    entries: int
    tolerance: float
    n_draws: int
    departure: float | None
    problem: dict[str, Any]

    @property
    def score(self) -> float:
        """`(analytic - mean) / stderr`, standard normal if the kernel is right."""
        return (self.analytic - self.mean) / self.stderr

    @property
    def of_network(self) -> bool:
        """Of a network of finite width, not of a layer."""
        return "width" in self.problem

    @property
    def deviation(self) -> tuple[float, float]:
        """Of sampling from the analytic kernel, relative, and its standard error."""
        return self.mean / self.analytic - 1, self.stderr / abs(self.analytic)

    def perturbed(self, relative: float) -> "Result":
        return self._replace(analytic=self.analytic * (1 + relative))


class Check(NamedTuple):
    """One test: what was found, the range that it must lie in, and whether it does."""

    name: str
    value: float
    low: float
    high: float

    @property
    def passed(self) -> bool:
        # False for NaN.
        return self.low <= self.value <= self.high


def normal_bound(n: int) -> float:
    """What the largest of `n` standard normal `|z|` exceeds with a chance of at most `LEVEL`."""
    return float(scipy.stats.norm.isf(LEVEL / 2 / n))


def verdict(results: Sequence[Result]) -> list[Check]:
    """Tests of the z-scores over the grid against the standard normal.

    Problems have samples of their own, so that the scores of one kernel are independent; NNGP and
    NTK of a problem share theirs, and are tested apart. Kernels that are estimates themselves are
    held to their documented error, widened by the sampling error; wide networks to the analytic
    kernel in the limit.
    """
    layers = [r for r in results if not r.of_network]
    checks = []
    for kernel in ("nngp", "ntk"):
        scores = np.array([r.score for r in layers if r.kernel == kernel and r.tolerance == 0])
        if (n := scores.size) > 0:
            low, high = (float(q) / n for q in scipy.stats.chi2.interval(1 - LEVEL, n))
            mean_square = float(np.mean(scores**2))
            checks.append(Check(f"{kernel}: mean square of {n} z", mean_square, low, high))
            bound, largest = normal_bound(n), float(np.max(np.abs(scores)))
            checks.append(Check(f"{kernel}: largest of {n} abs(z)", largest, 0.0, bound))
        estimates = [r for r in layers if r.kernel == kernel and r.tolerance > 0]
        if estimates:
            bound = normal_bound(sum(r.entries for r in estimates))
            excess = max(
                abs(r.analytic - r.mean) / (r.tolerance * r.scale + bound * r.stderr)
                for r in estimates
            )
            name = f"{kernel}: largest of {len(estimates)} errors, over what is documented"
            checks.append(Check(name, excess, 0.0, 1.0))
    limits = network_limits(results)
    bound = normal_bound(max(1, len(limits)))
    for (network, kernel), (limit, stderr) in limits.items():
        name = f"{kernel}: softmax over {network}, abs(z) of the limit of networks"
        checks.append(Check(name, abs(limit) / stderr, 0.0, bound))
    return checks


def series_of_networks(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """Those of networks, by network and kernel: one result for every width."""
    series: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if result.of_network:
            series.setdefault((result.problem["network"], result.kernel), []).append(result)
    return series


def network_limits(results: Sequence[Result]) -> dict[tuple[str, str], tuple[float, float]]:
    """Relative deviation from the analytic kernel at infinite width, and its standard error.

    The intercept of a weighted least-squares line in `1 / width`.
    """
    limits = {}
    for key, series in series_of_networks(results).items():
        if len(series) < 2:
            continue
        inverse = np.array([1 / r.problem["width"] for r in series])
        deviation, stderr = np.transpose([r.deviation for r in series])
        design = np.stack([np.ones_like(inverse), inverse], axis=1) / stderr[:, None]
        covariance = np.linalg.inv(design.T @ design)
        intercept, _ = covariance @ design.T @ (deviation / stderr)
        limits[key] = float(intercept), math.sqrt(covariance[0, 0])
    return limits
