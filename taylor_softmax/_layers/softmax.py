"""Softmax and Taylor softmax: over classes, over positions, and over an infinitely wide axis."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from neural_tangents import Kernel
from neural_tangents._src.stax.requirements import get_diagonal
from neural_tangents._src.utils.utils import interleave_ones
from neural_tangents.stax import Bool, Diagonal, layer, requires, supports_masking

from taylor_softmax import _infinite_width
from taylor_softmax._class_axis import covariance as class_axis
from taylor_softmax._class_axis.covariance import Pairs
from taylor_softmax._layers.arguments import (
    Layer,
    check_batch_axis,
    in_single_at_least,
    resolve_axis,
)
from taylor_softmax._layers.finite import FiniteClassKernel, NormalisedKernel, cast
from taylor_softmax._layers.spatial import SpatialLayout
from taylor_softmax._numerics.arguments import Validated, as_real, check_axes, check_boolean
from taylor_softmax._numerics.surrogate import Surrogate, parse
from taylor_softmax._position_axis import moments as position_axis
from taylor_softmax._position_axis.estimate import warn
from taylor_softmax.methods import Method, choose


@layer
@supports_masking(remask_kernel=True)
def TaylorSoftmax(
    order: Validated[int | None] = None,
    axis: Validated[int | tuple[int, ...]] = -1,
    infinite_width: Validated[bool] = False,
    *,
    batch_axis: Validated[int] = 0,
    method: Validated[Method | None] = None,
) -> Layer:
    """Taylor softmax: `y_i = f(z_i) / sum_j f(z_j)` with `f(z) = sum_{k <= order} z^k / k!`.

    The input must be Gaussian, that is, it must come from `Dense`, `Conv` or another layer with
    random weights. Let `a, c, b` be the entries of `cov1`, `nngp`, `cov2`, `Theta` the incoming
    `ntk`, and `n` the number of channels, here called classes. The layer has three kinds of axes:

    - A finite channel axis, the default. With `I` of `taylor_softmax.class_covariance`,
      `nngp = 1/n^2 + (1 - 1/n) I(a, c, b; n)` and `ntk = Theta (1 - 1/n) dI/dc`. These are
      expectations over initialisations of the products of one class's outputs and gradients.
      `taylor_softmax.class_kernel` gives those of all pairs of classes.
    - A channel axis with `infinite_width=True`. The output is multiplied by `n`, and tends to
      `f(z_i) / E[f]` as `n` grows. `nngp = E[f(u) f(v)] / (E[f(u)] E[f(v)])` and
      `ntk = Theta E[f'(u) f'(v)] / (E[f(u)] E[f(v)])`, elementwise. This layer can stand in the
      middle of a network.
    - Spatial axes. Each channel has a softmax over its positions along `axis`, whatever their
      covariance. `nngp = E[y(u) y(v)^T]` of `taylor_softmax.joint_second_moment`, and
      `ntk = E[J(u) Theta J(v)^T]` with `J` the Jacobian of `y`. Positions along the other spatial
      axes have softmaxes of their own, which covary.

    Taylor softmax is due to de Brebisson & Vincent 2016 (arXiv 1511.05042). The larger the
    variance, the more its kernel differs from that of softmax: use `Softmax` where you mean
    softmax.

    Masks pass through unchanged. Masked positions leave the sum over spatial axes. Inputs and
    kernels in float16 and bfloat16 are computed in float32.

    Args:
      order: order of the Taylor polynomial. It is even, so that `f > 0`, and at most 32 over a
        finite axis. None, the default, is softmax itself, `f = exp`.
      axis: what to normalise over: the channel axis, or one spatial axis or several.
      infinite_width: whether to multiply by the size of the axis, and to take the limit of infinite
        width in `kernel_fn`.
      batch_axis: batch axis of the inputs.
      method: how `kernel_fn` evaluates, see `taylor_softmax.methods`; None, the default, chooses.

    Returns:
      `(init_fn, apply_fn, kernel_fn)`.

    Raises:
      TypeError, ValueError: `order` is not an even positive integer; `axis` is out of range or is
        the batch axis; `method` does not apply to it; the input of `kernel_fn` is not Gaussian; the
        kernel of `infinite_width=True` without an order overflows, which is exp of variances beyond
        88 in float32 and 709 in float64. Inside `jit` it is infinite.
      NotImplementedError: the network has no kernel here, and the message says which has; or
        `order` is beyond 32 over a finite axis.
    """
    return _softmax_layer(order, axis, infinite_width, batch_axis, method)


@layer
@supports_masking(remask_kernel=True)
def Softmax(
    axis: Validated[int | tuple[int, ...]] = -1,
    infinite_width: Validated[bool] = False,
    *,
    batch_axis: Validated[int] = 0,
    method: Validated[Method | None] = None,
) -> Layer:
    """Softmax: `y_i = exp(z_i) / sum_j exp(z_j)`.

    It is the limit of `TaylorSoftmax` as its order grows, and the same as
    `TaylorSoftmax(order=None)`. Arguments, kernels and errors are those of `TaylorSoftmax`. With
    `infinite_width=True` `nngp = exp(c)` and `ntk = Theta exp(c)`, exactly.
    """
    return _softmax_layer(None, axis, infinite_width, batch_axis, method)


def _softmax_layer(
    order: Any, axis: Any, infinite_width: Any, batch_axis: Any, method: Any
) -> Layer:
    infinite_width = check_boolean("infinite_width", infinite_width)
    surrogate = parse(order, finite=not infinite_width)
    axis, batch_axis = check_axes(axis), check_batch_axis(batch_axis)
    if method is not None:
        # Whether the axis is that of classes only an input tells.
        if infinite_width:
            applicable: tuple[Method, ...] = ()
        else:
            applicable = class_axis.methods(surrogate) + position_axis.methods(surrogate)
        choose(method, *applicable, axis=f"{surrogate} over `axis={axis!r}`")
    softmax = _Softmax(surrogate, axis, infinite_width, batch_axis, method)

    # Sizes are integers of any kind: layers before give NumPy's.
    def init_fn(rng: Array, input_shape: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[()]]:
        softmax.axes(len(input_shape))
        return input_shape, ()

    # Over the last axis the channels are meant, unless a kernel says that they are elsewhere.
    over_channels = axis in (-1, (-1,))
    diagonal = Diagonal() if over_channels else Diagonal(input=Bool.NO)

    @requires(batch_axis=batch_axis, diagonal_spatial=diagonal)
    @in_single_at_least
    def kernel_fn(k: Any, **kwargs: Any) -> Kernel:
        return softmax.kernel(k)

    return init_fn, softmax.apply, kernel_fn


@dataclasses.dataclass(frozen=True)
class _Softmax:
    """What the functions of a softmax layer share; attributes are the layer's arguments."""

    surrogate: Surrogate
    axis: int | tuple[int, ...]
    infinite_width: bool
    batch_axis: int
    method: Method | None

    def axes(self, ndim: int) -> tuple[int, ...]:
        return resolve_axis(self.axis, self.batch_axis, ndim)

    def apply(self, params: tuple[()], inputs: Any, *, mask: Any = None, **kwargs: Any) -> Array:
        (inputs,), dtype = as_real(inputs=inputs)
        axes = self.axes(inputs.ndim)
        # Of size 1 along the channels, behind layers with weights. A row with nothing left is 0.
        where = None if mask is None else ~mask
        outputs = self.surrogate.softmax(inputs, axis=axes, where=where)
        if self.infinite_width:
            outputs = outputs * math.prod(inputs.shape[i] for i in axes)
        return outputs.astype(dtype)

    def kernel(self, k: Any) -> Kernel:
        axes = self.axes(len(k.shape1))
        over_channels = axes == (k.channel_axis,)
        if k.channel_axis in axes and not over_channels:
            raise NotImplementedError(
                f"`axis={self.axis!r}` of inputs of shape {k.shape1} joins the channel axis with "
                f"spatial ones. Kernels are implemented for softmax over the channel axis "
                f"(`axis={k.channel_axis}`) or over spatial axes; "
                f"`neural_tangents.monte_carlo_kernel_fn` on `apply_fn` works for every axis."
            )
        if self.infinite_width and not over_channels:
            raise NotImplementedError(
                f"`infinite_width=True` with `axis={self.axis!r}`: spatial axes of inputs of shape "
                f"{k.shape1} are finite. Use `infinite_width=False`, or `axis={k.channel_axis}`."
            )
        check_gaussian(k)
        if not over_channels and k.diagonal_spatial:
            # `_softmax_layer` took the last axis for that of the channels.
            raise ValueError(
                f"`axis={self.axis!r}` of inputs of shape {k.shape1} is a spatial axis: channels "
                f"are axis {k.channel_axis}. Write `axis={axes[0]}` for it, so that the layers "
                f"before keep the covariance between positions, or `axis={k.channel_axis}` for "
                f"softmax over channels."
            )
        if not over_channels:
            return _over_positions(k, axes, self.surrogate, self.method)
        if self.infinite_width:
            return _check_range(k, elementwise(k, self._moments(k)))
        n_classes = _n_channels(k)
        warn_if_constant(n_classes, "class", "`Dense(n_classes)`")
        check_not_normalised(k, "or use `infinite_width=True`")
        return cast(elementwise(k, self._moments(k)), FiniteClassKernel, n_classes=n_classes)

    def _moments(self, k: Any) -> list[tuple[Array, Array | None]]:
        """Second moment and NTK factor of each of the pairs in `pairs_of_inputs`.

        The factor of the first pairs, if there is an NTK: `elementwise` reads no other.
        """
        pairs = pairs_of_inputs(k)
        if self.infinite_width:
            moments = functools.partial(_infinite_width.moments, surrogate=self.surrogate)
            return [moments(*each) for each in pairs]
        n = _n_channels(k)
        method = class_axis.check_method(self.method, self.surrogate)
        results = class_axis.covariances(
            pairs,
            n_classes=n,
            surrogate=self.surrogate,
            method=method,
            slopes=[k.ntk is not None] + [False] * (len(pairs) - 1),
        )
        return [
            (1 / n**2 + (1 - 1 / n) * value, None if slope is None else (1 - 1 / n) * slope)
            for value, slope in results
        ]


