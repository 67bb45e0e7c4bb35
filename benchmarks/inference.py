"""Categorical inference: classifiers beside scikit-learn's, time and evidence, inducing inputs.

Run `python -m benchmarks.inference` on an otherwise idle machine; `--quick` tries it out.
"""

import functools
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import scipy.optimize
from jax import Array
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.gaussian_process.kernels import RBF, Kernel
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold
from sklearn.preprocessing import StandardScaler

from benchmarks.report import environment, options, progress, run, table
from taylor_softmax import stax
from taylor_softmax.predict import InducingKernels, categorical_inference, choose_inducing
from taylor_softmax.sklearn import InfiniteNetworkClassifier

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COMMAND = "benchmarks.inference"
FIGURE = "inference-classifiers.png"
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
Two ways to infer with one kernel: the NNGP of `Dense, Relu, Dense, Relu, Dense` with logits of
variance {variance:g}, on the ten classes of scikit-learn's digits. All images that are not used for
training are the test. Times are those of one fit, without compilation. scikit-learn's classifier
approximates each class against the rest by Laplace's method and normalises afterwards, so it has no
evidence of all labels. GPflow is left out, since it needs TensorFlow."""


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
    jax.config.update("jax_enable_x64", True)
    images, labels = shuffled()
    x = images - images.mean(0)
    x = x / np.sqrt((x**2).mean())
    rows = [row for n in sizes for row in rows_of(n, x, labels)]
    return table(["", "inputs", *FIT], rows)


INDUCING = """\
Inference from inducing inputs, which `choose_inducing` takes. The 11,673 training inputs are 1,297
digits and their shifts by a pixel in all eight directions; 500 other digits are the test. The whole
kernel would have 1.1 GB, and inference would keep several arrays of that size. "choice" is the time
to choose inducing inputs, their kernels included. "fit" is the time of one fit to a residual of
1e-3, without compilation."""


def inducing(numbers: tuple[int, ...], n_test: int) -> str:
    jax.config.update("jax_enable_x64", True)
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


class TemperatureScaled(ClassifierMixin, BaseEstimator):
    """Regression on labels with the kernel that a classifier chooses, then softmax of scaled means.

    Noise and scale are those of the least negative log-likelihood by cross-validation, five times.
    """

    def __init__(self, kernel_of: InfiniteNetworkClassifier) -> None:
        self.kernel_of = kernel_of

    def _kernel(self, x1: np.ndarray, x2: np.ndarray) -> np.ndarray:
        same, at = self._fitted, self._fitted.hyperparameters_
        return same._network().cross(same._scaled(x1), same._scaled(x2), at).astype(float)

    def fit(self, X: np.ndarray, y: np.ndarray) -> "TemperatureScaled":
        fresh: Any = clone(self.kernel_of)
        self._fitted = fresh.fit(X, y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        k = self._kernel(X, X)
        targets = np.eye(len(self.classes_))[labels] - 1 / len(self.classes_)

        def weights(of: np.ndarray, noise: float) -> np.ndarray:
            ridge = noise * np.mean(np.diagonal(k)) * np.eye(len(of))
            return np.linalg.solve(k[np.ix_(of, of)] + ridge, targets[of])

        def held_out(noise: float) -> np.ndarray:
            mean = np.empty(targets.shape)
            for train, test in KFold(5, shuffle=True, random_state=0).split(X):
                mean[test] = k[np.ix_(test, train)] @ weights(train, noise)
            return mean

        def likelihood(mean: np.ndarray) -> tuple[float, float]:
            best = scipy.optimize.minimize_scalar(
                lambda log: nll(softmax(np.exp(log) * mean, axis=1), labels).mean(),
                bounds=(-3, 8),
                method="bounded",
            )
            return best.fun, np.exp(best.x)

        trials = {noise: likelihood(held_out(noise)) for noise in np.geomspace(1e-5, 1, 11)}
        noise = min(trials, key=lambda each: trials[each][0])
        self._x, self._weights = X, weights(np.arange(len(X)), noise)
        self._scale = trials[noise][1]
        return self

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        return softmax(self._scale * self._kernel(X, self._x) @ self._weights, axis=1)


def nll(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each label, in nats; probabilities of 0 count as 1e-30."""
    return -np.log(np.maximum(p[np.arange(len(labels)), labels], 1e-30))


