"""Seconds of the first call of each public function, and at another size, in fresh processes.

Run `python -m benchmarks.first_calls` on an otherwise idle machine; `--quick` tries it out. With
`--before DIRECTORY`, a checkout of another commit, its times stand beside those of this one.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import taylor_softmax
from benchmarks.report import options, progress, run, table
from benchmarks.timing import seconds
from taylor_softmax import losses, monte_carlo, nn, predict, stax

COMMAND = "benchmarks.first_calls"
ROOT = Path(__file__).resolve().parent.parent
N_CLASSES = 10

# Of a size: what to call.
Call = Callable[[int], Callable[[], Any]]


def points(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Means and variances of logits, one variance per point."""
    rng = np.random.default_rng(n)
    mean = 2 * rng.standard_normal((n, N_CLASSES))
    return mean.astype(np.float32), rng.lognormal(size=(n, 1)).astype(np.float32)


def digits(n: int, n_test: int = 100) -> tuple[Any, np.ndarray, tuple[Any, np.ndarray]]:
    """A kernel of `n` digits, their labels, and the kernels of test inputs, all of NumPy."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))[: n + n_test]
    x = (images[order] - images.mean(0)) / images.std()
    squares = np.sum((x[:, None] - x) ** 2, axis=-1)
    k = (10 * np.exp(-squares / (2 * np.median(squares)))).astype(np.float32)
    return k[:n, :n], labels[order[:n]], (k[n:, :n], np.diagonal(k)[n:])


def posterior(n: int, n_test: int) -> Callable[[], Any]:
    k, labels, k_test = digits(n, n_test)
    fitted = predict.categorical_inference(k, labels, n_classes=N_CLASSES)
    return lambda: fitted(*k_test).probabilities


def inference(n: int) -> Callable[[], Any]:
    k, labels, _ = digits(n)
    return lambda: predict.categorical_inference(k, labels, n_classes=N_CLASSES).alpha


def evidence_gradient(n: int, jit: bool) -> Callable[[], Any]:
    k, labels, _ = digits(n)
    gradient = jax.value_and_grad(
        lambda k: predict.categorical_log_evidence(k, labels, n_classes=N_CLASSES)
    )
    gradient = jax.jit(gradient) if jit else gradient
    return lambda: gradient(k)


def positions(n: int, size: int = 4) -> tuple[Any, Any, Any]:
    x = np.random.default_rng(0).standard_normal((2, n, size, 32)).astype(np.float32) / 32**0.5
    own1, own2 = (np.einsum("bid,bjd->bij", each, each) for each in x)
    return own1, np.einsum("bid,bjd->bij", *x), own2


def inputs(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((*shape, 8)).astype(np.float32)


def layer(of: Callable[[], Any], *shape: int) -> Callable[[], Any]:
    """NNGP and NTK. The layer is made when it is asked for: a checkout may not have it."""
    kernel_fn: Any = stax.serial(stax.Dense(N_CLASSES), of(), stax.Dense(1))[2]
    return lambda: kernel_fn(inputs(*shape), None, ("nngp", "ntk"))


def tokens(of: Callable[[], Any]) -> Call:
    """Of 4 and 3 inputs of 8 tokens, or positions."""
    return lambda n: layer(of, n, 8)


def attention(**options: Any) -> Callable[[], Any]:
    return lambda: stax.GlobalSelfAttention(8, 8, 8, 2, linear_scaling=False, **options)


def classifier(n: int) -> Callable[[], Any]:
    """Ten classes of blobs of inputs, through `fit` and `predict_proba`."""
    from taylor_softmax.sklearn import InfiniteNetworkClassifier

    y = np.arange(n) % N_CLASSES
    x = inputs(n) + 3 * inputs(N_CLASSES)[y]
    return lambda: InfiniteNetworkClassifier().fit(x, y).predict_proba(x)


def loss_gradient(n: int) -> Callable[[], Any]:
    y = jnp.eye(N_CLASSES, dtype=jnp.float32)[np.arange(n) % N_CLASSES]
    gradient = jax.grad(lambda z: jnp.mean(losses.cross_entropy(2)(z, y)))
    return lambda: gradient(jnp.asarray(points(n)[0]))


def chosen(n: int) -> Callable[[], Any]:
    k, _, _ = digits(n)
    return lambda: predict.choose_inducing(np.diagonal(k), lambda i: k[i], 20)


def variances(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ones = np.ones(n, np.float32)
    return ones, 0.5 * ones, ones


# A call, its size and another one; the second is called in the process of the first.
CALLS: dict[str, tuple[Call, int, int]] = {
    "class_probabilities": (
        lambda n: lambda: predict.class_probabilities(*points(n)),
        *(1000, 700),
    ),
    "class_probability_covariance": (
        lambda n: lambda: predict.class_probability_covariance(*points(n)),
        *(1000, 700),
    ),
    "expected_log_normalizer": (
        lambda n: lambda: predict.expected_log_normalizer(*points(n)),
        *(1000, 700),
    ),
    "class_probabilities, covariance=": (
        lambda n: (
            lambda: predict.class_probabilities(
                points(n)[0], covariance=np.eye(N_CLASSES, dtype=np.float32) + 0.5
            )
        ),
        *(20, 15),
    ),
    "gradient of class_probabilities": (
        lambda n: (
            lambda: jax.grad(lambda v: jnp.sum(predict.class_probabilities(points(n)[0], v)[:, 0]))(
                points(n)[1]
            )
        ),
        *(1000, 700),
    ),
    "categorical_inference": (inference, 150, 160),
    "its posterior": (lambda n: posterior(150, n), 100, 50),
    "gradient of categorical_log_evidence": (lambda n: evidence_gradient(n, False), 150, 160),
    "the same under jit": (lambda n: evidence_gradient(n, True), 150, 160),
    "class_covariance": (
        lambda n: lambda: taylor_softmax.class_covariance(*variances(n), n_classes=N_CLASSES),
        *(1000, 700),
    ),
    "joint_second_moment": (
        lambda n: lambda: taylor_softmax.joint_second_moment(*positions(n)),
        *(4, 3),
    ),
    "gradient of joint_second_moment": (
        lambda n: (
            lambda: jax.grad(
                lambda c, n=n: jnp.sum(
                    taylor_softmax.joint_second_moment(positions(n)[0], c, positions(n)[2])[..., 0]
                )
            )(positions(n)[1])
        ),
        *(4, 3),
    ),
    "monte_carlo.class_second_moment": (
        lambda n: (
            lambda: monte_carlo.class_second_moment(
                jax.random.key(0), *variances(n), n_classes=N_CLASSES, n_samples=1000
            )
        ),
        *(10, 7),
    ),
    "nn.taylor_softmax": (lambda n: lambda: nn.taylor_softmax(points(n)[0], 4), 1000, 700),
    "gradient of losses.cross_entropy(2)": (loss_gradient, 1000, 700),
    "choose_inducing": (chosen, 150, 160),
    "attention_second_moment": (
        lambda n: lambda: taylor_softmax.attention_second_moment(*positions(n)),
        *(4, 3),
    ),
    "stax.Softmax()": (lambda n: layer(stax.Softmax, n), 50, 40),
    "stax.TaylorSoftmax(2)": (lambda n: layer(lambda: stax.TaylorSoftmax(2), n), 50, 40),
    "stax.LogSoftmax()": (lambda n: layer(stax.LogSoftmax, n), 50, 40),
    "stax.Softmax(infinite_width=True)": (
        lambda n: layer(lambda: stax.Softmax(infinite_width=True), n),
        *(50, 40),
    ),
    "stax.Softmax(axis=1), 8 positions": (tokens(lambda: stax.Softmax(axis=1)), 4, 3),
    "stax.GlobalSelfAttention, 8 tokens": (tokens(attention()), 4, 3),
    "the same, causal": (tokens(attention(causal=True)), 4, 3),
    "the same, rotary": (tokens(attention(rotary=1e4)), 4, 3),
    "stax.Erf()": (lambda n: layer(stax.Erf, n), 50, 40),
    "InfiniteNetworkClassifier": (classifier, 100, 90),
}


def times(name: str) -> str:
    """Seconds in this process: the first call, the next, and the first at another size."""
    make, size, other = CALLS[name]
    # The device, and what every program has done by then.
    jax.block_until_ready(jnp.zeros(3) + 1)
    call = make(size)
    # Made before it is timed: a posterior has a fit, which would count.
    another_call = make(other)
    first, again, another = (seconds(each) for each in (call, call, another_call))
    return f"{first:.2f} {again:.3f} {another:.2f}"


def of_checkout(directory: Path, name: str) -> list[str]:
    """The times of a call, of the library in `directory`."""
    environment = os.environ | {"PYTHONPATH": str(directory)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, __file__, "--call", name]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    # What that commit does not have, or does not compile.
    return result.stdout.split()[-3:] if result.returncode == 0 else ["-"] * 3


def calls(names: list[str], before: Path | None) -> str:
    rows = []
    for name in names:
        row = of_checkout(ROOT, name)
        if before is not None:
            columns = zip(of_checkout(before, name), row, strict=True)
            row = [value for pair in columns for value in pair]
        _, size, other = CALLS[name]
        rows.append([f"{name}, {size} and {other}", *row])
        progress(", ".join(rows[-1]))
    header = ["first (s)", "again (s)", "another size (s)"]
    if before is not None:
        header = [f"{each}{when}" for each in header for when in (", before", "")]
    return table(["call, sizes", *header], rows)


EXPLANATION = """\
Seconds of the first call, of the same call again, and of the first call at another size. Every row
comes from a fresh process, in float32, without a cache of compiled programs. The name of a row ends
with the two sizes, which are numbers of points, of inputs, or of test inputs. There are ten
classes. Inference has digits of scikit-learn. Rows of layers are NNGP and NTK of a `Dense` and the
layer. A dash means that the commit does not have the function.{before}"""


def main() -> None:
    parser = options(COMMAND, __doc__)
    parser.add_argument("--call", choices=CALLS, help=argparse.SUPPRESS)
    parser.add_argument("--before", type=Path, help="a checkout to compare with")
    arguments = parser.parse_args()
    if arguments.call:
        print(times(arguments.call))
        return
    names = ["class_probabilities", "stax.Erf()"] if arguments.quick else list(CALLS)
    before = ""
    if arguments.before is not None:
        show = ["git", "-C", str(arguments.before), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(show, check=True, capture_output=True, text=True).stdout.strip()
        before = f" Before: commit {commit}."
    parts = {
        "calls": lambda: (EXPLANATION.format(before=before), calls(names, arguments.before)),
    }
    run("First calls", COMMAND, parts, arguments)


if __name__ == "__main__":
    main()
