"""Classifies handwritten digits with infinite networks that end in softmax.

`python examples/digits.py` computes the NNGP and NTK kernels of two infinitely
wide networks: one ends in Taylor softmax of order 2, the other in softmax
itself. It classifies with them, checks kernel entries against Monte Carlo, and
draws a figure beside this file.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax import Array
from sklearn.datasets import load_digits

from taylor_softmax import (
    class_kernel,
    monte_carlo,
    stax,
)  # before neural_tangents: mends it

import neural_tangents as nt  # isort: skip

matplotlib.use("Agg")
import matplotlib.pyplot as plt

jax.config.update("jax_enable_x64", True)

N_CLASSES = 10
N_TRAIN, N_TEST = 500, 500
N_PAIRS, N_SAMPLES = 30, 4000  # of the Monte Carlo check
LAYERS = {
    "TaylorSoftmax(2)": (stax.TaylorSoftmax(order=2), 2),
    "Softmax": (stax.Softmax(), None),
}

# The network up to the logits, whose variance over initialisations comes out at
# about 4: softmax outputs that commit themselves, as those of trained networks
# do.
BODY = stax.serial(
    stax.Dense(512, W_std=2**0.5, b_std=0.1),
    stax.Relu(),
    stax.Dense(512, W_std=2**0.5, b_std=0.1),
    stax.Relu(),
    stax.Dense(N_CLASSES, W_std=2.0),
)


def load() -> tuple[Array, np.ndarray, Array, np.ndarray]:
    """Training images and labels, then test images and labels.

    Pixels are centred and have mean square 1.
    """
    images, labels = load_digits(return_X_y=True)
    chosen = np.random.default_rng(0).permutation(len(labels))[
        : N_TRAIN + N_TEST
    ]
    images, labels = images[chosen], labels[chosen]
    images = images - images[:N_TRAIN].mean(0)
    x = jnp.asarray(images / np.sqrt((images[:N_TRAIN] ** 2).mean()))
    return x[:N_TRAIN], labels[:N_TRAIN], x[N_TRAIN:], labels[N_TRAIN:]


def centred(kernel_fn: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel_fn` with covariances of outputs instead of second moments.

    For Gaussian-process inference a class's output `y_i` has the prior mean
    `1/n`, and over all classes the prior covariance `I(x1, x2) (Id - 1 1^T /
    n)`. The `nngp` of neural-tangents is the uncentred `E[y_i(x1) y_i(x2)] =
    1/n^2 + (1 - 1/n) I`, so the mean's square has to come off; what is left is
    the covariance of one class's output. The NTK is built from gradients, which
    a constant mean does not change; its process is that of the network
    linearised around its initialisation.
    """

    def centred_fn(x1: Array, x2: Array | None, get: tuple[str, ...]) -> Any:
        kernel = kernel_fn(x1, x2, get)
        return kernel._replace(nngp=kernel.nngp - 1 / N_CLASSES**2)

    return centred_fn


def classify(kernel_fn: Callable[..., Any]) -> dict[str, float]:
    """Test accuracy of both Gaussian processes after infinite training."""
    x_train, train_labels, x_test, test_labels = load()
    # Outputs and one-hot targets both sum to 1. Less the prior mean they sum to
    # 0: residuals lie in the range of Id - 1 1^T / n, on which that matrix is
    # the identity. So one scalar kernel serves every class, as neural-tangents
    # supposes, and the predictions sum to 1 again.
    targets = jnp.eye(N_CLASSES)[train_labels] - 1 / N_CLASSES
    predict = nt.predict.gradient_descent_mse_ensemble(
        centred(kernel_fn), x_train, targets, diag_reg=1e-3
    )
    means: Any = predict(t=None, x_test=x_test, get=("nngp", "ntk"))
    accuracy = {}
    for name, mean in means._asdict().items():
        outputs = np.asarray(mean) + 1 / N_CLASSES
        assert np.allclose(outputs.sum(1), 1)
        accuracy[name] = float(np.mean(outputs.argmax(1) == test_labels))
    return accuracy


