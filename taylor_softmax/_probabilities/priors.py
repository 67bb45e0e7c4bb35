"""Gaussian process priors over logits at the training inputs, and given Gaussian observations.

`Exact` has the kernel `K` of `N` inputs; `Inducing` the part of it that is explained by the logits
at `M` inducing inputs `Z`, and the rest of its diagonal: with `L L^T = K_ZZ`, `Phi = L^-1 K_ZX`,

    z = Phi^T w + r,    w ~ N(0, Id_M),    r_n ~ N(0, K_nn - |Phi_n|^2),

as in Titsias 2009 and Hensman et al. 2015 (arXiv 1411.2005). What is inferred is `w`; `r` keeps its
prior, so that a bound has to it no divergence, and that of `w` is that of `Phi^T w`, whose kernel
`Phi^T Phi` takes the place of `K`. Given observations of precision `omega`, `V = (K^-1 + diag
omega)^-1` comes from the Cholesky factor of

    B = Id_N + omega^(1/2) K omega^(1/2)    or of    Id_M + Phi diag(omega) Phi^T,

which have the same determinant and eigenvalues of at least 1: `V` needs no inverse of `K`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import solve_triangular

from taylor_softmax._numerics.arguments import concrete, namespace
from taylor_softmax._numerics.precision import matmul

# Added to K_ZZ, in units of eps times M times its mean variance: inducing inputs that are alike
# have no Cholesky factor. As if they were seen through noise: the bound stays one.
_JITTER = 10.0


def padded_size(n: int) -> int:
    """The size that `n` inputs are filled up to, so that what is compiled serves other numbers.

    An odd multiple of 16: at most a sixteenth more from 512 on, where time is that of computing.
    Rows of a power of two share lines of the cache: 1,024 take 1.3 times as long as 1,008
    (measured).
    """
    return 16 + 32 * max(0, -(-(n - 16) // 32))


def padded(array: Any, *shape: int) -> Array:
    """With zeros behind, up to `shape`; numbers that are known by NumPy, which compiles nothing."""
    array = concrete(array)
    widths = [(0, n - m) for n, m in zip(shape, array.shape, strict=True)]
    return jnp.asarray(namespace(array).pad(array, widths))


class Exact(NamedTuple):
    """The prior with the kernel of the training inputs, `(N, N)`."""

    kernel: Array

    def padded(self, n: int) -> "Exact":
        """With more training inputs, up to `n`, of variance 0."""
        return Exact(padded(self.kernel, n, n))

    @property
    def variance(self) -> Array:
        return jnp.diagonal(self.kernel)

    @property
    def own_variance(self) -> Array:
        """Of the inputs with which test inputs have a kernel: the training inputs."""
        return self.variance

    @property
    def rest(self) -> Array:
        """Variances of what the prior does not resolve: none."""
        return jnp.zeros_like(self.variance)

    def times(self, alpha: Array) -> Array:
        """`K alpha`."""
        return matmul(self.kernel, alpha)

    def given(self, precision: Array) -> "ExactGiven":
        root = jnp.sqrt(precision)
        scaled = root[:, None] * self.kernel
        lower = jnp.linalg.cholesky(jnp.eye(len(root), dtype=root.dtype) + scaled * root)
        return ExactGiven(self.kernel, root, lower, solve_triangular(lower, scaled, lower=True))

    def features(self, cross: Array) -> Array:
        """Of test inputs with kernels `(T, N)` with the training inputs, for what follows."""
        return cross

    def mean(self, features: Array, alpha: Array) -> Array:
        """`E[z]` at inputs with these features, `(T, C)`."""
        return matmul(features, alpha)


class ExactGiven(NamedTuple):
    """Given observations; `half = L^-1 omega^(1/2) K`, so that `V = K - half^T half`."""

    kernel: Array
    root: Array
    lower: Array
    half: Array

    def variance(self) -> Array:
        return jnp.diagonal(self.kernel) - jnp.sum(self.half**2, axis=0)

    def logdet(self) -> Array:
        return 2 * jnp.sum(jnp.log(jnp.diagonal(self.lower)))

    def damped(self, e: Array) -> Array:
        """`(Id + diag(omega) K)^-1 e`."""
        inner = solve_triangular(self.lower, self.root * matmul(self.kernel, e), lower=True)
        return e - self.root * solve_triangular(self.lower, inner, lower=True, trans="T")

    def squares(self) -> Callable[[Array], Array]:
        """`x -> (V o V) x`."""
        return functools.partial(matmul, (self.kernel - matmul(self.half.T, self.half)) ** 2)

    def reduction(self, features: Array) -> Array:
        """By how much observations reduce the variances of inputs with these features, `(T,)`."""
        inner = solve_triangular(self.lower, self.root[:, None] * features.T, lower=True)
        return jnp.sum(inner**2, axis=0)

    def slope(self, in_variance: Array, in_logdet: Array) -> Exact:
        """In the kernel, of `in_variance^T variance() + in_logdet logdet()`.

        With `A = (Id + K diag omega)^-1 = Id - V diag omega`: `dV = A dK A^T` and
        `dlogdet = tr(diag(omega) A dK)`.
        """
        precision = self.root**2
        posterior = self.kernel - matmul(self.half.T, self.half)
        a = jnp.eye(len(precision), dtype=precision.dtype) - posterior * precision
        return Exact(matmul(a.T, in_variance[:, None] * a) + in_logdet * precision[:, None] * a)


def jitter(inducing: Any) -> Any:
    """What is added to the diagonal of `K_ZZ`; above 0 for logits without variance, too."""
    info = jnp.finfo(inducing.dtype)
    return _JITTER * len(inducing) * info.eps * inducing.diagonal().mean() + info.tiny


class Inducing(NamedTuple):
    """The prior with `Phi`, `(M, N)`.

    Attributes:
      root: `L`, `(M, M)`.
      weights: `Phi`.
      variance: of the logits, `(N,)`.
    """

    root: Array
    weights: Array
    variance: Array

    def padded(self, n: int) -> "Inducing":
        """With more training inputs, up to `n`, of variance 0, and independent inducing inputs."""
        m = padded_size(len(self.root))
        others = np.diag((np.arange(m) >= len(self.root)).astype(self.root.dtype))
        root = padded(self.root, m, m) + others
        return Inducing(root, padded(self.weights, m, n), padded(self.variance, n))

    @classmethod
    @functools.partial(jax.jit, static_argnums=0)
    def of(cls, inducing: Array, cross: Array, variance: Array) -> "Inducing":
        """From `K_ZZ`, `K_ZX` and the diagonal of `K_XX`."""
        added = jitter(inducing) * jnp.eye(len(inducing), dtype=inducing.dtype)
        root = jnp.linalg.cholesky(inducing + added)
        return cls(root, solve_triangular(root, cross, lower=True), variance)

    @property
    def own_variance(self) -> Array:
        """Of the inputs with which test inputs have a kernel: the inducing inputs, `(M,)`."""
        return jnp.sum(self.root**2, axis=1)

    @property
    def rest(self) -> Array:
        """Variances of what the inducing inputs don't explain."""
        return jnp.maximum(self.variance - jnp.sum(self.weights**2, axis=0), 0)

    def times(self, alpha: Array) -> Array:
        """`Phi^T Phi alpha`."""
        return matmul(self.weights.T, matmul(self.weights, alpha))

    def given(self, precision: Array) -> "InducingGiven":
        scaled = jnp.sqrt(precision) * self.weights
        lower = jnp.linalg.cholesky(
            jnp.eye(len(scaled), dtype=scaled.dtype) + matmul(scaled, scaled.T)
        )
        half = solve_triangular(lower, self.weights, lower=True)
        return InducingGiven(self.weights, precision, lower, half)

    def features(self, cross: Array) -> Array:
        """Of test inputs with kernels `(T, M)` with the inducing inputs: `(T, M)`."""
        return solve_triangular(self.root, cross.T, lower=True).T

    def mean(self, features: Array, alpha: Array) -> Array:
        """`E[z]` at inputs with these features, `(T, C)`."""
        return matmul(features, matmul(self.weights, alpha))