def _n_channels(k: Any) -> int:
    return k.shape1[k.channel_axis]


def warn_if_constant(n: int, what: str, before: str) -> None:
    """Warns of a softmax over one class or position: the default filter shows it once."""
    if n == 1:
        warnings.warn(
            f"This softmax is over one {what}: its output, and so its kernel, is constant. Pass "
            f"their number to the layer before it, such as {before}.",
            stacklevel=2,
        )


def _check_range(given: Kernel, k: Kernel) -> Kernel:
    """`k`, or says that its values are beyond floats, if they are concrete."""
    for name in ("nngp", "ntk", "cov1", "cov2"):
        array = getattr(k, name)
        if array is None or isinstance(array, Tracer) or not np.isinf(array).any():
            continue
        raise ValueError(
            f"`{name}` of `Softmax(infinite_width=True)` grows as exp(covariance) and overflows "
            f"{array.dtype}, whose exp ends at {math.log(jnp.finfo(array.dtype).max):.3g}: logits "
            f"have variances up to {float(jnp.max(given.cov1)):.3g}. Lower `W_std` of the layer "
            "before it, or use `TaylorSoftmax(order, infinite_width=True)`, which stays finite."
        )
    return k


def check_gaussian(k: Any) -> None:
    """Raises a `ValueError` unless `k` is of Gaussian outputs."""
    if not k.is_gaussian:
        raise ValueError(
            "The input of a softmax layer must be Gaussian for its kernel. Put a layer with "
            "random weights before it, such as `stax.Dense(n_classes)`."
        )


