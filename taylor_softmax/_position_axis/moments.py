"""Softmax over positions: a finite axis whose logits have any covariance.

`(u, v) ~ N(0, [[K11, K12], [K12^T, K22]])` are the logits at the `S` positions of two inputs, in
one channel. Wanted is the `(S, S)` matrix `E[y(u) y(v)^T]` of `y(z)_p = f(z_p) / sum_q f(z_q)`,
and for the NTK its derivative in `K12` along the incoming NTK `Theta`, by Price's theorem
`E[J(u) Theta J(v)^T]` with `J` the Jacobian of `y`.

Order 2. With `1 / D = int exp(-t D) dt` for both normalisers, `lambda = (t, ..., t, s, ..., s)` and
`Lambda = diag(lambda)`, the factor `exp(-t D_u - s D_v)` is Gaussian. Under it the logits have
covariance `C = (Id + Sigma Lambda)^-1 Sigma` and mean `m = -C lambda`, and

    log phi = -1^T lambda + lambda^T C lambda / 2 - log det(Id + Sigma Lambda) / 2,
    E[y_p(u) y_q(v)] = int int phi (A_p A_q + C_pq (C_pq / 2 + (1 + m_p) (1 + m_q))) dt ds,
    A_p = E_C[f_2(u_p)] = ((1 + m_p)^2 + C_pp + 1) / 2.

Every term is finite at singular covariances, of which no inverse is taken.

Other orders and softmax have no closed integrand. Mehler's formula in `S` dimensions,

    E[y(u) y(v)^T] = sum_k (1/k!) < E[D^k y(u)], K12^(x)k, E[D^k y(v)] >,

separates the inputs; degrees 0 to 2 are summed, from coefficients that are computed once an input,
and the product of what is left of `y(u)` and `y(v)` is estimated pair by pair by quasi-Monte Carlo.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats.qmc
from jax import Array, lax
from jax.typing import ArrayLike

from taylor_softmax._generated.position_axis import observation_order_2, second_moment_order_2
from taylor_softmax._numerics import quadrature
from taylor_softmax._numerics.arguments import Validated, broadcast_covariances
from taylor_softmax._numerics.precision import einsum, log_tiny, matmul
from taylor_softmax._numerics.surrogate import Surrogate, parse
from taylor_softmax.methods import Direct, Method, QuasiMonteCarlo, Series, choose

# Nodes of the outer rule in each of t and s, order 2.
_OUTER_NODES = 24

# Points, beside their negatives, for the components of one input. Their error enters at first
# order, as the mean of one side times the error of the other's: with a quarter of these points it
# is 3e-3 of the largest entry (16 positions, variance 1), at any number of points per pair.
_COMPONENT_POINTS = 1 << 14

# Numbers in the largest array of a step: they bound the memory, at any number of pairs.
_CHUNK = 1 << 21


class Components(NamedTuple):
    """Hermite components of `y` for the logits of one input, up to degree 2.

    Attributes:
      mean: `E[y]`, `(S,)`.
      slope: `E[D y]`, `(S, S)`.
      curvature: `E[D^2 y]`, `(S, S, S)`.
    """

    mean: Array
    slope: Array
    curvature: Array


class Input(NamedTuple):
    """What a pair needs of one of its inputs.

    Attributes:
      covariance: of the logits, `(S, S)`.
      present: 1 where there is a position, 0 where it is padding, `(S,)`.
      expansion: None at order 2.
    """

    covariance: Array
    present: Array
    expansion: "Expansion | None"


class Expansion(NamedTuple):
    """The outputs of one input as a polynomial and a residual.

    Attributes:
      components: the polynomial.
      root: Cholesky factor of the covariance, `(S, S)`.
      residual: of the outputs at the points that `root` makes of the first half of the normal ones,
        `(n_points, S)`: the same for every pair in which the input is the first. None without
        points.
    """

    components: Components
    root: Array
    residual: Array | None


def joint_second_moment(
    cov11: Validated[ArrayLike],
    cov12: Validated[ArrayLike],
    cov22: Validated[ArrayLike],
    *,
    order: Validated[int | None] = None,
    method: Validated[Method | None] = None,
) -> Array:
    """`E[y(u) y(v)^T]` of a softmax over jointly Gaussian logits with any covariance.

    For `(u, v) ~ N(0, [[K11, K12], [K12^T, K22]])` and `y(z)_p = f(z_p) / sum_q f(z_q)` over `S`
    positions. At order 2 the integrand of the remaining double integral is elementary. For other
    orders and softmax the components of degree 0 to 2 of Mehler's formula are exact to the error of
    their coefficients, and the rest is estimated with quasi-random points, the same at every
    call: see the module `taylor_softmax._position_axis.moments`. Covariances may be singular.
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
      `(..., S, S)`; dimensionless, the entries of each matrix sum to 1.

    Raises:
      TypeError, ValueError: `order` or `method` is not one of the above; a covariance is not of
        shape `(..., S, S)` with the same `S` as the others.
    """
    surrogate = parse(order)
    method = check_method(method, surrogate)
    *covs, dtype = broadcast_covariances(cov11, cov12, cov22)
    batch, (size, _) = covs[0].shape[:-2], covs[0].shape[-2:]
    flat = tuple(cov.reshape(-1, size, size) for cov in covs)
    present = jnp.ones(flat[0].shape[:2], flat[0].dtype)
    one, two = (
        prepare(cov, present, surrogate=surrogate, method=method) for cov in (flat[0], flat[2])
    )
    index = np.arange(len(flat[0]))
    moment, _ = second_moments(one, two, index, index, flat[1], None, surrogate, method)
    return moment.reshape(*batch, size, size).astype(dtype)


def methods(surrogate: Surrogate) -> tuple[Method, ...]:
    """What evaluates softmax over positions, the default first."""
    return (Direct(),) if surrogate.has_closed_form else (QuasiMonteCarlo(), Series())


def check_method(method: Any, surrogate: Surrogate) -> Method:
    """`method`, or the default for None, or what is wrong with it."""
    return choose(method, *methods(surrogate), axis=f"{surrogate} over positions")


def prepare(covariance: Array, present: Array, *, surrogate: Surrogate, method: Method) -> Input:
    """The `Input` of inputs with covariances `(n, S, S)` and positions `present`, `(n, S)`."""
    covariance = _project(covariance, present, present, surrogate)
    if surrogate.has_closed_form:
        return Input(covariance, present, None)
    size = present.shape[-1]

    def expand(args: tuple[Array, Array]) -> Expansion:
        covariance, present = args
        root = _cholesky(covariance, covariance)
        components = _components(root, present, surrogate)
        if not isinstance(method, QuasiMonteCarlo):
            return Expansion(components, root, None)
        z = matmul(_normal_points(method.n_points, 2 * size, covariance.dtype)[:, :size], root.T)
        value, _, _ = surrogate.ratios(z, present)
        return Expansion(components, root, value - _polynomial(z, components, covariance))

    step = max(1, _CHUNK // (2 * _COMPONENT_POINTS * size))
    expansion = lax.map(jax.checkpoint(expand), (covariance, present), batch_size=step)
    return Input(covariance, present, expansion)


def second_moments(
    one: Input,
    two: Input,
    first: np.ndarray,
    second: np.ndarray,
    cov12: Array,
    theta: Array | None,
    surrogate: Surrogate,
    method: Method,
) -> tuple[Array, Array | None]:
    """`E[y(u) y(v)^T]` and, unless `theta` is None, its derivative in `K12` along `theta`.

    Args:
      one, two: inputs, leading axes `n1` and `n2`.
      first, second: `(pairs,)`, the indices in `one` and `two` of each pair.
      cov12, theta: `(pairs, S, S)`.

    Returns:
      Each `(pairs, S, S)`.
    """
    size = cov12.shape[-1]
    # Order 2 solves systems of 2S equations at every node; the others keep S^2 numbers a point.
    if surrogate.has_closed_form:
        per_pair = (2 * size * _OUTER_NODES) ** 2
    else:
        points = method.n_points if isinstance(method, QuasiMonteCarlo) else 0
        per_pair = max(points, size) * size**2
    step = max(1, _CHUNK // per_pair)

    def pair(args: tuple[Array, Array, Array, Array | None]) -> tuple[Array, Array | None]:
        i, j, cov12, theta = args
        left, right = (jax.tree.map(lambda x, i=i: x[i], of) for of, i in ((one, i), (two, j)))
        cov12 = _project(cov12, left.present, right.present, surrogate)
        if not surrogate.has_closed_form:
            if theta is not None:
                theta = _project(theta, left.present, right.present, surrogate)
            return _series_and_residual(left, right, cov12, theta, surrogate, method)
        evaluate = functools.partial(_order_2, left, right)
        if theta is None:
            return evaluate(cov12), None
        return jax.jvp(evaluate, (cov12,), (theta,))

    args = jnp.asarray(first), jnp.asarray(second), cov12, theta
    return lax.map(jax.checkpoint(pair), args, batch_size=step)


def _project(cov: Array, first: Array, second: Array, surrogate: Surrogate) -> Array:
    """`cov` of the positions that are present; for softmax, of their differences from the mean.

    Softmax does not see a shift common to all positions, while a sample of it would be noise.
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


