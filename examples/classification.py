"""Class probabilities of handwritten digits, exact and approximated.

`python examples/classification.py` turns the Gaussian posteriors of an
infinitely wide network (NNGP and NTK) into class probabilities. It compares the
exact expectation with what is used in its place, and with the posterior of the
categorical model at the scale of the kernel that the evidence picks. Then it
trains finite networks on their empirical kernels. It draws reliability and
evidence beside this file.

What each is for: least squares pushed through softmax is one linear solve. Its
targets (`CONFIDENCE`) set how confident it is; here they are tuned by hand.
Categorical inference takes tens of solves a class. It has nothing to tune but
the kernel, and a bound on the evidence chooses that without held-out labels. It
is no better a classifier: here, on 300 images, 96 % against 97 %, with a larger
NLL, since it is less sure than it is right. `InfiniteNetworkClassifier` does
the first, and chooses noise and scale by itself.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax import Array
from sklearn.datasets import load_digits

from taylor_softmax import (
    class_kernel,
    losses,
    stax,
)  # before neural_tangents: mends it
from taylor_softmax.predict import categorical_inference, class_posterior

import neural_tangents as nt  # isort: skip

matplotlib.use("Agg")
import matplotlib.pyplot as plt

jax.config.update("jax_enable_x64", True)

N_CLASSES = 10
N_TRAIN, N_TEST = 300, 1000
N_SMALL = 60  # training images of the finite networks
N_SAMPLES = 100
TIME = 20.0  # of training the finite networks
SCALES = (
    1.0,
    3.0,
    10.0,
    30.0,
    100.0,
)  # variances of the logits to choose from by evidence
# Regression targets are the logits of a distribution that gives the label this
# probability. It sets how confident predictions are on average, by whichever
# method; 0.99 leaves them underconfident.
CONFIDENCE = 0.9999


def body(width: int, variance: float) -> Any:
    """The network up to the logits, which have about that variance."""
    hidden = [
        layer
        for _ in range(2)
        for layer in (stax.Dense(width, 2**0.5, 0.1), stax.Relu())
    ]
    return stax.serial(*hidden, stax.Dense(N_CLASSES, W_std=variance**0.5))


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


def posteriors(
    x_train: Array, labels: np.ndarray, x_test: Array
) -> dict[str, Any]:
    """`Gaussian(mean, covariance)` of the test logits, for NNGP and NTK."""
    wrong = (1 - CONFIDENCE) / (N_CLASSES - 1)
    targets = np.log(CONFIDENCE / wrong) * (
        jnp.eye(N_CLASSES)[labels] - 1 / N_CLASSES
    )
    predict_fn = nt.predict.gradient_descent_mse_ensemble(
        body(512, 10.0)[2], x_train, targets, diag_reg=1e-3
    )
    results: Any = predict_fn(
        x_test=x_test, get=("nngp", "ntk"), compute_cov=True
    )
    return results._asdict()


def probabilities(gaussian: Any) -> dict[str, np.ndarray]:
    """Class probabilities `(N_TEST, N_CLASSES)`, exact and approximated."""
    mean, variance = gaussian.mean, jnp.diagonal(gaussian.covariance)[:, None]
    noise = jax.random.normal(jax.random.key(0), (N_SAMPLES, *mean.shape))
    samples = jax.nn.softmax(mean + jnp.sqrt(variance) * noise)
    results = {
        "exact": class_posterior(gaussian).probabilities,
        "softmax of the mean": jax.nn.softmax(mean),
        "probit": jax.nn.softmax(mean / jnp.sqrt(1 + jnp.pi / 8 * variance)),
        f"{N_SAMPLES} samples": samples.mean(0),
    }
    return {name: np.asarray(p) for name, p in results.items()}


def categorical(
    x_train: Array, labels: np.ndarray, x_test: Array
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Evidence bounds and test probabilities at each of `SCALES`."""
    evidence, results, posterior = [], [], None
    for scale in SCALES:
        kernel_fn: Any = body(512, scale)[2]
        k_train, k_cross = (
            kernel_fn(x, x_train, "nngp") for x in (x_train, x_test)
        )
        # From one scale to the next the posterior changes little.
        posterior = categorical_inference(
            (k_train + k_train.T) / 2,
            labels,
            n_classes=N_CLASSES,
            tol=1e-3,
            init=posterior,
        )
        k_test = kernel_fn(x_test, None, "nngp")
        evidence.append(float(posterior.log_evidence))
        results.append(
            np.asarray(posterior(k_cross, jnp.diagonal(k_test)).probabilities)
        )
        print(
            f"logit variance {scale:5g}: log evidence {evidence[-1]:8.1f}, "
            f"{posterior.iterations} iterations"
        )
    return np.array(evidence), results


