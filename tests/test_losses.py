"""The cross-entropy, and training in function space with it on empirical kernels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from taylor_softmax import class_kernel, losses, stax
from taylor_softmax._numerics.surrogate import parse

import neural_tangents as nt  # isort: skip

ORDERS = (None, 2, 8)


@pytest.mark.quick(order=2)
@pytest.mark.parametrize("order", ORDERS)
def test_value_and_gradient(order):
    rng = np.random.default_rng(0)
    fx = jnp.asarray(rng.normal(size=(2, 5, 4)) * 3)
    y = jax.nn.softmax(jnp.asarray(rng.normal(size=(2, 5, 4))))
    loss = losses.cross_entropy(order)

    def expected(fx):
        return -jnp.sum(y * jnp.log(parse(order).softmax(fx))) / 10

    assert loss(fx, y) == pytest.approx(float(expected(fx)), rel=1e-13)
    np.testing.assert_allclose(jax.grad(loss)(fx, y), jax.grad(expected)(fx), atol=1e-14)
    probabilities = losses.cross_entropy(probabilities=True)
    p = parse(order).softmax(fx)
    assert probabilities(p, y) == pytest.approx(float(expected(fx)), rel=1e-13)
    # Control: another order is another loss.
    assert abs(losses.cross_entropy(4)(fx, y) - expected(fx)) > 1e-3


@pytest.mark.quick(order=8, dtype=jnp.float32)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("order", ORDERS)
def test_huge_logits(order, dtype):
    """Where probabilities underflow their logarithm does not."""
    loss = losses.cross_entropy(order)
    fx = jnp.array([[1e30, -1e30, 0.0], [2e3, 0.0, -50.0]], dtype)
    y = jax.nn.one_hot(jnp.array([2, 1]), 3, dtype=dtype)
    value, gradient = jax.value_and_grad(loss)(fx, y)
    assert np.isfinite(gradient).all()
    z = np.asarray(fx, np.longdouble)  # holds 1e30 to the power of 8
    if order is None:
        log_f = z
    else:
        f = np.longdouble(1)
        for k in range(order, 0, -1):
            f = 1 + f * z / k
        log_f = np.log(f)
    largest = log_f.max(1, keepdims=True)
    log_sum = np.log(np.exp(log_f - largest).sum(1)) + largest[:, 0]
    assert value == pytest.approx(float(np.mean(log_sum - log_f[[0, 1], [2, 1]])), rel=1e-6)


@pytest.mark.quick(dtype=jnp.float32)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32], ids=["float64", "float32"])
def test_probabilities_beyond_the_simplex(dtype):
    """Continued along the tangent: convex, once differentiable, and pushing back."""
    loss, eps = losses.cross_entropy(probabilities=True), float(jnp.finfo(dtype).eps)
    y = jnp.array([[1.0]], dtype)

    def value(p):
        return float(loss(jnp.array([[p]], dtype), y))

    def slope(p):
        return float(jax.grad(loss)(jnp.array([[p]], dtype), y)[0, 0])

    assert value(0.25) == pytest.approx(np.log(4), rel=1e-6)
    assert value(-eps) == pytest.approx(-np.log(eps) + 2, rel=1e-6)
    assert slope(0.5) == pytest.approx(-2, rel=1e-6)
    assert slope(0.0) == slope(-1.0) == pytest.approx(-1 / eps, rel=1e-6)
    slopes = [slope(p) for p in (-1.0, -eps, 0.0, 1.5 * eps, 1e-3, 0.5, 2.0)]
    assert slopes == sorted(slopes)


@pytest.mark.quick(order=2, margin=0.3)
@pytest.mark.parametrize("order", [None, 2, 8])
@pytest.mark.parametrize("margin", [0.0, 0.3, 5.0])
def test_margin(order, margin):
    """Banerjee et al. 2020: the target's logit is taken `margin` smaller, and that alone."""
    z = np.array([[0.3, -1.2, 2.0, 0.1], [30.0, -2.0, 0.5, 1.0], [1.0, 1.0, 1.0, 1.0]])
    log_f = np.asarray(parse(order).log_value(jnp.asarray(z)))
    shifted = np.asarray(parse(order).log_value(jnp.asarray(z - margin)))
    for target in range(4):
        others = np.where(np.arange(4) == target, shifted, log_f)
        want = -(shifted[:, target] - np.log(np.sum(np.exp(others), 1)))
        y = jnp.broadcast_to(jax.nn.one_hot(target, 4), z.shape)
        got = [
            losses.cross_entropy(order, margin=margin)(jnp.asarray(a[None]), b[None])
            for a, b in zip(z, y, strict=True)
        ]
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)
    if margin:
        # Negative control: it is not the loss without.
        plain = losses.cross_entropy(order)(jnp.asarray(z), y)
        assert abs(losses.cross_entropy(order, margin=margin)(jnp.asarray(z), y) - plain) > 0.01


