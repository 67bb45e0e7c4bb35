"""The posterior of logits given class labels, and what it says of test inputs."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Float

from taylor_softmax._numerics.arguments import (
    Validated,
    as_real,
    check_entries,
    check_integer,
    check_variances,
    concrete,
    summary,
)
from taylor_softmax._numerics.surrogate import Exponential
from taylor_softmax._probabilities import inference
from taylor_softmax._probabilities.arguments import (
    InducingKernels,
    KernelLike,
    indefinite,
    nan_unless,
    read_cross,
    read_observations,
)
from taylor_softmax._probabilities.inference import Sites
from taylor_softmax._probabilities.moments import moments
from taylor_softmax._probabilities.priors import Exact, Prior, padded, padded_size


class ClassPosterior(NamedTuple):
    """Class probabilities `y` under a Gaussian posterior over logits.

    Attributes:
      probabilities: `E[y]`, shape `(..., C)`.
      covariance: `Cov[y]`, shape `(..., C, C)`: how uncertain the posterior is of them; or None.
    """

    probabilities: Array
    covariance: Array | None

    def __repr__(self) -> str:
        return summary(self)


class LogitPosterior(NamedTuple):
    """Gaussian posterior over logits, independent over classes; both `(N, C)`."""

    mean: Array
    variance: Array

    def __repr__(self) -> str:
        return summary(self)


@dataclasses.dataclass(frozen=True, repr=False)
class CategoricalPosterior:
    """The posterior `q(z) = prod_c N(K alpha_c, (K^-1 + diag omega_c)^-1)` over logits.

    Attributes:
      log_evidence: a lower bound of `log p(y)`, in nats.
      alpha: `K^-1` times the mean of the logits at the training inputs, `(N, C)`. At the optimum
        `y - p`: what a label differs by from its expected probability.
      site_precision: `omega`, `(N, C)`.
      converged: whether `residual` is at most the tolerance.
      iterations: how often the bound was evaluated.
      residual: how far from the optimum: see `categorical_inference`.
      history: bound and residual by iteration, `(iterations, 2)`.
      prior: what was given of the kernel, as inference has it.
      get: "nngp" or "ntk", which of them was taken from a `neural_tangents.Kernel`; None if the
        kernel was an array.
    """

    log_evidence: Array
    alpha: Array
    site_precision: Array
    converged: bool
    iterations: int
    residual: float
    history: np.ndarray
    prior: Prior
    get: str | None

    def __repr__(self) -> str:
        n, n_classes = self.alpha.shape
        return (
            f"CategoricalPosterior({n} inputs, {n_classes} classes, "
            f"log_evidence={float(self.log_evidence):.6g}, converged={self.converged}, "
            f"iterations={self.iterations}, residual={self.residual:.1e})"
        )

    @overload
    def __call__(
        self,
        k_test_train: Validated[KernelLike],
        k_test_test: Validated[KernelLike],
        *,
        covariance: Validated[bool] = False,
        latent: Literal[False] = False,
    ) -> ClassPosterior: ...
    @overload
    def __call__(
        self,
        k_test_train: Validated[KernelLike],
        k_test_test: Validated[KernelLike],
        *,
        latent: Literal[True],
    ) -> LogitPosterior: ...
    def __call__(
        self,
        k_test_train: Validated[KernelLike],
        k_test_test: Validated[KernelLike],
        *,
        covariance: Validated[bool] = False,
        latent: bool = False,
    ) -> ClassPosterior | LogitPosterior:
        """Class probabilities at test inputs.

        Kernels of the logits, as in `categorical_inference`: arrays, or what `kernel_fn` returns.

        Args:
          k_test_train: kernel of test with training inputs, `(T, N)`, or with inducing inputs,
            `(T, M)`, if the posterior is of `InducingKernels`.
          k_test_test: kernel of test inputs, `(T, T)`, or its diagonal `(T,)`, all that is used.
          covariance: whether to return `Cov[y]`, `(T, C, C)`, too.
          latent: whether to return means and variances of the logits instead, `(T, C)` each.

        Raises:
          TypeError: the kernel is complex, or no array of numbers.
          ValueError: shapes don't match, the kernel is not finite, has covariances that its
            variances don't allow, or is not that of the logits. Of a test input whose kernel is
            traced the results are NaN instead.
        """
        cross, variance, valid, dtype = read_cross(k_test_train, k_test_test, self.prior, self.get)
        logits = _logits(self.prior, Sites(self.alpha, self.site_precision), cross, variance)
        # Half precision comes back as it came.
        half = jnp.finfo(dtype).bits < 32

        def as_given(x: Array) -> Array:
            x = nan_unless(valid, x)
            return x.astype(dtype) if half else x

        if latent:
            return jax.tree.map(as_given, logits)
        result = moments(*logits, Exponential(), covariance)
        return jax.tree.map(as_given, ClassPosterior(result.mean, result.covariance))


def _logits(prior: Prior, sites: Sites, cross: Array, variance: Array) -> LogitPosterior:
    """At test inputs of variances `(T,)` and kernels `cross` with those that the prior has.

    All of them filled up to sizes for which this is compiled already.
    """
    n_test = len(cross)
    size_test = 16 if n_test <= 16 else -(-n_test // 128) * 128
    prior, *filled = _filled(prior, *sites)
    sites, n_own = Sites(*filled), padded_size(cross.shape[1])
    cross = padded(cross, size_test, n_own)
    logits = _latent(prior, sites, cross, padded(variance, size_test))
    return jax.tree.map(lambda x: x[:n_test], logits)


@jax.jit
def _latent(prior: Prior, sites: Sites, cross: Array, variance: Array) -> LogitPosterior:
    features = prior.features(cross)

    def posterior(precision: Array) -> Array:
        return variance - prior.given(precision).reduction(features)

    variances = jax.lax.map(posterior, sites.precision.T).T
    floor = jnp.finfo(variance.dtype).eps * variance[:, None]
    return LogitPosterior(prior.mean(features, sites.alpha), jnp.maximum(variances, floor))


def choose_inducing(
    variance: Validated[ArrayLike], column: Callable[[int], ArrayLike], n_inducing: Validated[int]
) -> np.ndarray:
    """Which inputs to take for inducing ones: each the one that those before explain least.

    The largest conditional variance, that is, the pivot of a Cholesky factorisation, as Burt,
    Rasmussen & van der Wilk 2020 (JMLR 21:131) recommend. Time: `N M^2`, and `M` columns of the
    kernel.

        def column(i):
            return kernel_fn(x, x[i : i + 1], "nngp")[:, 0]

        chosen = choose_inducing(variance, column, 500)

    Args:
      variance: at all inputs, `(N,)`: the diagonal of their kernel.
      column: of an index, the kernel of all inputs with that one, `(N,)`.
      n_inducing: how many, at most.

    Returns:
      Their indices, fewer than `n_inducing` where these explain all others up to rounding.

    Raises:
      TypeError, ValueError: an argument is not as above.
    """
    (rest,), _ = as_real(variance=variance)
    check_integer("n_inducing", n_inducing, least=1)
    if rest.ndim != 1:
        raise ValueError(f"`variance` must have shape (N,), got {rest.shape}.")
    check_variances("variance", rest)
    rest = np.array(rest)
    least = 10 * len(rest) * np.finfo(rest.dtype).eps * rest.max(initial=0)
    rows, chosen = np.empty((min(n_inducing, rest.size), rest.size), rest.dtype), []
    for k, row in enumerate(rows):
        i = int(np.argmax(rest))
        if rest[i] <= least:
            break
        with_all = np.asarray(column(i))
        if with_all.shape != rest.shape:
            raise ValueError(
                f"`column` must return the kernel of all {rest.size} inputs with one, of shape "
                f"{rest.shape}, got {with_all.shape}."
            )
        row[:] = (with_all - rows[:k, i] @ rows[:k]) / np.sqrt(rest[i])
        rest -= row**2
        rest[i] = 0
        chosen.append(i)
    return np.array(chosen, dtype=int)


def categorical_inference(
    k_train_train: Validated[KernelLike | InducingKernels],
    y_train: Validated[ArrayLike],
    *,
    n_classes: Validated[int | None] = None,
    tol: Validated[float] = 1e-4,
    max_iterations: Validated[int] = 100,
    damping: Validated[float] = 1.0,
    init: Validated[CategoricalPosterior | None] = None,
    progress: Validated[bool] = False,
) -> CategoricalPosterior:
    """Posterior of a Gaussian process with a softmax on top, given class labels.

    The model of an infinitely wide network that ends in a softmax: logits `z_c ~ N(0, K)`,
    independent over classes, and labels with probabilities `softmax(z)`. Its posterior is
    approximated by the Gaussian, independent over classes, that maximises a lower bound of the
    evidence `log p(y)`; every expectation in the bound is exact, without samples. The formulas
    stand in the docstring of the module `taylor_softmax._probabilities.inference`.

        posterior = categorical_inference(kernel_fn(x, None, "nngp"), labels)
        k_test = kernel_fn(x_test, x, "nngp"), kernel_fn(x_test, None, "nngp")
        probabilities = posterior(*k_test).probabilities

    Time: some `10 N^3` operations a class and iteration. Memory: a few `N x N` arrays, whatever
    the number of classes. With `M` inducing inputs: some `50 N M^2`, and a few `M x N` arrays.

    Args:
      k_train_train: kernel of the logits at the training inputs, `(N, N)`: "nngp" for the
        posterior of the network itself. The kernel of the network up to `Dense(n_classes)`, without
        its softmax: that of its probabilities is another, which an array does not tell. Or what
        `kernel_fn` returns: of a `Kernel`, or of a tuple of both, the `nngp` is taken (pass its
        `ntk` for the posterior under the NTK). Singular kernels need no jitter. Beyond some 3,000
        inputs `InducingKernels`.
      y_train: classes as integers `(N,)`, from 0, or one-hot or soft labels `(N, C)` that sum to 1.
      n_classes: number of classes of integer labels; by default the largest label and one.
      tol: what the residual has to fall to: the largest of `|y - p - alpha|`, and of what a change
        of the logarithm of a precision would do to twice the bound, in nats.
      max_iterations: how often the bound may be evaluated.
      damping: the longest step, in (0, 1].
      init: a posterior of as many inputs and classes to start from, of another kernel for example.
      progress: whether to print bound and residual.

    Returns:
      A `CategoricalPosterior`, to be called with the kernels of test inputs. If it has not
      converged it says so, with a warning.

    Raises:
      TypeError: labels are neither integers nor real, the kernel is not real, or one of them is
        traced, as inside `jit`: take `categorical_log_evidence` there.
      ValueError: the kernel is not square, symmetric, finite or positive semi-definite, or is a
        `Kernel` of outputs that are not Gaussian; labels are out of range, don't sum to 1 or are
        not as many as inputs; or an option is out of range.
    """
    prior, y, get = read_observations(k_train_train, y_train, n_classes)
    _check_options(tol, max_iterations, damping)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((prior, y))):
        raise TypeError(
            "`categorical_inference` got traced arguments, as inside `jit`, `grad` or `vmap`, "
            "where it can't say whether it has converged. Call it outside, or take the bound "
            "alone: `categorical_log_evidence`."
        )
    history: list[tuple[float, float]] = []

    def report(iteration: int, bound: float, residual: float) -> None:
        history.append((bound, residual))
        if progress:
            print(f"iteration {iteration}: log evidence {bound:.6g}, residual {residual:.1e}")

    filled, labels = _filled(prior, y)
    fit = inference.fit(
        filled,
        labels,
        _start(filled, y, labels, init),
        tol=tol,
        max_iterations=max_iterations,
        damping=damping,
        report=report,
    )
    if isinstance(prior, Exact) and not np.isfinite(fit.log_evidence):
        raise indefinite("k_train_train", concrete(prior.kernel))
    residual, iterations = float(fit.residual), int(fit.iterations)
    converged = residual <= tol
    if not converged:
        warnings.warn(
            f"`categorical_inference` has not converged: after {iterations} iterations the "
            f"residual is {residual:.1e}, `tol` {tol:.1e}. The bound {float(fit.log_evidence):.6g} "
            "holds all the same. Go on from here with `init=`, or accept a larger `tol`.",
            stacklevel=2,
        )
    alpha, precision = (jnp.asarray(np.asarray(x)[: len(y)]) for x in fit.sites)
    return CategoricalPosterior(
        jnp.asarray(fit.log_evidence),
        alpha,
        precision,
        converged,
        iterations,
        residual,
        np.array(history, y.dtype),
        prior,
        get,
    )


def categorical_log_evidence(
    k_train_train: Validated[KernelLike | InducingKernels],
    y_train: Validated[ArrayLike],
    *,
    n_classes: Validated[int | None] = None,
    tol: Validated[float] = 1e-4,
    max_iterations: Validated[int] = 100,
    damping: Validated[float] = 1.0,
) -> Float[Array, ""]:
    """The lower bound of `log p(y)` of `categorical_inference`, differentiable in the kernel.

    For depths and scales of a network, by any optimiser of functions with gradients:

        def loss(scales):
            kernel_fn = network(*scales)
            return -categorical_log_evidence(kernel_fn(x, None, "nngp"), labels, n_classes=10)

        value, gradient = jax.value_and_grad(loss)(scales)

    At its optimum over the posterior the bound's derivative in the kernel is that with the
    posterior held fixed: the gradient costs one more iteration, whatever their number. It is the
    first derivative only: second ones would miss how the posterior moves. Works under `jit`, where
    labels have to be concrete or `n_classes` given. What is traced and wrong gives NaN there.

    Args and errors are those of `categorical_inference`.

    Returns:
      The bound, a scalar, in nats.
    """
    prior, y, _ = read_observations(k_train_train, y_train, n_classes)
    _check_options(tol, max_iterations, damping)
    fixed = jax.lax.stop_gradient(prior)
    # Under `jit` shapes are what they are.
    if not any(isinstance(x, Tracer) for x in jax.tree.leaves((fixed, y))):
        prior, y = _filled(prior, y)
        fixed = jax.lax.stop_gradient(prior)
    fit = inference.fit(
        fixed,
        y,
        inference.initial_sites(y),
        tol=tol,
        max_iterations=max_iterations,
        damping=damping,
    )
    return inference.evidence(prior, y, jax.lax.stop_gradient(fit))


def _filled(prior: Prior, *rows: Any) -> tuple[Any, ...]:
    """Prior and rows of training inputs, filled up to a size for which all is compiled already.

    The inputs that are added have no variance and no labels, and change nothing.
    """
    size = padded_size(len(rows[0]))
    return prior.padded(size), *(padded(x, size, x.shape[1]) for x in rows)


def _check_options(tol: Any, max_iterations: Any, damping: Any) -> None:
    check_integer("max_iterations", max_iterations, least=1)
    (tol, damping), _ = as_real(tol=tol, damping=damping)
    tol, damping = concrete(tol), concrete(damping)
    check_entries("tol", tol, tol > 0, "positive")
    check_entries("damping", damping, (damping > 0) & (damping <= 1), "in (0, 1]")


def _start(prior: Prior, y: Array, filled: Array, init: CategoricalPosterior | None) -> Sites:
    """Sites to start from for labels `(N, C)`, filled up: those of `init`, if it has as many."""
    if init is None:
        return inference.initial_sites(filled)
    if init.alpha.shape != y.shape:
        raise ValueError(
            f"`init` must have {y.shape[0]} inputs and {y.shape[1]} classes, got "
            f"{init.alpha.shape}."
        )
    before, *sites = _filled(init.prior, init.alpha, init.site_precision)
    before, sites = jax.tree.map(lambda x: x.astype(y.dtype), (before, Sites(*sites)))
    return inference.carried_over(prior, before, sites)