class InducingGiven(NamedTuple):
    """Given observations; `half = L^-1 Phi`, so that `V = half^T half`."""

    weights: Array
    precision: Array
    lower: Array
    half: Array

    def variance(self) -> Array:
        return jnp.sum(self.half**2, axis=0)

    def logdet(self) -> Array:
        return 2 * jnp.sum(jnp.log(jnp.diagonal(self.lower)))

    def damped(self, e: Array) -> Array:
        """`(Id + diag(omega) Phi^T Phi)^-1 e`."""
        inner = solve_triangular(self.lower, matmul(self.half, e), lower=True, trans="T")
        return e - self.precision * matmul(self.weights.T, inner)

    def squares(self) -> Callable[[Array], Array]:
        """`x -> (V o V) x`, without an `N x N` array."""

        def times(x: Array) -> Array:
            inner = matmul(self.half * x, self.half.T)
            return jnp.sum(self.half * matmul(inner, self.half), axis=0)

        return times

    def reduction(self, features: Array) -> Array:
        """By how much observations reduce the variances of inputs with these features, `(T,)`."""
        inner = solve_triangular(self.lower, features.T, lower=True)
        return jnp.sum(features**2, axis=1) - jnp.sum(inner**2, axis=0)

    def slope(self, in_variance: Array, in_logdet: Array) -> Inducing:
        """In the prior, of `in_variance^T variance() + in_logdet logdet()`.

        With `U = (Id + Phi diag(omega) Phi^T)^-1 Phi`: `V = Phi^T U`, and the slope in `Phi` is
        `2 U (diag(in_variance) (Id - V diag omega) + in_logdet diag omega)`.
        """
        u = solve_triangular(self.lower, self.half, lower=True, trans="T")
        weighted = in_variance * u
        inner = matmul(weighted, u.T)
        damped = weighted - matmul(inner, self.weights * self.precision)
        weights = 2 * (damped + in_logdet * self.precision * u)
        others = jnp.zeros_like(self.lower), jnp.zeros_like(in_variance)
        return Inducing(others[0], weights, others[1])


Prior = Exact | Inducing