def _order_2(one: Input, two: Input, cov12: Array) -> Array:
    size = cov12.shape[-1]
    sigma = jnp.block([[one.covariance, cov12], [cov12.T, two.covariance]])
    tau, weight = (jnp.asarray(x, sigma.dtype) for x in quadrature.half_line_rule(_OUTER_NODES))

    def scale(of: Input) -> Array:
        """`1 / E[D]`: there `t` is where the weight of the integrand is."""
        mean = jnp.sum(of.present * (1 + jnp.diagonal(of.covariance) / 2))
        return lax.stop_gradient(1 / jnp.maximum(mean, 0.5))

    def integrand(t: Array, s: Array) -> Array:
        # One factor exp(-rate f_2(z_k)) after the other, as a Kalman filter takes observations in:
        # 1 + z_k = 0 with precision `rate`. No system is solved and no logarithm of a determinant
        # cancels; a batch of matrices of a few rows compiles and runs faster so.
        rate = jnp.concatenate([t * one.present, s * two.present])

        def observe(
            state: tuple[Array, Array, Array], k: Array
        ) -> tuple[tuple[Array, Array, Array], None]:
            cov, moved, log_phi = state
            column = cov[:, k]
            gain, shift, factor = observation_order_2(moved[k], cov[k, k], rate[k])
            cov = cov - gain * column[:, None] * column
            return (cov, moved + shift * column, log_phi + factor), None

        # `moved` is 1 + the mean.
        start = (sigma, jnp.ones_like(rate), jnp.zeros_like(t))
        (tilted, moved, log_phi), _ = lax.scan(observe, start, jnp.arange(2 * size))
        variance = jnp.diagonal(tilted)
        moment = second_moment_order_2(
            moved[:size, None],
            variance[:size, None],
            tilted[:size, size:],
            moved[size:],
            variance[size:],
        )
        return jnp.exp(log_phi) * moment

    first, second = scale(one), scale(two)
    # f_2 >= 1/2: beyond this exp(-t D) is 0 and powers of t would overflow.
    largest = -log_tiny(sigma.dtype)

    def nodes(of: Input, scale: Array) -> tuple[Array, Array]:
        t = tau * scale
        alive = t * jnp.sum(of.present) / 2 < largest
        return jnp.where(alive, t, 0), jnp.where(alive, weight * scale, 0)

    (t, t_weight), (s, s_weight) = nodes(one, first), nodes(two, second)
    values = jax.vmap(jax.vmap(integrand, (None, 0)), (0, None))(t, s)
    moment = jnp.einsum("t,s,tspq->pq", t_weight, s_weight, values)
    return moment * one.present[:, None] * two.present