def reliability(p: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By tenths of the likeliest class's probability: number of inputs, its mean, accuracy."""
    confidence, right = p.max(1), p.argmax(1) == labels
    tenth = np.minimum((confidence * 10).astype(int), 9)
    count = np.bincount(tenth, minlength=10)
    some = count > 0
    sums = (np.bincount(tenth, each, 10)[some] for each in (confidence, right))
    mean, accuracy = (each / count[some] for each in sums)
    return count[some], mean, accuracy


def calibration_error(p: np.ndarray, labels: np.ndarray) -> float:
    count, confidence, accuracy = reliability(p, labels)
    return float(np.sum(count * np.abs(confidence - accuracy)) / len(p))


# Of a first fit, beside which compiling does not count.
_MINUTE = 60


class Row(NamedTuple):
    """What came of one classifier.

    Attributes:
      inputs: name of the data, and number of training inputs.
      error: standard error of `nll`.
      first: seconds of the first fit, which compiles.
      fit: of the second one, or of the only one where it compiles nothing or takes a minute.
      inputs_in, confidence, right: of the reliability diagram.
    """

    inputs: str
    classifier: str
    accuracy: float
    nll: float
    error: float
    calibration: float
    first: float | None
    fit: float
    predict: float
    inputs_in: list[int]
    confidence: list[float]
    right: list[float]


def measured(inputs: str, name: str, classifier: Any, data: tuple[np.ndarray, ...]) -> Row:
    x_train, y_train, x_test, y_test = data

    def seconds(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def once() -> tuple[float, float]:
        fit = seconds(lambda: classifier.fit(x_train, y_train))
        return fit, seconds(lambda: classifier.predict_proba(x_test))

    fit, predict = once()
    first = None
    if isinstance(classifier, InfiniteNetworkClassifier):
        first = fit
        if first < _MINUTE:
            fit, predict = once()
    p = np.asarray(classifier.predict_proba(x_test), float)
    errors = nll(p, y_test)
    count, confidence, right = (each.tolist() for each in reliability(p, y_test))
    return Row(
        inputs,
        name,
        accuracy=float(np.mean(p.argmax(1) == y_test)),
        nll=float(errors.mean()),
        error=float(errors.std() / len(errors) ** 0.5),
        calibration=calibration_error(p, y_test),
        first=first,
        fit=fit,
        predict=predict,
        inputs_in=count,
        confidence=confidence,
        right=right,
    )


def candidates(n_columns: int) -> dict[str, Any]:
    categorical = InfiniteNetworkClassifier(inference="categorical")
    return {
        "InfiniteNetworkClassifier": InfiniteNetworkClassifier(),
        "the same, categorical inference": categorical,
        "temperature-scaled regression": TemperatureScaled(InfiniteNetworkClassifier()),
        "GaussianProcessClassifier": GaussianProcessClassifier(1.0 * RBF(n_columns**0.5)),
        "LogisticRegression": LogisticRegression(max_iter=1000),
    }


CLASSIFIERS = """\
Classifiers with their default settings, in float32, on data that scikit-learn ships. Pixels of
digits are centred and divided by their root mean square. The columns of the other data are
standardised.

- `InfiniteNetworkClassifier` chooses its scales by the evidence.
- Temperature-scaled regression has the kernel that `InfiniteNetworkClassifier` chooses. It takes
  noise and temperature from cross-validation. Its time includes the choice of the kernel.
- `GaussianProcessClassifier` has an RBF kernel times a factor. Its own optimizer starts from a
  factor of 1 and from a length scale that is the root of the number of columns.
- `LogisticRegression` has its default penalty.

"NLL" is the negative log-likelihood of the test labels in nats, with its standard error.
"calibration error" is over ten bins of confidence. "fit" includes the choice of hyperparameters.
"first fit" also compiles; if it takes a minute, there is no second one, and both columns show it.
The reliability diagram shows bins of at least ten test inputs."""


def splits(sizes: tuple[int, ...]) -> Iterable[tuple[str, int, tuple[Any, ...]]]:
    """Name, number of training inputs, and training and test inputs with labels."""
    images, labels = shuffled()
    x = images - images.mean(0)
    x = x / np.sqrt((x**2).mean())
    for n in sizes:
        yield "digits", n, (x[:n], labels[:n], x[n:], labels[n:])
    for name, load, n in (("breast cancer", load_breast_cancer, 285), ("wine", load_wine, 89)):
        x, labels = load(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        x, labels = x[order], labels[order]
        x = StandardScaler().fit(x[:n]).transform(x)
        yield name, n, (x[:n], labels[:n], x[n:], labels[n:])


def saved_rows(path: Path, at: str) -> list[Row]:
    """Those of an earlier run of the same code on the same machine."""
    if not path.exists():
        return []
    saved = json.loads(path.read_text())
    if saved["environment"] != at:
        progress(f"{path} is of other code or another machine: starting anew")
        return []
    return [Row(**row) for row in saved["rows"]]


def classifiers(sizes: tuple[int, ...], folder: Path) -> tuple[str, str]:
    """The table, and what shows the figure. Goes on with the rows that a run has saved."""
    jax.config.update("jax_enable_x64", False)
    path, at = folder / "inference-classifiers.json", environment(COMMAND, [])
    rows = saved_rows(path, at)
    for name, n, data in splits(sizes):
        inputs = f"{name}, {n}"
        for classifier, instance in candidates(data[0].shape[1]).items():
            if any((row.inputs, row.classifier) == (inputs, classifier) for row in rows):
                continue
            progress(f"{inputs}: {classifier}")
            row = measured(inputs, classifier, instance, data)
            progress(f"    NLL {row.nll:.3f}, fit {row.fit:.2f} s")
            rows.append(row)
            content = {"environment": at, "rows": [each._asdict() for each in rows]}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=1) + "\n")
    draw([f"digits, {n}" for n in sizes], rows, folder / FIGURE)
    header = ["inputs", "classifier", "accuracy", "NLL", "calibration error"]
    text = table(
        [*header, "fit (s)", "first fit (s)", "predict (s)"],
        [
            [
                row.inputs,
                row.classifier,
                f"{row.accuracy:.1%}",
                f"{row.nll:.3f} ± {row.error:.3f}",
                f"{row.calibration:.3f}",
                f"{row.fit:.2f}",
                "" if row.first is None else f"{row.first:.2f}",
                f"{row.predict:.2f}",
            ]
            for row in rows
        ],
    )
    return text, f"![Likelihood by number of training images, and reliability.]({FIGURE})"


# Test inputs in a bin of the reliability diagram: fewer say little.
LEAST_SHOWN = 10


def draw(digits: list[str], rows: list[Row], path: Path) -> None:
    """NLL by number of training images, and a reliability diagram at a number in the middle."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    shown = digits[len(digits) // 2]
    sizes = [int(each.split()[-1]) for each in digits]
    for name in candidates(1):
        of_name = {row.inputs: row for row in rows if row.classifier == name}
        left.errorbar(
            sizes,
            [of_name[each].nll for each in digits],
            [of_name[each].error for each in digits],
            fmt="o-",
            capsize=3,
            label=name,
        )
        row = of_name[shown]
        often = np.array(row.inputs_in) >= LEAST_SHOWN
        right.plot(np.array(row.confidence)[often], np.array(row.right)[often], "o-")
    left.set(
        xlabel="training images",
        ylabel="negative log-likelihood, nats",
        title="Test labels of digits",
        ylim=(0, None),
    )
    left.set_xscale("log")
    left.set_xticks(sizes, map(str, sizes))
    left.minorticks_off()
    left.legend()
    right.plot([0, 1], [0, 1], ":", color="gray")
    right.set(
        xlabel="probability of the likeliest class",
        ylabel="how often it is right",
        title=f"Reliability, {sizes[len(sizes) // 2]} training images",
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
    progress(f"saved {path}")


def main() -> None:
    arguments = options(COMMAND, __doc__).parse_args()
    folder = (arguments.output or Path("benchmarks/results/inference.md")).parent
    # There are 1,797 images; 2,000 inputs would leave none for the test.
    sizes = (100,) if arguments.quick else (500, 1000, 1600)
    parts: dict[str, Callable[[], Iterable[str]]] = {
        "classifiers": lambda: (
            CLASSIFIERS,
            *classifiers((60,) if arguments.quick else (200, 500, 1000), folder),
        ),
        "digits": lambda: (EXPLANATION.format(variance=VARIANCE), digits(sizes)),
        "inducing": lambda: (
            INDUCING,
            inducing((20,), 1700) if arguments.quick else inducing((125, 250, 500), 500),
        ),
    }
    run("Categorical inference", COMMAND, parts, arguments)


if __name__ == "__main__":
    main()
