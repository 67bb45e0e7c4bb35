"""Log-softmax over classes: moments against quadrature and sampling, and the layer."""

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
import pytest
import scipy.special
from jax import random

import taylor_softmax
from taylor_softmax import predict, stax
from taylor_softmax._class_axis.covariance import Pairs
from taylor_softmax._log_softmax import moments
from taylor_softmax._probabilities.log_normalizer import of_equal_logits

X = random.normal(random.key(0), (4, 5))
IMAGES = random.normal(random.key(1), (2, 4, 3, 2))
# Variances and covariance, moderate and large.
NEAR = [(1.0, 0.5, 1.0), (1.0, 1.0, 1.0), (1.0, -1.0, 1.0), (4.0, 3.9, 4.0), (4.0, -2.0, 1.0)]
FAR = [(100.0, 95.0, 100.0), (100.0, 100.0, 100.0), (100.0, -60.0, 50.0), (1e4, 9.9e3, 1e4)]


def of_two_classes(a, c, b):
    """Moments by a fine rule in `d = z_2 - z_1 ~ N(0, 2 a)`, of which `l_1 = -log(1 + exp d)`."""
    one, two, correlation = np.sqrt(2 * a), np.sqrt(2 * b), c / np.sqrt(a * b)
    rest = np.sqrt(max(1 - correlation**2, 0))
    step = min(0.1, 0.3 / max(one, two))
    x = np.arange(-8.5, 8.5, step)
    weight = np.exp(-(x**2) / 2) / np.sum(np.exp(-(x**2) / 2))
    same = cross = factor = 0.0
    for each, w in zip(x, weight, strict=True):
        d1, d2 = one * each, two * (correlation * each + rest * x)
        l1 = w * np.logaddexp(0, d1)
        same += l1 * (weight @ np.logaddexp(0, d2))
        cross += l1 * (weight @ np.logaddexp(0, -d2))
        # Rows of the Jacobian are (1 - y_1) (1, -1) and its negative.
        factor += 2 * w * scipy.special.expit(d1) * (weight @ scipy.special.expit(d2))
    return same, cross, factor


def stacked(cases, n_classes, dtype=float):
    pairs = Pairs(*(jnp.asarray(x, dtype) for x in zip(*cases, strict=True)))
    return np.stack(moments([pairs], n_classes=n_classes)[0], -1)


@pytest.mark.quick(cases=FAR)
@pytest.mark.parametrize("cases", [NEAR, FAR], ids=["near", "far"])
def test_two_classes_against_quadrature(cases):
    want = np.array([of_two_classes(*case) for case in cases])
    scale = np.max(np.abs(want), 1, keepdims=True)
    got = stacked(cases, 2)[:, :3]
    np.testing.assert_array_less(np.abs(got - want) / scale, 1e-6)
    single = stacked(cases, 2, jnp.float32)[:, :3]
    assert single.dtype == np.float32
    np.testing.assert_array_less(np.abs(single - want) / scale, 1e-4)
    # Negative control: without the integral, as if the normalisers did not covary.
    integral = [case[1] / 2 for case in cases]
    assert np.all(np.abs(got[:, 0] - integral - want[:, 0]) > 1e-3 * scale[:, 0])


@pytest.mark.quick
def test_sampling():
    n, cases = 5, [(2.0, 1.2, 3.0), (30.0, 29.0, 30.0)]
    got = stacked(cases, n)
    x, y = random.normal(random.key(2), (2, 100_000, n))
    for (a, c, b), exact in zip(cases, got, strict=True):
        u = np.sqrt(a) * x
        v = c / np.sqrt(a) * x + np.sqrt(b - c**2 / a) * y
        l1, l2, y1, y2 = (f(z) for f in (jax.nn.log_softmax, jax.nn.softmax) for z in (u, v))
        products = jnp.sum(y1 * y2, 1)
        samples = np.stack(
            [
                jnp.mean(l1 * l2, 1),
                jnp.mean(l1 * jnp.roll(l2, 1, 1), 1),
                1 - jnp.mean(y1 + y2, 1) + products,
                -jnp.mean(y1 + y2, 1) + products,
            ],
            -1,
        )
        stderr = samples.std(0) / np.sqrt(len(samples))
        score = np.abs(samples.mean(0) - exact) / stderr
        assert np.all(score < 4.5), score
        # Negative control: a mean of the normaliser that is 1 % off.
        off = exact[:2] * 1.02 - samples.mean(0)[:2]
        assert np.all(np.abs(off) / stderr[:2] > 4.5)


@pytest.mark.slow
def test_mean_of_the_normaliser_of_equal_logits():
    variance = jnp.array([[0.0, 0.1], [1.0, 100.0]])
    for n in (1, 3, 100):
        want = predict.expected_log_normalizer(jnp.zeros((2, 2, n)), variance[..., None])
        np.testing.assert_allclose(of_equal_logits(variance, n), want, rtol=1e-12, atol=1e-15)
    # Of a million, by the distribution of the largest of z + g.
    x = np.linspace(-9, 9, 721)
    weight = np.exp(-(x**2) / 2) / np.sum(np.exp(-(x**2) / 2))
    y = np.linspace(0, 60, 1201)
    cdf = np.exp(-np.exp(-(y[:, None] - x))) @ weight
    want = np.sum(1 - cdf**1_000_000) * (y[1] - y[0]) - (y[1] - y[0]) / 2 - np.euler_gamma
    np.testing.assert_allclose(of_equal_logits(jnp.ones(1), 1_000_000), want, rtol=1e-7)
    # The slope is half of E[sum y (1 - y)].
    slope = jax.grad(lambda a: of_equal_logits(a, 10))(jnp.asarray(1.0))
    same = taylor_softmax.class_covariance(1.0, 1.0, 1.0, n_classes=10)
    np.testing.assert_allclose(slope, (1 - 0.1) * (1 - 10 * same) / 2, rtol=1e-6)


