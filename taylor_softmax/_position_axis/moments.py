"""Softmax over positions: a finite axis whose logits have any covariance.

`(u, v) ~ N(0, [[K11, K12], [K12^T, K22]])` are the logits at the `S` positions of two inputs, in
one channel. Wanted is the `(S, S)` matrix `E[y(u) y(v)^T]` of `y(z)_p = f(z_p) / sum_q f(z_q)`,
and for the NTK its derivative in `K12` along the incoming NTK `Theta`, by Price's theorem
`E[J(u) Theta J(v)^T]` with `J` the Jacobian of `y`.

At order 2 both are double integrals of elementary functions, see `closed_form`. Otherwise they are
estimated with quasi-random points, see `pair`; each scrambling gives an estimate, and their spread
its error, see `estimate`. Derivatives are estimates of their own, by Price's theorem, see
`derivatives`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from taylor_softmax._numerics.arguments import Validated, broadcast_covariances
from taylor_softmax._numerics.surrogate import Surrogate, parse
from taylor_softmax._position_axis import closed_form, estimate, pair, sampling
from taylor_softmax._position_axis.components import components, rounds
from taylor_softmax._position_axis.estimate import Budget
from taylor_softmax.methods import Direct, Method, QuasiMonteCarlo, Series, choose

# Up to so many positions that coefficient is computed: S^3 numbers an input, S^4 operations a pair.
_LARGEST_CURVATURE = 64

# Numbers in the largest array of a step, on accelerators: they bound the memory, at any number of
# pairs. On a CPU one pair after the other is fastest, its arrays being in the cache.
_CHUNK = 1 << 24

Input = closed_form.EigenLogits | pair.Expansion


class Moments(NamedTuple):
    """Of pairs of inputs.

    Attributes:
      value: `E[y(u) y(v)^T]`.
      slope: its derivative in `K12` along `Theta`; None without `Theta`.
      error: the estimated largest errors of value and slope, `(pairs, 1 or 2)`, relative to
        `estimate.units`; 0 of what is computed without points.
    """

    value: Float[Array, "pairs S T"]
    slope: Float[Array, "pairs S T"] | None
    error: Float[Array, "pairs k"]


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
    orders and softmax what the terms of degree 0 to 2 in `K12` leave is estimated with quasi-random
    points, the same at every call: see the module `taylor_softmax._position_axis.pair`.
    Covariances may be singular, and positive semi-definite up to rounding: the result is finite.
    Differentiable in all three; first derivatives alone where points are used, which estimate the
    derivatives themselves, by Price's theorem.

    Errors: `POSITIONS_CLOSED_FORM`, `POSITIONS_NNGP` and `POSITIONS_MANY_NNGP` in
    `taylor_softmax._numerics.errors`, with the default number of points. Where values are concrete
    an estimated error of more than 2e-2 of the scale warns.

    Args:
      cov11: `K11`, `(..., S, S)`, symmetric and positive semi-definite.
      cov12: `K12`, `(..., S, S)`.
      cov22: `K22`, `(..., S, S)`.
      order: even order of the Taylor polynomial `f`, or None for softmax itself.
      method: `QuasiMonteCarlo(n_points, seed, error)`, the default, or `Series()`, the series to
        degree 2 alone; `Direct()` at order 2.

    Returns:
      `(..., S, S)`; dimensionless, the entries of each matrix sum to 1, at order 2 within 3e-5 up
      to variances of 1e4.

    Raises:
      TypeError, ValueError: `order` or `method` is not one of the above; a covariance is not of
        shape `(..., S, S)` with the same `S` as the others.
      NotImplementedError: a second derivative of an estimate is asked for.
    """
    surrogate = parse(order)
    method = check_method(method, surrogate)
    *covs, dtype = broadcast_covariances(cov11, cov12, cov22)
    batch, (size, _) = covs[0].shape[:-2], covs[0].shape[-2:]
    flat = tuple(cov.reshape(-1, size, size) for cov in covs)
    moment, error = _joint_second_moments(*flat, surrogate=surrogate, method=method)
    estimate.warn([error], method, "Softmax over positions")
    return moment.reshape(*batch, size, size).astype(dtype)


