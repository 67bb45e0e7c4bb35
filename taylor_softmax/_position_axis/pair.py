"""The second moment of one pair of inputs, its derivatives and its NTK, from points.

`(u, v) ~ N(0, [[K11, K12], [K12^T, K22]])` are the logits at the `S` positions of two inputs, in
one channel. Wanted is the `(S, S)` matrix `E[y(u) y(v)^T]` of `y(z)_p = f(z_p) / sum_q f(z_q)`,
and for the NTK its derivative in `K12` along the incoming NTK `Theta`, by Price's theorem
`E[J(u) Theta J(v)^T]` with `J` the Jacobian of `y`.

With `v_r` of cross-covariance `r K12` with `u`,

    E[y(u) y(v)^T] = m m'^T + int_0^1 G(r; K12) dr,    G(r; X) = E[J(u) X J(v_r)^T],

and the NTK is `G(1; Theta)`: two numbers from one mechanism. What is sampled is as small as what it
is integrated to, blind to constants in `X`, and the sums over rows and columns are those of `m` and
`m'` whatever the points are. Points and their negatives at both inputs give `G` at `r` and `-r`,
and so its even and odd part. With `m = E[y]`, `B = E[J]` and `T = E[D^2 y]`, computed once an input
(see `components`),

    even: B K12 B'^T + O(r^2),    odd: r <T, K12 (x) K12, T'> + O(r^3),

so that a single `r` is enough for the rest, as in Gauss's rule: what stands beyond has the powers
`r^2`, `r^4` and `r^3`, `r^5`, and with `r = 0.8` and the weights of `r^2` and `r^3` those of `r^4`
and `r^5` are 7 % and 4 % off. Control variate is what the sample means of `J` miss of `B`.
At large variances products of the values themselves have less of an error; both are mixed. Where
an error is asked for, it is values alone: their spread tells all of their error.
Each scrambling of the points gives an estimate, and their spread its error: see `estimate`.
Derivatives are estimates of their own, by Price's theorem: see `derivatives`.

Standard errors with 1,024 points, over the largest entry, 16 positions, correlation 0.9, in 1e-3 at
variance 1 / 4 (largest entry's), of the parts of odd and even degree in `y`:

- derivative at 0.8: 0.7 / 4.1 and 0.9 / 5.4; at (1, 0.6): 0.8 / 4.5 and 1.3 / 6.0, for twice the
  time;
- values: 7.8 / 14 and 6.7 / 12; less the component of degree 1: 1.4 / 3.6; less that of degree 2,
  `S^3` operations a point: 0.4 / 4.2;
- one node without the known coefficient of the odd part: a bias of 3 / 30 to 60.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Float

from taylor_softmax._numerics.precision import matmul
from taylor_softmax._numerics.statistics import Running
from taylor_softmax._numerics.surrogate import Surrogate
from taylor_softmax._position_axis import derivatives, estimate, sampling
from taylor_softmax._position_axis.components import Components
from taylor_softmax._position_axis.estimate import Budget

# Values of r at which the derivative is sampled, where the coefficient of degree 1 in r is known
# and where it is not.
_NODES = (0.8,)
_NODES_WITHOUT_CURVATURE = (0.9, 0.5)

# Variances of the logits at which the derivative's even and odd part, and the odd and even part of
# the values at r = 1, less what is linear, have errors of the same size. Beyond, the derivative's
# grow without limit, at large variances of Taylor softmax beyond every value (order 8, variance
# 1e4); a product of values is between 0 and 1.
_EQUALLY_GOOD = (4.0, 10.0)


class Expansion(NamedTuple):
    """What a pair needs of one of its inputs, where points are used.

    Attributes:
      present: 1 where there is a position, 0 where it is padding, `(S,)`.
      covariance: of its logits.
      root: of the covariance.
      components: of its outputs.
    """

    present: Float[Array, "*n S"]
    covariance: Float[Array, "*n S S"]
    root: sampling.Root
    components: Components


def series(
    one: Expansion, two: Expansion, cov12: Array, theta: Array | None
) -> tuple[Array, Array | None]:
    """The second moment and its derivative of one pair by the series alone, to degree 2."""
    of_one, of_two = one.components, two.components
    moment = of_one.mean[:, None] * of_two.mean + of_one.linear(cov12, of_two)
    moment = moment + of_one.quadratic(cov12, cov12, of_two) / 2
    if theta is None:
        return moment, None
    return moment, of_one.linear(theta, of_two) + of_one.quadratic(cov12, theta, of_two)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def sampled(
    surrogate: Surrogate,
    budget: Budget,
    one: Expansion,
    two: Expansion,
    cov12: Float[Array, "S T"],
    theta: Float[Array, "S T"] | None,
    points: Float[Array, "k blocks dims points"],
) -> tuple[Float[Array, "results S T"], Float[Array, " results"], Float[Array, ""]]:
    """The second moment and its derivative of one pair, their errors, and how many scramblings."""
    of_one, of_two = one.components, two.components
    uncorrelated = of_one.linear(cov12, of_two)
    known = of_one.curvature is not None
    nodes = _NODES if known else _NODES_WITHOUT_CURVATURE
    of_odd, of_even = (_share_of_values(one, two, at) for at in _EQUALLY_GOOD)
    if budget.error is not None:
        # No rule in r has an error that the spread would not see (4e-3 of the NNGP's scale at
        # variance 20, 3 positions, measured).
        nodes, of_odd, of_even = (), 1.0, 1.0
    even_weights, odd_weights = (
        sampling.integral_weights(nodes, first) for first in (2, 3 if known else 1)
    )
    start = of_one.mean[:, None] * of_two.mean + uncorrelated
    odd_known = jnp.zeros_like(start)
    if known and nodes:
        # Taken off the odd part at each node, and integrated.
        share = 0.5 - sum(w * r for w, r in zip(odd_weights, nodes, strict=True))
        odd_known = share * of_one.quadratic(cov12, cov12, of_two)
    logits = sampling.correlate(one.root, two.root, cov12)[:2]

    def once(blocks: Array) -> Array:
        means = _sample(one, two, logits, cov12, theta, nodes, surrogate, blocks)
        even, odd = jnp.zeros_like(start), odd_known
        for (plus, minus, right), even_weight, odd_weight in zip(
            means.at_nodes, even_weights, odd_weights, strict=True
        ):
            missed = _missed(of_one, of_two, means.left, right, cov12)
            both = (plus + minus) / 2 + missed - uncorrelated
            even, odd = even + even_weight * both, odd + odd_weight * (plus - minus) / 2
        # An even derivative is of odd values.
        moment = start + even + of_odd * (means.odd - even)
        moment = moment + odd + of_even * (means.even - odd)
        if theta is None:
            return moment[None]
        assert means.derivative is not None
        missed = _missed(of_one, of_two, means.left, means.right, theta)
        return jnp.stack([moment, means.derivative + missed])

    units = estimate.units(of_one, of_two, theta)
    of_components = of_one.variance(cov12, theta, of_two)

    def error(state: Running) -> Array:
        stderr = jnp.sqrt(state.stderr() ** 2 + of_components)
        return estimate.relative_error(stderr, units, state.n, budget.n_scramblings)

    def reached(state: Running) -> Array:
        assert budget.error is not None
        return jnp.all(error(state) <= budget.error)

    variances = (jnp.max(jnp.diagonal(of.covariance)) for of in (one, two))
    variance = functools.reduce(jnp.multiply, (jnp.sqrt(jnp.maximum(x, 0)) for x in variances))
    limit = budget.limit(variance)
    total = estimate.average(once, points, limit, None if budget.error is None else reached)
    return total.mean, error(total), total.n


def _sampled_jvp(
    surrogate: Surrogate, budget: Budget, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    """By Price's theorem, from the scramblings that the value took."""
    results = sampled(surrogate, budget, *primals)
    *inputs, cov12, theta, points = primals
    only = derivatives.first_order_only
    one, two = (jax.tree.map(lambda x, of=of: only(x, of.covariance), of) for of in inputs)
    cov12, theta = jax.tree.map(only, (cov12, theta))
    d_one, d_two, d_cross, d_theta, _ = tangents
    changes = _Changes(
        *(
            None if x is None or isinstance(x, SymbolicZero) else x
            for x in (d_one.covariance, d_two.covariance, d_cross, d_theta)
        )
    )
    n = lax.stop_gradient(results[2])
    slopes = _slopes(surrogate, one, two, cov12, theta, points, n, changes)
    return results, (slopes, *(jnp.zeros_like(x) for x in results[1:]))


