"""Kernels and class labels as users pass them: read, or what is wrong with them.

What is concrete is read with NumPy, so that it is checked under a transformation too. Of what is
traced nothing is known: it gives NaN where it is wrong.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from taylor_softmax._numerics.arguments import (
    as_real,
    check_covariances,
    check_entries,
    check_integer,
    check_variances,
    concrete,
    namespace,
    shown,
    summary,
)
from taylor_softmax._numerics.precision import single_at_least
from taylor_softmax._probabilities.priors import Exact, Inducing, Prior, jitter

# Of a kernel's asymmetry, over its largest entry: what rounding in float32 leaves.
_SYMMETRY = 1e-4
# Of a kernel between inputs, over the root of the product of their variances: more than estimates,
# over positions and in attention, are off. What is beyond comes of two kernels, such as NNGP and
# NTK, or of other inputs.
_SLACK = 0.05
_POSSIBLE = "a covariance of variables with the variances given: of one kernel, and the same inputs"
# Of a kernel's eigenvalues below 0, over its largest variance: twenty times what estimates of 256
# points leave at logits of variance 20, and 40 times the NTK in float32 of inputs that are nearly
# alike (measured).
_INDEFINITE = 1e-2
# Labels name their classes by numbers. Beyond as many as this, and as inputs, they name others.
_MANY_CLASSES = 1000


# What `kernel_fn` returns: an array, a `neural_tangents.Kernel`, or a named tuple of arrays.
KernelLike = ArrayLike | Any


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

    k_inducing_inducing: KernelLike
    k_inducing_train: KernelLike
    k_train_train: ArrayLike

    def __repr__(self) -> str:
        return summary(self)


class Observations(NamedTuple):
    """What inference is given.

    Attributes:
      prior: of the logits at the training inputs.
      labels: `(N, C)`, in the precision of the prior; NaN where traced arguments are wrong.
      get: which kernel of a `neural_tangents.Kernel` the prior has; None where it was an array.
    """

    prior: Prior
    labels: Array
    get: str | None


def read_observations(k_train_train: Any, y_train: Any, n_classes: Any) -> Observations:
    """Kernel and labels of inference, or what is wrong with them."""
    prior, valid, get = _read_prior(k_train_train)
    labels, labels_valid = read_labels(y_train, len(prior.variance), n_classes)
    labels = jnp.asarray(labels, prior.variance.dtype)
    return Observations(prior, nan_unless(valid & labels_valid, labels), get)


def nan_unless(valid: Any, array: Array) -> Array:
    """`array`, NaN where it is not `valid`, an array of its leading axes."""
    if not isinstance(valid, Tracer):
        return array
    return jnp.where(valid.reshape(*valid.shape, *(1,) * (array.ndim - valid.ndim)), array, jnp.nan)


def read_kernel(name: str, kernel: Any, get: str | None = None) -> tuple[Any, str | None]:
    """The array of a kernel as `kernel_fn` returns it, and which of its kernels that is.

    Args:
      kernel: an array, which is left as it is; or a `neural_tangents.Kernel`, or a tuple of "nngp"
        and "ntk" with these names.
      get: which to take; None for the only one, or for the NNGP of both.

    Raises:
      ValueError: it does not hold that kernel, or is not one of Gaussian logits.
    """
    held = [each for each in ("nngp", "ntk") if getattr(kernel, each, None) is not None]
    if not held:
        return kernel, get
    # Other than bare arrays a `Kernel` knows whether it is one of Gaussian outputs.
    if getattr(kernel, "is_gaussian", True) is not True:
        raise ValueError(
            f"`{name}` must be the kernel of the logits, which are Gaussian, got a "
            f"{type(kernel).__name__} of outputs that are not. Take the kernel of the network "
            "without its last softmax: the layers up to `Dense(n_classes)`."
        )
    get = held[0] if get is None else get
    if get not in held:
        raise ValueError(
            f"`{name}` must hold the {get.upper()}, of which the posterior is, got "
            f"{' and '.join(held)} alone."
        )
    return getattr(kernel, get), get


def read_cross(
    k_test_train: Any, k_test_test: Any, prior: Prior, get: str | None
) -> tuple[Array, Array, Any, Any]:
    """Kernels of test inputs, or what is wrong with them.

    Args:
      prior: of the logits at the training inputs.
      get: which kernel of a `Kernel` the prior has, if that is known.

    Returns:
      The kernel with the inputs of the prior, `(T, N)` or `(T, M)`; the variances at the test
      inputs, `(T,)`; which of them are valid, `(T,)`; and the dtype of results.
    """
    given = {"k_test_train": k_test_train, "k_test_test": k_test_test}
    for name, kernel in given.items():
        both = all(getattr(kernel, each, None) is not None for each in ("nngp", "ntk"))
        if both and get is None:
            raise ValueError(
                f"`{name}` holds NNGP and NTK, and `k_train_train` was an array, which may be "
                f"either. Pass `{name}.nngp`, or `.ntk`: what that array was."
            )
        given[name], _ = read_kernel(name, kernel, get)
    (cross, variance), dtype = as_real(**given)
    inducing = isinstance(prior, Inducing)
    kind, x = ("inducing", "x_inducing") if inducing else ("training", "x_train")
    own = concrete(prior.own_variance)
    if cross.ndim != 2 or cross.shape[1] != len(own):
        raise ValueError(
            f"`k_test_train` must have shape (T, {len(own)}) for {len(own)} {kind} inputs, got "
            f"{cross.shape}. Test inputs come first: `kernel_fn(x_test, {x})`."
        )
    n_test = len(cross)
    if variance.shape not in ((n_test,), (n_test, n_test)):
        raise ValueError(
            f"`k_test_test` must have shape ({n_test}, {n_test}) or ({n_test},), its diagonal, "
            f"got {variance.shape}."
        )
    with jax.ensure_compile_time_eval():
        variance = jnp.diagonal(variance) if variance.ndim == 2 else variance
    at = concrete(variance)
    valid = check_variances("k_test_test", at)
    possible = check_covariances(
        "k_test_train", concrete(cross), at[:, None], own, _SLACK, _POSSIBLE
    )
    return cross, variance, valid & possible.all(axis=1), dtype


def _read_prior(k_train_train: Any) -> tuple[Prior, Any, str | None]:
    """The prior; whether it is one, if that is traced; and which kernel of a `Kernel` it has."""
    if isinstance(k_train_train, InducingKernels):
        return _read_inducing(k_train_train)
    array, get = read_kernel("k_train_train", k_train_train)
    (kernel,), dtype = as_real(k_train_train=array)
    example = "kernel_fn(x_train, None, 'nngp')"

    def slack(k: Any) -> Any:
        rounding = 10 * len(k) * float(jnp.finfo(dtype).eps)
        # Above 0 for logits without variance, too.
        return (_INDEFINITE + rounding) * k.diagonal().max() + jnp.finfo(k.dtype).tiny

    return Exact(kernel), _check_kernel("k_train_train", kernel, dtype, example, slack), get


def _read_inducing(kernels: InducingKernels) -> tuple[Inducing, Any, str | None]:
    arrays, get = {}, None
    for name, kernel in kernels._asdict().items():
        arrays[name], get = read_kernel(name, kernel, get)
    (own, cross, variance), dtype = as_real(**arrays)
    example = "kernel_fn(x_inducing, None, 'nngp')"
    valid = _check_kernel("k_inducing_inducing", own, dtype, example, jitter)
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
    at = concrete(variance)
    valid = valid & check_variances("k_train_train", at).all()
    of_inducing = concrete(own).diagonal()[:, None]
    possible = check_covariances(
        "k_inducing_train", concrete(cross), of_inducing, at, _SLACK, _POSSIBLE
    )
    return Inducing.of(own, cross, variance), valid & possible.all(), get


def _check_kernel(
    name: str, kernel: Array, dtype: DTypeLike, example: str, slack: Callable[[Any], Any]
) -> Any:
    """Whether a kernel that was given in `dtype` is one, if it is traced.

    Args:
      slack: how far its least eigenvalue may be below 0.

    Raises:
      ValueError: it is not square, or is concrete, and not finite, symmetric or positive
        semi-definite.
    """
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1] or not len(kernel):
        raise ValueError(
            f"`{name}` must have shape (N, N) with N >= 1, got {kernel.shape}. Pass the "
            f"kernel of the logits, `{example}`."
        )
    k = concrete(lax.stop_gradient(kernel) if isinstance(kernel, Tracer) else kernel)
    finite = check_entries(name, k, namespace(k).isfinite(k), "finite")
    rounding = max(_SYMMETRY, 2 * float(jnp.finfo(dtype).eps))
    symmetric = check_entries(name, k, abs(k - k.T) <= rounding * abs(k).max(), "symmetric")
    variance = k.diagonal()
    check_entries(name, variance, variance >= 0, "nonnegative along its diagonal")
    possible = check_covariances(name, k, variance[:, None], variance, _SLACK, _POSSIBLE)
    return finite.all() & symmetric.all() & possible.all() & _is_positive(name, k, slack(k))


def _is_positive(name: str, kernel: Any, slack: Any) -> Any:
    """Whether the eigenvalues of a kernel are at least `-slack`, if it is traced."""
    shifted = kernel + slack * np.eye(len(kernel), dtype=kernel.dtype)
    if isinstance(kernel, Tracer):
        return jnp.all(jnp.isfinite(jnp.linalg.cholesky(shifted)))
    try:
        np.linalg.cholesky(shifted)
    except np.linalg.LinAlgError:
        raise indefinite(name, kernel) from None
    return True


def indefinite(name: str, kernel: Any) -> ValueError:
    """The error that says how far below 0 the least eigenvalue of a kernel is."""
    least = float(np.linalg.eigvalsh(kernel)[0])
    return ValueError(
        f"`{name}` must be positive semi-definite, got an eigenvalue of {least:.3g} at variances "
        f"up to {float(kernel.diagonal().max()):.3g}. It is the covariance of nothing. If it is an "
        f"estimate of one, add {-least:.2g} to its diagonal."
    )


def read_labels(y_train: Any, n: int, n_classes: Any) -> tuple[Any, Any]:
    """One-hot or soft labels `(n, C)` of class labels; and which are valid, `(n,)`, if traced."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(y_train)):
        y = jnp.asarray(y_train)
    else:
        y = _concrete_labels(y_train)
    if y.ndim not in (1, 2) or len(y) != n:
        raise ValueError(
            f"`y_train` must have shape ({n},) or ({n}, C) for a kernel of {n} inputs, got "
            f"{y.shape}."
        )
    return _one_hot(y, n_classes) if y.ndim == 1 else _soft(y, n_classes)


