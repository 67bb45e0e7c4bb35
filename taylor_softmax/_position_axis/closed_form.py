"""Order 2 over positions: a double integral of elementary functions.

The two inputs may differ in their numbers of positions, `S` and `T`: what is of the second, or of
the first seen from it, has `T` in the place of `S`.

With `1 / D = int exp(-t D) dt` for both normalisers, rates `lambda = (t, ..., t, s, ..., s)` and
`Lambda = diag(lambda)`, the factor `exp(-t D_u - s D_v)` is Gaussian. Under it the logits have
covariance `C = (Id + Sigma Lambda)^-1 Sigma` and mean `m = -C lambda`, and

    log phi = -1^T lambda - 1^T Lambda m / 2 - log det(Id + Sigma Lambda) / 2,
    E[y_p(u) y_q(v)] = int int phi (A_p A_q + C_pq (C_pq / 2 + (1 + m_p) (1 + m_q))) dt ds,
    A_p = E_C[f_2(u_p)] = ((1 + m_p)^2 + C_pp + 1) / 2.

Every term is finite at singular covariances, of which no inverse is taken.

Values are computed in eigenbases. `K11 = U d U^T` once an input; for every t, with
`g = 1 / (1 + t d)`, the covariance of v under the first factor, `K22 - t K12^T U g U^T K12`, is
`W e W^T`, and `P = U g U^T K12 W`; for every s, with `h = 1 / (1 + s e)`,

    C11 = U d g U^T - s P h P^T,    C12 = P h W^T,    C22 = W e h W^T,
    log det = sum log1p(t d) + sum log1p(s e):

one product of matrices for a pair of nodes. So is the derivative in K12 along Theta: with
`G = Id - C Lambda`, whose blocks are `G11 = U g U^T + s t P h P^T` and `G22 = W h W^T`,

    dC = G [[0, Theta], [Theta^T, 0]] G^T,    dm = -dC lambda, d log phi = s t ((1 + m_u)^T Theta
    (1 + m_v) + sum C12 o Theta).

Eigenvectors have no derivative where eigenvalues meet. For derivatives the same integrand is
computed otherwise, see `_sequential`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from taylor_softmax._generated.position_axis import (
    covariance_order_2,
    mean_order_2,
    observation_order_2,
)
from taylor_softmax._numerics import quadrature
from taylor_softmax._numerics.precision import einsum, log_tiny, matmul

# Nodes of the outer rule in each of t and s.
N_NODES = 24


class EigenLogits(NamedTuple):
    """EigenLogits of one input.

    Attributes:
      covariance: `(S, S)`, 0 where a position is absent.
      present: 1 where there is a position, 0 where it is padding, `(S,)`.
      values, vectors: eigenvalues, not negative, and eigenvectors of the covariance.
    """

    covariance: Float[Array, "*n S S"]
    present: Float[Array, "*n S"]
    values: Float[Array, "*n S"]
    vectors: Float[Array, "*n S S"]


def diagonalise(covariance: Float[Array, "S S"], present: Float[Array, " S"]) -> EigenLogits:
    """The logits of one input."""
    return EigenLogits(covariance, present, *_eigen(lax.stop_gradient(covariance)))


@jax.custom_jvp
def second_moment(
    one: EigenLogits, two: EigenLogits, cross: Float[Array, "S T"]
) -> Float[Array, "S T"]:
    """`E[y(u) y(v)^T]`."""
    return _integrate(one, two, cross, None)[0]


@second_moment.defjvp
def _second_moment_jvp(
    primals: tuple[EigenLogits, EigenLogits, Array],
    tangents: tuple[EigenLogits, EigenLogits, Array],
) -> tuple[Array, Array]:
    return second_moment(*primals), jax.jvp(_sequential, primals, tangents)[1]


@jax.custom_jvp
def moment_and_slope(
    one: EigenLogits, two: EigenLogits, cross: Float[Array, "S T"], theta: Float[Array, "S T"]
) -> tuple[Float[Array, "S T"], Float[Array, "S T"]]:
    """`E[y(u) y(v)^T]` and its derivative in `K12` along `theta`."""
    value, slope = _integrate(one, two, cross, theta)
    assert slope is not None
    return value, slope


@moment_and_slope.defjvp
def _moment_and_slope_jvp(
    primals: tuple[EigenLogits, EigenLogits, Array, Array],
    tangents: tuple[EigenLogits, EigenLogits, Array, Array],
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    def plainly(
        one: EigenLogits, two: EigenLogits, cross: Array, theta: Array
    ) -> tuple[Array, Array]:
        return jax.jvp(lambda cross: _sequential(one, two, cross), (cross,), (theta,))

    return moment_and_slope(*primals), jax.jvp(plainly, primals, tangents)[1]


def _eigen(covariance: Array) -> tuple[Array, Array]:
    values, vectors = jnp.linalg.eigh(covariance)
    return jnp.maximum(values, 0), vectors


def _rule(logits: EigenLogits) -> tuple[Array, Array]:
    """Nodes and weights in the rate of one input, `(N_NODES,)`."""
    dtype = logits.covariance.dtype
    tau, weight = (jnp.asarray(x, dtype) for x in quadrature.half_line_rule(N_NODES))
    # 1 / E[D]: there the weight of the integrand is.
    mean = jnp.sum(logits.present * (1 + jnp.diagonal(logits.covariance) / 2))
    scale = lax.stop_gradient(1 / jnp.maximum(mean, 0.5))
    # f_2 >= 1/2: beyond this exp(-t D) is 0 and powers of t would overflow.
    t = tau * scale
    alive = t * jnp.sum(logits.present) / 2 < -log_tiny(dtype)
    return jnp.where(alive, t, 0), jnp.where(alive, weight * scale, 0)


class _Tilted(NamedTuple):
    """The Gaussian under the factors of one t and every s, leading axis `N_NODES`.

    Attributes:
      log_mass: `log phi`.
      moved1, moved2: `1 + m`.
      var1, var2, cross: diagonals of `C11` and `C22`, and `C12`.
    """

    log_mass: Float[Array, " s"]
    moved1: Float[Array, "s S"]
    var1: Float[Array, "s S"]
    cross: Float[Array, "s S T"]
    moved2: Float[Array, "s T"]
    var2: Float[Array, "s T"]

    def moment(self, weights: Array) -> Array:
        """Sum over s of `phi E[f_2(u) f_2(v)]`, `(S, T)`."""
        mass = weights * jnp.exp(self.log_mass)
        first = mass[:, None] * mean_order_2(self.moved1, self.var1)
        means = matmul(first.T, mean_order_2(self.moved2, self.var2))
        moved1, moved2 = self.moved1[:, :, None], self.moved2[:, None, :]
        covariances = covariance_order_2(moved1, self.cross, moved2)
        return means + jnp.sum(mass[:, None, None] * covariances, 0)


def _integrate(
    one: EigenLogits, two: EigenLogits, cross: Array, theta: Array | None
) -> tuple[Array, Array | None]:
    """The double integral in eigenbases, and its derivative unless `theta` is None."""
    (t_nodes, t_weights), (s, s_weights) = _rule(one), _rule(two)
    rotated = matmul(one.vectors.T, cross)

    def add(total: Any, node: tuple[Array, Array]) -> tuple[Any, None]:
        t, weight = node
        basis = _Basis.make(one, two, rotated, t, s)
        at, weights = basis.tilted(one, two), weight * s_weights
        if theta is None:
            return (total[0] + at.moment(weights), None), None
        change = basis.tilted_slope(one, two, at, theta)
        value, slope = jax.jvp(lambda at: at.moment(weights), (at,), (change,))
        return (total[0] + value, total[1] + slope), None

    start = jnp.zeros_like(cross), None if theta is None else jnp.zeros_like(cross)
    (value, slope), _ = lax.scan(add, start, (t_nodes, t_weights))
    present = one.present[:, None] * two.present
    return value * present, None if slope is None else slope * present


class _Basis(NamedTuple):
    """What the module's docstring calls so, at one `t` and all `s`.

    Attributes:
      t, s: scalar and `(N_NODES,)`.
      g: `(S,)`.
      e, w: eigenvalues and eigenvectors, `(T,)` and `(T, T)`.
      p: `P`, `(S, T)`.
      h: `(N_NODES, T)`.
    """

    t: Array
    s: Array
    g: Array
    e: Array
    w: Array
    p: Array
    h: Array

    @classmethod
    def make(
        cls, one: EigenLogits, two: EigenLogits, rotated: Array, t: Array, s: Array
    ) -> "_Basis":
        """Args: `rotated` is `U^T K12`."""
        g = 1 / (1 + t * one.values)
        e, w = _eigen(two.covariance - t * matmul(rotated.T, g[:, None] * rotated))
        p = matmul(matmul(one.vectors * g, rotated), w)
        return cls(t, s, g, e, w, p, 1 / (1 + s[:, None] * e))

    def tilted(self, one: EigenLogits, two: EigenLogits) -> _Tilted:
        t, s, g, e, w, p, h = self
        in_p, in_w = h * matmul(p.T, one.present), h * matmul(w.T, two.present)
        spread = one.values * g
        alone = matmul(one.vectors, spread * matmul(one.vectors.T, one.present))
        column = s[:, None]
        mean1 = -t * (alone - column * matmul(in_p, p.T)) - column * matmul(in_w, p.T)
        mean2 = -t * matmul(in_p, w.T) - column * matmul(e * in_w, w.T)
        rates = t * jnp.sum(one.present) + s * jnp.sum(two.present)
        pulls = t * matmul(mean1, one.present) + s * matmul(mean2, two.present)
        determinant = jnp.sum(jnp.log1p(t * one.values)) + jnp.sum(jnp.log1p(column * e), 1)
        var1 = matmul(one.vectors**2, spread) - column * matmul(h, (p**2).T)
        return _Tilted(
            log_mass=-rates - (pulls + determinant) / 2,
            moved1=1 + mean1,
            var1=var1,
            cross=matmul(p * h[:, None, :], w.T),
            moved2=1 + mean2,
            var2=matmul(e * h, (w**2).T),
        )

    def tilted_slope(
        self, one: EigenLogits, two: EigenLogits, at: _Tilted, theta: Array
    ) -> _Tilted:
        """The derivative of `tilted`, which is `at`, in `K12` along `theta`."""
        t, s, g, _, w, p, h = self
        column, both = s[:, None], (s * t)[:, None, None]
        turned = matmul(theta, w)
        shrunk = matmul(one.vectors * g, matmul(one.vectors.T, turned))
        inner = matmul(p.T, turned)
        inner = h[:, :, None] * (inner + inner.T) * h[:, None, :]
        in_p = matmul(p, inner)
        first, outer = shrunk * h[:, None, :], both * in_p
        # The covariances of what moves the means, rates times 1 + m.
        moved1, moved2 = at.moved1 * one.present, at.moved2 * two.present
        a, b = column * matmul(moved2, theta.T), t * matmul(moved1, theta)
        a_in_p, b_in_w = h * matmul(a, p), h * matmul(b, w)
        alone = matmul(matmul(a, one.vectors) * g, one.vectors.T)
        mass = jnp.sum(moved1 * matmul(moved2, theta.T), 1) + jnp.sum(at.cross * theta, (1, 2))
        return _Tilted(
            log_mass=s * t * mass,
            moved1=-alone - column * matmul(t * a_in_p - b_in_w, p.T),
            var1=-2 * column * jnp.sum((first + outer / 2) * p, 2),
            cross=matmul(first + outer, w.T),
            moved2=matmul(t * a_in_p - b_in_w, w.T),
            var2=-t * jnp.sum(matmul(w, inner) * w, 2),
        )


def _sequential(one: EigenLogits, two: EigenLogits, cross: Array) -> Array:
    """The same integral without eigenvectors: slower, and differentiable everywhere.

    One factor `exp(-rate f_2(z_k))` after the other, as a Kalman filter takes observations in:
    `1 + z_k = 0` with precision `rate`. No system is solved, no logarithm of a determinant cancels.
    """
    size, total = len(cross), sum(cross.shape)
    sigma = jnp.block([[one.covariance, cross], [cross.T, two.covariance]])
    (t, t_weights), (s, s_weights) = _rule(one), _rule(two)

    def integrand(t: Array, s: Array) -> Array:
        rate = jnp.concatenate([t * one.present, s * two.present])

        def observe(state: tuple[Array, Array, Array], k: Array) -> tuple[Any, None]:
            cov, moved, log_phi = state
            column = cov[:, k]
            gain, shift, factor = observation_order_2(moved[k], cov[k, k], rate[k])
            cov = cov - gain * column[:, None] * column
            return (cov, moved + shift * column, log_phi + factor), None

        # `moved` is 1 + the mean.
        start = (sigma, jnp.ones_like(rate), jnp.zeros_like(t))
        (tilted, moved, log_phi), _ = lax.scan(observe, start, jnp.arange(total))
        variance = jnp.diagonal(tilted)
        first, second = slice(None, size), slice(size, None)
        means = mean_order_2(moved, variance)
        moment = means[first, None] * means[second]
        moment = moment + covariance_order_2(
            moved[first, None], tilted[first, second], moved[second]
        )
        return jnp.exp(log_phi) * moment

    @jax.checkpoint
    def over_s(args: tuple[Array, Array]) -> Array:
        t, weight = args
        values = jax.vmap(integrand, (None, 0))(t, s)
        return weight * einsum("s,spq->pq", s_weights, values)

    moment = jnp.sum(lax.map(over_s, (t, t_weights)), 0)
    return moment * one.present[:, None] * two.present