sampled.defjvp(_sampled_jvp, symbolic_zeros=True)


class _Changes(NamedTuple):
    """Tangents of a pair; None where there is none."""

    cov11: Array | None
    cov22: Array | None
    cov12: Array | None
    theta: Array | None


def _slopes(
    surrogate: Surrogate,
    one: Expansion,
    two: Expansion,
    cov12: Array,
    theta: Array | None,
    points: Array,
    n: Array,
    changes: _Changes,
) -> Float[Array, "results S T"]:
    """The derivative along `changes`, in which it is linear, from the first `n` scramblings."""
    of_one, of_two = one.components, two.components
    logits = sampling.correlate(one.root, two.root, cov12)[:2]
    nothing = jnp.zeros_like(cov12)

    def block(z: Array) -> Array:
        u, v, _ = _logits(one, two, logits, z)
        u, v = (jnp.concatenate([x, -x], 1) for x in (u, v))
        at_one, at_two = (
            functools.partial(sampling.outputs_at, present=of.present, surrogate=surrogate)
            for of in (one, two)
        )
        left, right = at_one(u), at_two(v)

        def once(theta: Array, change: Array) -> Array:
            product = sampling.jacobian_product(left, right, change)
            return product + _missed(
                of_one, of_two, left.mean_jacobian(), right.mean_jacobian(), change
            )

        moment, slope = nothing, nothing
        if changes.cov12 is not None:
            moment = moment + once(cov12, changes.cov12)
        if changes.cov11 is not None:
            curved = derivatives.curved(left, changes.cov11)
            moment = moment + matmul(curved, right.value.T) / (2 * u.shape[1])
        if changes.cov22 is not None:
            curved = derivatives.curved(right, changes.cov22)
            moment = moment + matmul(left.value, curved.T) / (2 * u.shape[1])
        if theta is None:
            return moment[None]
        if changes.theta is not None:
            slope = slope + once(theta, changes.theta)
        if changes.cov12 is not None:
            slope = slope + derivatives.cross_jacobian_product(left, right, theta, changes.cov12)
        if changes.cov11 is not None:
            product = derivatives.curved_jacobian_product
            slope = slope + product(at_one, u, right, changes.cov11, theta) / 2
        if changes.cov22 is not None:
            product = derivatives.curved_jacobian_product
            slope = slope + product(at_two, v, left, changes.cov22, theta.T).T / 2
        return jnp.stack([moment, slope])

    blocks = points.reshape(-1, *points.shape[2:])
    return estimate.mean_of_first(block, blocks, n * points.shape[1])


