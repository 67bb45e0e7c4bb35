"""Gaussian process priors over logits at the training inputs, and their Gaussian posteriors.

`Exact` has the kernel `K` of `N` training inputs. `Inducing` has the part of it that the logits at
`M` inducing inputs `Z` explain, and the rest of its diagonal. With `L L^T = K_ZZ` and
`Phi = L^-1 K_ZX`,

    z = Phi^T w + r,    w ~ N(0, Id_M),    r_n ~ N(0, K_nn - |Phi_n|^2),

as in Titsias 2009 and Hensman et al. 2015 (arXiv 1411.2005). Inference is over `w`. The rest `r`
keeps its prior, and contributes no divergence to a bound. The divergence of `w` is that of
`Phi^T w`, whose kernel `Phi^T Phi` takes the place of `K`. Given observations of precision `omega`,
`V = (K^-1 + diag omega)^-1` comes from the Cholesky factor of

    B = Id_N + omega^(1/2) K omega^(1/2)    or of    Id_M + Phi diag(omega) Phi^T.

Both have the same determinant, and eigenvalues of at least 1. So `V` needs no inverse of `K`.
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

# Variance added to the diagonal of K_ZZ, in units of eps times M times its mean variance. Without
# it the kernel of inducing inputs that are alike has no Cholesky factor. It acts as noise in what
# the inducing inputs say, so that the bound is still a lower bound.
_JITTER = 10.0


def padded_size(n: int) -> int:
    """The size that `n` inputs are filled up to: programs compiled for it serve other numbers too.

    It is an odd multiple of 16. From 512 inputs on, where computing takes longer than compiling,
    this adds at most a sixteenth. Rows whose length is a power of two share lines of the cache:
    1,024 inputs take 1.3 times as long as 1,008 (measured).
    """
    return 16 + 32 * max(0, -(-(n - 16) // 32))


def padded(array: Any, *shape: int) -> Array:
    """`array` filled up to `shape` with zeros. NumPy does it if it can, which compiles nothing."""
    array = concrete(array)
    widths = [(0, n - m) for n, m in zip(shape, array.shape, strict=True)]
    return jnp.asarray(namespace(array).pad(array, widths))


class Exact(NamedTuple):
    """The prior with the whole kernel of the training inputs, `(N, N)`."""

    kernel: Array

    def padded(self, n: int) -> "Exact":
        """The prior filled up to `n` training inputs, with inputs of variance 0."""
        return Exact(padded(self.kernel, n, n))

    @property
    def variance(self) -> Array:
        """Variances of the logits, `(N,)`."""
        return jnp.diagonal(self.kernel)

    @property
    def own_variance(self) -> Array:
        """Variances at the inputs that test kernels are computed with, the training inputs."""
        return self.variance

    @property
    def rest(self) -> Array:
        """Variances of the rest `r`, `(N,)`: 0, since the kernel is whole."""
        return jnp.zeros_like(self.variance)

    def times(self, alpha: Array) -> Array:
        """`K alpha`."""
        return matmul(self.kernel, alpha)

    def given(self, precision: Array) -> "ExactGiven":
        """The posterior given observations of these precisions, `(N,)`."""
        root = jnp.sqrt(precision)
        scaled = root[:, None] * self.kernel
        lower = jnp.linalg.cholesky(jnp.eye(len(root), dtype=root.dtype) + scaled * root)
        return ExactGiven(self.kernel, root, lower, solve_triangular(lower, scaled, lower=True))

    def features(self, cross: Array) -> Array:
        """Features of test inputs whose kernel with the training inputs is `cross`, `(T, N)`."""
        return cross

    def mean(self, features: Array, alpha: Array) -> Array:
        """`E[z]` at inputs with the given features, `(T, C)`."""
        return matmul(features, alpha)


class ExactGiven(NamedTuple):
    """The posterior of `Exact` given observations.

    Attributes:
      kernel: `K`.
      root: `omega^(1/2)`.
      lower: Cholesky factor `L` of `B`.
      half: `L^-1 omega^(1/2) K`, so that `V = K - half^T half`.
    """

    kernel: Array
    root: Array
    lower: Array
    half: Array

    def variance(self) -> Array:
        """The diagonal of `V`."""
        return jnp.diagonal(self.kernel) - jnp.sum(self.half**2, axis=0)

    def logdet(self) -> Array:
        """`logdet B`."""
        return 2 * jnp.sum(jnp.log(jnp.diagonal(self.lower)))

    def damped(self, e: Array) -> Array:
        """`(Id + diag(omega) K)^-1 e`."""
        inner = solve_triangular(self.lower, self.root * matmul(self.kernel, e), lower=True)
        return e - self.root * solve_triangular(self.lower, inner, lower=True, trans="T")

    def squares(self) -> Callable[[Array], Array]:
        """The function `x -> (V o V) x`."""
        return functools.partial(matmul, (self.kernel - matmul(self.half.T, self.half)) ** 2)

    def reduction(self, features: Array) -> Array:
        """How much observations reduce the variances at inputs with these features, `(T,)`."""
        inner = solve_triangular(self.lower, self.root[:, None] * features.T, lower=True)
        return jnp.sum(inner**2, axis=0)

    def slope(self, in_variance: Array, in_logdet: Array) -> Exact:
        """The slope of `in_variance^T variance() + in_logdet logdet()` in the kernel.

        With `A = (Id + K diag omega)^-1 = Id - V diag omega`: `dV = A dK A^T` and
        `dlogdet = tr(diag(omega) A dK)`.
        """
        precision = self.root**2
        posterior = self.kernel - matmul(self.half.T, self.half)
        a = jnp.eye(len(precision), dtype=precision.dtype) - posterior * precision
        return Exact(matmul(a.T, in_variance[:, None] * a) + in_logdet * precision[:, None] * a)


def jitter(inducing: Any) -> Any:
    """The variance that is added to the diagonal of `K_ZZ`; positive even if `K_ZZ` is 0."""
    info = jnp.finfo(inducing.dtype)
    return _JITTER * len(inducing) * info.eps * inducing.diagonal().mean() + info.tiny


class Inducing(NamedTuple):
    """The prior with inducing inputs.

    Attributes:
      root: `L`, `(M, M)`.
      weights: `Phi`, `(M, N)`.
      variance: variances of the logits at the training inputs, `(N,)`.
    """

    root: Array
    weights: Array
    variance: Array

    def padded(self, n: int) -> "Inducing":
        """The prior filled up to `n` training inputs of variance 0, and to independent `Z`."""
        m = padded_size(len(self.root))
        added_identity = np.diag((np.arange(m) >= len(self.root)).astype(self.root.dtype))
        root = padded(self.root, m, m) + added_identity
        return Inducing(root, padded(self.weights, m, n), padded(self.variance, n))

    @classmethod
    @functools.partial(jax.jit, static_argnums=0)
    def of(cls, inducing: Array, cross: Array, variance: Array) -> "Inducing":
        """The prior from `K_ZZ`, `K_ZX` and the diagonal of `K_XX`."""
        added = jitter(inducing) * jnp.eye(len(inducing), dtype=inducing.dtype)
        root = jnp.linalg.cholesky(inducing + added)
        return cls(root, solve_triangular(root, cross, lower=True), variance)

    @property
    def own_variance(self) -> Array:
        """Variances at the inputs that test kernels are computed with, the inducing inputs."""
        return jnp.sum(self.root**2, axis=1)

    @property
    def rest(self) -> Array:
        """Variances of the rest `r`, which the inducing inputs do not explain, `(N,)`."""
        return jnp.maximum(self.variance - jnp.sum(self.weights**2, axis=0), 0)

    def times(self, alpha: Array) -> Array:
        """`Phi^T Phi alpha`."""
        return matmul(self.weights.T, matmul(self.weights, alpha))

    def given(self, precision: Array) -> "InducingGiven":
        """The posterior given observations of these precisions, `(N,)`."""
        scaled = jnp.sqrt(precision) * self.weights
        lower = jnp.linalg.cholesky(
            jnp.eye(len(scaled), dtype=scaled.dtype) + matmul(scaled, scaled.T)
        )
        half = solve_triangular(lower, self.weights, lower=True)
        return InducingGiven(self.weights, precision, lower, half)

    def features(self, cross: Array) -> Array:
        """Features of test inputs whose kernel with the inducing inputs is `cross`, `(T, M)`."""
        return solve_triangular(self.root, cross.T, lower=True).T

    def mean(self, features: Array, alpha: Array) -> Array:
        """`E[z]` at inputs with the given features, `(T, C)`."""
        return matmul(features, matmul(self.weights, alpha))


class InducingGiven(NamedTuple):
    """The posterior of `Inducing` given observations.

    Attributes:
      weights: `Phi`.
      precision: `omega`.
      lower: Cholesky factor `L` of `Id_M + Phi diag(omega) Phi^T`.
      half: `L^-1 Phi`, so that `V = half^T half`.
    """

    weights: Array
    precision: Array
    lower: Array
    half: Array

    def variance(self) -> Array:
        """The diagonal of `V`."""
        return jnp.sum(self.half**2, axis=0)

    def logdet(self) -> Array:
        """`logdet B`."""
        return 2 * jnp.sum(jnp.log(jnp.diagonal(self.lower)))

    def damped(self, e: Array) -> Array:
        """`(Id + diag(omega) Phi^T Phi)^-1 e`."""
        inner = solve_triangular(self.lower, matmul(self.half, e), lower=True, trans="T")
        return e - self.precision * matmul(self.weights.T, inner)

    def squares(self) -> Callable[[Array], Array]:
        """The function `x -> (V o V) x`, without an `N x N` array."""

        def times(x: Array) -> Array:
            inner = matmul(self.half * x, self.half.T)
            return jnp.sum(self.half * matmul(inner, self.half), axis=0)

        return times

    def reduction(self, features: Array) -> Array:
        """How much observations reduce the variances at inputs with these features, `(T,)`."""
        inner = solve_triangular(self.lower, features.T, lower=True)
        return jnp.sum(features**2, axis=1) - jnp.sum(inner**2, axis=0)

    def slope(self, in_variance: Array, in_logdet: Array) -> Inducing:
        """The slope of `in_variance^T variance() + in_logdet logdet()` in the prior.

        With `U = (Id + Phi diag(omega) Phi^T)^-1 Phi`: `V = Phi^T U`, and the slope in `Phi` is
        `2 U (diag(in_variance) (Id - V diag omega) + in_logdet diag omega)`.
        """
        u = solve_triangular(self.lower, self.half, lower=True, trans="T")
        weighted = in_variance * u
        inner = matmul(weighted, u.T)
        damped = weighted - matmul(inner, self.weights * self.precision)
        weights = 2 * (damped + in_logdet * self.precision * u)
        return Inducing(jnp.zeros_like(self.lower), weights, jnp.zeros_like(in_variance))


Prior = Exact | Inducing
