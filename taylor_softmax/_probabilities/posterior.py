"""The posterior of logits given class labels, and its predictions at test inputs."""

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
      covariance: `Cov[y]`, shape `(..., C, C)`: how uncertain the probabilities are. None if it was
        not asked for.
    """

    probabilities: Array
    covariance: Array | None

    def __repr__(self) -> str:
        return summary(self)


class LogitPosterior(NamedTuple):
    """Gaussian posterior over logits, independent over classes.

    Attributes:
      mean: posterior means, `(N, C)`.
      variance: posterior variances, `(N, C)`, in units of a logit squared.
    """

    mean: Array
    variance: Array

    def __repr__(self) -> str:
        return summary(self)


@dataclasses.dataclass(frozen=True, repr=False)
class CategoricalPosterior:
    """The posterior `q(z) = prod_c N(K alpha_c, (K^-1 + diag omega_c)^-1)` over logits.

    Attributes:
      log_evidence: a lower bound of `log p(y)`, in nats.
      alpha: `K^-1` times the means of the logits at the training inputs, `(N, C)`. At the optimum
        it is `y - p`, the label minus its expected probability.
      site_precision: `omega`, `(N, C)`.
      converged: whether `residual` is at most the tolerance.
      iterations: number of evaluations of the bound.
      residual: distance from the optimum, see `tol` of `categorical_inference`.
      history: bound and residual of each iteration, `(iterations, 2)`.
      prior: the prior of the logits, made of the training kernel.
      get: the kernel that was taken from a `neural_tangents.Kernel`, "nngp" or "ntk"; None if the
        argument was an array.
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

        Both kernels are kernels of the logits, as in `categorical_inference`: arrays, or what
        `kernel_fn` returns.

        Args:
          k_test_train: kernel of `T` test inputs with the training inputs, `(T, N)`, or with the
            inducing inputs, `(T, M)`, if the posterior was made of `InducingKernels`.
          k_test_test: kernel of the test inputs, `(T, T)`, or its diagonal, `(T,)`. Only the
            diagonal is used.
          covariance: whether to return `Cov[y]`, `(T, C, C)`, too.
          latent: whether to return means and variances of the logits instead, both `(T, C)`.

        Returns:
          A `ClassPosterior`, or with `latent` a `LogitPosterior`.

        Raises:
          TypeError: a kernel is complex, or not an array of numbers.
          ValueError: shapes do not match; a kernel is not finite, has covariances that its
            variances do not allow, or is not a kernel of logits. If the kernel of a test input is
            traced, wrong values make the results at this input NaN instead.
        """
        cross, variance, valid, dtype = read_cross(k_test_train, k_test_test, self.prior, self.get)
        logits = _logits(self.prior, Sites(self.alpha, self.site_precision), cross, variance)
        # Arguments in half precision have results in half precision.
        half = jnp.finfo(dtype).bits < 32

        def as_given(x: Array) -> Array:
            x = nan_unless(valid, x)
            return x.astype(dtype) if half else x

        if latent:
            return jax.tree.map(as_given, logits)
        result = moments(*logits, Exponential(), covariance)
        return jax.tree.map(as_given, ClassPosterior(result.mean, result.covariance))


def _logits(prior: Prior, sites: Sites, cross: Array, variance: Array) -> LogitPosterior:
    """The posterior of the logits at test inputs.

    All arrays are filled up to sizes for which programs may be compiled already.

    Args:
      cross: kernel of test inputs with the training or inducing inputs, `(T, N)` or `(T, M)`.
      variance: variances at the test inputs, `(T,)`.
    """
    n_test = len(cross)
    size_test = 16 if n_test <= 16 else -(-n_test // 128) * 128
    prior, *filled = _filled(prior, *sites)
    sites, size_prior = Sites(*filled), padded_size(cross.shape[1])
    cross = padded(cross, size_test, size_prior)
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
    """Chooses inducing inputs: each is the input that those chosen before explain least.

    That is the input of the largest conditional variance, or the pivot of a Cholesky
    factorisation, as Burt, Rasmussen & van der Wilk 2020 (JMLR 21:131) recommend. The choice takes
    `N M^2` operations, and `M` columns of the kernel.

        def column(i):
            return kernel_fn(x, x[i : i + 1], "nngp")[:, 0]

        chosen = choose_inducing(variance, column, 500)

    Args:
      variance: variances at all inputs, `(N,)`: the diagonal of their kernel.
      column: from the index of an input, the kernel of all inputs with this one, `(N,)`.
      n_inducing: largest number `M` of inducing inputs.

    Returns:
      Indices of the inducing inputs. There are fewer than `n_inducing` if these explain all other
      inputs up to rounding.

    Raises:
      TypeError: an argument is not real, or `n_inducing` is not an integer.
      ValueError: an argument does not have the shape above, a variance is negative or not finite,
        or `n_inducing` is less than 1.
    """
    (given_variance,), _ = as_real(variance=variance)
    check_integer("n_inducing", n_inducing, least=1)
    if given_variance.ndim != 1:
        raise ValueError(
            f"`variance` must have shape (N,), got {given_variance.shape}. Pass the diagonal of "
            "the kernel."
        )
    check_variances("variance", given_variance)
    # The variance of each input given those that are chosen.
    unexplained = np.array(given_variance)
    n, dtype = unexplained.size, unexplained.dtype
    rounding = 10 * n * np.finfo(dtype).eps * unexplained.max(initial=0)
    rows, chosen = np.empty((min(n_inducing, n), n), dtype), []
    for k, row in enumerate(rows):
        i = int(np.argmax(unexplained))
        if unexplained[i] <= rounding:
            break
        kernel_with_i = np.asarray(column(i))
        if kernel_with_i.shape != (n,):
            raise ValueError(
                f"`column` must return the kernel of all {n} inputs with one, of shape ({n},), got "
                f"{kernel_with_i.shape}."
            )
        row[:] = (kernel_with_i - rows[:k, i] @ rows[:k]) / np.sqrt(unexplained[i])
        unexplained -= row**2
        unexplained[i] = 0
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

    This is the model of an infinitely wide network that ends in a softmax: logits `z_c ~ N(0, K)`,
    independent over classes, and labels with the probabilities `softmax(z)`. The posterior is
    approximated by the Gaussian, independent over classes, that maximises a lower bound of the
    evidence `log p(y)`. All expectations in the bound are exact, without samples. The docstring of
    the module `taylor_softmax._probabilities.inference` has the formulas.

        posterior = categorical_inference(kernel_fn(x, None, "nngp"), labels)
        k_test = kernel_fn(x_test, x, "nngp"), kernel_fn(x_test, None, "nngp")
        probabilities = posterior(*k_test).probabilities

    It takes about `10 N^3` operations for each class and iteration, and the memory of a few `N x N`
    arrays, whatever the number of classes. With `M` inducing inputs it takes about `50 N M^2`
    operations, and a few `M x N` arrays.

    Args:
      k_train_train: kernel of the logits at the training inputs, `(N, N)`. Take the NNGP for the
        posterior of the network itself, and the kernel of the network up to `Dense(n_classes)`,
        without its softmax. An array does not tell whether it is the kernel of logits or of
        probabilities. You can also pass what `kernel_fn` returns. If that holds NNGP and NTK, the
        NNGP is taken; pass `.ntk` for the posterior under the NTK. Singular kernels need no jitter.
        For more than about 3,000 inputs pass `InducingKernels`.
      y_train: classes as integers from 0, `(N,)`, or one-hot or soft labels, `(N, C)`, that sum to
        1 over classes.
      n_classes: number of classes. The default for integer labels is the largest label plus 1.
      tol: the residual to reach. The residual is the largest of `|y - p - alpha|` and of
        `|omega D|`, the derivative of twice the bound, in nats, in the logarithm of a precision.
      max_iterations: largest number of evaluations of the bound.
      damping: the longest step, in (0, 1].
      init: a posterior to start from, with as many inputs and classes, such as that of another
        kernel.
      progress: whether to print bound and residual of each iteration.

    Returns:
      A `CategoricalPosterior`, to be called with the kernels of test inputs. A warning says so if
      it has not converged.

    Raises:
      TypeError: labels are neither integers nor real, the kernel is not real, or one of them is
        traced, as inside `jit`: use `categorical_log_evidence` there.
      ValueError: the kernel is not square, symmetric, finite or positive semi-definite, or it is a
        `Kernel` of outputs that are not Gaussian; labels are out of range, do not sum to 1, or are
        not as many as inputs; or an option is out of range.
    """
    prior, y, get = read_observations(k_train_train, y_train, n_classes)
    _check_options(tol, max_iterations, damping)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((prior, y))):
        raise TypeError(
            "`categorical_inference` got traced arguments, as inside `jit`, `grad` or `vmap`, "
            "where it can't say whether it has converged. Call it outside, or use "
            "`categorical_log_evidence`, which returns the bound alone."
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
            f"residual is {residual:.1e}, and `tol` is {tol:.1e}. The bound "
            f"{float(fit.log_evidence):.6g} holds nevertheless. Continue from this posterior with "
            "`init=`, raise `max_iterations`, or accept a larger `tol`.",
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

    Maximise it to choose depth and scales of a network, with any optimiser that takes gradients:

        def loss(scales):
            kernel_fn = network(*scales)
            return -categorical_log_evidence(kernel_fn(x, None, "nngp"), labels, n_classes=10)

        value, gradient = jax.value_and_grad(loss)(scales)

    At the optimum over the posterior, the derivative of the bound in the kernel is that at a fixed
    posterior. So the gradient costs one more iteration, whatever the number of hyperparameters.
    Only first derivatives are right: second derivatives would miss how the posterior moves. The
    function works under `jit`, if labels are concrete or `n_classes` is given. Wrong values of
    traced arguments make the result NaN.

    Arguments and errors are those of `categorical_inference`.

    Returns:
      The bound, a scalar, in nats.
    """
    prior, y, _ = read_observations(k_train_train, y_train, n_classes)
    _check_options(tol, max_iterations, damping)
    fixed = jax.lax.stop_gradient(prior)
    # Under `jit` the shapes are fixed already, and filling up would save no compilation.
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
    """The prior and rows of training inputs, filled up so that compiled programs can be reused.

    The added inputs have neither variance nor labels, and change nothing.
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
    """The sites to start from, filled up: those of `init`, or those of equal probabilities.

    Args:
      y: labels, `(N, C)`.
      filled: the labels, filled up.
    """
    if init is None:
        return inference.initial_sites(filled)
    if init.alpha.shape != y.shape:
        raise ValueError(
            f"`init` must be a posterior of {y.shape[0]} inputs and {y.shape[1]} classes, got "
            f"{init.alpha.shape}. Leave it out where the training inputs changed."
        )
    before, *sites = _filled(init.prior, init.alpha, init.site_precision)
    before, sites = jax.tree.map(lambda x: x.astype(y.dtype), (before, Sites(*sites)))
    return inference.carried_over(prior, before, sites)
