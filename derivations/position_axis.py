"""Positions, order 2: what one position adds to the tilted Gaussian, and the moment under it.

The integrand over positions is `E[f_2(u_p) f_2(v_q)]` under a Gaussian tilted by factors
`exp(-rate f_2(z_k))`, one for every position. Taking one factor in, with `z_k ~ N(mean, variance)`
and `log phi(mean)` the logarithm of its expectation, multiplies the mass by `phi`, and moves mean
and covariance `C` of all positions along the column `C_k`:

    mean += C_k d log phi / d mean,    C += C_k C_k^T d^2 log phi / d mean^2,

since a shift of the mean is what the derivatives of a Gaussian expectation in it see.
"""

from typing import Any

import sympy as sp

from derivations.emit import Function, Module
from derivations.gaussian import COV12, VAR1, T, U, V, expectation, taylor_polynomial
from derivations.probabilities import MEAN, VARIANCE, log_transform

RATE, MOVED, MOVED1, MOVED2 = sp.symbols("rate moved moved1 moved2", real=True)


def factored(expression: Any) -> Any:
    return sp.factor(expression)


def observation() -> Function:
    """In `moved = 1 + mean`, in which `f_2` is even."""
    rational, determinant = log_transform()
    log_phi = rational - sp.log(determinant) / 2
    excess, gain = sp.symbols("excess gain")
    slope, curvature = (
        factored(sp.diff(log_phi, MEAN, k).subs({MEAN: MOVED - 1, T: RATE})) for k in (1, 2)
    )
    pull = factored((rational + T / 2).subs({MEAN: MOVED - 1, T: RATE}))
    # One positive gain, and terms of one sign: nothing cancels.
    if sp.simplify(slope - curvature * MOVED) != 0 or sp.simplify(pull - slope * MOVED / 2) != 0:
        raise ArithmeticError(f"{slope} and {pull} are not those of a gain of {-curvature}")
    scale = sp.expand(determinant.subs(T, RATE))
    return Function(
        name="observation_order_2",
        summary="The factor `exp(-rate f(z))` of one position, `z ~ N(moved - 1, variance)`.",
        arguments=(MOVED, VARIANCE, RATE),
        definitions=((excess, scale - 1), (gain, sp.cancel(-curvature * scale) / (1 + excess))),
        outputs=(
            ("gain", "-d^2 log phi / d mean^2", gain),
            ("shift", "d log phi / d mean", -gain * MOVED),
            ("log_phi", "log phi", -(sp.Function("log1p")(excess) + gain * MOVED**2 + RATE) / 2),
        ),
    )


def second_moment() -> tuple[Function, Function]:
    """`E[f_2(u) f_2(v)]` as a product of means, of rank one over positions, and a covariance."""
    at = {U: MOVED1 - 1 + U, V: MOVED2 - 1 + V}
    value_u, value_v = (taylor_polynomial(z, 2).subs(at) for z in (U, V))
    mean_u, mean_v = (expectation(value) for value in (value_u, value_v))
    covariance: Any = factored(expectation(value_u * value_v) - sp.expand(mean_u * mean_v))
    mean = Function(
        name="mean_order_2",
        summary="Mean of a tilted logit's `f`, `z ~ N(moved - 1, variance)`.",
        arguments=(MOVED, VARIANCE),
        definitions=(),
        outputs=(("mean", "E[f(z)]", factored(mean_u.subs({MOVED1: MOVED, VAR1: VARIANCE}))),),
    )
    between = Function(
        name="covariance_order_2",
        summary="Covariance of the `f` of two tilted logits of means `moved - 1`.",
        arguments=(MOVED1, COV12, MOVED2),
        definitions=(),
        outputs=(("covariance", "E[f(u) f(v)] - E[f(u)] E[f(v)]", covariance),),
    )
    return mean, between


def module() -> Module:
    return Module(
        name="position_axis",
        source="derivations/position_axis.py",
        functions=(observation(), *second_moment()),
    )
