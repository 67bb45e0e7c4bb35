"""The posterior of logits given class labels, and what it says of test inputs."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float

from taylor_softmax._numerics.arguments import (
    Validated,
    as_real,
    check_covariances,
    check_entries,
    check_integer,
    check_variances,
)
from taylor_softmax._numerics.surrogate import Exponential
from taylor_softmax._probabilities import inference
from taylor_softmax._probabilities.inference import Sites
from taylor_softmax._probabilities.moments import moments
from taylor_softmax._probabilities.priors import Exact, Inducing, Prior

# Of a kernel's asymmetry, over its largest entry: what rounding in float32 leaves.
_SYMMETRY = 1e-4
# Of a kernel between inputs, over the root of the product of their variances: more than estimates,
# over positions and in attention, are off. What is beyond comes of two kernels, such as NNGP and
# NTK, or of other inputs.
_SLACK = 0.05
_POSSIBLE = "a covariance of variables with the variances given: of one kernel, and the same inputs"


class ClassPosterior(NamedTuple):
    """Class probabilities `y` under a Gaussian posterior over logits.

    Attributes:
      probabilities: `E[y]`, shape `(..., C)`.
      covariance: `Cov[y]`, shape `(..., C, C)`: how uncertain the posterior is of them; or None.
    """

    probabilities: Array
    covariance: Array | None


class LogitPosterior(NamedTuple):
    """Gaussian posterior over logits, independent over classes; both `(N, C)`."""

    mean: Array
    variance: Array


class InducingKernels(NamedTuple):
    """What stands for an `N x N` kernel that would be too large: kernels of `M` inducing inputs.

    Inducing inputs are of the kind of training inputs, and best some of them: see
    `choose_inducing`. `z = E[z | logits at the inducing inputs] + r`, and of `r` the prior is kept.
    The bound of the evidence stays one, and is the higher the more of them there are; with all
    training inputs for inducing ones it is that of the whole kernel.

    Attributes:
      k_inducing_inducing: their kernel, `(M, M)`.
      k_inducing_train: with the training inputs, `(M, N)`.
      k_train_train: variances at the training inputs, `(N,)`: the diagonal of their kernel.
    """

    k_inducing_inducing: ArrayLike
    k_inducing_train: ArrayLike
    k_train_train: ArrayLike


@dataclasses.dataclass(frozen=True)
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
    """

    log_evidence: Array
    alpha: Array
    site_precision: Array
    converged: bool
    iterations: int
    residual: float
    history: np.ndarray
    prior: Prior

    @overload
    def __call__(
        self,
        k_test_train: Validated[ArrayLike],
        k_test_test: Validated[ArrayLike],
        *,
        covariance: Validated[bool] = False,
        latent: Literal[False] = False,
    ) -> ClassPosterior: ...
    @overload
    def __call__(
        self,
        k_test_train: Validated[ArrayLike],
        k_test_test: Validated[ArrayLike],
        *,
        latent: Literal[True],
    ) -> LogitPosterior: ...
    def __call__(
        self,
        k_test_train: Validated[ArrayLike],
        k_test_test: Validated[ArrayLike],
        *,
        covariance: Validated[bool] = False,
        latent: bool = False,
    ) -> ClassPosterior | LogitPosterior:
        """Class probabilities at test inputs.

        Args:
          k_test_train: kernel of test with training inputs, `(T, N)`, or with inducing inputs,
            `(T, M)`, if the posterior is of `InducingKernels`.
          k_test_test: kernel of test inputs, `(T, T)`, or its diagonal `(T,)`, all that is used.
          covariance: whether to return `Cov[y]`, `(T, C, C)`, too.
          latent: whether to return means and variances of the logits instead, `(T, C)` each.

        Raises:
          TypeError: the kernel is complex, or no array of numbers.
          ValueError: shapes don't match, the kernel is not finite, or has covariances that its
            variances don't allow.
        """
        (cross, prior), dtype = as_real(k_test_train=k_test_train, k_test_test=k_test_test)
        if isinstance(self.prior, Inducing):
            n, kind, name = len(self.prior.weights), "inducing", "x_inducing"
        else:
            n, kind, name = len(self.alpha), "training", "x_train"
        if cross.ndim != 2 or cross.shape[1] != n:
            raise ValueError(
                f"`k_test_train` must have shape (T, {n}) for {n} {kind} inputs, got "
                f"{cross.shape}. Test inputs come first: `kernel_fn(x_test, {name})`."
            )
        n_test = len(cross)
        if prior.shape not in ((n_test,), (n_test, n_test)):
            raise ValueError(
                f"`k_test_test` must have shape ({n_test}, {n_test}) or ({n_test},), its diagonal, "
                f"got {prior.shape}."
            )
        prior = jnp.diagonal(prior) if prior.ndim == 2 else prior
        check_variances("k_test_test", prior)
        own = self.prior.own_variance
        check_covariances("k_test_train", cross, prior[:, None], own, _SLACK, _POSSIBLE)
        logits = _latent(self.prior, Sites(self.alpha, self.site_precision), cross, prior)
        # Half precision comes back as it came.
        half = jnp.finfo(dtype).bits < 32
        as_given = functools.partial(jax.tree.map, lambda x: x.astype(dtype) if half else x)
        if latent:
            return as_given(logits)
        result = moments(*logits, Exponential(), covariance)
        return as_given(ClassPosterior(result.mean, result.covariance))