def _components(root: Array, present: Array, surrogate: Surrogate) -> Components:
    half = _normal_points(_COMPONENT_POINTS, len(root), root.dtype)
    z = matmul(jnp.concatenate([half, -half]), root.T)
    value, slope, curvature = surrogate.ratios(z, present)
    n = len(value)

    def mean(left: Array, right: Array) -> Array:
        return matmul(left.T, right) / n

    # With p, q, r = f, f', f'' over the normaliser:
    # D_j y_i = [i=j] q_i - p_i q_j, and once more D_k. One j at a time, for the memory's sake.
    second = lax.map(lambda q: mean(value * q[:, None], slope), slope.T)
    second = 2 * jnp.moveaxis(second, 0, 1)
    each, slopes = jnp.arange(len(root)), mean(slope, slope)
    second = second.at[each, each, :].add(-slopes).at[each, :, each].add(-slopes)
    second = second.at[:, each, each].add(-mean(value, curvature))
    second = second.at[each, each, each].add(jnp.mean(curvature, 0))
    return Components(jnp.mean(value, 0), jnp.diag(jnp.mean(slope, 0)) - mean(value, slope), second)


def _polynomial(z: Array, components: Components, covariance: Array) -> Array:
    """The components of degree 0 to 2 at the points `z`, `(n, S)`."""
    mean, slope, curvature = components
    size = z.shape[-1]
    bend = matmul(z, curvature.reshape(-1, size).T).reshape(-1, size, size)
    excess = jnp.sum(bend * z[:, None, :], -1) - jnp.sum(curvature * covariance, (1, 2))
    return mean + matmul(z, slope.T) + excess / 2


