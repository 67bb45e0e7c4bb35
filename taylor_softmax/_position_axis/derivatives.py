"""Derivatives of means over Gaussian logits, as means themselves, by Price's theorem.

Of `F(u, v)` with `(u, v) ~ N(0, [[K11, K12], [K12^T, K22]])`, along `X11`, `X12`, `X22`,

    dE[F] = E[sum X12_jk d_uj d_vk F] + E[sum X11_jk d_uj d_uk F + sum X22_jk d_vj d_vk F] / 2.

Everything here is linear in the `X`. With `y = f / sum f`, `q = f' / sum f`, `r = f'' / sum f`,
`J = diag(q) - y q^T` and

    D_jk y_i = [i=j=k] r_i - [i=j] q_i q_k - [i=k] q_i q_j - [j=k] y_i r_j + 2 y_i q_j q_k,

`F = y y'^T` has `J X12 J'^T` (see `sampling.jacobian_product`) and `(D^2 y : X11) y'^T / 2`, and
`F = J Theta J'^T`, the NTK, the same of one order more.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from taylor_softmax._numerics.precision import matmul
from taylor_softmax._position_axis.sampling import Outputs

# From logits `(S, points)` to the outputs at them.
At = Callable[[Array], Outputs]


def curved(outputs: Outputs, change: Float[Array, "S S"]) -> Float[Array, "S points"]:
    """`D^2 y : X` at each point, for the symmetric part `X` of `change`."""
    y, q, r = outputs
    moved = matmul((change + change.T) / 2, q)
    trace = jnp.sum(jnp.diagonal(change)[:, None] * r, 0)
    own = jnp.diagonal(change)[:, None] * r - 2 * q * moved
    return own + y * (2 * jnp.sum(q * moved, 0) - trace)


def curved_jacobian_product(
    outputs: At,
    z: Float[Array, "S points"],
    right: Outputs,
    change: Float[Array, "S S"],
    theta: Float[Array, "S T"],
) -> Float[Array, "S T"]:
    """Mean over the points of `(D^2 J : X) Theta J'^T`, `D^2 J : X` being the Jacobian of `curved`.

    `J'^T = diag(q') - q' y'^T`: the first part is a derivative along every column of `Theta`.
    """

    def along(direction: Array) -> Array:
        return jax.jvp(lambda z: curved(outputs(z), change), (z,), (direction,))[1]

    def column(given: tuple[Array, Array]) -> Array:
        direction, slope = given
        return matmul(along(jnp.broadcast_to(direction[:, None], z.shape)), slope)

    first = lax.map(column, (theta.T, right.slope)).T
    second = matmul(along(matmul(theta, right.slope)), right.value.T)
    return (first - second) / z.shape[1]


def cross_jacobian_product(
    left: Outputs, right: Outputs, theta: Float[Array, "S T"], change: Float[Array, "S T"]
) -> Float[Array, "S T"]:
    """Mean over the points of `sum_jk,lm D_jk y Theta_jl X_km (D_lm y')^T`.

    The derivative of `E[J Theta J'^T]` in `K12` along `X`; multiplied out, so that no third axis is
    held for a point. Symmetric in `Theta` and `X`.
    """
    (y, q, r), (w, p, s) = left, right
    both = theta * change
    a, b = matmul(theta, p), matmul(change, p)
    c, d = matmul(theta.T, q), matmul(change.T, q)
    qa, qb = jnp.sum(q * a, 0), jnp.sum(q * b, 0)

    def along(inner: Array, other: Array, of_right: Array, of_left: Array) -> Array:
        """What has `inner` as a factor of each entry."""
        total = matmul(q * other - r * of_right, p.T) - matmul(q, (of_left * s).T)
        return inner * total

    total = both * matmul(r, s.T) + along(theta, qb, b, d) + along(change, qa, a, c)
    total = total + matmul(q * a, (d * p).T) + matmul(q * b, (c * p).T)
    of_left = r * (2 * a * b - matmul(both, s)) - 2 * q * (a * qb + b * qa)
    of_left = of_left + q * (matmul(theta, s * d) + matmul(change, s * c))
    of_right = s * (2 * c * d - matmul(both.T, r)) - 2 * p * (c * qb + d * qa)
    of_right = of_right + p * (matmul(theta.T, r * b) + matmul(change.T, r * a))
    of_both = jnp.sum(r * (matmul(both, s) - 2 * a * b), 0) - 2 * jnp.sum(s * c * d, 0)
    total = total + matmul(of_left + y * (of_both + 4 * qa * qb), w.T) + matmul(y, of_right.T)
    return total / y.shape[1]


def first_order_only(x: Array, *made_of: Array) -> Array:
    """`x`, where neither it nor what it is `made_of` may be differentiated.

    For what an estimate of a derivative is made of.
    A primitive: a rule of `jax.custom_jvp` is forgotten in reverse mode, where a second derivative
    would be the estimate's own, in silence.
    """
    return _first_order_only_p.bind(x, *made_of)


def _no_second_derivative(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "Second derivatives of estimates over positions are not implemented: a derivative is an "
        "estimate of its own, by Price's theorem, and its derivative would be that of the "
        "estimate, not of what is estimated. Use first derivatives, or `order=2`, which has a "
        "closed form and all derivatives."
    )


_first_order_only_p = Primitive("first_order_only")
_first_order_only_p.def_impl(lambda x, *_: x)
_first_order_only_p.def_abstract_eval(lambda x, *_: x)
ad.primitive_jvps[_first_order_only_p] = _no_second_derivative
batching.primitive_batchers[_first_order_only_p] = lambda arrays, axes: (
    _first_order_only_p.bind(*arrays),
    axes[0],
)
mlir.register_lowering(_first_order_only_p, lambda _, x, *others: [x])
