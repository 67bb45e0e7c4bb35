"""Reading and checking of kernels and class labels as users pass them.

Concrete arguments are read with NumPy, so that they are also checked inside `jit`, `grad` and
`vmap`. The values of traced arguments are not known: wrong ones make the result NaN.
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

# Largest asymmetry of a kernel, relative to its largest entry: float32 rounds by less.
_SYMMETRY = 1e-4
# How far a covariance may exceed the root of the product of the variances, relative to that root.
# The errors of estimates, over positions and in attention, are smaller. Larger excess means that
# two kernels were mixed, such as NNGP and NTK, or the kernels of different inputs.
_SLACK = 0.05
_POSSIBLE = (
    "a covariance that the variances allow (pass kernels of one kind, NNGP or NTK, and of the same "
    "inputs)"
)
# How far eigenvalues may be below 0, relative to the largest variance: twenty times what estimates
# from 256 points are at logits of variance 20, and 40 times what the NTK of nearly equal inputs is
# in float32 (measured).
_INDEFINITE = 1e-2
# Labels number the classes. A largest label beyond this number, and beyond the number of inputs,
# is something else, such as an identifier.
_MANY_CLASSES = 1000


# Everything that `kernel_fn` returns: an array, a `neural_tangents.Kernel`, or a named tuple of
# arrays.
KernelLike = ArrayLike | Any


class InducingKernels(NamedTuple):
    """The kernels of `M` inducing inputs, in place of an `N x N` kernel that is too large.

    Inducing inputs are best chosen among the training inputs, by `choose_inducing`. The logits are
    `z = E[z | logits at the inducing inputs] + r`. Inference changes the first part, and the rest
    `r` keeps its prior. The bound is still a lower bound of the evidence. More inducing inputs
    raise it, and with all training inputs it is the bound of the whole kernel.

    Attributes:
      k_inducing_inducing: kernel of the inducing inputs, `(M, M)`.
      k_inducing_train: kernel of the inducing inputs with the training inputs, `(M, N)`.
      k_train_train: variances at the training inputs, `(N,)`: the diagonal of their kernel.
    """

    k_inducing_inducing: KernelLike
    k_inducing_train: KernelLike
    k_train_train: ArrayLike

    def __repr__(self) -> str:
        return summary(self)


class Observations(NamedTuple):
    """The checked arguments of inference.

    Attributes:
      prior: prior of the logits at the training inputs.
      labels: one-hot or soft labels, `(N, C)`, in the precision of the prior; NaN where traced
        arguments are wrong.
      get: the kernel that was taken from a `neural_tangents.Kernel`, "nngp" or "ntk"; None if the
        argument was an array.
    """

    prior: Prior
    labels: Array
    get: str | None


def read_observations(k_train_train: Any, y_train: Any, n_classes: Any) -> Observations:
    """Reads the kernel and the labels of inference; raises what `categorical_inference` raises."""
    prior, valid, get = _read_prior(k_train_train)
    labels, labels_valid = read_labels(y_train, len(prior.variance), n_classes)
    labels = jnp.asarray(labels, prior.variance.dtype)
    return Observations(prior, nan_unless(valid & labels_valid, labels), get)


def nan_unless(valid: Any, array: Array) -> Array:
    """`array`, with NaN where `valid`, which has its leading axes, is False.

    If `valid` is concrete, wrong arguments have raised an error already.
    """
    if not isinstance(valid, Tracer):
        return array
    return jnp.where(valid.reshape(*valid.shape, *(1,) * (array.ndim - valid.ndim)), array, jnp.nan)


def read_kernel(name: str, kernel: Any, get: str | None = None) -> tuple[Any, str | None]:
    """The array of a kernel as `kernel_fn` returns it, and the name of that kernel.

    Args:
      name: name of the argument, for messages.
      kernel: an array, which is returned unchanged; a `neural_tangents.Kernel`; or a named tuple
        with fields "nngp" and "ntk".
      get: which kernel to take, "nngp" or "ntk". None takes the only one there is, or the NNGP.

    Raises:
      ValueError: `kernel` does not hold the kernel asked for, or its outputs are not Gaussian.
    """
    held = [kind for kind in ("nngp", "ntk") if getattr(kernel, kind, None) is not None]
    if not held:
        return kernel, get
    # A `Kernel` says whether its outputs are Gaussian; an array does not.
    if getattr(kernel, "is_gaussian", True) is not True:
        raise ValueError(
            f"`{name}` must be the kernel of the logits, which are Gaussian, got a "
            f"{type(kernel).__name__} of outputs that are not. Take the kernel of the network "
            "without its last softmax: the layers up to `Dense(n_classes)`."
        )
    get = held[0] if get is None else get
    if get not in held:
        raise ValueError(
            f"`{name}` must hold the {get.upper()}, as the training kernel of the posterior did, "
            f"got {' and '.join(held)} alone. Call `kernel_fn` with `get={get!r}`."
        )
    return getattr(kernel, get), get


def read_cross(
    k_test_train: Any, k_test_test: Any, prior: Prior, get: str | None
) -> tuple[Array, Array, Any, Any]:
    """Reads the kernels of test inputs.

    Args:
      k_test_train, k_test_test: as in `CategoricalPosterior.__call__`.
      prior: prior of the logits at the training inputs.
      get: the kernel that the prior was made of, "nngp" or "ntk"; None if that is not known.

    Returns:
      The kernel of test inputs with the training inputs, `(T, N)`, or with the inducing inputs,
      `(T, M)`; the variances at the test inputs, `(T,)`; which test inputs are valid, `(T,)`; and
      the dtype of results.

    Raises:
      TypeError, ValueError: as `CategoricalPosterior.__call__`.
    """
    kernels = {"k_test_train": k_test_train, "k_test_test": k_test_test}
    for name, kernel in kernels.items():
        has_both = all(getattr(kernel, kind, None) is not None for kind in ("nngp", "ntk"))
        if has_both and get is None:
            raise ValueError(
                f"`{name}` holds NNGP and NTK, and `k_train_train` was an array, which may be "
                f"either. Pass `{name}.nngp` or `{name}.ntk`, whichever that array was."
            )
        kernels[name], _ = read_kernel(name, kernel, get)
    (cross, variance), dtype = as_real(**kernels)
    inducing = isinstance(prior, Inducing)
    kind, x = ("inducing", "x_inducing") if inducing else ("training", "x_train")
    prior_variance = concrete(prior.own_variance)
    n = len(prior_variance)
    if cross.ndim != 2 or cross.shape[1] != n:
        raise ValueError(
            f"`k_test_train` must have shape (T, {n}) for {n} {kind} inputs, got {cross.shape}. "
            f"Test inputs come first: `kernel_fn(x_test, {x})`."
        )
    n_test = len(cross)
    if variance.shape not in ((n_test,), (n_test, n_test)):
        raise ValueError(
            f"`k_test_test` must have shape ({n_test}, {n_test}) or ({n_test},), its diagonal, "
            f"got {variance.shape}. Pass `kernel_fn(x_test, None)`."
        )
    with jax.ensure_compile_time_eval():
        variance = jnp.diagonal(variance) if variance.ndim == 2 else variance
    test_variance = concrete(variance)
    valid = check_variances("k_test_test", test_variance)
    possible = check_covariances(
        "k_test_train", concrete(cross), test_variance[:, None], prior_variance, _SLACK, _POSSIBLE
    )
    return cross, variance, valid & possible.all(axis=1), dtype


def _read_prior(k_train_train: Any) -> tuple[Prior, Any, str | None]:
    """The prior; whether the kernel is valid; and the name of the kernel it was taken from.

    Validity is True unless it is traced: a concrete kernel that is not valid raises an error.
    """
    if isinstance(k_train_train, InducingKernels):
        return _read_inducing(k_train_train)
    array, get = read_kernel("k_train_train", k_train_train)
    (kernel,), dtype = as_real(k_train_train=array)
    example = "kernel_fn(x_train, None, 'nngp')"

    def slack(k: Any) -> Any:
        rounding = 10 * len(k) * float(jnp.finfo(dtype).eps)
        # Positive even if all variances are 0.
        return (_INDEFINITE + rounding) * k.diagonal().max() + jnp.finfo(k.dtype).tiny

    return Exact(kernel), _check_kernel("k_train_train", kernel, dtype, example, slack), get


def _read_inducing(kernels: InducingKernels) -> tuple[Inducing, Any, str | None]:
    arrays, get = {}, None
    for name, kernel in kernels._asdict().items():
        arrays[name], get = read_kernel(name, kernel, get)
    (inducing, cross, variance), dtype = as_real(**arrays)
    example = "kernel_fn(x_inducing, None, 'nngp')"
    valid = _check_kernel("k_inducing_inducing", inducing, dtype, example, jitter)
    m = len(inducing)
    if cross.ndim != 2 or cross.shape[0] != m or not cross.size:
        raise ValueError(
            f"`k_inducing_train` must have shape ({m}, N) for {m} inducing inputs, "
            f"got {cross.shape}. Inducing inputs come first: `kernel_fn(x_inducing, x_train)`."
        )
    if variance.shape != cross.shape[1:]:
        raise ValueError(
            f"`k_train_train` of `InducingKernels` must have shape {cross.shape[1:]}, the diagonal "
            f"of the kernel at the training inputs, got {variance.shape}."
        )
    train_variance = concrete(variance)
    valid = valid & check_variances("k_train_train", train_variance).all()
    inducing_variance = concrete(inducing).diagonal()[:, None]
    possible = check_covariances(
        "k_inducing_train", concrete(cross), inducing_variance, train_variance, _SLACK, _POSSIBLE
    )
    return Inducing.of(inducing, cross, variance), valid & possible.all(), get


def _check_kernel(
    name: str, kernel: Array, dtype: DTypeLike, example: str, slack: Callable[[Any], Any]
) -> Any:
    """Whether `kernel` is finite, symmetric and positive semi-definite: a traced boolean, or True.

    Args:
      name: name of the argument, for messages.
      kernel: the kernel, in the dtype that is computed in.
      dtype: the dtype that the user passed, whose rounding is allowed for.
      example: a call that makes such a kernel, for messages.
      slack: from the kernel, how far its least eigenvalue may be below 0.

    Raises:
      ValueError: the kernel is not square, or it is concrete and not valid.
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
    """Whether all eigenvalues of a kernel are at least `-slack`; raises if it is concrete."""
    shifted = kernel + slack * np.eye(len(kernel), dtype=kernel.dtype)
    if isinstance(kernel, Tracer):
        return jnp.all(jnp.isfinite(jnp.linalg.cholesky(shifted)))
    try:
        np.linalg.cholesky(shifted)
    except np.linalg.LinAlgError:
        raise indefinite(name, kernel) from None
    return True