def _series_and_residual(
    one: Input,
    two: Input,
    cov12: Array,
    theta: Array | None,
    surrogate: Surrogate,
    method: Method,
) -> tuple[Array, Array | None]:
    assert one.expansion is not None
    assert two.expansion is not None
    left, right = one.expansion.components, two.expansion.components

    def degree_2(a: Array, b: Array) -> Array:
        moved = einsum("ijk,jl,km->ilm", left.curvature, a, b)
        return einsum("ilm,nlm->in", moved, right.curvature)

    moment = left.mean[:, None] * right.mean + degree_2(cov12, cov12) / 2
    moment = moment + matmul(matmul(left.slope, cov12), right.slope.T)
    derivative = None
    if theta is not None:
        derivative = matmul(matmul(left.slope, theta), right.slope.T) + degree_2(cov12, theta)
    if one.expansion.residual is None or not isinstance(method, QuasiMonteCarlo):
        return moment, derivative

    # A root of the joint covariance, whose first block belongs to the first input alone.
    root = one.expansion.root
    below = jax.scipy.linalg.solve_triangular(root, cov12, lower=True)
    rest = _cholesky(two.covariance - matmul(below.T, below), two.covariance)
    size = len(root)
    n_points = method.n_points
    points = _normal_points(n_points, 2 * size, cov12.dtype)
    z_v = matmul(points[:, :size], below) + matmul(points[:, size:], rest.T)
    y_v, q_v, _ = surrogate.ratios(z_v, two.present)
    residual = y_v - _polynomial(z_v, right, two.covariance)
    moment = moment + matmul(one.expansion.residual.T, residual) / n_points
    if theta is None or derivative is None:
        return moment, derivative

    z_u = matmul(points[:, :size], root.T)
    y_u, q_u, _ = surrogate.ratios(z_u, one.present)
    sides = _Side(z_u, y_u, q_u, left), _Side(z_v, y_v, q_v, right)
    return moment, derivative + _residual_derivative(*sides, theta)