def check_not_normalised(k: Any, otherwise: str) -> None:
    """Raises a `NotImplementedError` if the logits of `k` covary between classes.

    Args:
      otherwise: what else to do, for the message.
    """
    if isinstance(k, NormalisedKernel):
        raise NotImplementedError(
            "A layer that normalises over channels stands directly before a softmax over "
            f"{_n_channels(k)} of them: its kernel takes them for infinitely many. "
            f"Put it before the last dense layer, {otherwise}."
        )


def pairs_of_inputs(k: Kernel) -> list[Pairs]:
    """The pairs in `nngp`, `cov1` and, unless it is None, `cov2`."""

    def diagonal(cov: Array) -> Array:
        return get_diagonal(cov, k.diagonal_batch, k.diagonal_spatial)  # type: ignore[return-value]

    def outer(first: Array, second: Array, cov: Array, start: int) -> Pairs:
        end = 1 if k.diagonal_spatial else first.ndim
        return Pairs(
            interleave_ones(first, start, end, x_first=True),
            cov,
            interleave_ones(second, start, end, x_first=False),
        )

    start = 1 if k.diagonal_batch else 0
    var1 = diagonal(k.cov1)
    pairs = [outer(var1, var1, k.nngp, 0), outer(var1, var1, k.cov1, start)]
    if k.cov2 is not None:
        var2 = diagonal(k.cov2)
        pairs[0] = outer(var1, var2, k.nngp, 0)
        pairs.append(outer(var2, var2, k.cov2, start))
    return pairs


