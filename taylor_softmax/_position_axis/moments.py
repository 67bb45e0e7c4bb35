"""Softmax over positions: a finite axis whose logits have any covariance.

`(u, v) ~ N(0, [[K11, K12], [K12^T, K22]])` are the logits at the `S` positions of two inputs, in
one channel. Wanted is the `(S, S)` matrix `E[y(u) y(v)^T]` of `y(z)_p = f(z_p) / sum_q f(z_q)`,
and for the NTK its derivative in `K12` along the incoming NTK `Theta`, by Price's theorem
`E[J(u) Theta J(v)^T]` with `J` the Jacobian of `y`.

At order 2 both are double integrals of elementary functions, see `closed_form`. Otherwise, with
`v_r` of cross-covariance `r K12` with `u`,

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
At large variances products of the values themselves have less of an error; both are mixed.

Standard errors with 1,024 points, over the largest entry, 16 positions, correlation 0.9, in 1e-3 at
variance 1 / 4 (largest entry's), of the parts of odd and even degree in `y`:

- derivative at 0.8: 0.7 / 4.1 and 0.9 / 5.4; at (1, 0.6): 0.8 / 4.5 and 1.3 / 6.0, for twice the
  time;
- values: 7.8 / 14 and 6.7 / 12; less the component of degree 1: 1.4 / 3.6; less that of degree 2,
  `S^3` operations a point: 0.4 / 4.2;
- one node without the known coefficient of the odd part: a bias of 3 / 30 to 60.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from taylor_softmax._numerics.arguments import Validated, broadcast_covariances
from taylor_softmax._numerics.precision import matmul
from taylor_softmax._numerics.surrogate import Surrogate, parse
from taylor_softmax._position_axis import closed_form, sampling
from taylor_softmax._position_axis.components import Components, components
from taylor_softmax.methods import Direct, Method, QuasiMonteCarlo, Series, choose

# Values of r at which the derivative is sampled, where the coefficient of degree 1 in r is known
# and where it is not.
_NODES = (0.8,)
_NODES_WITHOUT_CURVATURE = (0.9, 0.5)

# Variances of the logits at which the derivative's even and odd part, and the odd and even part of
# the values at r = 1, less what is linear, have errors of the same size. Beyond, the derivative's
# grow without limit, at large variances of Taylor softmax beyond every value (order 8, variance
# 1e4); a product of values is between 0 and 1.
_EQUALLY_GOOD = (4.0, 10.0)

# Points of a pair by default.
_N_POINTS = 1 << 13

# Up to so many positions that coefficient is computed: S^3 numbers an input, S^4 operations a pair.
_LARGEST_CURVATURE = 64

# Numbers in the largest array of a step, on accelerators: they bound the memory, at any number of
# pairs. On a CPU one pair after the other is fastest, its arrays being in the cache.
_CHUNK = 1 << 24


class Expansion(NamedTuple):
    """What a pair needs of one of its inputs, where points are used.

    Attributes:
      present: 1 where there is a position, 0 where it is padding, `(S,)`.
      root: of the covariance of its logits.
      components: of its outputs.
    """

    present: Float[Array, "*n S"]
    root: sampling.Root
    components: Components


Input = closed_form.EigenLogits | Expansion


def joint_second_moment(
    cov11: Validated[ArrayLike],
    cov12: Validated[ArrayLike],
    cov22: Validated[ArrayLike],
    *,
    order: Validated[int | None] = None,
    method: Validated[Method | None] = None,
) -> Float[Array, "*batch S S"]:
    """`E[y(u) y(v)^T]` of a softmax over jointly Gaussian logits with any covariance.

    For `(u, v) ~ N(0, [[K11, K12], [K12^T, K22]])` and `y(z)_p = f(z_p) / sum_q f(z_q)` over `S`
    positions. At order 2 the integrand of the remaining double integral is elementary. For other
    orders and softmax the derivative in `K12` is estimated with quasi-random points, the same at
    every call, and integrated: see the module `taylor_softmax._position_axis.moments`.
    Covariances may be singular, and positive semi-definite up to rounding: the result is finite.
    Differentiable in all three.

    Errors: `POSITIONS_CLOSED_FORM` and `POSITIONS_NNGP` in `taylor_softmax._numerics.errors`, with
    the default number of points.

    Args:
      cov11: `K11`, `(..., S, S)`, symmetric and positive semi-definite.
      cov12: `K12`, `(..., S, S)`.
      cov22: `K22`, `(..., S, S)`.
      order: even order of the Taylor polynomial `f`, or None for softmax itself.
      method: `QuasiMonteCarlo(n_points)`, the default, or `Series()`, the series to degree 2 alone;
        `Direct()` at order 2.

    Returns:
      `(..., S, S)`; dimensionless, the entries of each matrix sum to 1, at order 2 within 3e-5 up
      to variances of 1e4.

    Raises:
      TypeError, ValueError: `order` or `method` is not one of the above; a covariance is not of
        shape `(..., S, S)` with the same `S` as the others.
    """
    surrogate = parse(order)
    method = check_method(method, surrogate)
    *covs, dtype = broadcast_covariances(cov11, cov12, cov22)
    batch, (size, _) = covs[0].shape[:-2], covs[0].shape[-2:]
    flat = tuple(cov.reshape(-1, size, size) for cov in covs)
    moment = _joint_second_moments(*flat, surrogate=surrogate, method=method)
    return moment.reshape(*batch, size, size).astype(dtype)


@functools.partial(jax.jit, static_argnames=("surrogate", "method"))
def _joint_second_moments(
    cov11: Array, cov12: Array, cov22: Array, *, surrogate: Surrogate, method: Method
) -> Array:
    """Compiled once for all calls of a shape; covariances `(pairs, S, S)`."""
    present = jnp.ones(cov11.shape[:2], cov11.dtype)
    one, two = (prepare(cov, present, surrogate=surrogate, method=method) for cov in (cov11, cov22))
    index = jnp.arange(len(cov11))
    return second_moments(one, two, index, index, cov12, None, surrogate, method)[0]


def methods(surrogate: Surrogate) -> tuple[Method, ...]:
    """What evaluates softmax over positions, the default first."""
    return (Direct(),) if surrogate.has_closed_form else (QuasiMonteCarlo(_N_POINTS), Series())


def check_method(method: Any, surrogate: Surrogate) -> Method:
    """`method`, or the default for None, or what is wrong with it."""
    return choose(method, *methods(surrogate), axis=f"{surrogate} over positions")


# Compiled once for all calls of a shape, also of layers outside `jit`: a loop is compiled anew
# wherever it is written down, which takes longer than what it computes for a few inputs.
@functools.partial(jax.jit, static_argnames=("surrogate", "method"))
def prepare(
    covariance: Float[Array, "n S S"],
    present: Float[Array, "n S"],
    *,
    surrogate: Surrogate,
    method: Method,
) -> Input:
    """The `Input` of `n` inputs whose logits have a `covariance` at the positions `present`."""
    noise = sampling.rounding(covariance * present[:, :, None] * present[:, None, :])
    covariance = project(covariance, present, present, surrogate)
    if surrogate.has_closed_form:
        return jax.vmap(closed_form.diagonalise)(covariance, present)
    size = present.shape[-1]
    with_curvature = size <= _LARGEST_CURVATURE or isinstance(method, Series)

    def expand(args: tuple[Array, Array, Array]) -> Expansion:
        covariance, present, noise = args
        root = sampling.psd_root(covariance, noise)
        of = components(root.root, present, surrogate, with_curvature=with_curvature)
        return Expansion(present, root, of)

    return lax.map(jax.checkpoint(expand), (covariance, present, noise))


@functools.partial(jax.jit, static_argnames=("surrogate", "method"))
def second_moments(
    one: Input,
    two: Input,
    first: Int[Array, " pairs"],
    second: Int[Array, " pairs"],
    cov12: Float[Array, "pairs S T"],
    theta: Float[Array, "pairs S T"] | None,
    surrogate: Surrogate,
    method: Method,
) -> tuple[Float[Array, "pairs S T"], Float[Array, "pairs S T"] | None]:
    """`E[y(u) y(v)^T]` and, unless `theta` is None, its derivative in `K12` along `theta`.

    The inputs in `one` have `S` positions, those in `two` have `T`.

    Args:
      one, two: inputs, leading axes `n1` and `n2`.
      first, second: `(pairs,)`, the indices in `one` and `two` of each pair.
    """
    if not len(cov12):
        # No pair, and maybe no input that an index could be of.
        return cov12, theta
    # Outside the loop over pairs, in which they would be laid out once a pair.
    blocks = _blocks(method, cov12.shape[-2:], cov12.dtype)

    def pair(args: tuple[Array, Array, Array, Array | None]) -> tuple[Array, Array | None]:
        i, j, cov12, theta = args
        left, right = (jax.tree.map(lambda x, i=i: x[i], of) for of, i in ((one, i), (two, j)))
        cov12 = project(cov12, left.present, right.present, surrogate)
        if theta is not None:
            theta = project(theta, left.present, right.present, surrogate)
        if not surrogate.has_closed_form:
            return _estimate(left, right, cov12, theta, surrogate, blocks)
        if theta is None:
            return closed_form.second_moment(left, right, cov12), None
        return closed_form.moment_and_slope(left, right, cov12, theta)

    args = first, second, cov12, theta
    step = _pairs_at_once(max(cov12.shape[1:]), surrogate, method)
    return lax.map(jax.checkpoint(pair), args, batch_size=step)


def _pairs_at_once(size: int, surrogate: Surrogate, method: Method) -> int | None:
    if jax.default_backend() == "cpu":
        return None
    rows = size**2
    if isinstance(method, QuasiMonteCarlo):
        assert method.n_points is not None
        rows = 2 * method.n_points
    if surrogate.has_closed_form:
        rows = size * closed_form.N_NODES
    return max(1, _CHUNK // (size * rows))


def project(cov: Array, first: Array, second: Array, surrogate: Surrogate) -> Array:
    """`cov` of the positions that are present; for softmax, of their differences from the mean.

    Softmax does not see a shift common to all positions, while a sample of it would be noise, and
    its rounding errors may exceed the differences.
    """
    cov = cov * first[..., :, None] * second[..., None, :]
    if surrogate.is_shift_invariant:

        def centre(cov: Array, present: Array) -> Array:
            """Takes the mean over the positions that are present off the rows."""
            count = jnp.maximum(jnp.sum(present, -1), 1)[..., None, None]
            mean = jnp.sum(cov, -2, keepdims=True) / count
            return cov - mean * present[..., :, None]

        cov = centre(cov, first)
        cov = jnp.swapaxes(centre(jnp.swapaxes(cov, -1, -2), second), -1, -2)
    return cov


def _estimate(
    one: Expansion,
    two: Expansion,
    cov12: Array,
    theta: Array | None,
    surrogate: Surrogate,
    blocks: Array | None,
) -> tuple[Array, Array | None]:
    """The second moment and its derivative of one pair, with points or by the series alone."""
    of_one, of_two = one.components, two.components
    uncorrelated = of_one.linear(cov12, of_two)
    moment = of_one.mean[:, None] * of_two.mean + uncorrelated
    if blocks is None:
        moment = moment + of_one.quadratic(cov12, cov12, of_two) / 2
        if theta is None:
            return moment, None
        return moment, of_one.linear(theta, of_two) + of_one.quadratic(cov12, theta, of_two)

    known = of_one.curvature is not None
    nodes = _NODES if known else _NODES_WITHOUT_CURVATURE
    even_weights, odd_weights = (
        sampling.integral_weights(nodes, first) for first in (2, 3 if known else 1)
    )
    means = _sample(one, two, cov12, theta, nodes, surrogate, blocks)
    left_missed = of_one.slope - means.left

    def missed(right: Array, inner: Array) -> Array:
        """What `E[J C J'^T]` misses for the sample means of `J` being off `B`, to first order."""
        first = matmul(matmul(left_missed, inner), of_two.slope.T)
        return first + matmul(matmul(of_one.slope, inner), (of_two.slope - right).T)

    even = odd = jnp.zeros_like(moment)
    if known:
        # Taken off the odd part at each node, and integrated.
        share = 0.5 - sum(w * r for w, r in zip(odd_weights, nodes, strict=True))
        odd = share * of_one.quadratic(cov12, cov12, of_two)
    for (plus, minus, right), even_weight, odd_weight in zip(
        means.at_nodes, even_weights, odd_weights, strict=True
    ):
        both = (plus + minus) / 2 + missed(right, cov12) - uncorrelated
        even, odd = even + even_weight * both, odd + odd_weight * (plus - minus) / 2
    # An even derivative is of odd values.
    of_odd, of_even = (_share_of_values(one, two, at) for at in _EQUALLY_GOOD)
    moment = moment + even + of_odd * (means.odd - even)
    moment = moment + odd + of_even * (means.even - odd)
    if theta is None:
        return moment, None
    assert means.derivative is not None
    return moment, means.derivative + missed(means.right, theta)


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
    cov12: Array,
    theta: Array | None,
    nodes: tuple[float, ...],
    surrogate: Surrogate,
    blocks: Array,
) -> _Means:
    """Args: `blocks` of points, `(blocks, S + 2 T, points)`."""
    ends = np.cumsum(cov12.shape)
    slope, rest, _ = sampling.correlate(one.root, two.root, cov12)

    def residual_parts(at: sampling.Outputs, z: Array, of: Expansion) -> tuple[Array, Array]:
        plus, minus = jnp.split(at.value, 2, 1)
        even = (plus + minus) / 2 - of.components.mean[:, None]
        return even, (plus - minus) / 2 - matmul(of.components.slope, z)

    def block(z: Array) -> _Means:
        first, second, third = jnp.split(z, ends)
        correlated = matmul(slope.T, first) + matmul(rest, second)
        independent = matmul(two.root.root, third)
        logits = matmul(one.root.root, first)
        left = sampling.outputs(logits, one.present, surrogate)
        at_nodes = []
        for r in nodes:
            z = r * correlated + np.sqrt(1 - r * r) * independent
            right = sampling.outputs(z, two.present, surrogate)
            both = (sampling.jacobian_product(left, at, cov12) for at in (right, right.mirrored()))
            at_nodes.append((*both, right.mean_jacobian()))
        right = sampling.outputs(correlated, two.present, surrogate)
        residuals = residual_parts(left, logits, one), residual_parts(right, correlated, two)
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
    total, _ = lax.scan(jax.checkpoint(add), start, blocks)
    return jax.tree.map(lambda x: x / len(blocks), total)


def _blocks(method: Method, sizes: tuple[int, ...], dtype: Any) -> Array | None:
    """Points of all pairs with `sizes` `S` and `T`, `(blocks, S + 2 T, points)`, if there are any.

    On a CPU the arrays of a block stay in the cache of the second level: in one block the 8,192
    points take 1.9 times as long (8, 16 and 32 positions, float32, measured).
    """
    if not isinstance(method, QuasiMonteCarlo):
        return None
    assert method.n_points is not None
    n, at_once = method.n_points, 1 << max(7, 13 - (max(sizes) - 1).bit_length())
    if jax.default_backend() != "cpu" or n % at_once:
        at_once = n
    dimension = sizes[0] + 2 * sizes[1]
    points = sampling.normal_points(n, dimension, dtype, sampling.PAIRS, seed=method.seed)
    return jnp.swapaxes(points.reshape(dimension, -1, at_once), 0, 1)
