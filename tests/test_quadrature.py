"""The rules against integrals that are known, or that mpmath finds by its own quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
from numpy.polynomial import chebyshev

from taylor_softmax._numerics import quadrature

EPS = float(np.finfo(float).eps)

# Integrands on the half line with their exact integrals.
HALF_LINE: dict[str, tuple[Callable[..., Any], float]] = {
    **{
        f"exp(-tau) tau^{k}": (lambda t, k=k: np.exp(-t) * t**k, float(math.factorial(k)))
        for k in range(6)
    },
    # Few classes: powers of one class's transform.
    **{
        f"(1 + tau)^-{p}": (lambda t, p=p: (1 + t) ** -p, 1 / (p - 1))
        for p in (1.5, 2.0, 4.0, 10.0)
    },
    **{f"exp(-{a} tau)": (lambda t, a=a: np.exp(-a * t), 1 / a) for a in (0.25, 0.5, 2.0, 4.0)},
    "tau (1 + tau)^-5": (lambda t: t * (1 + t) ** -5.0, 1 / 12),
    # The stretched exponential of few classes and a large variance.
    "exp(-sqrt(tau))": (lambda t: np.exp(-np.sqrt(t)), 2.0),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", HALF_LINE)
def test_half_line_rule(name):
    function, want = HALF_LINE[name]
    errors = []
    for n_nodes in (28, 64):
        node, weight = quadrature.half_line_rule(n_nodes)
        assert node.shape == weight.shape == (n_nodes,)
        assert (np.diff(node) > 0).all()
        assert node[0] > 0
        assert (weight > 0).all()
        errors.append(abs(function(node) @ weight / want - 1))
    # Measured: the worst of these is tau^5 exp(-tau), 2e-5 with the nodes that the kernels use.
    assert errors[0] < 3e-5
    assert errors[1] < 64 * EPS


@pytest.mark.parametrize("name", HALF_LINE)
def test_half_line_integrals_are_right(name):
    """The table above, by mpmath: the functions work on its numbers too where they use no exp."""
    function, want = HALF_LINE[name]
    with mpmath.workdps(20):
        # tau = w^2 takes the root out of the last one.
        got: Any = mpmath.quad(
            lambda w: 2 * w * float(function(np.float64(w) ** 2)), [0, 1, 2, 4, 8, 16, 64, 1e3, 1e6]
        )
    # (1 + tau)^-1.5 leaves 2e-6 beyond 1e12.
    assert abs(float(got) / want - 1) < 2e-6


def test_half_line_rule_resolves_both_ends():
    """Integrands of scale 1/4 and 4, which is what the square in the map is for."""
    node, weight = quadrature.half_line_rule(28)
    errors = [abs(np.exp(-a * node) @ weight * a - 1) for a in (0.25, 0.5, 1, 2, 4)]
    assert max(errors) < 2e-8
    # Negative control: the map without the square, same number of nodes.
    x, plain = np.polynomial.legendre.leggauss(28)
    x, plain = (x + 1) / 2, plain / 2
    node, weight = 2 * x / (1 - x), plain * 2 / (1 - x) ** 2
    assert max(abs(np.exp(-a * node) @ weight * a - 1) for a in (0.25, 0.5, 1, 2, 4)) > 1e-7


@pytest.mark.quick
@pytest.mark.parametrize("perturb", ["node", "weight"])
def test_a_perturbed_half_line_rule_is_noticed(perturb):
    """Negative control of the tests above."""
    node, weight = (x.copy() for x in quadrature.half_line_rule(64))
    middle = np.argmin(abs(node - 1))
    (node if perturb == "node" else weight)[middle] *= 1 + 1e-9
    errors = [abs(function(node) @ weight / want - 1) for function, want in HALF_LINE.values()]
    assert max(errors) > 1000 * EPS


@pytest.mark.quick(n_nodes=129)
@pytest.mark.parametrize(("n_nodes", "reach"), [(64, 8.0), (128, 8.0), (129, 9.0), (65, 10.0)])
@pytest.mark.parametrize("power", range(13))
def test_moments_of_the_normal_rule(power, n_nodes, reach):
    x, weight = quadrature.normal_rule(n_nodes, reach)
    assert x[0] == -reach
    assert x[-1] == reach
    np.testing.assert_allclose(np.diff(x), 2 * reach / (n_nodes - 1), rtol=1e-12)
    got = float(x**power @ weight)
    want = 0.0 if power % 2 else float(mpmath.fac2(power - 1))
    size = float(mpmath.fac2(power - 1)) if power else 1.0
    # All that is missing is what lies beyond the reach, and an end node's worth of it.
    with mpmath.workdps(30):
        density = mpmath.npdf(reach) * mpmath.mpf(reach) ** power
        tail = mpmath.quad(lambda u: u**power * mpmath.npdf(u), [reach, reach + 4, reach + 12])
        missing = float(
            2 * tail + density * 2 * reach / (n_nodes - 1) + 2 * want * mpmath.npdf(reach)
        )
    assert abs(got - want) <= 2 * missing + 16 * EPS * max(size, 1)


@pytest.mark.quick(sigma=3.0)
@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("t", [1e-3, 0.1, 1.0, 10.0, 100.0])
def test_normal_rule_on_the_integrand_of_softmax(t, sigma):
    with mpmath.workdps(25):
        want = mpmath.quad(
            lambda x: mpmath.exp(-t * mpmath.exp(sigma * x)) * mpmath.npdf(x),
            [-14, -8, -5, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8],
        )
    errors = {}
    for n_nodes in (32, 128):
        x, weight = quadrature.normal_rule(n_nodes, 8.0)
        errors[n_nodes] = abs(float(np.exp(-t * np.exp(sigma * x)) @ weight - want))
    # The step of exp(-t exp(sigma x)) is 1 / sigma wide: 128 nodes resolve every one of these, and
    # 32 do not resolve the steep ones (negative control).
    assert errors[128] < 4e-15 if sigma <= 2 else errors[128] < 1e-10
    if sigma >= 2 and t >= 0.1:
        assert errors[32] > 1e-8


@pytest.mark.quick
def test_a_perturbed_normal_rule_is_noticed():
    """Negative control: weights of a normal of another variance."""
    x, _ = quadrature.normal_rule(128, 8.0)
    wrong = np.exp(-(x**2) / (2 * (1 + 1e-6)))
    wrong /= wrong.sum()
    assert abs(x**2 @ wrong - 1) > 5e-7


@pytest.mark.quick
def test_exponential_rule():
    """Moments of `tau ~ Exp(1)` and of its logarithm: minus Euler's constant, pi^2 / 6."""
    log_tau, weight = quadrature.exponential_rule(18)
    moments = [weight @ f for f in (np.exp(log_tau), np.exp(2 * log_tau), log_tau, log_tau**2)]
    want = [1, 2, -np.euler_gamma, np.euler_gamma**2 + np.pi**2 / 6]
    # The interval leaves out 1e-9 of the mass, at logarithms of up to -20.
    np.testing.assert_allclose(moments, want, atol=2e-6)
    coarse, weight = quadrature.exponential_rule(9)
    assert abs(weight @ coarse + np.euler_gamma) > 2e-6