@functools.partial(jax.jit, static_argnames=("surrogate", "method"))
def _joint_second_moments(
    cov11: Array, cov12: Array, cov22: Array, *, surrogate: Surrogate, method: Method
) -> tuple[Array, Array]:
    """Compiled once for all calls of a shape; covariances `(pairs, S, S)`."""
    present = jnp.ones(cov11.shape[:2], cov11.dtype)
    one, two = (prepare(cov, present, surrogate=surrogate, method=method) for cov in (cov11, cov22))
    index = jnp.arange(len(cov11))
    moments = second_moments(one, two, index, index, cov12, None, surrogate, method)
    return moments.value, moments.error


def methods(surrogate: Surrogate) -> tuple[Method, ...]:
    """What evaluates softmax over positions, the default first."""
    return (Direct(),) if surrogate.has_closed_form else (QuasiMonteCarlo(), Series())


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
    noise = sampling.rounding(
        lax.stop_gradient(covariance) * present[:, :, None] * present[:, None, :]
    )
    covariance = project(covariance, present, present, surrogate)
    if surrogate.has_closed_form:
        return jax.vmap(closed_form.diagonalise)(covariance, present)
    size = present.shape[-1]
    with_curvature = size <= _LARGEST_CURVATURE or isinstance(method, Series)
    n_points, seed, error = 0, 0, None
    still = covariance
    if isinstance(method, QuasiMonteCarlo):
        budget = Budget.of(method, size)
        n_points = budget.n_points * budget.n_scramblings
        seed, error = budget.seed, budget.error
        # What is sampled is not differentiated: `derivatives` are of the covariance.
        still = lax.stop_gradient(covariance)
    points = rounds(n_points, size, covariance.dtype, seed)

    def expand(args: tuple[Array, Array, Array, Array]) -> pair.Expansion:
        covariance, still, present, noise = args
        root = sampling.psd_root(still, noise, True)
        hermite = components(
            root.root, present, surrogate, points, with_curvature=with_curvature, error=error
        )
        return pair.Expansion(present, covariance, root, hermite)

    return lax.map(jax.checkpoint(expand), (covariance, still, present, noise))


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
) -> Moments:
    """`E[y(u) y(v)^T]` and, unless `theta` is None, its derivative in `K12` along `theta`.

    The inputs in `one` have `S` positions, those in `two` have `T`.

    Args:
      one, two: inputs, leading axes `n1` and `n2`.
      first, second: `(pairs,)`, the indices in `one` and `two` of each pair.
    """
    n_results = 1 if theta is None else 2
    if not len(cov12):
        # No pair, and maybe no input that an index could be of.
        return Moments(cov12, theta, jnp.zeros((0, n_results), cov12.dtype))
    sizes = cov12.shape[1:]
    budget = points = None
    if not surrogate.has_closed_form and isinstance(method, QuasiMonteCarlo):
        budget = Budget.of(method, max(sizes))
        # Outside the loop over pairs, in which they would be laid out once a pair.
        points = budget.points(sizes, cov12.dtype)
    no_points = jnp.zeros(n_results, cov12.dtype)

    def of_pair(args: tuple[Array, Array, Array, Array | None]) -> tuple[Any, ...]:
        i, j, cov12, theta = args
        left, right = (jax.tree.map(lambda x, i=i: x[i], of) for of, i in ((one, i), (two, j)))
        cov12 = project(cov12, left.present, right.present, surrogate)
        if theta is not None:
            theta = project(theta, left.present, right.present, surrogate)
        if budget is not None:
            results, error, _ = pair.sampled(surrogate, budget, left, right, cov12, theta, points)
            return results[0], None if theta is None else results[1], error
        if not surrogate.has_closed_form:
            return *pair.series(left, right, cov12, theta), no_points
        if theta is None:
            return closed_form.second_moment(left, right, cov12), None, no_points
        return *closed_form.moment_and_slope(left, right, cov12, theta), no_points

    args = first, second, cov12, theta
    step = _pairs_at_once(max(sizes), surrogate, budget)
    return Moments(*lax.map(jax.checkpoint(of_pair), args, batch_size=step))


def _pairs_at_once(size: int, surrogate: Surrogate, budget: Budget | None) -> int | None:
    if jax.default_backend() == "cpu":
        return None
    rows = size**2 if budget is None else 2 * budget.n_points
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
