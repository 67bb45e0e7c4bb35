"""Class probabilities, order 2: the transform of a Gaussian logit in closed form.

`z ~ N(mean, variance)` is one logit and `phi(t) = E[exp(-t f_2(z))]`. With classes independent,
`E[y_i]` and `E[y_i y_j]` are integrals over `t` of products of `phi` and of its first two
derivatives, which are those of `log phi`: mean and variance of `f_2(z)` under the weights tilted by
`exp(-t f_2(z))`.
"""

from typing import Any

import sympy as sp

from derivations.emit import Function, Module
from derivations.gaussian import T, gaussian_log_integral, taylor_polynomial

VARIANCE = sp.Symbol("variance", positive=True)
MEAN = sp.Symbol("mean", real=True)


def log_transform() -> tuple[Any, Any]:
    """`(rational, D)` with `log phi(t) = rational - log(D) / 2`, `D = 1 + t variance`; order 2."""
    x = sp.Symbol("x", real=True)
    weight = -T * taylor_polynomial(x + MEAN, 2)
    return gaussian_log_integral(weight, sp.Matrix([x]), sp.Matrix([[VARIANCE]]))


def positive_terms(inverse: sp.Symbol, expression: sp.Expr) -> Any:
    """`expression` in powers of `inverse = 1 / (1 + t variance)` and of `1 + mean`.

    Raises:
      ArithmeticError: a coefficient is negative. Where all are positive nothing cancels.
    """
    shifted, power = sp.symbols("shifted power", positive=True)
    substituted = expression.subs(MEAN, shifted - 1).subs(T, (1 / power - 1) / VARIANCE)
    polynomial = sp.Poly(sp.cancel(substituted), power, shifted, VARIANCE)
    if min(polynomial.coeffs()) < 0:
        raise ArithmeticError(f"{polynomial} has a negative coefficient")
    return polynomial.as_expr().subs({shifted: 1 + MEAN, power: inverse})


def deviation(inverse: sp.Symbol, excess: sp.Symbol, log_phi: Any) -> Any:
    """Tilted mean of `f_2(z)` less `f_2(mean)`, as a product with the variance.

    What the two have in common is taken out before there are numbers to subtract.
    """
    shifted = sp.Symbol("shifted", real=True)
    difference = -sp.diff(log_phi, T) - taylor_polynomial(MEAN, 2)
    quotient: Any = sp.cancel(difference * (1 + T * VARIANCE) ** 2 / VARIANCE)
    by_mean = sp.Poly(sp.expand(quotient.subs(MEAN, shifted - 1)), shifted)
    terms = [
        sp.factor(coefficient).subs(T * VARIANCE, excess) * (1 + MEAN) ** power
        for (power,), coefficient in by_mean.terms()
    ]
    return VARIANCE * inverse**2 * sp.Add(*terms)


def module() -> Module:
    rational, determinant = log_transform()
    log_phi = rational - sp.log(determinant) / 2
    inverse, excess = sp.symbols("inverse excess")
    # -t / 2 - t (1 + mean)^2 / (2 D) - log(D) / 2: three terms of one sign, for any mean and t.
    pull: Any = sp.factor(rational + T / 2)
    if not (-pull * determinant / T).is_nonnegative:
        raise ArithmeticError(f"{pull} can be positive")
    transform = Function(
        name="logit_order_2",
        summary="Tilted moments of one Gaussian logit for Taylor softmax of order 2.",
        arguments=(MEAN, VARIANCE, T),
        definitions=((excess, T * VARIANCE), (inverse, 1 / (1 + excess))),
        outputs=(
            (
                "log_phi",
                "log phi(t)",
                pull * determinant * inverse - T / 2 - sp.Function("log1p")(excess) / 2,
            ),
            ("tilted_mean", "-d log phi / dt", positive_terms(inverse, -sp.diff(log_phi, T))),
            (
                "deviation",
                "-d log phi / dt - f_2(mean)",
                deviation(inverse, excess, log_phi),
            ),
            (
                "tilted_variance",
                "d^2 log phi / dt^2",
                positive_terms(inverse, sp.diff(log_phi, T, 2)),
            ),
        ),
    )
    return Module(
        name="probabilities", source="derivations/probabilities.py", functions=(transform,)
    )
