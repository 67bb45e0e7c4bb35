"""Gaussian expectations by SymPy, which all derivations share, and the Taylor polynomials of `exp`.

`(u, v) ~ N(0, [[var1, cov12], [cov12, var2]])` are one pair of logits, `t` and `s` the rates at
which `exp(-t f(u) - s f(v))` falls.
"""

import functools
from typing import Any

import sympy as sp

VAR1, VAR2, T, S = sp.symbols("var1 var2 t s", positive=True)
COV12 = sp.Symbol("cov12", real=True)
U, V = sp.symbols("u v", real=True)


def taylor_polynomial(z: sp.Expr, order: int) -> sp.Expr:
    """`f_m(z) = sum_{k <= m} z^k / k!`."""
    return sum((z**k / sp.factorial(k) for k in range(order + 1)), sp.Integer(0))


@functools.cache
def moment(i: int, j: int) -> sp.Expr:
    """`E[u^i v^j]` by Gaussian integration by parts (Stein's lemma), from `E[1] = 1`."""
    if i < 0 or j < 0:
        return sp.Integer(0)
    if i == j == 0:
        return sp.Integer(1)
    if i == 0:
        return (j - 1) * VAR2 * moment(0, j - 2)
    return sp.expand((i - 1) * VAR1 * moment(i - 2, j) + j * COV12 * moment(i - 1, j - 1))


def expectation(polynomial: sp.Expr) -> sp.Expr:
    """`E[p(u, v)]` for a polynomial `p`."""
    terms = sp.Poly(sp.expand(polynomial), U, V).terms()
    return sp.expand(sum(coefficient * moment(i, j) for (i, j), coefficient in terms))


def gaussian_log_integral(
    weight: sp.Expr, variables: sp.Matrix, covariance: sp.Matrix
) -> tuple[Any, Any]:
    """`log E[exp(weight)]` for a quadratic `weight` of `variables ~ N(0, covariance)`.

    Completing the square, with `exponent = -z^T M z / 2 + h^T z + k`:
    `log E = h^T M^-1 h / 2 + k - log(det(M covariance)) / 2`.

    Returns:
      `(rational, determinant)` such that `log E = rational - log(determinant) / 2`.
    """
    exponent = sp.expand(-(variables.T * covariance.inv() * variables)[0] / 2 + weight)
    symbols = variables.flat()
    origin = dict.fromkeys(symbols, 0)
    precision = -sp.hessian(exponent, symbols)
    linear = sp.Matrix([exponent.diff(z).subs(origin) for z in symbols])
    constant = exponent.subs(origin)
    determinant = sp.factor(sp.simplify(precision.det() * covariance.det()))
    rational = sp.factor((linear.T * precision.inv() * linear)[0] / 2 + constant)
    return rational, sp.expand(determinant)
