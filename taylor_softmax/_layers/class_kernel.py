"""Kernels between every two classes, from those of one class with itself."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float
from neural_tangents import Kernel

from taylor_softmax._layers.finite import MIXTURE, FiniteClassKernel, LogSoftmaxKernel
from taylor_softmax._numerics.arguments import Validated

_NOT_AT_THE_END = (
    "`kernel` has a softmax over {n} classes, but not at its end: a layer behind it mixes the "
    "classes or changes their sum. Take the kernel before that layer."
)


class ClassKernel(NamedTuple):
    """Class-by-class kernels, each of shape `(N1, N2, [spatial,] C, C)`.

    Attributes:
      nngp: `E[y(x1) y(x2)^T]`.
      ntk: `E[J(x1) J(x2)^T]` with `J` the Jacobian of the outputs in the parameters; None if the
        given kernel has none.
    """

    nngp: Float[Array, "*batch classes classes"]
    ntk: Float[Array, "*batch classes classes"] | None


def class_kernel(kernel: Validated[Kernel]) -> ClassKernel:
    """The kernels between every two classes, of a network that ends in a softmax over them.

    Classes are exchangeable and each row of a softmax sums to 1, so the same-class entries that
    `kernel` holds determine all others. With `n` classes and `Id` the `n x n` identity,

        nngp = 1 1^T / n^2 + I (Id - 1 1^T / n),    ntk = Theta dI/dc (Id - 1 1^T / n):

    what `nt.empirical_nngp_fn` and `nt.empirical_ntk_fn(apply_fn, trace_axes=())` average to over
    initialisations. Behind `stax.LogSoftmax`, whose formulas have those of two classes, directly.

    Args:
      kernel: the `Kernel` that `kernel_fn(x1, x2)` (with `get=None`) returns.

    Raises:
      TypeError: `kernel` is an array or a tuple, as `kernel_fn(x1, x2, get='nngp')` returns.
      ValueError: the network does not end in a softmax over classes. What leaves the classes as
        they are, such as `GlobalAvgPool`, may follow it.
    """
    if not isinstance(kernel, Kernel):
        raise TypeError(
            f"`kernel` must be a `neural_tangents.Kernel`, got {type(kernel).__name__}. Call "
            f"`kernel_fn(x1, x2)` without `get`."
        )
    if not isinstance(kernel, FiniteClassKernel):
        raise ValueError(
            "`kernel` is not that of classes. `class_kernel` is for a network whose last layer is "
            "`stax.TaylorSoftmax`, `stax.Softmax` or `stax.LogSoftmax` over a finite channel axis; "
            "the channels of any other network are independent of each other."
        )
    n = kernel.n_classes
    if isinstance(kernel, LogSoftmaxKernel):
        return _of_log_softmax(kernel)
    assert kernel.shape1 is not None
    if (
        kernel.is_gaussian is MIXTURE
        or not kernel.sums_to_one
        or kernel.shape1[kernel.channel_axis] != n
    ):
        raise ValueError(_NOT_AT_THE_END.format(n=n))
    identity = jnp.eye(n, dtype=kernel.nngp.dtype)
    # For one class the centred part vanishes, and nothing has to be undone.
    same_class_share = 1 - 1 / n if n > 1 else 1.0
    centring = (identity - 1 / n) / same_class_share

    def spread(same_class: Array) -> Array:
        return same_class[..., None, None] * centring

    nngp = 1 / n**2 + spread(kernel.nngp - 1 / n**2)
    return ClassKernel(nngp, None if kernel.ntk is None else spread(kernel.ntk))


def _of_log_softmax(kernel: LogSoftmaxKernel) -> ClassKernel:
    n = kernel.n_classes
    if kernel.cross_nngp is None:
        raise ValueError(_NOT_AT_THE_END.format(n=n))

    def spread(same_class: Array, cross: Array) -> Array:
        return jnp.where(
            jnp.eye(n, dtype=bool), same_class[..., None, None], cross[..., None, None]
        )

    return ClassKernel(
        spread(kernel.nngp, kernel.cross_nngp),
        None if kernel.ntk is None else spread(kernel.ntk, kernel.cross_ntk),
    )
