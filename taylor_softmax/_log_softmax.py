"""Log-softmax of i.i.d. Gaussian logits: second moments from the class covariance of softmax.

`l(z) = z - L(z)` with `L(z) = log sum_j exp z_j`, whose gradient is `y = softmax(z)`. For `n`
classes with logits `(u_i, v_i) ~ N(0, [[a, c], [c, b]])` Stein's lemma gives
`E[u_i L(v)] = c E[y_i(v)] = c / n`, and Price's theorem

    d E[L(u) L(v)] / dc = E[y(u) . y(v)] = 1 / n + (n - 1) I(a, c, b),

with `I` the class covariance (`taylor_softmax.class_covariance`). So, with `M(a) = E[L(u)]`,

    E[l_i(u) l_j(v)] = c ([i = j] - 1 / n) + M(a) M(b) + (n - 1) int_0^c I(a, x, b) dx:

where `1 / n` of the integrand cancels half of `2 c / n`. Jacobians are `Id - 1 y^T`, so that

    E[sum_k J_ik(u) J_jk(v)] = [i = j] - 1 / n + (n - 1) I(a, c, b).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float

from taylor_softmax._class_axis.covariance import Pairs, covariances
from taylor_softmax._numerics.surrogate import Exponential
from taylor_softmax._probabilities.log_normalizer import of_equal_logits
from taylor_softmax.methods import Method

# Nodes of the integral. Its error relative to the largest moment, measured at 2 classes against
# quadrature, is 4e-9 up to variance 4 and 1e-8 at 100, where 6 nodes have 1e-6. At 1e4 it is 6e-7,
# which is the error of I.
_NODES = 10


class Moments(NamedTuple):
    """Second moments of the outputs at two inputs, and of their Jacobians, for the NTK.

    Attributes:
      same, cross: `E[l_i(u) l_j(v)]` for one class and for two.
      same_factor, cross_factor: `E[sum_k J_ik(u) J_jk(v)]` likewise.
    """

    same: Float[Array, "..."]
    cross: Float[Array, "..."]
    same_factor: Float[Array, "..."]
    cross_factor: Float[Array, "..."]


def moments(
    requests: Sequence[Pairs], *, n_classes: int, method: Method | None = None
) -> list[Moments]:
    """Moments for every one of `requests`, each of the shape that its arrays broadcast to.

    Args:
      requests: variances and covariances of pairs of inputs.
      n_classes: `n`.
      method: for the class covariance, see `taylor_softmax.class_covariance`.
    """
    integrals, values = _integrals(requests, n_classes, method)
    results = []
    for (var1, cov12, var2), integral, value in zip(requests, integrals, values, strict=True):
        means = of_equal_logits(var1, n_classes) * of_equal_logits(var2, n_classes)
        cross = means + (n_classes - 1) * integral - cov12 / n_classes
        factor = (n_classes - 1) * value - 1 / n_classes
        results.append(Moments(cross + cov12, cross, factor + 1, factor))
    return results


def _integrals(
    requests: Sequence[Pairs], n_classes: int, method: Method | None
) -> tuple[list[Array], list[Array]]:
    """`int_0^c I(a, x, b) dx` and `I(a, c, b)` for each request.

    The nodes are in `t`, `x = c sin(pi t / 2)`: where logits are nearly equal, `I` of large
    variances behaves like a root in `x`, but is smooth in `t`.
    """
    fractions, weights = _sine_rule(_NODES)
    evaluate = functools.partial(
        covariances,
        n_classes=n_classes,
        surrogate=Exponential(),
        method=method,
        slopes=[False] * len(requests),
    )

    # The backward pass computes a node anew. Otherwise it would keep every node's intermediates.
    @jax.checkpoint
    def add(
        carry: tuple[list[Array], list[Array]], node: tuple[Array, Array]
    ) -> tuple[tuple[list[Array], list[Array]], None]:
        fraction, weight = node
        at_node = [request._replace(cov12=fraction * request.cov12) for request in requests]
        values = [value for value, _ in evaluate(at_node)]
        sums = [total + weight * value for total, value in zip(carry[0], values, strict=True)]
        return (sums, values), None

    dtype = jnp.result_type(float, *(x for request in requests for x in request))
    shapes = [jnp.broadcast_shapes(*(x.shape for x in request)) for request in requests]
    zeros = [jnp.zeros(shape, dtype) for shape in shapes]
    nodes = jnp.asarray(fractions, dtype), jnp.asarray(weights, dtype)
    (sums, values), _ = jax.lax.scan(add, (zeros, zeros), nodes)
    return [request.cov12 * x for request, x in zip(requests, sums, strict=True)], values


@functools.cache
def _sine_rule(n_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes `x` and weights for `int_0^1 g(x) dx`, Gauss-Legendre in `t`, `x = sin(pi t / 2)`.

    The last node is 1 and has weight 0: its value is needed beside the integral.
    """
    t, weight = scipy.special.roots_legendre(n_nodes)
    angle = np.pi / 4 * (t + 1)
    nodes, weights = np.sin(angle), np.pi / 4 * weight * np.cos(angle)
    return np.append(nodes, 1.0), np.append(weights, 0.0)
