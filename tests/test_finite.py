"""Which layers may stand before and behind a softmax over finitely many classes."""

import jax
import neural_tangents as nt
import numpy as np
import pytest
from jax import random

import taylor_softmax
from taylor_softmax import stax

X = random.normal(random.key(0), (3, 5))
IMAGES = random.normal(random.key(1), (2, 4, 4, 3))
SOFTMAX = stax.serial(stax.Dense(16), stax.Relu(), stax.Dense(4, W_std=2.0), stax.Softmax())
MAPS = stax.serial(stax.Conv(16, (1, 1)), stax.Relu(), stax.Conv(4, (1, 1)), stax.Softmax())


@pytest.mark.quick(between=())
@pytest.mark.filterwarnings("ignore:`FanIn` layers assume independent inputs")
@pytest.mark.parametrize(
    "last", [stax.Relu(), stax.Erf(), stax.Softmax(), stax.LayerNorm()], ids=lambda x: x[0].__name__
)
@pytest.mark.parametrize("between", [(), (stax.FanOut(2), stax.FanInConcat())], ids=len)
def test_nothing_nonlinear_behind_a_dense_layer_over_classes(last, between):
    *_, kernel_fn = stax.serial(SOFTMAX, *between, stax.Dense(8), last)
    with pytest.raises(NotImplementedError, match=r"mixture of Gaussians.*`infinite_width=True`"):
        kernel_fn(X, None)


@pytest.mark.quick
def test_layers_of_neural_tangents_itself_are_refused_too():
    with pytest.raises(NotImplementedError, match="mixture of Gaussians"):
        nt.stax.serial(SOFTMAX, nt.stax.Dense(8), nt.stax.Relu())[2](X, None)
    # In a compiled function, and in parts.
    *_, kernel_fn = stax.serial(SOFTMAX, stax.Dense(8))
    kernel = jax.jit(lambda x: kernel_fn(x, None))(X)
    with pytest.raises(NotImplementedError, match="mixture of Gaussians"):
        nt.stax.Erf()[2](kernel)


@pytest.mark.quick
def test_the_second_moment_behind_linear_layers_is_right():
    """And a nonlinearity's would not be: what is refused is off by far more than the noise."""
    init_fn, apply_fn, kernel_fn = stax.serial(
        stax.Dense(1024), stax.Relu(), stax.Dense(10, W_std=3.0), stax.Softmax(), stax.Dense(512)
    )
    kernel = kernel_fn(X, None)

    def sample(key):
        _, params = init_fn(key, X.shape)
        y = apply_fn(params, X)
        return y @ y.T / y.shape[1], jax.nn.relu(y) ** 2 @ jax.nn.relu(y).T ** 2 / y.shape[1]

    linear, fourth = jax.lax.map(jax.jit(sample), random.split(random.key(2), 1000))
    stderr = np.std(linear, 0) / np.sqrt(len(linear))
    # Width 1024 leaves a bias of order 1/width.
    assert np.all(np.abs(np.mean(linear, 0) - kernel.nngp) < 4.5 * stderr + 3e-3 * kernel.nngp)
    # Negative control: of a Gaussian of this variance, the mean of relu(y)^4 is 3/2 variance^2.
    variance = np.diagonal(kernel.nngp)
    measured = np.diagonal(np.mean(fourth, 0))
    noise = np.diagonal(np.std(fourth, 0)) / np.sqrt(len(fourth))
    assert np.all((measured - 1.5 * variance**2) / noise > 4)


@pytest.mark.quick
def test_no_normalisation_over_the_logits():
    dense = stax.Dense(4)
    with pytest.raises(NotImplementedError, match=r"normalises over channels .* over 4 of them"):
        stax.serial(dense, stax.LayerNorm(), stax.Softmax())[2](X, None)
    for network in (
        (stax.LayerNorm(), dense, stax.Softmax()),
        (stax.LayerNorm(), stax.Softmax(infinite_width=True)),
    ):
        kernel = stax.serial(stax.Dense(8), *network)[2](X, None)
        assert np.all(np.isfinite(kernel.ntk))


@pytest.mark.quick
@pytest.mark.parametrize(
    "network",
    {
        "infinite width": (stax.Dense(8), stax.Softmax(infinite_width=True)),
        "Relu": (stax.Dense(8), stax.Relu()),
        "logits": (stax.Dense(8),),
        "Dense": (SOFTMAX, stax.Dense(4)),
        "Dropout": (SOFTMAX, stax.Dropout(0.5)),
    }.values(),
)
def test_class_kernel_refuses(network):
    *_, kernel_fn = stax.serial(*network)
    with pytest.raises(ValueError, match=r"`kernel` (is not that of classes|has a softmax over 4)"):
        taylor_softmax.class_kernel(kernel_fn(X, None))


@pytest.mark.quick
@pytest.mark.parametrize(
    "last",
    [stax.Flatten(), stax.GlobalSumPool(), stax.SumPool((2, 2)), stax.AvgPool((2, 2))],
    ids=lambda x: x[0].__name__,
)
def test_class_kernel_refuses_what_mixes_classes_or_changes_their_sum(last):
    *_, kernel_fn = stax.serial(MAPS, last)
    with pytest.raises(ValueError, match="has a softmax over 4 classes, but not at its end"):
        taylor_softmax.class_kernel(kernel_fn(IMAGES, None))
    over_positions = stax.serial(stax.Conv(4, (1, 1)), stax.Softmax(axis=(1, 2)))
    with pytest.raises(ValueError, match="is not that of classes"):
        taylor_softmax.class_kernel(over_positions[2](IMAGES, None))


def test_class_kernel_of_a_batched_network():
    whole, parts = (
        taylor_softmax.class_kernel(kernel_fn(X, None))
        for kernel_fn in (SOFTMAX[2], nt.batch(SOFTMAX[2], batch_size=1, device_count=1))
    )
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.quick
def test_class_kernel_behind_what_leaves_the_classes():
    for last in (stax.GlobalAvgPool(), stax.Identity()):
        *_, kernel_fn = stax.serial(MAPS, last)
        classes = taylor_softmax.class_kernel(kernel_fn(IMAGES, None))
        np.testing.assert_allclose(classes.nngp.sum((-1, -2)), 1, rtol=1e-9)
        np.testing.assert_allclose(classes.ntk.sum((-1, -2)), 0, atol=1e-9)
    *_, kernel_fn = stax.serial(
        SOFTMAX, stax.FanOut(2), stax.parallel(stax.Identity(), stax.Identity())
    )
    one, two = kernel_fn(X, None)
    np.testing.assert_array_equal(
        taylor_softmax.class_kernel(one).nngp, taylor_softmax.class_kernel(two).nngp
    )