@jax.jit
def _latent(prior: Prior, sites: Sites, cross: Array, variance: Array) -> LogitPosterior:
    """At test inputs of variances `(T,)` and kernels `cross` with those that the prior has."""
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
    k_train_train: Validated[ArrayLike | InducingKernels],
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
        posterior of the network itself. The kernel of a network up to its softmax, not of its
        probabilities. Singular kernels need no jitter. Beyond some 3,000 inputs `InducingKernels`.
      y_train: classes as integers `(N,)`, or one-hot or soft labels `(N, C)` that sum to 1.
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
      TypeError: labels are neither integers nor real, or the kernel is not real.
      ValueError: the kernel is not square, symmetric or finite, labels are out of range, don't sum
        to 1 or are not as many as inputs, or an option is out of range.
    """
    prior, y = prior_and_labels(k_train_train, y_train, n_classes)
    check_integer("max_iterations", max_iterations, least=1)
    if not 0 < damping <= 1:
        raise ValueError(f"`damping` must be in (0, 1], got {damping}.")
    if not tol > 0:
        raise ValueError(f"`tol` must be positive, got {tol}.")
    start = _start(y, init)
    fit = inference.fit(
        prior,
        y,
        start,
        tol=tol,
        max_iterations=max_iterations,
        damping=damping,
        report=_report if progress else None,
    )
    residual, iterations = float(fit.residual), int(fit.iterations)
    converged = residual <= tol
    if not converged:
        warnings.warn(
            f"`categorical_inference` has not converged: after {iterations} iterations the "
            f"residual is {residual:.1e}, `tol` {tol:.1e}. The bound {float(fit.log_evidence):.6g} "
            "holds all the same. Go on from here with `init=`, or accept a larger `tol`.",
            stacklevel=2,
        )
    return CategoricalPosterior(
        fit.log_evidence,
        fit.sites.alpha,
        fit.sites.precision,
        converged,
        iterations,
        residual,
        np.asarray(fit.history[:iterations]),
        prior,
    )


def categorical_log_evidence(
    k_train_train: Validated[ArrayLike | InducingKernels],
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
    labels have to be concrete or `n_classes` given, and arguments are not checked.

    Args and errors are those of `categorical_inference`.

    Returns:
      The bound, a scalar, in nats.
    """
    prior, y = prior_and_labels(k_train_train, y_train, n_classes)
    fit = inference.fit(
        jax.lax.stop_gradient(prior),
        y,
        inference.initial_sites(y),
        tol=tol,
        max_iterations=max_iterations,
        damping=damping,
    )
    return inference.bound(prior, y, jax.lax.stop_gradient(fit.sites))


def _start(y: Array, init: CategoricalPosterior | None) -> Sites:
    """Sites to start from for labels `(N, C)`: those of `init`, if it has as many."""
    if init is None:
        return inference.initial_sites(y)
    if init.alpha.shape != y.shape:
        raise ValueError(
            f"`init` must have {y.shape[0]} inputs and {y.shape[1]} classes, got "
            f"{init.alpha.shape}."
        )
    return Sites(init.alpha.astype(y.dtype), init.site_precision.astype(y.dtype))


def _report(iteration: Array, bound: Array, residual: Array) -> None:
    print(f"iteration {int(iteration)}: log evidence {bound:.6g}, residual {residual:.1e}")


def prior_and_labels(
    k_train_train: Validated[ArrayLike | InducingKernels],
    y_train: Validated[ArrayLike],
    n_classes: Validated[int | None],
) -> tuple[Prior, Array]:
    """The prior and labels `(N, C)` of its dtype, or what is wrong with them."""
    if isinstance(k_train_train, InducingKernels):
        prior = _inducing(k_train_train)
    else:
        (kernel,), dtype = as_real(k_train_train=k_train_train)
        _check_kernel("k_train_train", kernel, dtype, "kernel_fn(x_train, None, 'nngp')")
        prior = Exact(kernel)
    variance = prior.variance
    return prior, _labels(y_train, len(variance), n_classes).astype(variance.dtype)


