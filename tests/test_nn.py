"""Taylor softmax as functions, against its definition at high precision."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from taylor_softmax import nn

Z = np.array([[-9.5, -1.25, 0.5, 3.0], [-30.0, 12.0, 11.0, -4.0], [-17.0, -16.5, -15.0, -20.0]])


def exact(z, order):
    """Rows of logarithms, in 50 digits."""
    with mpmath.workdps(50):

        def f(x):
            if order is None:
                return mpmath.exp(float(x))
            return mpmath.fsum(
                mpmath.mpf(float(x)) ** k / mpmath.factorial(k) for k in range(order + 1)
            )

        rows = [[f(x) for x in row] for row in z]
        return np.array([[float(mpmath.log(x / mpmath.fsum(row))) for x in row] for row in rows])


@pytest.mark.quick(order=8)
@pytest.mark.parametrize("order", [None, 2, 8, 32])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_definition(order, dtype):
    z = Z.astype(dtype)
    want = exact(z, order)
    eps = np.finfo(dtype).eps
    value, logarithm = nn.taylor_softmax(z, order), nn.log_taylor_softmax(z, order)
    assert value.dtype == logarithm.dtype == dtype
    np.testing.assert_allclose(value, np.exp(want), rtol=100 * eps)
    np.testing.assert_allclose(logarithm, want, rtol=20 * eps, atol=20 * eps)
    # Negative control: the next order is another function.
    other = nn.taylor_softmax(z, 4 if order is None else order + 2 if order < 32 else 30)
    assert np.max(np.abs(other / np.exp(want) - 1)) > 1e-4


@pytest.mark.quick
def test_softmax_is_that_of_jax():
    np.testing.assert_allclose(nn.taylor_softmax(Z), jax.nn.softmax(Z), rtol=1e-14)
    got = nn.log_taylor_softmax(Z, axis=0)
    np.testing.assert_allclose(got, jax.nn.log_softmax(Z, 0), rtol=1e-14, atol=1e-14)


@pytest.mark.quick(order=2)
@pytest.mark.parametrize("order", [None, 2, 32])
def test_excluded_entries_are_absent(order):
    where = np.array([True, False, True, True])
    for excluded in (jnp.asarray(Z), jnp.asarray(Z).at[:, 1].set(jnp.inf)):
        for function in (nn.taylor_softmax, nn.log_taylor_softmax):
            got, alone = function(excluded, order, where=where), function(Z[:, where], order)
            np.testing.assert_allclose(got[:, where], alone, rtol=1e-13)
            assert np.all(got[:, 1] == (0 if function is nn.taylor_softmax else -np.inf))
    infinite = jnp.asarray(Z).at[:, 1].set(-jnp.inf)
    np.testing.assert_array_equal(
        nn.taylor_softmax(infinite, order), nn.taylor_softmax(Z, order, where=where)
    )
    assert not np.any(nn.taylor_softmax(Z, order, where=np.zeros(4, bool)))


@pytest.mark.quick(order=32, size=1e30)
@pytest.mark.parametrize("order", [None, 2, 32])
@pytest.mark.parametrize("size", [1.0, 1e30])
def test_gradients(order, size):
    z = jnp.asarray(Z[0] * size, jnp.float32).at[0].set(-jnp.inf)
    weights = jnp.arange(4.0, dtype=jnp.float32)

    def total(z):
        log_p = nn.log_taylor_softmax(z, order)
        return weights @ nn.taylor_softmax(z, order) + weights[1:] @ log_p[1:]

    gradient = jax.jit(jax.grad(total))(z)
    assert np.all(np.isfinite(gradient))
    assert gradient[0] == 0
    if size == 1:
        step = 1e-2
        for i in (1, 2, 3):
            ends = [total(z.at[i].add(s * step)) for s in (1, -1)]
            np.testing.assert_allclose(
                gradient[i], (ends[0] - ends[1]) / (2 * step), rtol=2e-2, atol=1e-3
            )


@pytest.mark.quick(dtype=jnp.bfloat16)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    z = jnp.asarray(Z, dtype)
    for function in (nn.taylor_softmax, nn.log_taylor_softmax):
        got = function(z, 32)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, function(z.astype(jnp.float32), 32).astype(dtype))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1j * Z, 2), TypeError, "`z` must be a real"),
        (("a", 2), TypeError, "`z` must be a real"),
        ((Z, 3), ValueError, "`order` must be even"),
        ((Z, 2.0), TypeError, "`order` must be an integer"),
        ((Z, 34), NotImplementedError, "`order` over a finite axis is at most 32"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    for function in (nn.taylor_softmax, nn.log_taylor_softmax):
        with pytest.raises(error, match=message):
            function(*arguments)