class Scores(NamedTuple):
    """`nll` is in nats, `calibration` is the expected calibration error."""

    accuracy: float
    nll: float
    brier: float
    calibration: float


def reliability(
    p: np.ndarray, labels: np.ndarray, n_bins: int = 10
) -> np.ndarray:
    """A row for each bin of confidence.

    Its columns: mean confidence, accuracy, share of the images, standard error
    of the accuracy.
    """
    confidence, correct = p.max(1), p.argmax(1) == labels
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    chosen = [bins == i for i in range(n_bins)]
    rows = []
    for c in chosen:
        if c.any():
            # Of Laplace's estimate, which is not 0 where all are right.
            rate = (correct[c].sum() + 1) / (c.sum() + 2)
            error = np.sqrt(rate * (1 - rate) / (c.sum() + 2))
            rows.append(
                (confidence[c].mean(), correct[c].mean(), c.mean(), error)
            )
    return np.array(rows)


def scores(p: np.ndarray, labels: np.ndarray) -> Scores:
    confidence, accuracy, share, _ = reliability(p, labels).T
    likelihood = p[np.arange(len(labels)), labels]
    brier = np.mean(np.sum((p - np.eye(N_CLASSES)[labels]) ** 2, axis=1))
    return Scores(
        float(np.mean(p.argmax(1) == labels)),
        float(-np.log(likelihood).mean()),
        float(brier),
        float(share @ np.abs(confidence - accuracy)),
    )


def print_scores(
    results: dict[str, dict[str, np.ndarray]], labels: np.ndarray
) -> None:
    print(
        f"{'':39}{'accuracy':>10}{'NLL':>9}{'Brier':>9}{'ECE':>9}"
        f"{'largest error':>16}"
    )
    for kind, methods in results.items():
        exact = next(iter(methods.values()))
        for name, p in methods.items():
            score = scores(p, labels)
            error = np.max(np.abs(p - exact))
            line = f"{kind:>19}  {name:<18}{score.accuracy:>10.1%}"
            line += f"{score.nll:>9.4f}{score.brier:>9.4f}"
            line += f"{score.calibration:>9.4f}"
            print(line + (f"{error:>16.1e}" if error else ""))


