"""Networks of flax and equinox that end in a Taylor softmax, in the tools of neural-tangents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from jax.flatten_util import ravel_pytree

from taylor_softmax import losses, nn, nt

ORDER, N_CLASSES = 4, 3
X = random.normal(random.key(0), (6, 5))
Y = jnp.eye(N_CLASSES)[jnp.arange(6) % N_CLASSES]


def flax_network():
    linen = pytest.importorskip("flax.linen")
    first, last = (linen.Dense(n, param_dtype=X.dtype) for n in (16, N_CLASSES))
    network = linen.Sequential([first, linen.tanh, last])
    return network.apply, network.init(random.key(1), X)


def equinox_network():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(X.shape[1], N_CLASSES, 16, 1, key=random.key(1))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return lambda params, x: jax.vmap(eqx.combine(params, static))(x), params


@pytest.fixture(params=[flax_network, equinox_network], ids=["flax", "equinox"])
def network(request):
    """Logits as a function of parameters and inputs, and parameters."""
    return request.param()


@pytest.mark.quick
def test_empirical_kernel_is_that_of_the_jacobian(network):
    logits, params = network

    def apply_fn(params, x):
        return nn.taylor_softmax(logits(params, x), ORDER)

    kernel = nt.empirical_ntk_fn(apply_fn, trace_axes=())(X, None, params)
    flat, unravel = ravel_pytree(params)
    jacobian = jax.jacobian(lambda flat: apply_fn(unravel(flat), X))(flat)
    want = jnp.einsum("aip,bjp->abij", jacobian, jacobian)
    np.testing.assert_allclose(kernel, want, rtol=1e-8, atol=1e-10)
    # Probabilities sum to 1 whatever the parameters.
    np.testing.assert_allclose(kernel.sum(-1), 0, atol=1e-10)
    other = nt.empirical_ntk_fn(logits, trace_axes=())(X, None, params)
    assert np.max(np.abs(other.sum(-1))) > 1e-2, "negative control"


@pytest.mark.parametrize("ends_in_softmax", [True, False])
def test_gradient_descent_is_that_of_the_linearised_network(network, ends_in_softmax):
    """Small steps of gradient descent on the network linearised in its parameters."""
    logits, params = network

    def apply_fn(params, x):
        return nn.taylor_softmax(logits(params, x), ORDER) if ends_in_softmax else logits(params, x)

    loss = losses.cross_entropy(None if ends_in_softmax else ORDER, probabilities=ends_in_softmax)
    kernel = nt.empirical_ntk_fn(apply_fn, trace_axes=())(X, None, params)
    start, time, n_steps = apply_fn(params, X), 2.0, 4000
    end = nt.predict.gradient_descent(loss, kernel, Y, trace_axes=())(time, start)

    linear = nt.linearize(apply_fn, params)

    def step(params, _):
        gradient = jax.grad(lambda p: loss(linear(p, X), Y))(params)
        return jax.tree.map(lambda p, g: p - time / n_steps * g, params, gradient), None

    trained, _ = jax.lax.scan(step, params, length=n_steps)
    np.testing.assert_allclose(end, linear(trained, X), atol=1e-3 * np.max(np.abs(end - start)))
    assert np.max(np.abs(end - start)) > 0.05