def elementwise(k: Kernel, moments: Sequence[tuple[Array, Array | None]]) -> Kernel:
    """`k` after a layer with second moments and NTK factors `moments`, as `pairs_of_inputs`."""
    (nngp, factor), (cov1, _), *rest = moments
    ntk = None
    if k.ntk is not None:
        assert factor is not None
        ntk = k.ntk * factor
    return k.replace(
        nngp=nngp,
        ntk=ntk,
        cov1=cov1,
        cov2=rest[0][0] if rest else None,
        is_gaussian=False,
    )


def _over_positions(
    k: Any, axes: tuple[int, ...], surrogate: Surrogate, method: Method | None
) -> Kernel:
    """`k` after a softmax over the spatial `axes`."""
    method = position_axis.check_method(method, surrogate)
    if k.is_reversed:
        k = k.reverse()

    def layout(first: Any, second: Any) -> SpatialLayout:
        return SpatialLayout(first, second, k.batch_axis, k.channel_axis, axes)

    errors: list[Array] = []
    within1, between = layout(k.shape1, k.shape1), layout(k.shape1, k.shape2)
    batch_ndim = 1 if k.diagonal_batch else 2

    def inputs(cov: Array, mask: Array | None, within: SpatialLayout) -> position_axis.Input:
        groups, present = within.groups(cov, batch_ndim), within.present(mask, len(cov))
        return position_axis.prepare(
            groups, present.astype(cov.dtype), surrogate=surrogate, method=method
        )

    def moments(
        one: position_axis.Input,
        two: position_axis.Input,
        spatial: SpatialLayout,
        cov: Array,
        ntk: Array | None,
        ndim: int,
    ) -> tuple[Array, Array | None]:
        """Value and slope; `errors` get what they are estimated to be off."""
        batch = cov.shape[:ndim]
        given, theta = (
            None
            if x is None
            else spatial.split(x.astype(cov.dtype), ndim).reshape(-1, *spatial.n_over)
            for x in (cov, ntk)
        )
        assert given is not None
        value, slope, error = position_axis.second_moments(
            one, two, *spatial.pairs(batch), given, theta, surrogate, method
        )
        errors.append(error)
        return spatial.join(value, batch), None if slope is None else spatial.join(slope, batch)

    one = inputs(k.cov1, k.mask1, within1)
    cov1, _ = moments(one, one, within1, k.cov1, None, batch_ndim)
    two, cov2 = one, None
    if k.cov2 is not None:
        within2 = layout(k.shape2, k.shape2)
        two = inputs(k.cov2, k.mask2, within2)
        cov2, _ = moments(two, two, within2, k.cov2, None, batch_ndim)
    nngp, ntk = moments(one, two, between, k.nngp, k.ntk, 2)
    warn(errors, method, "Softmax over positions")
    return k.replace(nngp=nngp, ntk=ntk, cov1=cov1, cov2=cov2, is_gaussian=False)
