# %% [markdown]
# # Hyperparameters by the evidence
#
# How large should the scales of weights and biases be, and how many layers
# should there be? The evidence `log p(y)` answers that without held-out labels.
# This notebook maximises it by hand, for each of three depths, and shows it
# beside the likelihood of held-out labels. At the end
# `InfiniteNetworkClassifier` does the same in three lines.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import scipy.optimize

from taylor_softmax import nt, predict, stax
from taylor_softmax.sklearn import InfiniteNetworkClassifier

jax.config.update("jax_enable_x64", True)

N_CLASSES, N_TRAIN, N_TEST = 3, 75, 600


def spirals(n, seed):
    """Points on three arms, `(n, 2)`, and their arms, a tenth of them wrong."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(N_CLASSES, size=n)
    radius = rng.uniform(0.15, 1, n)
    angle = (
        2 * np.pi * labels / N_CLASSES + 3.5 * radius + 0.3 * rng.normal(size=n)
    )
    labels = np.where(
        rng.random(n) < 0.1, rng.integers(N_CLASSES, size=n), labels
    )
    return jnp.asarray(
        1.5 * radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    ), labels


x_train, y_train = spirals(N_TRAIN, 0)
x_test, y_test = spirals(N_TEST, 1)


def body(n_classes, W_std, b_std, last_W_std, depth=1):
    """The network up to its logits."""
    hidden = (stax.Dense(512, W_std, b_std), stax.Relu()) * depth
    return stax.serial(*hidden, stax.Dense(n_classes, last_W_std))


def scores(p):
    """Accuracy and negative log-likelihood, with its standard error."""
    nll = -np.log(np.asarray(p)[np.arange(N_TEST), y_test])
    accuracy = np.mean(np.argmax(p, 1) == y_test)
    return accuracy, nll.mean(), nll.std() / N_TEST**0.5


# %% [markdown]
# ## The evidence and its gradient
#
# `categorical_log_evidence` is a function to differentiate in whatever the
# kernel depends on. The optimizer works on logarithms: scales are positive, and
# their effect is relative.

# %%
START = {"W_std": 2**0.5, "b_std": 0.3, "last_W_std": 5.0}


def network(values, depth):
    return body(N_CLASSES, **dict(zip(START, values, strict=True)), depth=depth)


def loss(logarithms, depth):
    kernel_fn = network(jnp.exp(logarithms), depth)[2]
    return -predict.categorical_log_evidence(
        kernel_fn(x_train, None, "nngp"), y_train, n_classes=N_CLASSES, tol=1e-3
    )


value_and_slopes = jax.jit(jax.value_and_grad(loss), static_argnums=1)


def inferred(logarithms, depth):
    """Kernel function, posterior, and class probabilities of test points."""
    kernel_fn = network(np.exp(logarithms), depth)[2]
    k_train = kernel_fn(x_train, None, "nngp")
    posterior = predict.categorical_inference(
        k_train, y_train, n_classes=N_CLASSES, tol=1e-3, max_iterations=300
    )
    k_test = kernel_fn(x_test, None, "nngp")
    p = posterior(kernel_fn(x_test, x_train, "nngp"), k_test).probabilities
    return kernel_fn, posterior, p


found, results = {}, {}
for depth in (1, 2, 3):
    found[depth] = scipy.optimize.minimize(
        lambda at, depth=depth: tuple(
            map(np.asarray, value_and_slopes(at, depth))
        ),
        np.log(list(START.values())),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 15, "ftol": 1e-4},
    )
    results[depth] = inferred(found[depth].x, depth)
    _, nll, error = scores(results[depth][2])
    values = np.exp(found[depth].x)
    at = ", ".join(f"{n} {v:.2f}" for n, v in zip(START, values, strict=True))
    print(f"depth {depth}: log evidence {-found[depth].fun:.2f} at {at};")
    print(f"         held-out NLL {nll:.3f} +- {error:.3f}")
depth = max(found, key=lambda each: -found[each].fun)
best = found[depth].x

# %% [markdown]
# ## Evidence and held-out likelihood side by side
#
# Start from the best network, and change one hyperparameter at a time by a
# factor.

# %%
FACTORS = np.geomspace(1 / 2, 2, 5)
figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
curves = {}
for i, name in enumerate(START):
    rows = []
    for factor in FACTORS:
        moved = best + np.log(factor) * np.eye(3)[i]
        _, posterior, p = inferred(moved, depth)
        rows.append([float(posterior.log_evidence), *scores(p)[1:]])
    evidence, nll, error = np.transpose(rows)
    axes[0].plot(FACTORS, evidence, "o-", label=name)
    axes[1].errorbar(FACTORS, nll, error, fmt="o-", capsize=3)
    curves[name] = evidence, nll
axes[0].set(title="Bound of the log evidence", xlabel="factor", ylabel="nats")
axes[1].set(title="Held-out labels", xlabel="factor", ylabel="NLL, nats")
for axis in axes:
    axis.set_xscale("log")
    axis.set_xticks(FACTORS, [f"{factor:.2g}" for factor in FACTORS])
    axis.minorticks_off()
axes[0].legend()
plt.show()

# %% [markdown]
# The evidence saw the training labels alone. Bars are standard errors over the
# test points.
#
# ## What the posterior says
#
# Probabilities are exact expectations over the logits' posterior, and not the
# softmax of a mean. They come with a covariance, which says how sure the
# posterior is of them.

# %%
kernel_fn, posterior, p_test = results[depth]
side = np.linspace(-2.2, 2.2, 45)
grid = jnp.asarray(np.stack(np.meshgrid(side, side), -1).reshape(-1, 2))
prior = jax.vmap(lambda point: kernel_fn(point[None], None, "nngp")[0, 0])(grid)
classes = posterior(kernel_fn(grid, x_train, "nngp"), prior, covariance=True)
spread = jnp.sqrt(jnp.trace(classes.covariance, axis1=1, axis2=2))

figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
shape, extent = (45, 45), (-2.2, 2.2, -2.2, 2.2)
colours = np.asarray(classes.probabilities).reshape(*shape, N_CLASSES)
axes[0].imshow(colours, origin="lower", extent=extent)
axes[0].set(title="class probabilities, as red, green, blue")
shown = axes[1].imshow(
    np.asarray(spread).reshape(shape),
    origin="lower",
    extent=extent,
    cmap="viridis",
)
axes[1].set(title="standard deviation of the probabilities")
figure.colorbar(shown, ax=axes[1])
for axis in axes:
    for label, marker in enumerate("os^"):
        arm = x_train[y_train == label]
        axis.plot(
            arm[:, 0], arm[:, 1], marker, color="white", mec="black", ms=5
        )
plt.show()

# %% [markdown]
# ## Beside least squares
#
# Least squares takes one linear solve and no iteration. But the scale of its
# targets decides how sure it is of itself, and somebody has to choose that
# scale.

# %%
accuracy, nll, error = scores(p_test)
print(
    f"     categorical inference: accuracy {accuracy:.3f}, "
    f"NLL {nll:.3f} +- {error:.3f}"
)
for scale in (1.0, 4.0, 16.0):
    targets = scale * (jnp.eye(N_CLASSES)[y_train] - 1 / N_CLASSES)
    predict_fn = nt.predict.gradient_descent_mse_ensemble(
        kernel_fn, x_train, targets, diag_reg=1e-2
    )
    gaussian = predict_fn(x_test=x_test, get="nngp", compute_cov=True)
    accuracy, nll, error = scores(
        predict.class_posterior(gaussian).probabilities
    )
    print(
        f"least squares, targets {scale:3g}: accuracy {accuracy:.3f}, "
        f"NLL {nll:.3f} +- {error:.3f}"
    )

# %% [markdown]
# ## With scikit-learn's contract
#
# The classifier does all of that for a network with any hyperparameters. It
# needs a start for each of them. With `inference="least_squares"`, its default,
# it also chooses the noise of the regression by the evidence, and its scale by
# the leave-one-out likelihood.

# %%
fitted = {}
for inference in ("categorical", "least_squares"):
    classifier = InfiniteNetworkClassifier(
        functools.partial(body, depth=depth),
        hyperparameters=START,
        inference=inference,
    )
    fitted[inference] = classifier.fit(x_train, y_train)
    accuracy, nll, error = scores(classifier.predict_proba(x_test))
    print(
        f"{inference}: log evidence {classifier.log_evidence_:.2f}, "
        f"accuracy {accuracy:.3f}, NLL {nll:.3f} +- {error:.3f}"
    )

# %%
assert posterior.converged
assert abs(fitted["categorical"].log_evidence_ + found[depth].fun) < 1
evidence, nll = curves["last_W_std"]
assert np.argmax(evidence) == len(FACTORS) // 2
assert nll[np.argmax(evidence)] < nll.min() + 0.05
np.testing.assert_allclose(classes.probabilities.sum(1), 1.0, rtol=1e-6)