def compare(
    layer: Any, order: int | None, x: Array
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Analytic entries, sampled ones, standard errors: `(pairs, n, n)` each.

    Monte Carlo samples the logits of each pair of images and knows no formula
    of the kernel.
    """
    x1, x2 = x[:N_PAIRS], x[N_PAIRS : 2 * N_PAIRS]
    logits: Any = BODY[2](x1, x2)
    var1, cov12, var2 = logits.cov1, jnp.diagonal(logits.nngp), logits.cov2
    analytic = class_kernel(layer[2](logits)).nngp[
        jnp.arange(N_PAIRS), jnp.arange(N_PAIRS)
    ]
    sampled = monte_carlo.class_second_moment(
        jax.random.key(1),
        var1,
        cov12,
        var2,
        n_classes=N_CLASSES,
        order=order,
        n_samples=N_SAMPLES,
    )
    return (
        np.asarray(analytic),
        np.asarray(sampled.mean),
        np.asarray(sampled.stderr),
    )


def print_comparison(
    name: str, results: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    print(
        f"\n{name}: E[y_i(x1) y_j(x2)], analytic and from {N_SAMPLES} samples"
    )
    print(
        f"{'pair':>6}{'classes':>9}{'analytic':>12}{'Monte Carlo':>14}"
        f"{'std. error':>13}{'z':>7}"
    )
    for pair in range(3):
        for j, classes in ((0, "same"), (1, "other")):
            exact, mean, error = (float(array[pair, 0, j]) for array in results)
            z = (mean - exact) / error
            print(
                f"{pair:>6}{classes:>9}{exact:>12.6f}{mean:>14.6f}"
                f"{error:>13.6f}{z:>7.2f}"
            )


def draw(
    path: Path, kernels: Any, labels: np.ndarray, comparison: dict[str, Any]
) -> None:
    """Draws the kernels, images sorted by class, and the sampled entries."""
    figure = plt.figure(figsize=(14, 4.2), layout="constrained")
    subfigures: Any = figure.subfigures(1, 3)
    left, middle, right = subfigures
    counts = np.bincount(labels, minlength=N_CLASSES)
    ends = np.cumsum(counts)
    panels = (
        (left, kernels.nngp - 1 / N_CLASSES**2, "NNGP (centred)"),
        (middle, kernels.ntk, "NTK"),
    )
    for panel, kernel, title in panels:
        axes = panel.subplots()
        # As a correlation: bright images would outshine the classes. Its
        # diagonal is 1, far above all else, and the percentiles keep the
        # colours for the rest.
        root = np.sqrt(np.diagonal(kernel))
        matrix = kernel / np.outer(root, root)
        low, high = np.percentile(matrix, [1, 99])
        image = axes.imshow(
            matrix, vmin=low, vmax=high, interpolation="nearest"
        )
        panel.colorbar(
            image, ax=axes, shrink=0.85, extend="both", label="correlation"
        )
        axes.set_xticks(ends - counts / 2, range(N_CLASSES))
        axes.set_yticks(ends - counts / 2, range(N_CLASSES))
        axes.tick_params(length=0)
        axes.set(title=f"{title} of a Softmax network")
        axes.set(xlabel="digit of image $x_2$", ylabel="digit of image $x_1$")
    top, bottom = right.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for (name, results), colour in zip(
        comparison.items(), ("tab:orange", "tab:blue"), strict=True
    ):
        exact, mean, error = (array[:, 0, 0] for array in results)
        style = {"fmt": "o", "ms": 3, "color": colour}
        top.errorbar(exact, mean, error, lw=1, label=name, **style)
        bottom.plot(exact, (mean - exact) / error, "o", ms=3, color=colour)
    span = np.array(top.get_xlim())
    top.plot(span, span, color="black", lw=0.8, zorder=0)
    top.legend(frameon=False)
    top.set(
        title=f"Same-class entries of {N_PAIRS} pairs of images",
        ylabel="Monte Carlo ± std. error",
    )
    bottom.axhspan(-2, 2, color="0.9")
    bottom.axhline(0, color="black", lw=0.8)
    bottom.set(
        xlabel="analytic $E[y_i(x_1)\\,y_i(x_2)]$",
        ylabel="z-score",
        ylim=(-4, 4),
    )
    bottom.locator_params(axis="x", nbins=6)
    figure.savefig(path, dpi=120)


def main() -> None:
    x_train, train_labels, _, _ = load()
    comparison = {}
    print(f"Digits: {N_TRAIN} training and {N_TEST} test images; test accuracy")
    for name, (layer, _) in LAYERS.items():
        accuracy = classify(stax.serial(BODY, layer)[2])
        print(
            f"{name:>18}: "
            + ", ".join(f"{k.upper()} {v:.1%}" for k, v in accuracy.items())
        )
    for name, (layer, order) in LAYERS.items():
        comparison[name] = compare(layer, order, x_train)
        print_comparison(name, comparison[name])
    by_class = np.argsort(train_labels, kind="stable")
    x = x_train[by_class]
    kernels = stax.serial(BODY, LAYERS["Softmax"][0])[2](
        x, None, ("nngp", "ntk")
    )
    path = Path(__file__).with_suffix(".png")
    draw(path, kernels, train_labels, comparison)
    print(f"\nFigure: {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
