"""The second moment of one pair of inputs, its derivatives and its NTK, from points.

`(u, v) ~ N(0, [[K11, K12], [K12^T, K22]])` are the logits at the `S` positions of two inputs, in
one channel. Wanted is the `(S, S)` matrix `E[y(u) y(v)^T]` of `y(z)_p = f(z_p) / sum_q f(z_q)`,
and for the NTK its derivative in `K12` along the incoming NTK `Theta`, by Price's theorem
`E[J(u) Theta J(v)^T]` with `J` the Jacobian of `y`.

With the components `m = E[y]`, `B = E[J]` and `T = E[D^2 y]`, computed once an input (see
`components`), and `h(u) = m + B u + g(u)` of a quadratic form `g` that says most of degree 2,

    E[y y'^T] = E[h h'^T] + E[(y - h) h'^T] + E[h (y' - h')^T] + E[(y - h) (y' - h')^T].

The last term is sampled. The others are known of `m`, `B`, `T` and `T_g = D^2 g`:

    m m'^T + B K12 B'^T + (<T, K12 (x) K12, T'> - <T - T_g, K12 (x) K12, T' - T'_g>) / 2.

So `g` need not be all of degree 2, for which it would take `S^3` operations a point instead of
`S^2`: what is missing costs variance, and no bias. Points come with their negatives, which makes
odd and even parts of `y` apart. The sums over rows and columns are those of `m` and `m'` whatever
the points are.
The NTK is sampled as it stands. Control variate is what the sample means of `J` miss of `B`.
Each scrambling of the points gives an estimate, and their spread its error: see `estimate`.
Derivatives are estimates of their own, by Price's theorem: see `derivatives`.

Errors of the NNGP in 1e-3 at variances 0.25 / 1 / 4 / 20 (16 i.i.d. positions, all correlations,
8,192 points, means of four seeds):

- as here: 0.2 / 1.3 / 4.6 / 15;
- without `g`: 1.2 / 5.1 / 12 / 19;
- instead `m m'^T` plus the integral of `E[J K12 J'^T]` over the correlation, sampled at one value
  of it, mixed with values less their linear part from a variance of 4 on: 0.2 / 1.2 / 7.0 / 19,
  for 1.7 times the time.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Float

from taylor_softmax._numerics.precision import matmul
from taylor_softmax._numerics.statistics import Running, sum_over
from taylor_softmax._numerics.surrogate import Surrogate
from taylor_softmax._position_axis import derivatives, estimate, sampling
from taylor_softmax._position_axis.components import Components, quadratic_form
from taylor_softmax._position_axis.estimate import Budget


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
    known = of_one.mean[:, None] * of_two.mean + of_one.linear(cov12, of_two)
    if of_one.curvature is not None:
        known = known + of_one.quadratic_of_forms(cov12, of_two)
    logits = sampling.correlate(one.root, two.root, cov12)

    def block(z: Array) -> tuple[Array, ...]:
        u, v = _logits(one, logits, z)
        left = sampling.outputs(u, one.present, surrogate)
        right = sampling.outputs(v, two.present, surrogate)
        residual = matmul(_residual(left, u, one), _residual(right, v, two).T) / z.shape[1]
        if theta is None:
            return (residual,)
        product = sampling.jacobian_product(left, right, theta)
        return residual, product, left.mean_jacobian(), right.mean_jacobian()

    def once(blocks: Array) -> Array:
        residual, *jacobians = (x / len(blocks) for x in sum_over(block, blocks))
        moment = known + residual
        if theta is None:
            return moment[None]
        product, left, right = jacobians
        return jnp.stack([moment, _corrected(product, left, right, one, two, theta)])

    units = estimate.units(of_one, of_two, theta)
    of_components = of_one.variance(cov12, theta, of_two)

    def error(state: Running) -> Array:
        stderr = jnp.sqrt(state.stderr() ** 2 + of_components)
        return estimate.relative_error(stderr, units, state.n, budget.n_scramblings)

    variances = (jnp.max(jnp.diagonal(of.covariance)) for of in (one, two))
    variance = functools.reduce(jnp.multiply, (jnp.sqrt(jnp.maximum(x, 0)) for x in variances))
    return estimate.average(once, points, budget, variance, error)


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
    changes = [
        None if isinstance(x, SymbolicZero) else x
        for x in (d_one.covariance, d_two.covariance, d_cross, d_theta)
    ]
    n = lax.stop_gradient(results[2])
    slopes = _slopes(surrogate, one, two, cov12, theta, points, n, *changes)
    return results, (slopes, *(jnp.zeros_like(x) for x in results[1:]))


sampled.defjvp(_sampled_jvp, symbolic_zeros=True)


def _slopes(
    surrogate: Surrogate,
    one: Expansion,
    two: Expansion,
    cov12: Array,
    theta: Array | None,
    points: Array,
    n: Array,
    d_cov11: Array | None,
    d_cov22: Array | None,
    d_cov12: Array | None,
    d_theta: Array | None,
) -> Float[Array, "results S T"]:
    """The derivative along the `d_`, in which it is linear, from the first `n` scramblings."""
    logits = sampling.correlate(one.root, two.root, cov12)
    nothing = jnp.zeros_like(cov12)

    def block(z: Array) -> Array:
        u, v = _logits(one, logits, z)
        u, v = (jnp.concatenate([x, -x], 1) for x in (u, v))
        at_one, at_two = (
            functools.partial(sampling.outputs_at, present=of.present, surrogate=surrogate)
            for of in (one, two)
        )
        left, right = at_one(u), at_two(v)

        def jacobian_product(change: Array) -> Array:
            product = sampling.jacobian_product(left, right, change)
            means = left.mean_jacobian(), right.mean_jacobian()
            return _corrected(product, *means, one, two, change)

        moment, slope = nothing, nothing
        if d_cov12 is not None:
            moment = moment + jacobian_product(d_cov12)
        if d_cov11 is not None:
            curved = derivatives.curved(left, d_cov11)
            moment = moment + matmul(curved, right.value.T) / (2 * u.shape[1])
        if d_cov22 is not None:
            curved = derivatives.curved(right, d_cov22)
            moment = moment + matmul(left.value, curved.T) / (2 * u.shape[1])
        if theta is None:
            return moment[None]
        if d_theta is not None:
            slope = slope + jacobian_product(d_theta)
        if d_cov12 is not None:
            slope = slope + derivatives.cross_jacobian_product(left, right, theta, d_cov12)
        if d_cov11 is not None:
            product = derivatives.curved_jacobian_product
            slope = slope + product(at_one, u, right, d_cov11, theta) / 2
        if d_cov22 is not None:
            product = derivatives.curved_jacobian_product
            slope = slope + product(at_two, v, left, d_cov22, theta.T).T / 2
        return jnp.stack([moment, slope])

    blocks = points.reshape(-1, *points.shape[2:])
    return estimate.mean_of_first(block, blocks, n * points.shape[1])


def _corrected(
    product: Array, left: Array, right: Array, one: Expansion, two: Expansion, inner: Array
) -> Float[Array, "S T"]:
    """The mean `product` of `J C J'^T`, to first order without what those of `J`, `J'` are off `B`.

    Args:
      left, right: means of `J` and `J'`.
      inner: `C`.
    """
    slope1, slope2 = one.components.slope, two.components.slope
    product = product + matmul(matmul(slope1 - left, inner), slope2.T)
    return product + matmul(matmul(slope1, inner), (slope2 - right).T)


def _residual(
    outputs: sampling.Outputs, z: Array, expansion: Expansion
) -> Float[Array, "S points"]:
    """`y` less its components: the even part at `z` and, behind it, the odd part."""
    curvature = expansion.components.curvature
    plus, minus = jnp.split(outputs.value, 2, 1)
    even = (plus + minus) / 2 - expansion.components.mean[:, None]
    if curvature is not None:
        root = expansion.root.root
        even = even - quadratic_form(curvature.mixed, curvature.squares, root, z, expansion.present)
    return jnp.concatenate([even, (plus - minus) / 2 - matmul(expansion.components.slope, z)], 1)


def _logits(one: Expansion, logits: tuple[Array, Array], z: Array) -> tuple[Array, Array]:
    """`u` and `v` at the points `z`.

    Args:
      logits: `A` and `Q` of `sampling.correlate`.
    """
    slope, rest = logits
    first, second = jnp.split(z, [len(slope)])
    return matmul(one.root.root, first), matmul(slope.T, first) + matmul(rest, second)