@pytest.mark.quick(order=8)
@pytest.mark.parametrize("order", [None, 8])
def test_gradients_with_a_margin(order):
    loss = losses.cross_entropy(order, margin=0.5)
    z = jnp.asarray([[0.3, -jnp.inf, 1e4, 0.1], [-jnp.inf, -jnp.inf, 0.0, -jnp.inf]])
    y = jnp.asarray([[1.0, 0, 0, 0], [0, 0, 1.0, 0]])
    value, gradient = jax.value_and_grad(loss)(z, y)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    z = jnp.asarray([[0.3, -0.4, 1.1, 0.1]])
    gradient = jax.grad(loss)(z, y[:1])
    for i in range(4):
        ends = [loss(z.at[0, i].add(s * 1e-5), y[:1]) for s in (1, -1)]
        np.testing.assert_allclose(gradient[0, i], (ends[0] - ends[1]) / 2e-5, rtol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"order": 3}, ValueError, "`order`.*3"),
        ({"order": "2"}, TypeError, "`order`.*'2'"),
        ({"order": 2, "probabilities": True}, ValueError, "`order`.*got 2"),
        ({"margin": 0.5, "probabilities": True}, ValueError, "`margin`.*got 0.5"),
        ({"margin": -1.0}, ValueError, "`margin`.*-1.0"),
        ({"margin": float("inf")}, ValueError, "`margin`.*inf"),
        ({"margin": "1"}, TypeError, "`margin`.*'1'"),
        ({"probabilities": "no"}, TypeError, "`probabilities`.*'no'"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        losses.cross_entropy(**arguments)


@pytest.mark.quick
def test_targets_have_the_shape_of_outputs():
    with pytest.raises(ValueError, match=r"`y`.*\(5, 3\).*\(5,\).*one_hot"):
        losses.cross_entropy()(jnp.zeros((5, 3)), jnp.zeros(5))


# Training in function space

N_CLASSES = 3
X_TRAIN, X_TEST = random.normal(random.key(0), (6, 4)), random.normal(random.key(1), (5, 4))
Y_TRAIN = jax.nn.one_hot(jnp.arange(6) % N_CLASSES, N_CLASSES)
BODY = (stax.Dense(64), stax.Relu(), stax.Dense(N_CLASSES))

# (last layer, order of the loss, whether outputs are probabilities)
NETWORKS = {
    "logits": (None, None, False),
    "logits, order 2": (None, 2, False),
    "Softmax": (stax.Softmax(), None, True),
    "TaylorSoftmax": (stax.TaylorSoftmax(order=2), None, True),
}


def network(name):
    last, order, probabilities = NETWORKS[name]
    layers = BODY if last is None else (*BODY, last)
    return *stax.serial(*layers)[:2], losses.cross_entropy(order, probabilities=probabilities)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_descent_on_an_empirical_kernel(name):
    """The linearised network's own gradient descent, in the space of its parameters."""
    init_fn, apply_fn, loss = network(name)
    _, params = init_fn(random.key(2), X_TRAIN.shape)
    ntk_fn = nt.empirical_ntk_fn(apply_fn, trace_axes=(), vmap_axes=0)
    k_train_train, k_test_train = ntk_fn(X_TRAIN, None, params), ntk_fn(X_TEST, X_TRAIN, params)
    predict_fn = nt.predict.gradient_descent(loss, k_train_train, Y_TRAIN, trace_axes=())
    fx_train, fx_test = apply_fn(params, X_TRAIN), apply_fn(params, X_TEST)
    time, steps = 1.0, 400
    got: Any = predict_fn(time, fx_train, fx_test, k_test_train)

    linear = nt.linearize(apply_fn, params)

    @jax.jit
    def step(p):
        # Heun's method for the gradient flow.
        flow = jax.grad(lambda p: loss(linear(p, X_TRAIN), Y_TRAIN))
        h, first = time / steps, flow(p)
        second = flow(jax.tree.map(lambda x, g: x - h * g, p, first))
        return jax.tree.map(lambda x, g, k: x - h / 2 * (g + k), p, first, second)

    trained = params
    for _ in range(steps):
        trained = step(trained)
    np.testing.assert_allclose(got[0], linear(trained, X_TRAIN), atol=2e-5)
    np.testing.assert_allclose(got[1], linear(trained, X_TEST), atol=2e-5)
    assert loss(got[0], Y_TRAIN) < loss(fx_train, Y_TRAIN) - 0.01
    if NETWORKS[name][2]:
        np.testing.assert_allclose(jnp.sum(got[0], -1), 1, atol=1e-5)


def test_empirical_kernels_average_to_the_analytic_ones():
    """`nt.monte_carlo_kernel_fn` class by class, `trace_axes=()`, against `class_kernel`."""
    layers = (stax.Dense(256, W_std=1.5), stax.Relu(), stax.Dense(N_CLASSES, W_std=1.5))
    init_fn, apply_fn, kernel_fn = stax.serial(*layers, stax.TaylorSoftmax(order=2))
    x1, x2 = X_TRAIN[:2], X_TEST[:3]
    exact = class_kernel(kernel_fn(x1, x2))
    # Means of the first 40, 80, ... samples, of which those of every 40 follow.
    counts = np.arange(40, 1601, 40)
    running = nt.monte_carlo_kernel_fn(
        init_fn,
        apply_fn,
        random.key(3),
        counts.tolist(),
        trace_axes=(),
        vmap_axes=0,
        device_count=0,
    )(x1, x2)
    running = list(running)
    for name in ("nngp", "ntk"):
        means = np.stack([np.asarray(getattr(kernel, name)) for kernel in running])
        sums = means * counts[:, None, None, None, None]
        samples = np.diff(sums, axis=0, prepend=0) / 40
        assert samples.shape[1:] == (2, 3, N_CLASSES, N_CLASSES)
        stderr = samples.std(0, ddof=1) / np.sqrt(len(counts))
        difference = samples.mean(0) - np.asarray(getattr(exact, name))
        # Student's t with 39 degrees of freedom: 5e-7 each beyond 6. The entries are correlated:
        # at widths 256 and 1024 with three seeds each their mean square came out at 0.3 to 3.2,
        # and with the control's quarter more at 23 and above.
        assert np.max(np.abs(difference / stderr)) < 6
        assert np.mean((difference / stderr) ** 2) < 4
        assert np.mean(((difference + 0.25 * samples.mean(0)) / stderr) ** 2) > 12


@pytest.mark.quick
def test_axes_of_empirical_kernels():
    """`diagonal_axes` gives the same-class entries, the default their mean over classes."""
    init_fn, apply_fn, _ = network("Softmax")
    _, params = init_fn(random.key(4), X_TRAIN.shape)
    full, diagonal, traced = (
        nt.empirical_kernel_fn(apply_fn, vmap_axes=0, **axes)(X_TEST, X_TRAIN, None, params)
        for axes in ({"trace_axes": ()}, {"trace_axes": (), "diagonal_axes": (-1,)}, {})
    )
    for name in ("nngp", "ntk"):
        matrix = np.asarray(getattr(full, name))
        assert matrix.shape == (5, 6, N_CLASSES, N_CLASSES)
        same_class = np.diagonal(matrix, axis1=2, axis2=3)
        np.testing.assert_allclose(getattr(diagonal, name), same_class, atol=1e-12)
        np.testing.assert_allclose(getattr(traced, name), same_class.mean(-1), atol=1e-12)
    # Outputs sum to 1, so gradients sum to 0.
    np.testing.assert_allclose(full.ntk.sum(-1), 0, atol=1e-12)
