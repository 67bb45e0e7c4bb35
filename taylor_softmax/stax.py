"""Everything that `neural_tangents.stax` has, and softmax layers with analytic kernels.

init_fn, apply_fn, kernel_fn = stax.serial(
    stax.Dense(512), stax.Relu(), stax.Dense(10), stax.TaylorSoftmax(order=2)
)
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from neural_tangents import Kernel
from neural_tangents._src.stax.requirements import get_diagonal
from neural_tangents._src.utils.utils import interleave_ones
from neural_tangents.stax import *  # noqa: F403  # pyright: ignore[reportWildcardImportFromLibrary]
from neural_tangents.stax import Bool, Diagonal, layer, requires, supports_masking

from taylor_softmax import _infinite_width
from taylor_softmax._class_axis import covariance
from taylor_softmax._class_axis.covariance import Method, Pairs
from taylor_softmax._numerics import surrogate
from taylor_softmax._numerics.arguments import check_integer
from taylor_softmax._position_axis import moments as position_axis

_Layer = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]


@layer
@supports_masking(remask_kernel=True)
def TaylorSoftmax(
    order: int = 2,
    axis: int | tuple[int, ...] = -1,
    infinite_width: bool = False,
    *,
    batch_axis: int = 0,
    method: Method = "auto",
    n_points: int = position_axis.DEFAULT_POINTS,
) -> _Layer:
    """Taylor softmax: `y_i = f(z_i) / sum_j f(z_j)` with `f(z) = sum_{k <= order} z^k / k!`.

    The input must be Gaussian, that is, come from `Dense`, `Conv` or another layer with random
    weights. With `a, c, b` the entries of `cov1`, `nngp`, `cov2`, `Theta` the incoming `ntk` and
    `n` the number of channels, here called classes:

    - Finite channel axis (the default):
      `nngp = 1/n^2 + (1 - 1/n) I(a, c, b; n)` and `ntk = Theta (1 - 1/n) dI/dc`, with `I` of
      `taylor_softmax.class_covariance`. They are expectations over initialisations, of the
      products of one class's outputs and gradients; `taylor_softmax.class_kernel` gives those of
      all pairs of classes.
    - `infinite_width=True`: the output is multiplied by `n`, and has the limit `f(z_i) / E[f]` as
      `n` grows. `nngp = E[f(u) f(v)] / (E[f(u)] E[f(v)])` and
      `ntk = Theta E[f'(u) f'(v)] / (E[f(u)] E[f(v)])`, elementwise; the layer can stand in the
      middle of a network.
    - Spatial axes: a softmax over the positions along `axis` of each channel, with whatever
      covariance they have: `nngp = E[y(u) y(v)^T]` of `taylor_softmax.joint_second_moment`, and
      `ntk = E[J(u) Theta J(v)^T]` with `J` the Jacobian of `y`. Positions along the other spatial
      axes have softmaxes of their own, which covary.

    Taylor softmax is due to de Brebisson & Vincent 2016 (arXiv 1511.05042). Its kernel differs
    from that of softmax by more the larger the variance: use `Softmax` where softmax is meant.

    Masks pass through unchanged. Masked positions leave the sum over spatial axes.

    Args:
      order: of the Taylor polynomial; even, so that `f > 0`. Up to 32 over a finite axis.
      axis: to normalise over: the channel axis, or one spatial axis or several.
      infinite_width: multiply by the size of the axis, and take its limit in `kernel_fn`.
      batch_axis: batch axis of the inputs.
      method: how `kernel_fn` evaluates `I`, see `taylor_softmax.class_covariance`.
      n_points: spatial axes, orders above 2: quasi-random points per pair of inputs, see
        `taylor_softmax.joint_second_moment`.

    Returns:
      `(init_fn, apply_fn, kernel_fn)`.

    Raises:
      TypeError, ValueError: `order` is not an even positive integer; `axis` is out of range or is
        the batch axis; the input of `kernel_fn` is not Gaussian.
      NotImplementedError: `kernel_fn` for what has no kernel here, naming what has.
    """
    order_checked = surrogate.check_order(order, allow_softmax=False)
    if order_checked > _LARGEST_FINITE_ORDER and not infinite_width:
        raise NotImplementedError(
            f"`order` over a finite axis is at most {_LARGEST_FINITE_ORDER}, got {order}. Its "
            f"kernel is softmax's own to many digits by then: use `stax.Softmax`, or "
            f"`infinite_width=True`, which takes every even order."
        )
    return _softmax_layer(order_checked, axis, infinite_width, batch_axis, method, n_points)


@layer
@supports_masking(remask_kernel=True)
def Softmax(
    axis: int | tuple[int, ...] = -1,
    infinite_width: bool = False,
    *,
    batch_axis: int = 0,
    method: Method = "auto",
    n_points: int = position_axis.DEFAULT_POINTS,
) -> _Layer:
    """Softmax: `y_i = exp(z_i) / sum_j exp(z_j)`.

    The limit of `TaylorSoftmax` as its order grows; arguments, kernels and errors are those of
    `TaylorSoftmax`. With `infinite_width=True` `nngp = exp(c)` and `ntk = Theta exp(c)`, exactly.
    """
    return _softmax_layer(None, axis, infinite_width, batch_axis, method, n_points)


class ClassKernel(NamedTuple):
    """Class-by-class kernels, each of shape `(N1, N2, [spatial,] C, C)`.

    Attributes:
      nngp: `E[y(x1) y(x2)^T]`.
      ntk: `E[J(x1) J(x2)^T]` with `J` the Jacobian of the outputs in the parameters; None if the
        given kernel has none.
    """

    nngp: Array
    ntk: Array | None


def class_kernel(kernel: Kernel) -> ClassKernel:
    """The kernels between every two classes, of a network that ends in a finite softmax layer.

    Classes are exchangeable and each row of outputs sums to 1, so the same-class entries that
    `kernel` holds determine all others. With `n` classes and `Id` the `n x n` identity,

        nngp = 1 1^T / n^2 + I (Id - 1 1^T / n),    ntk = Theta dI/dc (Id - 1 1^T / n):

    what `nt.empirical_nngp_fn` and `nt.empirical_ntk_fn(apply_fn, trace_axes=())` average to over
    initialisations.

    Args:
      kernel: the `Kernel` that `kernel_fn(x1, x2)` (with `get=None`) returns.

    Raises:
      TypeError: `kernel` is an array or a tuple, as `kernel_fn(x1, x2, get='nngp')` returns.
      ValueError: `kernel` is that of a Gaussian output: the network does not end in softmax.
    """
    if not isinstance(kernel, Kernel):
        raise TypeError(
            f"`kernel` must be a `neural_tangents.Kernel`, got {type(kernel).__name__}. Call "
            f"`kernel_fn(x1, x2)` without `get`."
        )
    if kernel.is_gaussian or kernel.shape1 is None:
        raise ValueError(
            "`kernel` is that of Gaussian outputs. `class_kernel` is for a network whose last "
            "layer is `stax.TaylorSoftmax` or `stax.Softmax` over a finite channel axis; the "
            "classes of any other network are independent."
        )
    n = kernel.shape1[kernel.channel_axis]
    identity = jnp.eye(n, dtype=kernel.nngp.dtype)
    # For one class the centred part vanishes, and nothing has to be undone.
    same_class_share = 1 - 1 / n if n > 1 else 1.0
    centring = (identity - 1 / n) / same_class_share

    def spread(same_class: Array) -> Array:
        return same_class[..., None, None] * centring

    nngp = 1 / n**2 + spread(kernel.nngp - 1 / n**2)
    return ClassKernel(nngp, None if kernel.ntk is None else spread(kernel.ntk))


# The tested range of `class_covariance`.
_LARGEST_FINITE_ORDER = 32


def _softmax_layer(
    order: int | None,
    axis: int | tuple[int, ...],
    infinite_width: bool,
    batch_axis: int,
    method: Method,
    n_points: int,
) -> _Layer:
    _check_axis(axis)
    n_points = check_integer("n_points", n_points, least=0)
    covariance.check_method(method)
    if not isinstance(infinite_width, bool):
        raise TypeError(f"`infinite_width` must be a boolean, got {infinite_width!r}.")

    def init_fn(rng: Array, input_shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[()]]:
        _resolve_axis(axis, batch_axis, len(input_shape))
        return input_shape, ()

    def apply_fn(params: tuple[()], inputs: Array, *, mask: Any = None, **kwargs: Any) -> Array:
        axes = _resolve_axis(axis, batch_axis, inputs.ndim)
        where = None
        # A mask has size 1 along the channels, of which none is missing.
        if mask is not None and all(mask.shape[i] == inputs.shape[i] > 1 for i in axes):
            where = ~mask
        outputs = surrogate.softmax(inputs, order=order, axis=axes, where=where)
        if infinite_width:
            outputs = outputs * functools.reduce(operator.mul, (inputs.shape[i] for i in axes))
        return outputs

    # Over the last axis the channels are meant, unless a kernel says that they are elsewhere.
    over_channels = axis in (-1, (-1,), [-1])
    diagonal = Diagonal() if over_channels else Diagonal(input=Bool.NO)

    @requires(batch_axis=batch_axis, diagonal_spatial=diagonal)
    def kernel_fn(k: Any, **kwargs: Any) -> Kernel:
        axes = _resolve_axis(axis, k.batch_axis, len(k.shape1))
        over_channels = axes == (k.channel_axis,)
        if k.channel_axis in axes and not over_channels:
            raise NotImplementedError(
                f"`axis={axis!r}` of inputs of shape {k.shape1} joins the channel axis with "
                f"spatial ones. Kernels are implemented for softmax over the channel axis "
                f"(`axis={k.channel_axis}`) or over spatial axes; "
                f"`neural_tangents.monte_carlo_kernel_fn` on `apply_fn` works for every axis."
            )
        if infinite_width and not over_channels:
            raise NotImplementedError(
                f"`infinite_width=True` with `axis={axis!r}`: spatial axes of inputs of shape "
                f"{k.shape1} are finite. Use `infinite_width=False`, or `axis={k.channel_axis}`."
            )
        if not k.is_gaussian:
            raise ValueError(
                "The input of a softmax layer must be Gaussian for its kernel. Put a layer with "
                "random weights before it, such as `stax.Dense(n_classes)`."
            )
        if not over_channels:
            return _spatial_softmax(k, axes, order, n_points)
        if infinite_width:
            moments = [
                _infinite_width.moments(*pairs, order=order) for pairs in _pairs_of_inputs(k)
            ]
            return _replace_covariances(k, moments)
        n = k.shape1[k.channel_axis]
        results = covariance.covariances(
            _pairs_of_inputs(k), n_classes=n, order=order, method=method
        )
        moments = [
            (1 / n**2 + (1 - 1 / n) * value, (1 - 1 / n) * slope) for value, slope in results
        ]
        return _replace_covariances(k, moments)

    return init_fn, apply_fn, kernel_fn


def _pairs_of_inputs(k: Kernel) -> list[Pairs]:
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


def _replace_covariances(k: Kernel, moments: list[tuple[Array, Array]]) -> Kernel:
    """`k` after a layer with second moments and NTK factors `moments`, as `_pairs_of_inputs`."""
    (nngp, factor), (cov1, _), *rest = moments
    return k.replace(
        nngp=nngp,
        ntk=None if k.ntk is None else k.ntk * factor,
        cov1=cov1,
        cov2=rest[0][0] if rest else None,
        is_gaussian=False,
    )


def _spatial_softmax(k: Any, axes: tuple[int, ...], order: int | None, n_points: int) -> Kernel:
    """`k` after a softmax over the spatial `axes`."""
    if k.is_reversed:
        k = k.reverse()
    ndim = len(k.shape1)
    spatial = [i for i in range(ndim) if i not in (k.batch_axis, k.channel_axis)]
    over = [spatial.index(i) for i in axes]
    rest = [i for i in range(len(spatial)) if i not in over]
    sizes = [k.shape1[i] for i in spatial]
    n_rest, n_over = (math.prod(sizes[i] for i in group) for group in (rest, over))

    def permutation(batch_ndim: int) -> list[int]:
        """Takes `(*batch, H, H, W, W, ...)` to `(*batch, rest, rest, over, over)`."""
        first, second = ([batch_ndim + 2 * i + j for i in range(len(sizes))] for j in (0, 1))
        groups = ([side[i] for i in group] for group in (rest, over) for side in (first, second))
        return [*range(batch_ndim), *itertools.chain(*groups)]

    def split(cov: Array, batch_ndim: int) -> Array:
        """`(*batch, rest, rest, over, over)`, one axis each."""
        batch = cov.shape[:batch_ndim]
        return cov.transpose(permutation(batch_ndim)).reshape(
            *batch, n_rest, n_rest, n_over, n_over
        )

    def join(array: Array, batch: tuple[int, ...]) -> Array:
        axes = permutation(len(batch))
        doubled = [*batch, *(size for size in sizes for _ in range(2))]
        array = array.reshape([doubled[i] for i in axes])
        return array.transpose(sorted(range(len(axes)), key=axes.__getitem__))

    batch_ndim = 1 if k.diagonal_batch else 2

    def inputs(cov: Array, mask: Array | None) -> position_axis.Input:
        """One for each batch entry and position along the other axes."""
        cov = split(cov, batch_ndim)
        if not k.diagonal_batch:
            cov = jnp.moveaxis(jnp.diagonal(cov), -1, 0)
        n = len(cov)
        cov = jnp.moveaxis(jnp.diagonal(cov, axis1=1, axis2=2), -1, 1)
        present = jnp.ones((n, n_rest, n_over), cov.dtype)
        if mask is not None:
            mask = jnp.moveaxis(mask, (k.batch_axis, k.channel_axis), (0, -1))[..., 0]
            mask = jnp.broadcast_to(mask, (n, *sizes))
            order_of_axes = [0, *(1 + i for i in (*rest, *over))]
            present = 1.0 - mask.transpose(order_of_axes).reshape(present.shape)
        return position_axis.prepare(
            cov.reshape(-1, n_over, n_over),
            present.reshape(-1, n_over).astype(cov.dtype),
            order=order,
            n_points=n_points,
        )

    def evaluate(
        one: position_axis.Input,
        two: position_axis.Input,
        cov: Array,
        ntk: Array | None,
        batch_ndim: int,
    ) -> tuple[Array, Array | None]:
        batch, given = cov.shape[:batch_ndim], split(cov, batch_ndim)
        theta = None if ntk is None else split(jnp.broadcast_to(ntk, cov.shape), batch_ndim)
        index = np.indices((*batch, n_rest, n_rest)).reshape(batch_ndim + 2, -1)
        # The first and the last of the batch axes: one where the batch is diagonal.
        first = index[0] * n_rest + index[-2]
        second = index[batch_ndim - 1] * n_rest + index[-1]
        results = position_axis.second_moments(
            one,
            two,
            first,
            second,
            given.reshape(-1, n_over, n_over),
            None if theta is None else theta.reshape(-1, n_over, n_over),
            order,
            n_points,
        )
        moment, derivative = (None if x is None else join(x, batch) for x in results)
        assert moment is not None
        return moment, derivative

    one = inputs(k.cov1, k.mask1)
    cov1, _ = evaluate(one, one, k.cov1, None, batch_ndim)
    two, cov2 = one, None
    if k.cov2 is not None:
        two = inputs(k.cov2, k.mask2)
        cov2, _ = evaluate(two, two, k.cov2, None, batch_ndim)
    nngp, ntk = evaluate(one, two, k.nngp, k.ntk, 2)
    return k.replace(nngp=nngp, ntk=ntk, cov1=cov1, cov2=cov2, is_gaussian=False)


def _check_axis(axis: Any) -> None:
    for value in axis if isinstance(axis, tuple | list) else (axis,):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"`axis` must be an integer or a tuple of them, got {axis!r}.")
    if axis in ((), []):
        raise ValueError("`axis` must name at least one axis, got none.")


def _resolve_axis(axis: int | tuple[int, ...], batch_axis: int, ndim: int) -> tuple[int, ...]:
    """`axis` as a tuple of nonnegative integers for inputs with `ndim` axes."""
    axes = tuple(axis) if isinstance(axis, tuple | list) else (axis,)
    if any(not -ndim <= value < ndim for value in axes):
        raise ValueError(
            f"`axis={axis!r}` is out of range for inputs with {ndim} axes. Choose from "
            f"{-ndim} to {ndim - 1}."
        )
    resolved = tuple(operator.index(value) % ndim for value in axes)
    if batch_axis % ndim in resolved:
        raise ValueError(
            f"`axis={axis!r}` is the batch axis of inputs with {ndim} axes. A softmax normalises "
            f"over the channel axis (`axis=-1`) of each input; pass `batch_axis` if yours is "
            f"another than {batch_axis}."
        )
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"`axis={axis!r}` names an axis twice.")
    return resolved
