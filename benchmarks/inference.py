"""Categorical inference on digits: time and evidence, beside scikit-learn; inducing inputs.

Run `python -m benchmarks.inference` on an otherwise idle machine; `--quick` tries it out.
"""

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from sklearn.datasets import load_digits
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.gaussian_process.kernels import Kernel

from benchmarks.report import options, progress, run, table
from taylor_softmax import stax
from taylor_softmax.predict import InducingKernels, categorical_inference, choose_inducing

COMMAND = "benchmarks.inference"
N_CLASSES = 10
VARIANCE = 10.0  # of the logits

_, _, KERNEL_FN = stax.serial(
    stax.Dense(512, 2**0.5, 0.1),
    stax.Relu(),
    stax.Dense(512, 2**0.5, 0.1),
    stax.Relu(),
    stax.Dense(N_CLASSES, VARIANCE**0.5),
)


def kernel(x1: Any, x2: Any) -> Array:
    k: Any = KERNEL_FN(jnp.asarray(x1), None if x2 is None else jnp.asarray(x2), "nngp")
    return k


class Network(Kernel):
    """The same kernel as scikit-learn takes it; it has nothing to optimise."""

    def __init__(self) -> None:
        """Without parameters, which scikit-learn reads off this signature."""

    def __call__(self, X: Any, Y: Any = None, eval_gradient: bool = False) -> Any:
        value = np.asarray(kernel(X, Y))
        return (value, np.empty((*value.shape, 0))) if eval_gradient else value

    def diag(self, X: Any) -> Any:
        return np.diagonal(np.asarray(kernel(X, None)))

    def is_stationary(self) -> Any:
        return False


def scores(p: Any, labels: np.ndarray) -> list[str]:
    p = np.asarray(p)
    likelihood = -np.log(p[np.arange(len(labels)), labels]).mean()
    return [f"{np.mean(p.argmax(1) == labels):.1%}", f"{likelihood:.4f}"]


FIT = ["iterations", "residual", "time (s)", "log evidence", "accuracy", "NLL"]
Data = tuple[np.ndarray, np.ndarray]  # inputs and labels


def fit(train: Data, test: Data) -> list[str]:
    """One fit without compilation: iterations, residual, seconds, evidence and scores."""
    (x_train, y_train), (x_test, y_test) = train, test
    k_train, k_cross = kernel(x_train, None), kernel(x_test, x_train)
    k_test = jnp.diagonal(kernel(x_test, None))
    progress(f"{len(x_train)} inputs: categorical_inference")
    # Compiles, and ends after one iteration.
    categorical_inference(k_train, y_train, n_classes=N_CLASSES, tol=1e9)
    start = time.perf_counter()
    posterior = categorical_inference(k_train, y_train, n_classes=N_CLASSES)
    seconds = time.perf_counter() - start
    p = posterior(k_cross, k_test).probabilities
    return [
        f"{posterior.iterations}",
        f"{posterior.residual:.0e}",
        f"{seconds:.1f}",
        f"{float(posterior.log_evidence):.1f}",
        *scores(p, y_test),
    ]


def rows_of(n_train: int, x: np.ndarray, labels: np.ndarray) -> list[list[str]]:
    x_train, y_train = x[:n_train], labels[:n_train]
    x_test, y_test = x[n_train:], labels[n_train:]
    ours = ["categorical_inference", str(n_train), *fit((x_train, y_train), (x_test, y_test))]
    progress(f"{n_train} inputs: GaussianProcessClassifier")
    start = time.perf_counter()
    fixed: Any = {"optimizer": None}
    other = GaussianProcessClassifier(Network(), **fixed).fit(x_train, y_train)
    seconds = time.perf_counter() - start
    theirs = ["GaussianProcessClassifier (one against the rest)", str(n_train), "", ""]
    theirs += [f"{seconds:.1f}", "", *scores(other.predict_proba(x_test), y_test)]
    return [ours, theirs]


