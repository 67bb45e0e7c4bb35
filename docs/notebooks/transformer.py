# %% [markdown]
# # An infinite transformer
#
# Softmax attention at $1/\sqrt d$ has a kernel in the limit of infinitely many
# heads, keys and channels. This notebook uses it in a transformer on
# handwritten digits. Each digit has 8 tokens: the rows of its image.

# %%
import time
import warnings

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax import random
from sklearn.datasets import load_digits

from taylor_softmax import stax

# neural_tangents can't check that the branches of a residual network are
# independent.
warnings.filterwarnings("ignore", message="`FanIn` layers assume")

N_TRAIN, N_TEST, N_CLASSES = 60, 100, 10
images, labels = load_digits(return_X_y=True)
chosen = np.random.default_rng(0).permutation(len(labels))[: N_TRAIN + N_TEST]
images, labels = images[chosen], labels[chosen]
images = (images - images[:N_TRAIN].mean(0)) / images[:N_TRAIN].std()
x = jnp.asarray(images, jnp.float32).reshape(-1, 8, 8)
x_train, x_test = x[:N_TRAIN], x[N_TRAIN:]

# %% [markdown]
# ## The network
#
# A block consists of attention and of a dense network. Each of them stands
# behind a layer normalisation and beside a skip connection. At the end the
# network takes the mean over tokens. `linear_scaling=False` makes it attention
# at $1/\sqrt d$, with separate query and key weights.


# %%
def residual(*layers):
    body = stax.serial(stax.LayerNorm(), *layers)
    return stax.serial(
        stax.FanOut(2), stax.parallel(stax.Identity(), body), stax.FanInSum()
    )


def transformer(width=8, depth=1, **options):
    """Widths, heads among them, matter for finite networks alone."""
    attention = stax.GlobalSelfAttention(
        width,
        n_chan_key=width,
        n_chan_val=width,
        n_heads=width // 4,
        linear_scaling=False,
        W_query_std=1.5,
        pos_emb_type="SUM",
        W_pos_emb_std=0.5,
        **options,
    )
    dense = stax.Dense(width, W_std=2**0.5), stax.Relu(), stax.Dense(width)
    block = stax.serial(residual(attention), residual(*dense))
    ends = stax.LayerNorm(), stax.GlobalAvgPool()
    return stax.serial(stax.Dense(width), *(block,) * depth, *ends)


# %% [markdown]
# ## Classification
#
# The mean of the Gaussian process with each kernel, trained on 60 images,
# classifies 100 others. This checks that the kernel is of use. The dense
# network is better at this task.


# %%
def accuracy(kernel_fn, kind):
    compute = jax.jit(lambda x1, x2: kernel_fn(x1, x2, kind))
    train, test = kernel_fn(x_train, None, kind), compute(x_test, x_train)
    # Above the errors of the estimate.
    ridge = 1e-3 * jnp.trace(train) / N_TRAIN * jnp.eye(N_TRAIN)
    targets = jnp.eye(N_CLASSES)[labels[:N_TRAIN]] - 1 / N_CLASSES
    outputs = test @ jnp.linalg.solve(train + ridge, targets)
    return np.mean(np.argmax(outputs, 1) == labels[N_TRAIN:])


dense = stax.serial(
    stax.Flatten(),
    stax.Dense(1, W_std=2**0.5, b_std=0.1),
    stax.Relu(),
    stax.Dense(1),
)
networks = {
    "fully connected": dense[2],
    "transformer": transformer()[2],
}
for name, kernel_fn in networks.items():
    start = time.perf_counter()
    score = accuracy(kernel_fn, "nngp")
    error = np.sqrt(score * (1 - score) / N_TEST)
    print(
        f"{name:>20}: {score:.2f} +- {error:.2f}, "
        f"{time.perf_counter() - start:.0f} s"
    )

# %% [markdown]
# ## Beside finite transformers
#
# This compares the NNGP of two digits with the mean over 300 networks of each
# width. Channels, heads and keys grow together.

# %%
N_NETWORKS, WIDTHS = 300, (8, 16, 32, 64)
pair = x_train[:1], x_train[1:2]
exact = float(transformer()[2](*pair, "nngp")[0, 0])
estimates = {}
for width in WIDTHS:
    init_fn, apply_fn, _ = transformer(width)

    def one(key, init_fn=init_fn, apply_fn=apply_fn):
        _, params = init_fn(key, pair[0].shape)
        return jnp.mean(apply_fn(params, pair[0]) * apply_fn(params, pair[1]))

    keys = random.split(random.key(width), N_NETWORKS)
    samples = np.asarray(
        jax.jit(lambda keys, one=one: jax.lax.map(one, keys))(keys)
    )
    estimates[width] = samples.mean(), samples.std(ddof=1) / N_NETWORKS**0.5
    mean, error = estimates[width]
    print(f"width {width:3}: {mean:.4f} +- {error:.4f}")
print(f"   infinite: {exact:.4f}")

# %%
figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
means, errors = zip(*estimates.values(), strict=True)
axis.errorbar(
    WIDTHS,
    means,
    2 * np.array(errors),
    fmt="o",
    capsize=3,
    label="finite networks",
)
axis.axhline(exact, color="black", label="infinite width")
axis.set(
    xscale="log",
    xlabel="channels, keys, four times the heads",
    ylabel="NNGP of two digits",
)
axis.set_xticks(WIDTHS, [str(width) for width in WIDTHS])
axis.minorticks_off()
axis.legend(loc="lower right")
plt.show()

# %% [markdown]
# Error bars are two standard errors. Narrow networks deviate by about
# $1/\text{width}$. The widest must agree.

# %%
mean, error = estimates[WIDTHS[-1]]
assert abs(mean - exact) < 5 * error + exact / WIDTHS[-1]

# %% [markdown]
# ## Causal attention
#
# With `causal=True` a token sees itself and the tokens before it. Later tokens
# do not matter. Replace the image from its fifth row on: the kernel of the
# first four rows does not change, up to rounding.


# %%
def of_tokens(causal):
    attention = stax.GlobalSelfAttention(
        8, 8, 8, n_heads=2, linear_scaling=False, W_query_std=1.5, causal=causal
    )
    return stax.serial(stax.Dense(8), stax.LayerNorm(), attention)[2]


another = pair[0].at[:, 4:].set(pair[1][:, 4:])
for causal in (False, True):
    kernel_fn = of_tokens(causal)
    before, after = (
        kernel_fn(x, None, "nngp")[0, 0, :4, :4] for x in (pair[0], another)
    )
    change = float(jnp.max(jnp.abs(after - before)) / jnp.max(before))
    print(
        f"causal={causal}: the kernel of the first four tokens "
        f"changes by {change:.1e}"
    )
assert change < 1e-3