@pytest.mark.quick
@pytest.mark.parametrize("n_nodes", [1, 2, 5, 14, 20])
def test_chebyshev_rule_reproduces_polynomials(n_nodes):
    node, matrix = quadrature.chebyshev_rule(n_nodes)
    assert node.shape == (n_nodes,)
    assert matrix.shape == (n_nodes, n_nodes)
    assert (abs(node) < 1).all()
    rng = np.random.default_rng(n_nodes)
    coefficients = rng.normal(size=n_nodes)
    # A monomial expansion, evaluated by another route than the coefficients it must lead to.
    monomials = chebyshev.cheb2poly(coefficients)
    values = np.polynomial.polynomial.polyval(node, monomials)
    size = EPS * abs(monomials).sum() * n_nodes
    np.testing.assert_allclose(matrix @ values, coefficients, atol=4 * size)
    # Off the nodes, by T_k(cos a) = cos(k a).
    angle = np.linspace(0, np.pi, 37)
    basis = np.cos(np.arange(n_nodes) * angle[:, None])
    want = np.polynomial.polynomial.polyval(np.cos(angle), monomials)
    np.testing.assert_allclose(basis @ (matrix @ values), want, atol=8 * size * n_nodes)
    # Negative control: one degree more than the rule has.
    beyond = np.cos(n_nodes * np.arccos(node))
    assert abs(np.cos(n_nodes * angle) - basis @ (matrix @ beyond)).max() > 0.5


@pytest.mark.quick
def test_chebyshev_rule_converges_on_a_smooth_function():
    for n_nodes, allowed in ((10, 1e-6), (20, 1e-13)):
        node, matrix = quadrature.chebyshev_rule(n_nodes)
        x = np.linspace(-1, 1, 101)
        got = chebyshev.chebval(x, matrix @ np.exp(2 * node))
        error = abs(got - np.exp(2 * x)).max()
        assert error < allowed
    node, matrix = quadrature.chebyshev_rule(10)
    # Negative control: nodes of the other kind with this matrix.
    other = np.cos(np.pi * np.arange(9, -1, -1) / 9)
    assert (
        abs(chebyshev.chebval(other, matrix @ np.exp(2 * other)) - np.exp(2 * other)).max() > 1e-3
    )
