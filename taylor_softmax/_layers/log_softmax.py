"""Log-softmax over classes."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array
from neural_tangents import Kernel
from neural_tangents.stax import Diagonal, layer, requires, supports_masking

from taylor_softmax import _log_softmax
from taylor_softmax._class_axis import covariance as class_axis
from taylor_softmax._layers.arguments import (
    Layer,
    check_batch_axis,
    in_single_at_least,
    resolve_axis,
)
from taylor_softmax._layers.finite import LogSoftmaxKernel, cast
from taylor_softmax._layers.softmax import (
    check_gaussian,
    check_not_normalised,
    elementwise,
    pairs_of_inputs,
    warn_if_constant,
)
from taylor_softmax._numerics.arguments import Validated, check_axes
from taylor_softmax._numerics.surrogate import Exponential
from taylor_softmax.methods import Method
from taylor_softmax.nn import log_taylor_softmax


@layer
@supports_masking(remask_kernel=True)
def LogSoftmax(
    axis: Validated[int | tuple[int, ...]] = -1,
    *,
    batch_axis: Validated[int] = 0,
    method: Validated[Method | None] = None,
) -> Layer:
    """Log-softmax over classes: `l_i = z_i - log sum_j exp z_j`.

    The input must be Gaussian, that is, it must come from `Dense`, `Conv` or another layer with
    random weights. Let `a, c, b` be the entries of `cov1`, `nngp`, `cov2`, `Theta` the incoming
    `ntk`, `n` the number of channels, here called classes, `I` the
    `taylor_softmax.class_covariance` of softmax, and `M(a) = E[log sum_j exp z_j]`. Then

        nngp = c (1 - 1/n) + M(a) M(b) + (n - 1) int_0^c I(a, x, b) dx,
        ntk = Theta (1 - 1/n + (n - 1) I(a, c, b)).

    These are expectations over initialisations of the products of one class's outputs and
    gradients. They follow from Stein's lemma and Price's theorem (the docs derive them in "Which
    layer may stand where"). `taylor_softmax.class_kernel` gives those of all pairs of classes.
    Outputs have a mean, `-M(a)`, that shows in the NNGP. The same layers may stand before and
    behind as with `Softmax`.

    The largest error, relative to the value of a class with itself at the larger variance, is as
    tested 1e-6 in float64 and 1e-4 in float32, up to a variance of 1e4.

    Use it where you want the kernel of log-probabilities. Training in function space takes the
    logits instead: see `taylor_softmax.losses.cross_entropy`.

    Masks pass through unchanged. Masked outputs are 0.

    Args:
      axis: what to normalise over: the channel axis. `apply_fn` takes any axis.
      batch_axis: batch axis of the inputs.
      method: how `kernel_fn` evaluates `I`, see `taylor_softmax.methods`; None chooses.

    Returns:
      `(init_fn, apply_fn, kernel_fn)`.

    Raises:
      TypeError, ValueError: `axis` is out of range or the batch axis; `method` does not apply; the
        input of `kernel_fn` is not Gaussian.
      NotImplementedError: `kernel_fn` is called over other axes than that of the channels, or
        behind `LayerNorm`.
    """
    axis, batch_axis = check_axes(axis), check_batch_axis(batch_axis)
    method = class_axis.check_method(method, Exponential())
    log_softmax = _LogSoftmax(axis, batch_axis, method)

    def init_fn(rng: Array, input_shape: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[()]]:
        log_softmax.axes(len(input_shape))
        return input_shape, ()

    @requires(batch_axis=batch_axis, diagonal_spatial=Diagonal())
    @in_single_at_least
    def kernel_fn(k: Any, **kwargs: Any) -> Kernel:
        return log_softmax.kernel(k)

    return init_fn, log_softmax.apply, kernel_fn


@dataclasses.dataclass(frozen=True)
class _LogSoftmax:
    """What the functions of the layer share; attributes are its arguments."""

    axis: int | tuple[int, ...]
    batch_axis: int
    method: Method | None

    def axes(self, ndim: int) -> tuple[int, ...]:
        return resolve_axis(self.axis, self.batch_axis, ndim)

    def apply(self, params: tuple[()], inputs: Any, *, mask: Any = None, **kwargs: Any) -> Array:
        axes = self.axes(jnp.ndim(inputs))
        if mask is None:
            return log_taylor_softmax(inputs, axis=axes)
        # Not -inf, of which a dense layer would make NaN.
        return jnp.where(mask, 0, log_taylor_softmax(inputs, axis=axes, where=~mask))

    def kernel(self, k: Any) -> Kernel:
        axes = self.axes(len(k.shape1))
        if axes != (k.channel_axis,):
            raise NotImplementedError(
                f"`axis={self.axis!r}` of inputs of shape {k.shape1} is not the channel axis. The "
                f"kernel of log-softmax is implemented for `axis={k.channel_axis}`; "
                f"`neural_tangents.monte_carlo_kernel_fn` on `apply_fn` works for every axis."
            )
        check_gaussian(k)
        check_not_normalised(k, "or leave it out")
        if k.is_reversed:
            k = k.reverse()
        n_classes = k.shape1[k.channel_axis]
        warn_if_constant(n_classes, "class", "`Dense(n_classes)`")
        moments = _log_softmax.moments(pairs_of_inputs(k), n_classes=n_classes, method=self.method)
        same_class = elementwise(k, [(each.same, each.same_factor) for each in moments])
        return cast(
            same_class,
            LogSoftmaxKernel,
            n_classes=n_classes,
            sums_to_one=False,
            cross_nngp=moments[0].cross,
            cross_ntk=None if k.ntk is None else k.ntk * moments[0].cross_factor,
        )
