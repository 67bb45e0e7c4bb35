"""Softmax over an infinitely wide axis.

`n softmax(z)_i -> f(z_i) / E[f(z)]` as the width `n` grows, by the law of large numbers: multiplied
by the width, softmax has a limit, and it acts elementwise. With `(u, v) ~ N(0, [[a, c], [c, b]])`

    nngp = E[f(u) f(v)] / (E[f(u)] E[f(v)]),    d nngp / dc = E[f'(u) f'(v)] / (E[f(u)] E[f(v)]),

both `exp(c)` for softmax itself, and for the Taylor polynomial of order m, by Mehler's formula and
`f_m' = f_{m-1}`,

    E[f_m(u) f_m(v)] = sum_{j <= m} c^j / j!  e_r(a/2) e_r(b/2),   r = floor((m - j) / 2),
    E[f_m(u)] = e_{m/2}(a/2),   e_r(x) = sum_{i <= r} x^i / i!.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from taylor_softmax._numerics.surrogate import Exponential, Surrogate


def moments(
    var1: Array, cov12: Array, var2: Array, *, surrogate: Surrogate
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """`(nngp, d nngp / d cov12)` of the infinitely wide layer, for arrays that broadcast.

    For softmax both overflow where `exp(cov12)` does, as the limit itself does.
    """
    if isinstance(surrogate, Exponential):
        value = jnp.exp(cov12) * jnp.ones_like(var1 * var2)
        return value, value
    order = surrogate.order
    assert order is not None
    return _mehler(var1, cov12, var2, order, order), _mehler(var1, cov12, var2, order - 1, order)


def _mehler(var1: Array, cov12: Array, var2: Array, order: int, normaliser: int) -> Array:
    """`E[f_m(u) f_m(v)] / (E[f_k(u)] E[f_k(v)])` for `m = order`, `k = normaliser`.

    In float32 `e_0(x) / e_16(x)` underflows when it is squared at variances near 1e3, and the sums
    themselves overflow at 1e5. Divided by a power of `s = max(1, x / M)` for each of their `M`
    degrees, they stay between 1 and `exp(M)`. The step of Horner's scheme to the next term puts in
    what is taken out of a term.
    """
    # order <= normaliser: the sums up to the normaliser's degree hold all that are needed.
    degree = normaliser // 2
    scales, ratios = [], []
    for x in (var1 / 2, var2 / 2):
        # The result does not depend on the scale, which therefore needs no derivative.
        scale = lax.stop_gradient(jnp.maximum(1.0, x / degree))
        sums = _exponential_sums(x, scale, degree)
        scales.append(scale)
        ratios.append(sums / sums[-1])
    total = jnp.zeros_like(var1 * cov12 * var2)
    previous_r = 0
    for j in range(order, -1, -1):
        r = (order - j) // 2
        step = cov12 / (j + 1)
        if r > previous_r:
            step = step / scales[0] / scales[1]
        total, previous_r = total * step + ratios[0][r] * ratios[1][r], r
    for _ in range(degree - previous_r):
        total = total / scales[0] / scales[1]
    return total


def _exponential_sums(x: Array, scale: Array, largest: int) -> Array:
    """`e_r(x) / scale^r` for `r <= largest`, stacked in front."""
    total = term = jnp.ones_like(x)
    sums = [total]
    for i in range(1, largest + 1):
        term = term * (x / scale) / i
        total = total / scale + term
        sums.append(total)
    return jnp.stack(sums)