def _concrete_labels(y_train: Any) -> np.ndarray:
    try:
        y = np.asarray(y_train)
    except ValueError:
        y = np.empty((), object)
    if y.dtype != bool and not jnp.issubdtype(y.dtype, np.number):
        raise TypeError(
            f"`y_train` must be numbers, got {shown(y_train)}. Number classes with names by "
            "`classes, y_train = np.unique(names, return_inverse=True)`."
        )
    return y


def _one_hot(y: Any, n_classes: Any) -> tuple[Any, Any]:
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"`y_train` of shape (N,) must be integers, the classes, got {y.dtype}.")
    if n_classes is None:
        if isinstance(y, Tracer):
            raise ValueError("`n_classes` must be given where `y_train` is traced.")
        n_classes = max(int(y.max()) + 1, 2)
        if n_classes > max(_MANY_CLASSES, len(y)):
            raise ValueError(
                f"`y_train` must be classes, numbered from 0, got {n_classes - 1} among "
                f"{len(y)} labels. Number them by `classes, y_train = np.unique(y_train, "
                "return_inverse=True)`, or give `n_classes`."
            )
    n_classes = check_integer("n_classes", n_classes, least=2)
    # Of traced ones the size is known, and one dtype is needed.
    y = y.astype(int) if isinstance(y, Tracer) else y
    valid = (y >= 0) & (y < n_classes)
    check_entries("y_train", y, valid, f"classes from 0 to {n_classes - 1}")
    return y[:, None] == namespace(y).arange(n_classes), valid


def _soft(y: Any, n_classes: Any) -> tuple[Any, Any]:
    if jnp.issubdtype(y.dtype, jnp.complexfloating):
        raise TypeError(f"`y_train` must be real, got dtype {y.dtype}.")
    if (n_classes is not None and y.shape[1] != n_classes) or y.shape[1] < 2:
        raise ValueError(
            f"`y_train` must have {n_classes or 'two or more'} columns, a class each, got "
            f"{y.shape}. Classes as integers have shape ({len(y)},)."
        )
    # Integers are exact: they count as floats of the default precision.
    given = y.dtype if jnp.issubdtype(y.dtype, jnp.floating) else jnp.result_type(float)
    dtype, rounding = single_at_least(given), 2 * float(jnp.finfo(given).eps)
    must = "probabilities that sum to 1 over classes, as one-hot labels do but not less their mean"
    y = y.astype(dtype)
    nonnegative = check_entries("y_train", y, y >= 0, must)
    sums = y.sum(axis=1)
    valid = check_entries("y_train", sums, abs(sums - 1) <= max(1e-4, rounding), must)
    return y, nonnegative.all(axis=1) & valid
