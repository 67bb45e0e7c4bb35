"""Pictures of a run: z-scores, wide networks, and how far Taylor softmax is from softmax."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
from matplotlib.figure import Figure

from benchmarks.accuracy.problems import CLASSES, LayerProblem, layer_name
from benchmarks.accuracy.verdict import Result, series_of_networks
from taylor_softmax import class_covariance

N_CLASSES = 10


def draw_all(results: Sequence[Result], folder: Path, stem: str) -> list[Path]:
    """Saves all figures; returns where."""
    figures = {
        "scores": scores(results),
        "orders": errors_against_order(results),
        "correlations": kernels_against_correlation(),
    }
    if any(r.of_network for r in results):
        figures["networks"] = networks(results)
    paths = []
    for name, figure in figures.items():
        path = folder / f"{stem}-{name}.png"
        figure.savefig(path, dpi=110, bbox_inches="tight")
        plt.close(figure)
        paths.append(path)
    return paths


def scores(results: Sequence[Result]) -> Figure:
    """Histogram of the z-scores of exact kernels beside the standard normal density."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    x = np.linspace(-4.5, 4.5, 200)
    for ax, kernel in zip(axes, ("nngp", "ntk"), strict=True):
        exact = [
            r.score for r in results if r.kernel == kernel and r.tolerance == 0 and not r.of_network
        ]
        ax.hist(exact, np.linspace(-4.5, 4.5, 28), density=True, color="0.75")
        ax.plot(x, scipy.stats.norm.pdf(x), "k-", lw=1)
        ax.set(title=f"{kernel.upper()}, {len(exact)} kernels", xlabel="z")
    axes[0].set_ylabel("density")
    return figure


def errors_against_order(results: Sequence[Result]) -> Figure:
    """Difference from softmax's kernel against the order: analytic, and as sampling sees it."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for ax, kernel in zip(axes, ("nngp", "ntk"), strict=True):
        chosen = [
            (LayerProblem(**r.problem), r)
            for r in results
            if r.kernel == kernel and r.group == f"{CLASSES}, finite"
        ]
        chosen = [(p, r) for p, r in chosen if p.size == N_CLASSES]
        softmax = {(p.var1, p.var2, p.rho): r for p, r in chosen if p.order is None}
        mean = 1 / N_CLASSES**2 if kernel == "nngp" else 0.0
        colors = mpl.colormaps["viridis_r"](np.linspace(0.1, 1, len(softmax)))
        by_variance = sorted(softmax.items(), key=lambda each: sorted(each[0][:2]))
        for ((var1, var2, rho), reference), color in zip(by_variance, colors, strict=True):
            same = [(p, r) for p, r in chosen if (p.var1, p.var2, p.rho) == (var1, var2, rho)]
            pairs = sorted((p.order, r) for p, r in same if p.order is not None)
            orders = np.array([order for order, _ in pairs])
            exact = reference.analytic - mean
            analytic = [abs((r.analytic - mean) / exact - 1) for _, r in pairs]
            sampled = [abs((r.mean - mean) / exact - 1) for _, r in pairs]
            stderr = [r.stderr / abs(exact) for _, r in pairs]
            label = f"{var1:g}, {var2:g}; {rho:g}"
            ax.plot(orders, analytic, "-", label=label, lw=1, color=color)
            ax.errorbar(orders, sampled, stderr, fmt="o", ms=4, capsize=2, color=color)
        ax.set(yscale="log", xlabel="order", title=f"{kernel.upper()}, {N_CLASSES} classes")
        ax.set_ylim(1e-6, 4)
        ax.set_xticks(sorted({p.order for p, _ in chosen if p.order is not None}))
    axes[0].set_ylabel("relative difference from softmax")
    lines = axes[1].get_legend_handles_labels()
    title = "variances; correlation"
    figure.legend(*lines, title=title, loc="outside right center", fontsize=8, title_fontsize=8)
    return figure


def kernels_against_correlation() -> Figure:
    """`I(rho)` of Taylor softmax and of softmax: analytic."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    rho = np.linspace(-1, 1, 101)
    for ax, variance in zip(axes, (0.5, 1.0, 4.0), strict=True):
        for order in (2, 4, 8, None):
            value = class_covariance(
                variance, rho * variance, variance, n_classes=N_CLASSES, order=order
            )
            style = "k--" if order is None else "-"
            ax.plot(rho, value, style, lw=1.2, label=layer_name(order))
        ax.set(title=f"variance {variance:g}", xlabel="correlation")
    axes[0].set_ylabel(f"I, {N_CLASSES} classes")
    axes[0].legend(fontsize=7)
    return figure


def networks(results: Sequence[Result]) -> Figure:
    """Relative deviation of finite networks from the analytic kernel, and the best `b / width`."""
    series = series_of_networks(results)
    names = list(dict.fromkeys(network for network, _ in series))
    figure, grid = plt.subplots(
        2, len(names), figsize=(3.6 * len(names), 5.4), squeeze=False, layout="constrained"
    )
    for row, kernel in zip(grid, ("nngp", "ntk"), strict=True):
        for ax, network in zip(row, names, strict=True):
            group = series[network, kernel]
            widths = np.array([r.problem["width"] for r in group])
            deviation, stderr = np.transpose([r.deviation for r in group])
            weight = 1 / (widths * stderr)
            slope = np.sum(weight * deviation / stderr) / np.sum(weight**2)
            ax.axhline(0, color="0.7", lw=0.8)
            ax.errorbar(widths, deviation, stderr, fmt="o", ms=4, capsize=2)
            fine = np.geomspace(widths.min(), widths.max(), 100)
            ax.plot(fine, slope / fine, "k--", lw=1, label=f"{slope:.2g} / width")
            ax.set(xscale="log", title=f"{kernel.upper()}, softmax over {network}")
            ax.set_xticks(widths, [str(width) for width in widths], fontsize=8)
            ax.set_xticks([], minor=True)
            ax.legend(frameon=False, fontsize=8)
    for ax in grid[-1]:
        ax.set_xlabel("width")
    for ax in grid[:, 0]:
        ax.set_ylabel("relative deviation")
    return figure