class _Side(NamedTuple):
    """Points of one input: logits `z`, outputs `y`, `q = f'(z) / D`, each `(n, S)`."""

    z: Array
    y: Array
    q: Array
    components: Components


def _residual_derivative(u: _Side, v: _Side, theta: Array) -> Array:
    """Mean over the points of `R_u theta R_v^T`, `R` the Jacobian of the residual.

    `R = J - B` with `J = diag(q) - y q^T` and `B = slope + sum_k z_k curvature_k`. Multiplied out,
    so that no `S x S` matrix is held for every point: means of products are all that is needed.
    """
    n = len(u.z)

    def mean(left: Array, right: Array) -> Array:
        return matmul(left.T, right) / n

    # J_u theta J_v^T.
    row, column = matmul(u.q, theta), matmul(v.q, theta.T)
    total = jnp.sum(row * v.q, 1, keepdims=True)
    both = theta * mean(u.q, v.q) - mean(u.q * column, v.y) - mean(u.y, row * v.q)
    both = both + mean(u.y * total, v.y)

    def mixed(jacobian: _Side, polynomial: _Side, theta: Array) -> Array:
        """`J theta B^T`."""
        # E[J_im z_k]. One z_k at a time, for the memory's sake.
        y, q, z = jacobian.y, jacobian.q, polynomial.z
        products = -lax.map(lambda z_k: mean(y * z_k[:, None], q), z.T)
        products = jnp.moveaxis(products, 0, -1)
        each = jnp.arange(len(theta))
        products = products.at[each, each].add(mean(q, z))
        plain = jnp.diag(jnp.mean(q, 0)) - mean(y, q)
        _, slope, curvature = polynomial.components
        moved = einsum("imk,ml->ilk", products, theta)
        return matmul(matmul(plain, theta), slope.T) + einsum("ilk,jlk->ij", moved, curvature)

    # B_u theta B_v^T.
    (_, slope_u, curvature_u), (_, slope_v, curvature_v) = u.components, v.components
    mean_u = slope_u + matmul(curvature_u, jnp.mean(u.z, 0))
    mean_v = slope_v + matmul(curvature_v, jnp.mean(v.z, 0))
    spread = mean(u.z - jnp.mean(u.z, 0), v.z - jnp.mean(v.z, 0))
    moved = einsum("imk,kp,ml->ilp", curvature_u, spread, theta)
    polynomials = matmul(matmul(mean_u, theta), mean_v.T)
    polynomials = polynomials + einsum("ilp,jlp->ij", moved, curvature_v)
    return both - mixed(u, v, theta) - mixed(v, u, theta.T).T + polynomials


def _cholesky(matrix: Array, covariance: Array) -> Array:
    """Cholesky factor of a positive semi-definite `matrix`, part of a `covariance`."""
    # What is added makes singular covariances, and their derivatives, harmless; 1e-8 of a variance
    # is far below the error of sampling.
    eps = float(jnp.finfo(matrix.dtype).eps)
    size = matrix.shape[-1]
    ridge = max(1e-8, 64 * eps) * jnp.trace(covariance) / size + eps
    return jnp.linalg.cholesky(matrix + ridge * jnp.eye(size, dtype=matrix.dtype))


def _normal_points(n_points: int, dimension: int, dtype: Any) -> Array:
    """Quasi-random points of the standard normal distribution; always the same."""
    return jnp.asarray(_sobol_points(n_points, dimension), dtype)


@functools.cache
def _sobol_points(n_points: int, dimension: int) -> np.ndarray:
    """Scrambled Sobol points, mapped to the standard normal distribution."""
    sampler = scipy.stats.qmc.Sobol(dimension, scramble=True, seed=0)  # pyright: ignore[reportCallIssue]
    # A power of two is what balances the points.
    uniform = sampler.random_base2(max(0, (n_points - 1).bit_length()))[:n_points]
    # Scrambling can give 0 exactly.
    return scipy.special.ndtri(np.clip(uniform, 1e-12, 1 - 1e-12))
