"""Infinite transformers on handwritten digits, beside other networks.

Digits are 8 tokens, the rows of 8 pixels. `python examples/transformer.py`
classifies them with three kernels: that of a transformer whose attention scales
logits by 1/sqrt(d), that of one that scales them by 1/d with tied weights, as
neural_tangents has it, and that of a fully connected network. Then it compares
an entry of the first kernel with finite networks of growing width. It draws a
figure beside this file. All of it takes about four minutes on two cores.
"""

import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax import Array, random
from sklearn.datasets import load_digits

from taylor_softmax import stax

matplotlib.use("Agg")
import matplotlib.pyplot as plt

N_CLASSES = 10
N_TRAIN, N_TEST = 100, 200
DEPTH = 2
BOTH = ("nngp", "ntk")
# Channels, keys and heads of finite networks.
WIDTHS = (8, 16, 32, 64)
N_NETWORKS = 400

# neural_tangents can't check that branches of a network are independent.
warnings.filterwarnings("ignore", message="`FanIn` layers assume")
warnings.filterwarnings("ignore", message="Linear scaling attention")


def residual(*layers: Any) -> Any:
    body = stax.serial(stax.LayerNorm(), *layers)
    return stax.serial(
        stax.FanOut(2), stax.parallel(stax.Identity(), body), stax.FanInSum()
    )


def body(width: int = 8, *, linear_scaling: bool = False) -> Any:
    """Blocks of attention and a dense network, then the mean over tokens.

    The kernel is that of infinite `width`.
    """
    attention = stax.GlobalSelfAttention(
        width,
        n_chan_key=width,
        n_chan_val=width,
        n_heads=width // 4,
        linear_scaling=linear_scaling,
        W_query_std=1.5,
        pos_emb_type="SUM",
        W_pos_emb_std=0.5,
    )
    dense = (stax.Dense(width, W_std=2**0.5), stax.Relu(), stax.Dense(width))
    block = stax.serial(residual(attention), residual(*dense))
    ends = stax.LayerNorm(), stax.GlobalAvgPool()
    return stax.serial(stax.Dense(width), *(block,) * DEPTH, *ends)


def transformer(**options: Any) -> Any:
    return stax.serial(body(**options), stax.Dense(1))


def fully_connected() -> Any:
    layers = (stax.Dense(1, W_std=2**0.5, b_std=0.1), stax.Relu()) * (DEPTH + 1)
    return stax.serial(stax.Flatten(), *layers, stax.Dense(1))


def load() -> tuple[Array, np.ndarray, Array, np.ndarray]:
    """Training images `(n, 8, 8)` and labels, then those of the test."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.random.default_rng(0).permutation(len(labels))[
        : N_TRAIN + N_TEST
    ]
    images, labels = images[chosen], labels[chosen]
    images = images - images[:N_TRAIN].mean(0)
    x = jnp.asarray(images / images[:N_TRAIN].std(), jnp.float32).reshape(
        -1, 8, 8
    )
    return x[:N_TRAIN], labels[:N_TRAIN], x[N_TRAIN:], labels[N_TRAIN:]


def accuracy(kernel_fn: Any) -> dict[str, float]:
    """Accuracy of the means of both Gaussian processes, after infinite time."""
    x_train, train_labels, x_test, test_labels = load()
    targets = jnp.eye(N_CLASSES)[train_labels] - 1 / N_CLASSES
    compute = jax.jit(lambda x1, x2: kernel_fn(x1, x2, BOTH))
    progress(f"  kernels of {N_TRAIN} digits among each other")
    of_train = jax.block_until_ready(kernel_fn(x_train, None, BOTH))
    progress(f"  kernels of {N_TEST} digits with them")
    of_test = jax.block_until_ready(compute(x_test, x_train))
    progress("  least squares")
    results = {}
    for name, train, test in zip(
        ("NNGP", "NTK"), of_train, of_test, strict=True
    ):
        # Above the error of the estimates.
        ridge = 1e-3 * jnp.trace(train) / N_TRAIN * jnp.eye(N_TRAIN)
        outputs = test @ jnp.linalg.solve(train + ridge, targets)
        results[name] = float(np.mean(np.argmax(outputs, 1) == test_labels))
    return results


def finite_networks(
    x1: Array, x2: Array
) -> Iterator[tuple[int, tuple[float, float]]]:
    """The NNGP of two inputs for each width, with its standard error."""
    for width in WIDTHS:
        # Over the last layer's weights the mean is exact: the product of what
        # goes into it.
        init_fn, apply_fn, _ = body(width)

        def one(
            key: Array, init_fn: Any = init_fn, apply_fn: Any = apply_fn
        ) -> Array:
            _, params = init_fn(key, x1.shape)
            return jnp.mean(apply_fn(params, x1) * apply_fn(params, x2))

        keys = random.split(random.key(width), N_NETWORKS)
        samples = np.asarray(
            jax.jit(lambda keys, one=one: jax.lax.map(one, keys))(keys)
        )
        stderr = samples.std() / np.sqrt(N_NETWORKS)
        yield width, (float(samples.mean()), float(stderr))


def progress(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def main() -> None:
    progress("started: about four minutes on two cores")
    networks = {
        "transformer, 1/sqrt(d)": transformer(),
        "transformer, 1/d": transformer(linear_scaling=True),
        "fully connected": fully_connected(),
    }
    print(
        f"Test accuracy, {N_TRAIN} training digits of 8 tokens, {DEPTH} blocks:"
    )
    scores = {}
    for name, (_, _, kernel_fn) in networks.items():
        progress(name)
        scores[name] = accuracy(kernel_fn)
        listed = ", ".join(
            f"{kind} {score:.3f}" for kind, score in scores[name].items()
        )
        print(f"  {name}: {listed}", flush=True)

    progress("the same entry of kernels of finite networks")
    x, *_ = load()
    pair = x[:1], x[1:2]
    exact = float(networks["transformer, 1/sqrt(d)"][2](*pair, "nngp")[0, 0])
    print(
        f"NNGP of two digits: {exact:.4f}; "
        f"of {N_NETWORKS} networks of each width:"
    )
    estimates = {}
    for width, (mean, stderr) in finite_networks(*pair):
        estimates[width] = mean, stderr
        print(f"  {width:4d} channels: {mean:.4f} +- {stderr:.4f}", flush=True)
    print(f"Figure: {draw(scores, estimates, exact)}")


def draw(
    scores: dict[str, dict[str, float]],
    estimates: dict[int, tuple[float, float]],
    exact: float,
) -> Path:
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4), layout="constrained"
    )
    for offset, kind in ((-0.2, "NNGP"), (0.2, "NTK")):
        heights = [score[kind] for score in scores.values()]
        left.bar(np.arange(len(scores)) + offset, heights, 0.4, label=kind)
    left.set_xticks(
        range(len(scores)), [name.replace(", ", ",\n") for name in scores]
    )
    left.set(ylabel="test accuracy", ylim=(0.5, 1))
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 2}
    left.legend(**above)
    means, errors = zip(*estimates.values(), strict=True)
    right.errorbar(
        list(estimates),
        means,
        errors,
        fmt="o",
        capsize=3,
        label="finite networks",
    )
    right.axhline(exact, color="black", label="infinite width")
    right.set(
        xscale="log",
        xlabel="channels, heads and keys",
        ylabel="NNGP of two digits",
    )
    right.set_xticks(list(estimates), [str(width) for width in estimates])
    # Labels of the powers of ten between them would lie upon these.
    right.minorticks_off()
    right.legend(**above)
    path = Path(__file__).with_suffix(".png")
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    main()
