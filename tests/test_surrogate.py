"""The surrogates against their definition, summed by mpmath at 50 digits."""

from __future__ import annotations

import fractions
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from taylor_softmax._numerics import surrogate
from taylor_softmax._numerics.surrogate import parse

ORDERS = (2, 4, 8, 16, 32, None)
DTYPES = (np.float32, np.float64)
DIGITS = 50

LOGITS = np.array(
    [
        [-30.0, -17.3, -5.5, -3.1, 0.0, 7.7, 19.0, 30.0],
        # All negative: nothing large in the row hides what Horner's form would get wrong.
        [-30.0, -22.2, -14.9, -12.5, -10.0, -8.0, -6.1, -4.4],
        [-2.2, -0.9, -0.35, 1e-3, 0.2, 0.4, 0.8, 1.1],
    ]
)


def taylor(z, order: int | None):
    """`f(z)` by definition."""
    if order is None:
        return mpmath.exp(z)
    return mpmath.fsum(mpmath.mpf(z) ** k / mpmath.factorial(k) for k in range(order + 1))


def taylor_slope(z, order: int | None):
    """`f'(z)` by definition: `f_m' = f_{m-1}`."""
    return taylor(z, None if order is None else order - 1)


def exact_softmax(z: np.ndarray, order: int | None) -> np.ndarray:
    """Rows of mpmath numbers, from the very floats that the library gets."""
    with mpmath.workdps(DIGITS):
        values = np.array([taylor(float(x), order) for x in z])
        return values / mpmath.fsum(values)


def roundings(order: int | None) -> int:
    """What an error may amount to in eps: a term for every factor, or exp's of its argument."""
    return 60 if order is None else 2 * order


def assert_within(got, want, allowed, scale=None) -> None:
    """`|got - want| <= allowed |scale|`, bad points printed; `want` and `scale` are mpmath's."""
    got = np.asarray(got)
    assert got.shape == want.shape
    scale = np.broadcast_to(want if scale is None else scale, want.shape)
    # Below the smallest normal number floats lose digits, or are flushed to 0.
    tiny = float(np.finfo(got.dtype).tiny)
    with mpmath.workdps(DIGITS):
        errors = [
            (float(max(abs(float(g) - w) - tiny, 0) / abs(s)), float(g), float(w))
            for g, w, s in zip(got.ravel(), want.ravel(), scale.ravel(), strict=True)
        ]
    # `not <=`, so that NaN is bad.
    bad = [error for error in errors if not error[0] <= allowed]
    assert not bad, f"{len(bad)} of {len(errors)} beyond {allowed:.1e} (error, got, want): {bad}"


# Orders


@pytest.mark.quick
@pytest.mark.parametrize(
    "order", [2, 4, 32, 100, np.int32(4), np.int64(6), np.uint8(8), np.array(4)]
)
def test_parse_makes_a_plain_int(order):
    got = parse(order, finite=False).order
    assert type(got) is int
    assert got == order


@pytest.mark.quick
def test_surrogates_are_values():
    """Equal and hashed as the functions that they stand for: static arguments of `jit`."""
    assert parse(None).order is None
    assert len({parse(None), parse(None), parse(4), parse(np.int64(4)), parse(6)}) == 3
    with pytest.raises(AttributeError):
        parse(4).order = 6


@pytest.mark.quick
def test_what_a_surrogate_knows_of_itself():
    assert [parse(order).has_closed_form for order in (None, 2, 4)] == [False, True, False]
    assert [parse(order).is_shift_invariant for order in (None, 2, 4)] == [True, False, False]
    z = jnp.asarray([0.3, -1.2, 2.0])
    for order in (None, 2, 4):
        moved = jnp.abs(parse(order).softmax(z + 1) - parse(order).softmax(z)).max()
        assert (moved < 1e-15) == parse(order).is_shift_invariant


