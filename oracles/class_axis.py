"""Class covariances by brute force, sharing no formula and no rule with the library.

The Laplace identity is not used in the library's form: same-class and cross-class moments are
integrated apart,

    E[y_1(u) y_1(v)] = int int E[f(u) f(v) e] phi^(n-1) dt ds,
    E[y_1(u) y_2(v)] = int int E[f(u) e] E[f(v) e] phi^(n-2) dt ds,   e = exp(-t f(u) - s f(v)),

with the expectations by a fine two-dimensional grid in the logits and the integrals by the
trapezoidal rule in log t and log s. Their difference is `I`, and the first plus `n - 1` times the
second is `1 / n`. Dividing `f` by its mean and `t, s` by `n` changes nothing.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# Integrands fall off like t for small t, and like phi(t)^n for large t.
_LOG_T = np.arange(-26.0, 26.0, 0.4)
_REACH = 9.0


class Moments(NamedTuple):
    same: Array
    cross: Array


def surrogate(z: Array, order: int | None) -> Array:
    if order is None:
        return jnp.exp(z)
    return functools.reduce(
        lambda total, k: total + z**k / float(math.factorial(k)),
        range(order + 1),
        jnp.zeros_like(z),
    )


@functools.partial(jax.jit, static_argnames=("n", "order", "grid"))
def moments(
    var1: Array, correlation: Array, var2: Array, *, n: int, order: int | None, grid: int = 200
) -> Moments:
    """Same-class and cross-class second moments for one pair of inputs, scalars."""
    x = jnp.linspace(-_REACH, _REACH, grid)
    weight = jnp.exp(-(x**2) / 2)
    weight = weight / jnp.sum(weight)
    t = jnp.asarray(np.exp(_LOG_T)) / n
    rest = jnp.sqrt(jnp.maximum(1 - correlation**2, 0))

    def scaled(z: Array, variance: Array) -> Array:
        if order is None:
            return jnp.exp(z - variance / 2)
        mean = sum((variance / 2) ** j / math.factorial(j) for j in range(order // 2 + 1))
        return surrogate(z, order) / mean

    f_u = scaled(jnp.sqrt(var1) * x, var1)
    f_v = scaled(jnp.sqrt(var2) * (correlation * x[:, None] + rest * x), var2)
    e_u = jnp.exp(-t[:, None] * f_u) * weight

    def given_u(s: Array) -> tuple[Array, Array]:
        e_v = jnp.exp(-s * f_v) * weight
        return jnp.sum(e_v, 1), jnp.sum(f_v * e_v, 1)

    zeroth, first = jax.lax.map(given_u, t)
    phi = e_u @ zeroth.T
    phi_u, phi_v, phi_uv = (e_u * f_u) @ zeroth.T, e_u @ first.T, (e_u * f_u) @ first.T
    step = (t * (_LOG_T[1] - _LOG_T[0]))[:, None] * t * (_LOG_T[1] - _LOG_T[0])
    return Moments(
        jnp.sum(step * phi_uv * phi ** (n - 1)),
        jnp.sum(step * phi_u * phi_v * phi ** (n - 2)),
    )


def class_covariance(
    var1: float, correlation: float, var2: float, *, n: int, order: int | None, grid: int = 200
) -> float:
    same, cross = moments(
        jnp.asarray(var1), jnp.asarray(correlation), jnp.asarray(var2), n=n, order=order, grid=grid
    )
    return float(same - cross)