EXPLANATION = """\
The NNGP kernel of `Dense, Relu, Dense, Relu, Dense` with logits of variance {variance:g} on the
digits of scikit-learn, ten classes; the images that are not for training are the test, fewer where
there are more of the others. Times are of one fit each, without compilation. scikit-learn's
classifier has a Laplace approximation for each class against the rest, normalised, and no evidence
of the whole. GPflow is left out, since it needs TensorFlow."""


def shuffled() -> Data:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return images[order], labels[order]


def shifts(images: np.ndarray, labels: np.ndarray) -> Data:
    """The images and their shifts by a pixel in all eight directions."""
    padded = np.pad(images.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)), mode="edge")
    copies = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    return np.concatenate(copies).reshape(-1, 64), np.tile(labels, 9)


def digits(sizes: tuple[int, ...]) -> str:
    images, labels = shuffled()
    x = images - images.mean(0)
    x = x / np.sqrt((x**2).mean())
    rows = [row for n in sizes for row in rows_of(n, x, labels)]
    return table(["", "inputs", *FIT], rows)


INDUCING = """\
1,297 digits and their shifts by a pixel in all eight directions, 11,673 training inputs, and 500
digits for the test; inducing inputs are those that `choose_inducing` takes. The whole kernel would
have 1.1 GB, of which inference keeps several. Times: of the choice, its kernels included, and of
one fit without compilation, to a residual of 1e-3."""


def inducing(numbers: tuple[int, ...], n_test: int) -> str:
    images, labels = shuffled()
    x = (images - images.mean()) / images.std()
    x_train, y_train = shifts(x[n_test:], labels[n_test:])
    x_test, y_test = x[:n_test], labels[:n_test]
    blocks = np.array_split(x_train, len(x_train) // 500 + 1)
    variance = np.concatenate([np.diagonal(np.asarray(kernel(each, None))) for each in blocks])
    k_test = jnp.diagonal(kernel(x_test, None))
    column = jax.jit(lambda z: kernel(x_train, z)[:, 0])
    rows = []
    for n in numbers:
        progress(f"{len(x_train)} inputs, {n} of them inducing")
        start = time.perf_counter()
        chosen = choose_inducing(variance, lambda i: column(x_train[i : i + 1]), n)
        z = x_train[chosen]
        kernels = InducingKernels(kernel(z, None), kernel(z, x_train), jnp.asarray(variance))
        choice = time.perf_counter() - start
        infer = functools.partial(categorical_inference, kernels, y_train, n_classes=N_CLASSES)
        infer(tol=1e9)
        start = time.perf_counter()
        posterior = infer(tol=1e-3)
        seconds = time.perf_counter() - start
        p = posterior(kernel(x_test, z), k_test).probabilities
        row = [str(len(chosen)), f"{posterior.iterations}", f"{posterior.residual:.0e}"]
        row += [f"{choice:.1f}", f"{seconds:.0f}", f"{float(posterior.log_evidence):.0f}"]
        rows.append([*row, *scores(p, y_test)])
    header = ["inducing inputs", "iterations", "residual", "choice (s)", "fit (s)"]
    return table([*header, "log evidence", "accuracy", "NLL"], rows)


def main() -> None:
    arguments = options(COMMAND, __doc__).parse_args()
    jax.config.update("jax_enable_x64", True)
    # There are 1,797 images; 2,000 inputs would leave none for the test.
    sizes = (100,) if arguments.quick else (500, 1000, 1600)
    parts: dict[str, Callable[[], Iterable[str]]] = {
        "digits": lambda: (EXPLANATION.format(variance=VARIANCE), digits(sizes)),
        "inducing": lambda: (
            INDUCING,
            inducing((20,), 1700) if arguments.quick else inducing((125, 250, 500), 500),
        ),
    }
    run("Categorical inference", COMMAND, parts, arguments)


if __name__ == "__main__":
    main()