@pytest.mark.quick
def test_the_limit_over_a_finite_axis():
    assert parse(32).order == 32
    assert parse(34, finite=False).order == 34
    with pytest.raises(NotImplementedError, match=r"`order`.*at most 32, got 34.*infinite_width"):
        parse(34)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("order", "kind", "said"),
    [
        (2.0, TypeError, "2.0 of type float"),
        (np.float64(2), TypeError, "of type float64"),
        ("2", TypeError, "'2' of type str"),
        ([2], TypeError, "of type list"),
        (np.array([2, 4]), TypeError, "of type ndarray"),
        (fractions.Fraction(2), TypeError, "of type Fraction"),
        (True, TypeError, "boolean True"),
        (False, TypeError, "boolean False"),
        (np.True_, TypeError, "boolean"),
        (0, ValueError, "positive, got 0"),
        (-2, ValueError, "positive, got -2"),
        (-3, ValueError, "positive, got -3"),
        (1, ValueError, "got 1"),
        (3, ValueError, "even, got 3"),
        (np.int64(7), ValueError, "even, got 7"),
    ],
)
def test_parse_says_what_is_wrong(order, kind, said):
    with pytest.raises(kind, match="`order`") as error:
        parse(order)
    message = str(error.value)
    assert said in message
    assert "Pass an even integer >= 2, or `None` for softmax" in message


# Softmax


@pytest.mark.quick(order=16, dtype=np.float32)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
def test_softmax_is_its_definition(order, dtype):
    z = LOGITS.astype(dtype)
    got = parse(order).softmax(jnp.asarray(z))
    assert got.dtype == dtype
    want = np.stack([exact_softmax(row, order) for row in z])
    assert_within(got, want, roundings(order) * np.finfo(dtype).eps)


@pytest.mark.quick(order=8)
@pytest.mark.parametrize("order", [2, 8, 32])
def test_a_wrong_root_is_noticed(order, monkeypatch):
    """Negative control: one root of the product moved by 1e-12."""
    z, want = LOGITS[2], exact_softmax(LOGITS[2], order)
    allowed = roundings(order) * np.finfo(float).eps
    assert_within(parse(order).softmax(jnp.asarray(z)), want, allowed)
    factors = surrogate._QuadraticFactors(order)
    factors.real = (factors.real[0] + 1e-12, *factors.real[1:])
    monkeypatch.setattr(surrogate, "_quadratic_factors", lambda order: factors)
    with pytest.raises(AssertionError, match="beyond"):
        assert_within(parse(order).softmax(jnp.asarray(z)), want, allowed)


def horner(z: np.ndarray, order: int) -> np.ndarray:
    """In NumPy, operation by operation: XLA may fuse a multiplication with an addition."""
    value = np.ones_like(z)
    for k in range(order, 0, -1):
        value = 1 + z * value / z.dtype.type(k)
    return value


@pytest.mark.quick
def test_positive_in_float32_where_horner_is_not():
    z = np.linspace(-11, -10, 201).astype(np.float32)
    naive = horner(z, 32)
    assert naive.dtype == np.float32
    assert naive.min() < 0  # negative control: the obvious form fails here
    want = exact_softmax(z, 32)
    with pytest.raises(AssertionError, match="beyond"):
        assert_within(naive / naive.sum(), want, 1e-1)
    got = parse(32).softmax(jnp.asarray(z))
    assert float(got.min()) > 0
    assert_within(got, want, roundings(32) * np.finfo(np.float32).eps)


def test_horner_loses_digits_in_float32_at_order_16():
    """Negative control at an order where it stays positive, and the product keeps its digits."""
    z = np.array([-10.0, -5.0, -4.0], np.float32)
    want = exact_softmax(z, 16)
    allowed = roundings(16) * np.finfo(np.float32).eps
    assert_within(parse(16).softmax(jnp.asarray(z)), want, allowed)
    naive = horner(z, 16)
    with pytest.raises(AssertionError, match="beyond"):
        assert_within(naive / naive.sum(), want, allowed)


@pytest.mark.quick(order=32)
@pytest.mark.parametrize("order", [2, 4, 6, 10, 16, 24, 32])
def test_positive_in_float32_everywhere(order):
    """Also between the points of the tests above: f > 0 on the whole negative axis."""
    z = jnp.linspace(-40, 0, 4001, dtype=jnp.float32)
    assert float(parse(order)._scaled(z, jnp.float32(1)).min()) > 0


HUGE = np.array(
    [
        [1e10, -1e10, 5e9, 1.0],
        [-1e10, -1e10, -1e10, -1e10],
        [1e10, -1.0, 0.5, 0.0],
        [0.0, 1e-30, -1e10, 1e-3],
    ]
)