def draw(
    path: Path,
    results: dict[str, dict[str, np.ndarray]],
    labels: np.ndarray,
    evidence: np.ndarray,
    by_scale: list[np.ndarray],
) -> None:
    """Draws reliability, and the evidence beside the likelihood.

    On the diagonal, the share of right answers is the announced one.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
    chosen: Any = {
        f"{kind}, exact": methods["exact"] for kind, methods in results.items()
    }
    nngp: Any = {n: p for n, p in results["NNGP"].items() if n != "exact"}
    for panel, title, methods in (
        (axes[0], "Exact expectations", chosen),
        (axes[1], "NNGP least squares, approximated", nngp),
    ):
        panel.plot([0, 1], [0, 1], color="black", lw=0.8)
        for (name, p), style in zip(
            methods.items(), ("o-", "s-", "^--"), strict=True
        ):
            confidence, accuracy, _, error = reliability(p, labels).T
            label = f"{name} (ECE {scores(p, labels).calibration:.3f})"
            panel.errorbar(
                confidence,
                accuracy,
                error,
                fmt=style,
                ms=5,
                lw=1,
                capsize=2,
                label=label,
            )
        panel.set(
            title=title, xlabel="confidence", ylabel="share of right answers"
        )
        panel.set(xlim=(0, 1.03), ylim=(0, 1.03))
    axes[2].semilogx(
        SCALES, evidence, "o-", color="C0", label="log evidence (left)"
    )
    axes[2].set(
        title="Categorical, by scale",
        xlabel="variance of the logits",
        ylabel="nats",
    )
    likelihood = axes[2].twinx()
    nll = [scores(p, labels).nll for p in by_scale]
    likelihood.semilogx(
        SCALES, nll, "s--", color="C1", label="test NLL (right)"
    )
    likelihood.set(ylabel="nats an image")
    lines = [*axes[2].get_lines(), *likelihood.get_lines()]
    # Below the axes, off the curves.
    below: Any = {
        "loc": "upper center",
        "bbox_to_anchor": (0.5, -0.16),
        "frameon": False,
    }
    for panel in axes[:2]:
        panel.legend(**below)
    axes[2].legend(lines, [str(line.get_label()) for line in lines], **below)
    figure.savefig(path, dpi=120)


def train_finite(
    x_train: Array, labels: np.ndarray, x_test: Array, test_labels: np.ndarray
) -> None:
    """Gradient descent on the cross-entropy, with the empirical kernel."""
    x, y = x_train[:N_SMALL], jnp.eye(N_CLASSES)[labels[:N_SMALL]]
    x_test, test_labels = x_test[:N_SMALL], test_labels[:N_SMALL]
    print(
        f"\nFinite networks, width 128, {N_SMALL} images, linearised: "
        "training loss, test accuracy"
    )
    for name, last, loss in (
        ("logits", (), losses.cross_entropy()),
        (
            "Softmax",
            (stax.Softmax(),),
            losses.cross_entropy(probabilities=True),
        ),
        (
            "TaylorSoftmax(2)",
            (stax.TaylorSoftmax(2),),
            losses.cross_entropy(probabilities=True),
        ),
    ):
        init_fn, apply_fn, _ = stax.serial(body(128, 1.0), *last)
        _, params = init_fn(jax.random.key(1), x.shape)
        ntk_fn: Any = nt.empirical_ntk_fn(apply_fn, trace_axes=(), vmap_axes=0)
        predict_fn = nt.predict.gradient_descent(
            loss, ntk_fn(x, None, params), y, trace_axes=()
        )
        start: Any = apply_fn(params, x), apply_fn(params, x_test)
        trained: Any = predict_fn(
            TIME, start[0], start[1], ntk_fn(x_test, x, params)
        )
        train, test = trained
        accuracy = np.mean(np.asarray(test).argmax(1) == test_labels)
        print(
            f"{name:>18}: {loss(start[0], y):7.4f} -> {loss(train, y):7.4f}, "
            f"{accuracy:.0%}"
        )


def sample_kernels(x: Array) -> None:
    """The kernels of random networks average to the analytic ones."""
    init_fn, apply_fn, kernel_fn = stax.serial(body(256, 4.0), stax.Softmax())
    x1, x2 = x[:1], x[1:3]
    axes: Any = {"trace_axes": (), "vmap_axes": 0}
    sampled: Any = nt.monte_carlo_kernel_fn(
        init_fn, apply_fn, jax.random.key(2), N_SAMPLES, **axes
    )(x1, x2, ("nngp", "ntk"))
    analytic: Any = kernel_fn(x1, x2)
    both, different = (
        (class_kernel(analytic), sampled),
        ~np.eye(N_CLASSES, dtype=bool),
    )
    print(
        f"\nKernels of two images, {N_SAMPLES} networks of width 256, "
        "averaged over classes"
    )
    for kind in ("nngp", "ntk"):
        for where, name in (
            (~different, "same class"),
            (different, "two classes"),
        ):
            exact, mean = (
                np.asarray(getattr(k, kind))[0, 0][where].mean() for k in both
            )
            print(
                f"{kind.upper():>18}, {name}: "
                f"analytic {exact:.5f}, sampled {mean:.5f}"
            )

    # Where only the same-class entries are wanted, `diagonal_axes` leaves out
    # the others.
    _, params = init_fn(jax.random.key(3), x.shape)
    full, diagonal = (
        nt.empirical_kernel_fn(apply_fn, diagonal_axes=diagonal_axes, **axes)(
            x1, x2, "ntk", params
        )
        for diagonal_axes in ((), (-1,))
    )
    assert np.allclose(diagonal, np.diagonal(full, axis1=-2, axis2=-1))


def main() -> None:
    x_train, train_labels, x_test, test_labels = load()
    gaussians = posteriors(x_train, train_labels, x_test)
    results = {
        kind.upper(): probabilities(gaussian)
        for kind, gaussian in gaussians.items()
    }
    print(f"Digits: {N_TRAIN} training and {N_TEST} test images")
    evidence, by_scale = categorical(x_train, train_labels, x_test)
    best = int(np.argmax(evidence))
    results[f"categorical, {SCALES[best]:g}"] = {"exact": by_scale[best]}
    print_scores(results, test_labels)
    train_finite(x_train, train_labels, x_test, test_labels)
    sample_kernels(x_train)
    path = Path(__file__).with_suffix(".png")
    draw(path, results, test_labels, evidence, by_scale)
    print(f"\nFigure: {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
