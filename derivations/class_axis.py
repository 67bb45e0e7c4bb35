"""Class axis, order 2: the integrand of the Laplace identity in closed form.

`(u, v) ~ N(0, [[var1, cov12], [cov12, var2]])` are one class's logits at two inputs and
`L(t, s) = log E[exp(-t f_2(u) - s f_2(v))]`. The covariance of the outputs is
`int int L_ts exp(n L) dt ds` over the positive quadrant, and its derivative in `c = cov12`, which
the NTK needs, is `int int (L_tsc + n L_ts L_c) exp(n L) dt ds`.
"""

from typing import Any

import sympy as sp

from derivations.emit import Function, Module
from derivations.gaussian import (
    COV12,
    VAR1,
    VAR2,
    S,
    T,
    U,
    V,
    gaussian_log_integral,
    taylor_polynomial,
)


def log_transform() -> tuple[Any, Any]:
    """`(rational, D)` with `L(t, s) = rational - log(D) / 2` at order 2."""
    weight = -T * taylor_polynomial(U, 2) - S * taylor_polynomial(V, 2)
    covariance = sp.Matrix([[VAR1, COV12], [COV12, VAR2]])
    return gaussian_log_integral(weight, sp.Matrix([U, V]), covariance)


def in_powers_of(base: sp.Expr, inverse: sp.Symbol, expression: sp.Expr) -> Any:
    """Writes `p / (constant base^k)` as `sum_i r_i inverse^(k-i)`, `inverse` standing for `1/base`.

    The `r_i` are the digits of `p` in base `base` by division in `cov12`. Against `p` multiplied
    out this has a third of the operations, and where `base` is near 1 nothing cancels.
    """
    numerator, denominator = sp.fraction(sp.factor(expression))
    power = 0
    while denominator.has(T, S):
        denominator, power = sp.cancel(denominator / base), power + 1
    digits = []
    while numerator != 0:
        numerator, digit = sp.div(sp.expand(numerator), base, COV12)
        digits.append(digit)
    total: Any = sum(
        sp.horner(sp.expand(digit / denominator), COV12, T, S) * inverse ** (power - i)
        for i, digit in enumerate(digits)
    )
    difference = total.subs(inverse, 1 / base) - expression
    if len(digits) > power + 1 or sp.simplify(difference) != 0:
        raise ArithmeticError(f"{expression} is not a polynomial in 1 / ({base})")
    return total


def module() -> Module:
    rational, determinant = log_transform()
    log_phi = rational - sp.log(determinant) / 2
    # L_ts is proportional to cov12: emitting the quotient keeps the kernel's digits at any
    # covariance, zero included.
    cross = sp.cancel(sp.diff(log_phi, T, S) / COV12)
    cross_slope = sp.diff(cross * COV12, COV12)
    log_phi_slope = sp.diff(log_phi, COV12)

    # Most of the weight lies where D is within O(1/n) of 1, hence log1p(D - 1); and D - 1 is
    # written with var1 var2 - cov12^2 in one piece, which vanishes for equal inputs.
    gap, excess, inverse = sp.symbols("gap excess inverse")
    collected = sp.horner(
        sp.expand(sp.expand(determinant - 1).subs(VAR1 * VAR2, gap + COV12**2)), T, S
    )
    if sp.expand(collected.subs(gap, VAR1 * VAR2 - COV12**2) - determinant + 1) != 0:
        raise ArithmeticError(f"{collected} is not {determinant} - 1")
    rational_form = in_powers_of(determinant, inverse, rational)
    integrand = Function(
        name="class_axis_order_2",
        summary="Integrand of the output covariance of Taylor softmax of order 2, per class pair.",
        arguments=(VAR1, COV12, VAR2, T, S),
        definitions=(
            (gap, VAR1 * VAR2 - COV12**2),
            (excess, collected),
            (inverse, 1 / (1 + excess)),
        ),
        outputs=(
            ("log_phi", "L(t, s)", rational_form - sp.Function("log1p")(excess) / 2),
            ("cross", "L_ts / cov12", in_powers_of(determinant, inverse, cross)),
            (
                "cross_slope",
                "d L_ts / d cov12",
                in_powers_of(determinant, inverse, cross_slope),
            ),
            ("log_phi_slope", "d L / d cov12", in_powers_of(determinant, inverse, log_phi_slope)),
        ),
    )
    return Module(name="class_axis", source="derivations/class_axis.py", functions=(integrand,))