@pytest.mark.quick(order=8, dtype=np.float32)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
def test_huge_logits(order, dtype):
    z = HUGE.astype(dtype)
    eps = np.finfo(dtype).eps
    got = parse(order).softmax(jnp.asarray(z))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got.sum(axis=1), 1, rtol=0, atol=8 * eps)
    for row, row_got in zip(z, got, strict=True):
        # Divided by powers of 1e10, what is small beside it keeps its digits until it underflows.
        assert_within(row_got, exact_softmax(row, order), roundings(order) * eps)
    function = jax.jit(jax.vmap(jax.jacobian(lambda z: parse(order).softmax(z))))
    jacobian = function(jnp.asarray(z))
    assert np.isfinite(jacobian).all()
    for row, row_jacobian in zip(z, jacobian, strict=True):
        want, size = exact_jacobian(row, order)
        assert_within(row_jacobian, want, 2 * roundings(order) * eps, size)


@pytest.mark.quick(order=4)
@pytest.mark.parametrize("order", [4, 16])
def test_without_the_scale_huge_logits_overflow(order):
    """Negative control of the test above."""
    z = jnp.asarray([1e10, 1.0], jnp.float32)
    value = parse(order)._scaled(z, jnp.float32(1))
    assert not np.isfinite(value / value.sum()).all()


@pytest.mark.quick(order=4, axis=(0, 2))
@pytest.mark.parametrize("order", [4, None])
@pytest.mark.parametrize("axis", [0, -1, (0, 2), (-2, -1), (0, 1, 2)])
def test_axes(axis, order):
    z = np.random.default_rng(0).normal(size=(2, 3, 4)) * 3
    got = parse(order).softmax(jnp.asarray(z), axis=axis)
    with mpmath.workdps(DIGITS):
        values = np.array([taylor(float(x), order) for x in z.ravel()]).reshape(z.shape)
        want = values / values.sum(axis=axis, keepdims=True)
    assert_within(got, want, roundings(order) * np.finfo(float).eps)
    other = parse(order).softmax(jnp.asarray(z), axis=2 if axis != -1 else 1)
    assert np.abs(got - other).max() > 1e-2  # the axis matters


@pytest.mark.quick(order=2)
@pytest.mark.parametrize("order", [2, 32, None])
def test_one_class_and_batches(order):
    z = jnp.asarray([[-3.0], [0.0], [1e10]])
    np.testing.assert_array_equal(parse(order).softmax(z), np.ones((3, 1)))
    rows = jnp.asarray(np.random.default_rng(1).normal(size=(5, 7)))
    each = jnp.stack([parse(order).softmax(row) for row in rows])
    np.testing.assert_allclose(parse(order).softmax(rows), each, rtol=1e-14)
    compiled = jax.jit(jax.vmap(lambda row: parse(order).softmax(row)))(rows)
    np.testing.assert_allclose(compiled, each, rtol=1e-14)


def exact_jacobian(z: np.ndarray, order: int | None) -> tuple[np.ndarray, np.ndarray]:
    """`d y_i / d z_j = y_i (delta_ij - y_j) f'(z_j) / f(z_j)`, and the size of its terms."""
    with mpmath.workdps(DIGITS):
        y = exact_softmax(z, order)
        value = np.array([taylor(float(x), order) for x in z])
        slope = np.array([taylor_slope(float(x), order) for x in z])
        identity = np.eye(len(z), dtype=int)
        jacobian = y[:, None] * (identity - y) * slope / value
        # f' / f is a sum over the roots of f that vanishes somewhere; 1 is the size of its terms.
        size = np.array([max(1, abs(s / v)) for s, v in zip(slope, value, strict=True)])
        return jacobian, y[:, None] * (identity + y) * size


@pytest.mark.quick(order=8, dtype=np.float64)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
def test_gradient_of_softmax(order, dtype):
    z = LOGITS.astype(dtype)
    jacobian = jax.jit(jax.vmap(jax.jacobian(lambda z: parse(order).softmax(z))))
    for row, got in zip(z, jacobian(jnp.asarray(z)), strict=True):
        want, size = exact_jacobian(row, order)
        assert_within(got, want, 2 * roundings(order) * np.finfo(dtype).eps, size)


