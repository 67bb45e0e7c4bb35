# %% [markdown]
# # A softmax at the end of an infinite network
#
# This notebook compares the kernels of an infinitely wide network that ends in
# softmax with averages over finite networks. Inputs lie on a half circle, so a
# kernel is a function of one angle.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax import random

import taylor_softmax
from taylor_softmax import nt, stax

N_CLASSES = 10
angles = np.linspace(0, np.pi, 13)
x = jnp.sqrt(2.0) * jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
x0 = x[:1]  # angle 0, with which all others are compared


def body(width):
    """The network up to its logits."""
    return stax.serial(
        stax.Dense(width, W_std=2**0.5),
        stax.Relu(),
        stax.Dense(width, W_std=1.5),
        stax.Erf(),
        stax.Dense(N_CLASSES, W_std=2.0),
    )


# %% [markdown]
# ## The kernel
#
# `stax.Softmax()` is a layer like any other. `kernel.nngp` is the second moment
# $E[y_i(x_1)\, y_i(x_2)]$ of one class's output over initialisations,
# `kernel.ntk` is that of its gradients. All classes have the same.

# %%
layers = {
    "Softmax": stax.Softmax(),
    "TaylorSoftmax(2)": stax.TaylorSoftmax(order=2),
    "TaylorSoftmax(8)": stax.TaylorSoftmax(order=8),
}
kernels = {}
for name, layer in layers.items():
    _, _, kernel_fn = stax.serial(body(256), layer)
    kernels[name] = kernel_fn(x0, x)
logits = body(256)[2](x0, x)
print(f"variance of the logits: {float(logits.cov2[0]):.2f}")
print("nngp:", np.round(np.asarray(kernels["Softmax"].nngp[0, ::3]), 5))

# %% [markdown]
# Where logits are uncorrelated, the second moment is $1/n^2 = 0.01$. What a
# network says of its inputs is the part beyond that.
#
# ## Finite networks
#
# Now initialise 400 networks of width 256. Average their outputs and gradients
# over classes; for the NTK `trace_axes=(-1,)` does that. The means over
# networks have standard errors.

# %%
WIDTH, N_NETWORKS = 256, 400


def sample(layer, key):
    init_fn, apply_fn, _ = stax.serial(body(WIDTH), layer)
    ntk_fn = nt.empirical_ntk_fn(apply_fn, trace_axes=(-1,), vmap_axes=0)

    def one(key):
        _, params = init_fn(key, x.shape)
        outputs = apply_fn(params, x)
        return outputs @ outputs[0] / N_CLASSES, ntk_fn(x0, x, params)[0]

    samples = jax.jit(lambda keys: jax.lax.map(one, keys))(
        random.split(key, N_NETWORKS)
    )
    return [
        (np.mean(s, 0), np.std(s, 0, ddof=1) / N_NETWORKS**0.5)
        for s in map(np.asarray, samples)
    ]


sampled = {
    name: sample(layers[name], random.key(i))
    for i, name in enumerate(("Softmax", "TaylorSoftmax(2)"))
}

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for panel, (kind, title) in enumerate((("nngp", "NNGP"), ("ntk", "NTK"))):
    for i, (name, kernel) in enumerate(kernels.items()):
        style = "-" if name in sampled else "--"
        axes[panel].plot(
            angles, getattr(kernel, kind)[0], style, color=f"C{i}", label=name
        )
        if name in sampled:
            mean, error = sampled[name][panel]
            axes[panel].errorbar(
                angles, mean, 2 * error, fmt="o", ms=4, capsize=2, color=f"C{i}"
            )
    axes[panel].set(title=title, xlabel="angle between the inputs")
axes[0].set(ylabel="one class with itself")
axes[0].legend()
plt.show()

# %% [markdown]
# Lines are infinitely wide networks. Points are finite ones, with two standard
# errors. At this variance order 2 differs from softmax, and order 8 hardly
# does.
#
# Here is the same as numbers. `z` is a deviation in standard errors. At width
# 256 a deviation of the order of $1/256$ is left.

# %%
for name, estimates in sampled.items():
    for kind, (mean, error) in zip(("nngp", "ntk"), estimates, strict=True):
        exact = np.asarray(getattr(kernels[name], kind)[0])
        deviation = np.abs(mean - exact) / exact.max()
        scores = np.abs(mean - exact) / error
        print(
            f"{name:>16} {kind:>4}: {deviation.max():.4f} of the largest, "
            f"{scores.max():.1f} z"
        )
        assert np.all(np.abs(mean - exact) < 5 * error + exact.max() / WIDTH)

# %% [markdown]
# ## All pairs of classes
#
# Outputs sum to 1, so different classes covary. `class_kernel` gives every pair
# of classes, as an array of shape `(inputs, inputs, classes, classes)`. It is
# the average of `nt.empirical_ntk_fn(apply_fn, trace_axes=())` over networks.

# %%
classes = taylor_softmax.class_kernel(kernels["Softmax"])
print(classes.nngp.shape)
print(
    "same class, another:", classes.nngp[0, 3, 0, 0], classes.nngp[0, 3, 0, 1]
)
np.testing.assert_allclose(classes.nngp.sum((-1, -2)), 1.0, rtol=1e-4)
np.testing.assert_allclose(classes.ntk.sum(-1), 0.0, atol=1e-4)
