"""The report of a run, in Markdown."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.verdict import (
    LEVEL,
    Check,
    Result,
    network_limits,
    series_of_networks,
)
from benchmarks.report import table


def checks_table(checks: Iterable[Check]) -> str:
    rows = [
        [c.name, f"{c.value:.3g}", f"{c.low:.3g}", f"{c.high:.3g}", "yes" if c.passed else "NO"]
        for c in checks
    ]
    return table(["test", "found", "at least", "at most", "passed"], rows)


GROUP_HEADER = ["number", "draws", "stderr", "largest difference", "mean z^2", "largest z"]


def groups_table(results: list[Result]) -> str:
    """Scores and relative errors by group and kernel."""
    rows = [[name, *group_row(of)] for name, of in groups(results).items()]
    return table(["kernel", *GROUP_HEADER], rows)


def groups(results: list[Result]) -> dict[str, list[Result]]:
    """Results of layers by kernel and group."""
    by_name: dict[str, list[Result]] = {}
    for r in results:
        if not r.of_network:
            by_name.setdefault(f"{r.kernel}, {r.group}", []).append(r)
    return by_name


def group_row(of: list[Result]) -> list[str]:
    z = np.array([r.score for r in of])
    stderr = np.median([r.stderr / r.scale for r in of])
    error = max(abs(r.analytic - r.mean) / r.scale for r in of)
    row = [f"{len(of)}", f"{min(r.n_draws for r in of):,}", f"{stderr:.0e}", f"{error:.1e}"]
    exact = of[0].tolerance == 0
    return row + ([f"{np.mean(z**2):.2f}", f"{np.max(np.abs(z)):.2f}"] if exact else ["", ""])


def beside_section(results: list[Result], others: list[Result], settings: dict[str, Any]) -> str:
    """Both on the problems that both have, and how far their analytic kernels are apart."""
    analytic = {(r.name, r.kernel): r.analytic for r in others}
    common = [r for r in results if (r.name, r.kernel) in analytic]
    names = {r.name for r in common}
    there = groups([r for r in others if r.name in names])
    rows = []
    for name, of in groups(common).items():
        pairs = zip(group_row(of), group_row(there[name]), strict=True)
        row = [name, *(f"{here} / {other}" if here else "" for here, other in pairs)]
        apart = max(abs(r.analytic - analytic[r.name, r.kernel]) / r.scale for r in of)
        # Of an estimate what is compared is its worst entry, which may be another one there.
        rows.append([*row, f"{apart:.0e}" if of[0].tolerance == 0 else ""])
    explanation = BESIDE.format(
        devices=", ".join(settings["devices"]), version=settings["versions"]["jax"]
    )
    return f"{explanation}\n\n{table(['kernel', *GROUP_HEADER, 'analytic'], rows)}"


def departures_table(results: list[Result]) -> str:
    """How far each order is from softmax: `(nngp, ntk)` over problems with equal settings."""
    problems: dict[str, dict[int, dict[str, float]]] = {}
    for r in results:
        order = r.problem.get("order")
        if r.departure is None or order is None:
            continue
        what = r.name.partition(", ")[2]
        problems.setdefault(what, {}).setdefault(order, {})[r.kernel] = r.departure
    orders = sorted({order for each in problems.values() for order in each})
    rows = []
    for what, each in problems.items():
        cells = [
            f"{each[o]['nngp']:.1e}, {each[o]['ntk']:.1e}" if o in each else "" for o in orders
        ]
        rows.append([what, *cells])
    return table(["NNGP, NTK", *(f"order {order}" for order in orders)], rows)


def networks_table(results: list[Result]) -> str:
    widths = sorted({r.problem["width"] for r in results if r.of_network})
    series = series_of_networks(results)
    rows = []
    for (network, kernel), limit in network_limits(results).items():
        at = {r.problem["width"]: r.deviation for r in series[network, kernel]}
        cells = [
            f"{1e3 * d:+.1f} ± {1e3 * e:.1f}" for d, e in (*(at[width] for width in widths), limit)
        ]
        rows.append([f"{kernel}, softmax over {network}", *cells])
    return table(["relative deviation / 1e-3", *(f"width {w}" for w in widths), "limit"], rows)


EXPLANATION = """\
NNGP and NTK of every layer, from `kernel_fn` and Gaussian logits, beside means over draws of
`apply_fn` and of its derivative along random tangents. Each setting has at least {samples:,} draws.
Whole networks have two to ten times as many, divided by the width. The seed is {seed}.