def _inducing(kernels: InducingKernels) -> Inducing:
    (own, cross, variance), dtype = as_real(**kernels._asdict())
    _check_kernel("k_inducing_inducing", own, dtype, "kernel_fn(x_inducing, None, 'nngp')")
    if cross.ndim != 2 or cross.shape[0] != len(own) or not cross.size:
        raise ValueError(
            f"`k_inducing_train` must have shape ({len(own)}, N) for {len(own)} inducing inputs, "
            f"got {cross.shape}. They come first: `kernel_fn(x_inducing, x_train)`."
        )
    if variance.shape != cross.shape[1:]:
        raise ValueError(
            f"`k_train_train` of `InducingKernels` must have shape {cross.shape[1:]}, the diagonal "
            f"of the kernel at the training inputs, got {variance.shape}."
        )
    check_variances("k_train_train", variance)
    of_inducing = jnp.diagonal(own)[:, None]
    check_covariances("k_inducing_train", cross, of_inducing, variance, _SLACK, _POSSIBLE)
    return Inducing.of(own, cross, variance)


def _check_kernel(name: str, kernel: Array, dtype: DTypeLike, example: str) -> None:
    """Raises a `ValueError` unless the kernel, given in `dtype`, is square and symmetric."""
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1] or not len(kernel):
        raise ValueError(
            f"`{name}` must have shape (N, N) with N >= 1, got {kernel.shape}. Pass the "
            f"kernel of the logits, `{example}`."
        )
    check_entries(name, kernel, jnp.isfinite(kernel), "finite")
    if isinstance(kernel, Tracer):
        return
    asymmetry = float(jnp.max(jnp.abs(kernel - kernel.T)))
    largest = float(jnp.max(jnp.abs(kernel)))
    if asymmetry > max(_SYMMETRY, 2 * float(jnp.finfo(dtype).eps)) * largest:
        raise ValueError(
            f"`{name}` must be symmetric, got entries up to {largest:.3g} that differ "
            f"from their mirror image by up to {asymmetry:.3g}."
        )
    if float(jnp.min(jnp.diagonal(kernel))) < 0:
        raise ValueError(f"`{name}` must have variances on its diagonal, got negatives.")


def _labels(y_train: Validated[ArrayLike], n: int, n_classes: Validated[int | None]) -> Array:
    y = jnp.asarray(y_train)
    if y.ndim == 2:
        (y,), _ = as_real(y_train=y)
    if y.ndim not in (1, 2) or len(y) != n:
        raise ValueError(
            f"`y_train` must have shape ({n},) or ({n}, C) for a kernel of {n} inputs, got "
            f"{y.shape}."
        )
    if y.ndim == 1:
        if not jnp.issubdtype(y.dtype, jnp.integer):
            raise TypeError(
                f"`y_train` of shape (N,) must be integers, the classes, got {y.dtype}."
            )
        concrete = not isinstance(y, Tracer)
        if n_classes is None and not concrete:
            raise ValueError("`n_classes` must be given where `y_train` is traced.")
        least, largest = (int(jnp.min(y)), int(jnp.max(y))) if concrete else (0, 0)
        n_classes = max(largest + 1, 2) if n_classes is None else n_classes
        check_integer("n_classes", n_classes, least=2)
        if least < 0 or largest >= n_classes:
            raise ValueError(
                f"`y_train` must be classes from 0 to {n_classes - 1}, got {least} to {largest}."
            )
        return jax.nn.one_hot(y, n_classes)
    if (n_classes is not None and y.shape[1] != n_classes) or y.shape[1] < 2:
        raise ValueError(
            f"`y_train` must have {n_classes or 'two or more'} columns, a class each, got "
            f"{y.shape}."
        )
    check_entries("y_train", y, jnp.isfinite(y), "finite")
    if not isinstance(y, Tracer):
        sums = np.asarray(jnp.sum(y, axis=1))
        if np.min(y) < 0 or np.max(np.abs(sums - 1)) > 1e-4:
            raise ValueError(
                "`y_train` of shape (N, C) must be probabilities that sum to 1 over classes, got "
                f"entries from {float(np.min(y)):.3g} and sums of {sums.min():.3g} to "
                f"{sums.max():.3g}. One-hot labels for regression, shifted by their mean, are not."
            )
    return y
