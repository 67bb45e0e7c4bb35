"""Infinitely wide axis: the moments that the layer's kernel is made of.

With `(u, v) ~ N(0, [[var1, cov12], [cov12, var2]])` and the Taylor polynomial `f_m` the kernel is
`E[f_m(u) f_m(v)] / (E f_m(u) E f_m(v))` and the factor of the NTK has `f_m'` in the numerator.
"""

import sympy as sp

from derivations.emit import Function, Module
from derivations.gaussian import COV12, VAR1, VAR2, U, V, expectation, taylor_polynomial

ORDERS = (2, 4, 6, 8, 10, 12)


def horner_form(polynomial: sp.Expr) -> sp.Expr:
    """Horner's form in `cov12` whose coefficients are products of Horner forms in one variance.

    SymPy's factorisation finds that every coefficient splits into a polynomial in `var1` times
    the same polynomial in `var2`; many are shared between the moments.
    """
    if polynomial.is_Number:
        return polynomial
    total = sp.Integer(0)
    for coefficient in sp.Poly(polynomial, COV12).all_coeffs():
        constant, factors = sp.factor_list(coefficient)
        constant *= sp.prod(base.subs({VAR1: 0, VAR2: 0}) ** power for base, power in factors)
        unit_factors = (
            sp.horner(sp.expand(base / base.subs({VAR1: 0, VAR2: 0})), *base.free_symbols) ** power
            for base, power in factors
        )
        total = total * COV12 + constant * sp.prod(unit_factors)
    return total


def moments(order: int) -> Function:
    value_u, value_v = taylor_polynomial(U, order), taylor_polynomial(V, order)
    outputs = (
        ("second_moment", "E[f(u) f(v)]", value_u * value_v),
        ("slope_moment", "E[f'(u) f'(v)]", value_u.diff(U) * value_v.diff(V)),
        ("mean1", "E[f(u)]", value_u),
        ("mean2", "E[f(v)]", value_v),
    )
    return Function(
        name=f"moments_order_{order}",
        summary=f"Gaussian moments of the Taylor polynomial `f` of order {order}.",
        arguments=(VAR1, COV12, VAR2),
        definitions=(),
        outputs=tuple(
            (name, meaning, horner_form(expectation(polynomial)))
            for name, meaning, polynomial in outputs
        ),
    )


def module() -> Module:
    return Module(
        name="infinite_width",
        source="derivations/infinite_width.py",
        functions=tuple(moments(order) for order in ORDERS),
    )