`z` is the difference over its standard error. If the kernels are exact, `z` is standard normal over
the grid. Its mean square and its largest value are tested, each with a chance of {level:g} to fail
a right kernel. Kernels over positions and of attention are estimates except at order 2, and are
held to their promised error instead.

"stderr" is the median standard error, and "largest difference" that of the kernel from the mean.
Both are relative to the largest entry of the kernel, for estimates to that at correlation 1."""

DEPARTURES = """\
## Distance from softmax

How far the kernel of each order is from that of softmax: the largest difference of the analytic
kernels over the largest entry of softmax's. Over classes the squared mean is subtracted before."""

NETWORKS = """\
## Wide finite networks

How far sampled networks of finite width are from the analytic kernel, in thousandths of it, with
standard errors. "limit" is the intercept of a weighted least-squares line in `1 / width`."""


BESIDE = """\
## Beside another run

Each cell has this run / the run on {devices} with jax {version}, on the problems that both have.
"analytic" is the largest difference between the analytic kernels of both, over the largest entry,
where kernels are exact."""


FIGURES = {
    "scores": "Histogram of the z-scores of exact kernels, and the standard normal density.",
    "orders": "Difference from softmax's kernel against the order, for ten classes: lines are "
    "analytic, points sampled.",
    "correlations": "Kernels of Taylor softmax and of softmax against the correlation.",
    "networks": "Networks of finite width: relative deviation from the analytic kernel, and the "
    "multiple of 1 / width that fits it best.",
}

LIMITS = """\
## Limits

Sampling does not see errors that are smaller than the standard errors above. The suite in `tests/`
compares kernels over classes with quadrature, to 1e-7. Over an infinitely wide axis variances end
at 1, because products of exponentials have tails that are too heavy to sample beyond. A finite
width stands in for the infinite one there; its bias is a small part of the standard error. Networks
have one hidden layer and one pair of inputs. The covariance of positions is that between positions
times that between inputs.

## Reproduce

    # The whole grid, on JAX's default device.
    make accuracy
    # One minute, saved in build/.
    make accuracy ACCURACY="--quick"
    # 10^8 samples a setting, on all GPUs.
    python -m benchmarks.accuracy --device gpu
    # Negative control: exits 1.
    python -m benchmarks.accuracy --perturb classes

An interrupted run continues where it stopped if code, versions, device, seed and number of samples
are the same. The result file has all of these beside every number."""


def figures_section(paths: Iterable[Path]) -> list[str]:
    parts = []
    for path in paths:
        caption = FIGURES[path.stem.rpartition("-")[2]]
        parts.append(f"![{caption}]({path.name})\n\n{caption}")
    return ["## Figures", *parts] if parts else []


def sections(
    results: list[Result],
    checks: list[Check],
    n_samples: int,
    seed: int,
    figures: Iterable[Path],
    beside: Iterable[str] = (),
) -> list[str]:
    """Of the report, in Markdown; those of `beside` stand next to the scores."""
    explanation = EXPLANATION.format(samples=n_samples, seed=seed, level=LEVEL)
    parts = ["## How", explanation, "## Verdict", checks_table(checks)]
    # docs/promises.md shows this table, too.
    marks = [f"<!-- --8<-- [{edge}:scores] -->" for edge in ("start", "end")]
    parts += ["## Scores", marks[0], groups_table(results), marks[1], *beside]
    parts += [DEPARTURES, departures_table(results)]
    if any(r.of_network for r in results):
        parts += [NETWORKS, networks_table(results)]
    return [*parts, *figures_section(figures), LIMITS]
