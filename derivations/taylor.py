"""The Taylor polynomials of `exp`, from their definition."""

import sympy as sp


def taylor_polynomial(z: sp.Expr, order: int) -> sp.Expr:
    """`f_m(z) = sum_{k <= m} z^k / k!`."""
    return sum((z**k / sp.factorial(k) for k in range(order + 1)), sp.Integer(0))