@pytest.mark.quick
def test_one_class_is_constant():
    np.testing.assert_allclose(stacked([(1.0, 0.5, 2.0)], 1)[:, [0, 2]], 0, atol=1e-12)


def test_derivatives():
    def same(c, a):
        return moments([Pairs(a, c, jnp.asarray(1.5))], n_classes=4)[0].same

    c, a = jnp.asarray(0.7), jnp.asarray(2.0)
    step, along = 1e-4, jnp.array([1, -1, 0, 0])
    along_c, along_a = jax.jit(jax.grad(same, argnums=(0, 1)))(c, a)
    ends = jax.jit(jax.vmap(same))(c + step * along, a + step * along[::-1])
    np.testing.assert_allclose(along_c, (ends[0] - ends[1]) / (2 * step), rtol=1e-5)
    np.testing.assert_allclose(along_a, (ends[3] - ends[2]) / (2 * step), rtol=1e-5)
    # Price's theorem again: the slope in c is the factor of the NTK.
    factor = moments([Pairs(a, c, jnp.asarray(1.5))], n_classes=4)[0].same_factor
    np.testing.assert_allclose(along_c, factor, rtol=1e-5)


def network(*last):
    return stax.serial(
        stax.Dense(8), stax.Relu(), stax.Dense(3, W_std=2.0), stax.LogSoftmax(), *last
    )


@pytest.mark.quick
def test_apply_is_that_of_jax():
    z = random.normal(random.key(3), (2, 3, 4))
    for axis in (-1, 1, (1, 2)):
        got = stax.LogSoftmax(axis=axis)[1]((), z)
        np.testing.assert_allclose(got, jax.nn.log_softmax(z, axis), rtol=1e-14)
    half = stax.LogSoftmax()[1]((), z.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    # Masked outputs are 0, and the others as if they were alone.
    masked = z.at[0, :, 2:].set(jnp.nan)
    got = stax.LogSoftmax()[1]((), masked, mask_constant=jnp.nan)
    np.testing.assert_allclose(
        got.masked_value[0, :, :2], jax.nn.log_softmax(z[0, :, :2]), rtol=1e-14
    )
    np.testing.assert_array_equal(got.masked_value[0, :, 2:], 0)


@pytest.mark.quick
def test_class_kernel_in_parts_masked_and_behind_other_layers():
    *_, kernel_fn = network()
    classes = taylor_softmax.class_kernel(kernel_fn(X, None))
    assert classes.nngp.shape == classes.ntk.shape == (4, 4, 3, 3)
    parts = taylor_softmax.class_kernel(nt.batch(kernel_fn, batch_size=2)(X, None))
    for got, want in zip(parts, classes, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    with pytest.raises(ValueError, match="has a softmax over 3 classes, but not at its end"):
        taylor_softmax.class_kernel(network(stax.Dense(2))[2](X, None))
    with pytest.raises(NotImplementedError, match="mixture of Gaussians"):
        network(stax.Dense(2), stax.Relu())[2](X, None)


def test_positions_are_elementwise_and_may_be_masked():
    logits = stax.serial(stax.Conv(8, (2, 2)), stax.Relu(), stax.Conv(3, (1, 1)))
    *_, kernel_fn = stax.serial(logits, stax.LogSoftmax())
    *_, pooled_fn = stax.serial(logits, stax.LogSoftmax(), stax.GlobalAvgPool())
    kernel, before = pooled_fn(IMAGES, None), logits[2](IMAGES, None, diagonal_spatial=False)
    variance = jnp.einsum("iiaabb->iab", before.nngp)
    (want,) = moments(
        [Pairs(variance[0, :, None, :, None], before.nngp[0, 1], variance[1, None, :, None])],
        n_classes=3,
    )
    np.testing.assert_allclose(kernel.nngp[0, 1], np.mean(want.same), rtol=1e-9)
    with pytest.raises(ValueError, match="not at its end"):
        taylor_softmax.class_kernel(kernel)
    masked = IMAGES.at[0, 2:].set(jnp.nan)
    classes = taylor_softmax.class_kernel(kernel_fn(masked, None, mask_constant=jnp.nan))
    assert np.all(np.isfinite(classes.nngp))
    assert np.all(classes.nngp[0, 0, 2:] == 0)


@pytest.mark.quick
def test_refusals():
    dense = stax.Dense(3)
    with pytest.raises(ValueError, match="must be Gaussian"):
        stax.serial(dense, stax.Relu(), stax.LogSoftmax())[2](X, None)
    with pytest.raises(NotImplementedError, match="normalises over channels"):
        stax.serial(dense, stax.LayerNorm(), stax.LogSoftmax())[2](X, None)
    with pytest.raises(NotImplementedError, match="is not the channel axis"):
        stax.serial(stax.Conv(3, (1, 1)), stax.LogSoftmax(axis=1))[2](IMAGES, None)
    for axis in (0, 7):
        with pytest.raises(ValueError, match="`axis"):
            stax.serial(dense, stax.LogSoftmax(axis=axis))[2](X, None)