def test_exact_jacobian_is_the_derivative():
    """The oracle of the test above, by mpmath's own differentiation."""
    z = LOGITS[2]
    want, _ = exact_jacobian(z, 8)
    with mpmath.workdps(DIGITS):

        def component(i: int, j: int, x):
            values = [taylor(x if k == j else float(z[k]), 8) for k in range(len(z))]
            return values[i] / mpmath.fsum(values)

        for i, j in ((0, 0), (0, 3), (4, 1)):
            numeric = mpmath.diff(lambda x, i=i, j=j: component(i, j, x), float(z[j]))
            assert abs(numeric / want[i, j] - 1) < 1e-20


@pytest.mark.quick
def test_gradient_at_a_huge_logit():
    """The scale depends on the largest logit and must not show in the gradient."""
    z = np.array([300.0, -200.0, 10.0, 0.5])
    got = jax.jacobian(lambda z: parse(8).softmax(z))(jnp.asarray(z))
    want, size = exact_jacobian(z, 8)
    assert_within(got, want, 4 * roundings(8) * np.finfo(float).eps, size)

    def with_varying_scale(z):
        factors = surrogate._quadratic_factors(8)
        scale = jnp.max(jnp.abs(z)) / factors.unit
        return parse(8)._scaled(z, scale)

    # Negative control: before it is divided by the sum, the scale does show.
    forgotten = jax.jacobian(with_varying_scale)(jnp.asarray(z))
    assert abs(float(forgotten[1, 0])) > 1e-3


# Divided by the mean


def exact_mean(variance: float, order: int | None):
    """`E[f(z)]` from the moments `E[z^(2 j)] = variance^j (2 j - 1)!!`."""
    v = mpmath.mpf(variance)
    if order is None:
        return mpmath.exp(v / 2)
    return mpmath.fsum(
        v**j * mpmath.fac2(2 * j - 1) / mpmath.factorial(2 * j) for j in range(order // 2 + 1)
    )


X = np.array([-8.0, -4.5, -3.3, -2.0, -1.0, -0.4, 0.0, 0.1, 0.9, 2.2, 3.7, 5.0, 8.0])


# The logarithm


@pytest.mark.quick(order=4)
@pytest.mark.parametrize("order", ORDERS)
def test_log_value_and_minimiser(order):
    z = np.concatenate([np.linspace(-60, 60, 41), [-0.1, 1e3]])
    with mpmath.workdps(DIGITS):
        want = [float(mpmath.log(taylor(float(x), order))) for x in z]
    got = parse(order).log_value(jnp.asarray(z))
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
    far = parse(order).log_value(jnp.array([1e37, -1e37], jnp.float32))
    assert np.isfinite(far).all()
    slope = jax.vmap(jax.grad(lambda z: parse(order).log_value(z)))
    if order is None:
        assert parse(None).minimiser == -np.inf
        return
    at = parse(order).minimiser + np.array([-0.01, 0.0, 0.01])
    np.testing.assert_array_equal(np.sign(np.round(slope(jnp.asarray(at)), 9)), [-1, 0, 1])


# The factors themselves


@pytest.mark.quick(order=20)
@pytest.mark.parametrize("order", [2, 4, 10, 20, 32, 40])
def test_factors_multiply_to_the_taylor_polynomial(order):
    """Beyond the orders that the tests above run at, at points where f is far from exp too."""
    factors: Any = surrogate._quadratic_factors(order)
    assert len(factors.real) == len(factors.imag) == order // 2
    assert min(factors.imag) > 0
    with mpmath.workdps(2 * DIGITS):
        for z in (-1.5 * order, -0.3 * order, -1.0, 0.0, 2.0, 1.5 * order):
            product = mpmath.mpf(1)
            for real, imag in zip(factors.real, factors.imag, strict=True):
                product *= (z - mpmath.mpf(real)) ** 2 + mpmath.mpf(imag) ** 2
            product /= mpmath.factorial(order)
            assert abs(product / taylor(z, order) - 1) < 2 * order * np.finfo(float).eps
        unit = mpmath.mpf(factors.unit) ** order / mpmath.factorial(order)
        assert abs(unit - 1) < order * np.finfo(float).eps
