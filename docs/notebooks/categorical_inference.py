# %% [markdown]
# # Classification with categorical inference
#
# Labels have the probabilities `softmax(z)`, logits `z` the Gaussian-process
# prior of an infinitely wide network. `predict.categorical_inference` gives the
# posterior that they define and a bound on its evidence, by which a scale or a
# depth can be chosen without held-out labels. Beside it stands the quicker way:
# least squares on the logits, whose Gaussian posterior `class_posterior` pushes
# through softmax.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from taylor_softmax import nt, predict, stax

jax.config.update("jax_enable_x64", True)

N_CLASSES, N_TRAIN, N_TEST = 3, 75, 600


def spirals(n, seed):
    """Three arms, `(n, 2)`, and which arm, one time in ten wrongly."""
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


def body(depth, variance):
    """The network up to its logits; the last weights have that variance."""
    hidden = (stax.Dense(512, W_std=2**0.5, b_std=0.3), stax.Relu()) * depth
    return stax.serial(*hidden, stax.Dense(N_CLASSES, W_std=variance**0.5))


def scores(p):
    """Accuracy and negative log-likelihood, with its standard error."""
    nll = -np.log(np.asarray(p)[np.arange(N_TEST), y_test])
    accuracy = np.mean(np.argmax(p, 1) == y_test)
    return accuracy, nll.mean(), nll.std() / N_TEST**0.5


# %% [markdown]
# ## Evidence picks the network

# %%
DEPTHS, VARIANCES = (1, 3), (1.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
posteriors, rows = {}, {}
for depth in DEPTHS:
    posterior = None
    for variance in VARIANCES:
        kernel_fn = body(depth, variance)[2]
        k_train = kernel_fn(x_train, None, "nngp")
        # From one variance to the next the posterior changes little: a good
        # start.
        posterior = predict.categorical_inference(
            k_train, y_train, n_classes=N_CLASSES, tol=1e-3, init=posterior
        )
        k_cross = kernel_fn(x_test, x_train, "nngp")
        p = posterior(k_cross, kernel_fn(x_test, None, "nngp")).probabilities
        posteriors[depth, variance] = posterior
        rows[depth, variance] = float(posterior.log_evidence), *scores(p)
        evidence, accuracy, nll, _ = rows[depth, variance]
        print(
            f"depth {depth}, variance {variance:5g}: "
            f"log evidence {evidence:7.2f}, accuracy {accuracy:.3f}, "
            f"NLL {nll:.3f}"
        )
best = max(rows, key=lambda key: rows[key][0])
print("highest evidence: depth {}, variance {:g}".format(*best))

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for i, depth in enumerate(DEPTHS):
    evidence, _, nll, error = np.array([rows[depth, v] for v in VARIANCES]).T
    axes[0].semilogx(
        VARIANCES, evidence, "o-", color=f"C{i}", label=f"depth {depth}"
    )
    axes[1].errorbar(VARIANCES, nll, error, fmt="o-", capsize=3, color=f"C{i}")
axes[0].set(
    title="Bound on the log evidence",
    xlabel="variance of the last weights",
    ylabel="nats",
)
axes[1].set(
    title="Held-out labels",
    xlabel="variance of the last weights",
    ylabel="NLL, nats",
    xscale="log",
)
axes[0].legend()
plt.show()

# %% [markdown]
# The evidence saw the training labels alone. Bars are standard errors over the
# test points.
#
# ## What the posterior says
#
# Probabilities are exact expectations over the logits' posterior, not the
# softmax of a mean; they come with a covariance, which says how sure the
# posterior is of them.

# %%
kernel_fn, posterior = body(*best)[2], posteriors[best]
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
# One linear solve, and no iteration; but how sure it is of itself is set by the
# scale of its targets, which somebody has to choose.

# %%
accuracy, nll, error = scores(
    posterior(
        kernel_fn(x_test, x_train, "nngp"), kernel_fn(x_test, None, "nngp")
    ).probabilities
)
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

# %%
assert posterior.converged
assert rows[best][1] > 0.8
np.testing.assert_allclose(classes.probabilities.sum(1), 1.0, rtol=1e-6)