def _missed(one: Components, two: Components, left: Array, right: Array, inner: Array) -> Array:
    """What `E[J C J'^T]` misses for the sample means of `J` being off `B`, to first order."""
    first = matmul(matmul(one.slope - left, inner), two.slope.T)
    return first + matmul(matmul(one.slope, inner), (two.slope - right).T)


def _share_of_values(one: Expansion, two: Expansion, equal: float) -> Array:
    """Weight of what values, rather than derivatives, say; half at the variance `equal`."""
    total = lax.stop_gradient(jnp.sqrt(jnp.sum(one.root.root**2) * jnp.sum(two.root.root**2)))
    count = jnp.sqrt(jnp.sum(one.present) * jnp.sum(two.present))
    square = (total / jnp.maximum(count, 1) / equal) ** 2
    return square / (1 + square)


class _Means(NamedTuple):
    """Means over points of one pair; `J` and `J'` are the Jacobians of its two inputs.

    Attributes:
      left: of `J`.
      at_nodes: for each r, of `J K12 J'^T` at r and at -r, and of `J'`.
      right: of `J'` at r = 1.
      even, odd: of products of the even and odd parts of `y` and `y'` in the points at r = 1, less
        their means and what is linear in the logits.
      derivative: of `J Theta J'^T` at r = 1; None without `Theta`.
    """

    left: Array
    at_nodes: tuple[tuple[Array, Array, Array], ...]
    right: Array
    even: Array
    odd: Array
    derivative: Array | None


def _sample(
    one: Expansion,
    two: Expansion,
    logits: tuple[Array, Array],
    cov12: Array,
    theta: Array | None,
    nodes: tuple[float, ...],
    surrogate: Surrogate,
    blocks: Array,
) -> _Means:
    """Args: `logits` as `_logits` takes them; `blocks` of points, `(blocks, S + 2 T, points)`."""

    def residual_parts(at: sampling.Outputs, z: Array, of: Expansion) -> tuple[Array, Array]:
        plus, minus = jnp.split(at.value, 2, 1)
        even = (plus + minus) / 2 - of.components.mean[:, None]
        return even, (plus - minus) / 2 - matmul(of.components.slope, z)

    def block(z: Array) -> _Means:
        u, correlated, independent = _logits(one, two, logits, z)
        left = sampling.outputs(u, one.present, surrogate)
        at_nodes = []
        for r in nodes:
            z = r * correlated + math.sqrt(1 - r * r) * independent
            right = sampling.outputs(z, two.present, surrogate)
            both = (sampling.jacobian_product(left, at, cov12) for at in (right, right.mirrored()))
            at_nodes.append((*both, right.mean_jacobian()))
        right = sampling.outputs(correlated, two.present, surrogate)
        residuals = residual_parts(left, u, one), residual_parts(right, correlated, two)
        even, odd = (matmul(x, y.T) / z.shape[1] for x, y in zip(*residuals, strict=True))
        return _Means(
            left.mean_jacobian(),
            tuple(at_nodes),
            right.mean_jacobian(),
            even,
            odd,
            None if theta is None else sampling.jacobian_product(left, right, theta),
        )

    if len(blocks) == 1:
        return block(blocks[0])

    def add(total: _Means, z: Array) -> tuple[_Means, None]:
        return jax.tree.map(jnp.add, total, block(z)), None

    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(block, blocks[0]))
    total, _ = lax.scan(add, start, blocks)
    return jax.tree.map(lambda x: x / len(blocks), total)


def _logits(
    one: Expansion, two: Expansion, logits: tuple[Array, Array], z: Array
) -> tuple[Array, Array, Array]:
    """`u`, `v` and an independent `v` at the points `z`.

    Args:
      logits: `A` and `Q` of `sampling.correlate`.
    """
    slope, rest = logits
    first, second, third = jnp.split(z, np.cumsum(slope.shape))
    v = matmul(slope.T, first) + matmul(rest, second)
    return matmul(one.root.root, first), v, matmul(two.root.root, third)