def indefinite(name: str, kernel: Any) -> ValueError:
    """The error to raise for a kernel that is not positive semi-definite."""
    least = float(np.linalg.eigvalsh(kernel)[0])
    return ValueError(
        f"`{name}` must be positive semi-definite, got an eigenvalue of {least:.3g} at variances "
        f"up to {float(kernel.diagonal().max()):.3g}. No variables have such a covariance. If the "
        f"kernel is an estimate, add {-least:.2g} to its diagonal."
    )


def read_labels(y_train: Any, n: int, n_classes: Any) -> tuple[Any, Any]:
    """Reads class labels.

    Args:
      y_train: classes as integers `(n,)`, or one-hot or soft labels `(n, C)`.
      n: number of inputs.
      n_classes: number of classes, or None to take it from the labels.

    Returns:
      One-hot or soft labels, `(n, C)`; and which of them are valid, `(n,)`.

    Raises:
      TypeError, ValueError: as `categorical_inference`.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(y_train)):
        y = jnp.asarray(y_train)
    else:
        y = _concrete_labels(y_train)
    if y.ndim not in (1, 2) or len(y) != n:
        raise ValueError(
            f"`y_train` must have shape ({n},) or ({n}, C) for a kernel of {n} inputs, got "
            f"{y.shape}. Pass one label for each training input."
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
        raise TypeError(
            f"`y_train` of shape (N,) must be integers, the classes, got dtype {y.dtype}. Convert "
            "them by `y_train.astype(int)`, or pass soft labels of shape (N, C)."
        )
    if n_classes is None:
        if isinstance(y, Tracer):
            raise ValueError(
                "`n_classes` must be given where `y_train` is traced, as inside `jit`: the largest "
                "label is not known there."
            )
        n_classes = max(int(y.max()) + 1, 2)
        if n_classes > max(_MANY_CLASSES, len(y)):
            raise ValueError(
                f"`y_train` must be classes, numbered from 0, got {n_classes - 1} among "
                f"{len(y)} labels. Number them by `classes, y_train = np.unique(y_train, "
                "return_inverse=True)`, or pass `n_classes`."
            )
    n_classes = check_integer("n_classes", n_classes, least=2)
    # Traced labels of any integer dtype are compared in JAX's default one.
    y = y.astype(int) if isinstance(y, Tracer) else y
    valid = (y >= 0) & (y < n_classes)
    check_entries("y_train", y, valid, f"classes from 0 to {n_classes - 1}")
    return y[:, None] == namespace(y).arange(n_classes), valid


def _soft(y: Any, n_classes: Any) -> tuple[Any, Any]:
    if jnp.issubdtype(y.dtype, jnp.complexfloating):
        raise TypeError(f"`y_train` must be real, got dtype {y.dtype}. Pass its real part.")
    if (n_classes is not None and y.shape[1] != n_classes) or y.shape[1] < 2:
        raise ValueError(
            f"`y_train` must have {n_classes or 'two or more'} columns, one for each class, got "
            f"shape {y.shape}. Classes as integers have shape ({len(y)},)."
        )
    # Integers are exact, and count as floats of the default precision.
    precision = y.dtype if jnp.issubdtype(y.dtype, jnp.floating) else jnp.result_type(float)
    dtype, rounding = single_at_least(precision), 2 * float(jnp.finfo(precision).eps)
    must = "probabilities that sum to 1 over classes, such as one-hot labels that are not centred"
    y = y.astype(dtype)
    nonnegative = check_entries("y_train", y, y >= 0, must)
    sums = y.sum(axis=1)
    valid = check_entries("y_train", sums, abs(sums - 1) <= max(1e-4, rounding), must)
    return y, nonnegative.all(axis=1) & valid
