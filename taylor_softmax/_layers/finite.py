"""What neural_tangents' kernels do not say: that a channel axis is finite, and its width matters.

neural_tangents takes every channel axis for infinitely wide. Around a softmax over `n` classes that
is wrong in two places, which kernels of these classes carry through all of its layers:

- *After* it. Over `n` random channels a dense layer's output is a mixture of Gaussians, not a
  Gaussian. Its second moment is what neural_tangents computes; a nonlinearity's of it is not.
- *Before* it. A layer that averages over channels, such as `LayerNorm`, does so over `n` logits.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, no_type_check

from neural_tangents import Kernel, stax
from neural_tangents._src.utils.dataclasses import dataclass, field


class _Mixture:
    """What `is_gaussian` is behind a dense layer over finitely many random channels.

    Layers that need to know ask for its truth value; linear ones don't.
    """

    def __bool__(self) -> bool:
        raise NotImplementedError(
            "This network has a softmax over finitely many classes in its middle. The outputs of "
            "the dense layer behind it are a mixture of Gaussians, not a Gaussian, so kernels of "
            "layers that are not linear are not known. Use `infinite_width=True` in the softmax, "
            "or put it at the end of the network; `neural_tangents.monte_carlo_kernel_fn` samples "
            "any network."
        )

    def __repr__(self) -> str:
        return "mixture of Gaussians"


MIXTURE: Any = _Mixture()


# Not checked: JAX makes kernels of other things than arrays, and `is_gaussian` is more than that.
@no_type_check
@dataclass
class FiniteClassKernel(Kernel):
    """A kernel behind a softmax over finitely many classes.

    Attributes:
      n_classes: their number.
      sums_to_one: whether the outputs of the classes still do.
    """

    n_classes: int = field(pytree_node=False, default=0)
    sums_to_one: bool = field(pytree_node=False, default=True)

    # `nt.batch` joins parts by these where it finds them, and otherwise makes a plain `Kernel`.
    def _asdict(self) -> Any:
        return self.asdict()

    def _replace(self: Any, **changes: Any) -> Any:
        return dataclasses.replace(self, **changes)


@no_type_check
@dataclass
class LogSoftmaxKernel(FiniteClassKernel):
    """A kernel behind a log-softmax, whose classes `nngp` and `ntk` alone don't tell apart.

    Attributes:
      cross_nngp, cross_ntk: what `nngp` and `ntk` are of one class, of two classes; None behind any
        layer that changes them.
    """

    cross_nngp: Any = None
    cross_ntk: Any = None

    def mask(self, mask1: Any, mask2: Any) -> Any:
        """As the kernel of one class is masked, so is that of two."""
        masked = Kernel.mask(self, mask1, mask2)
        if self.cross_nngp is None:
            return masked
        crossed = Kernel.mask(_as_kernel(self, self.cross_nngp, self.cross_ntk), mask1, mask2)
        return masked.replace(cross_nngp=crossed.nngp, cross_ntk=crossed.ntk)


@no_type_check
@dataclass
class NormalisedKernel(Kernel):
    """A kernel of outputs that have been normalised over channels, and so covary between them."""


def _replace_finite(self: Any, **changes: Any) -> Any:
    """`replace` as neural_tangents' layers call it, of which none makes outputs Gaussian."""
    if changes.get("is_gaussian") is True:
        changes["is_gaussian"] = MIXTURE
    if hasattr(self, "cross_nngp") and "nngp" in changes:
        changes = {"cross_nngp": None, "cross_ntk": None, **changes}
    return dataclasses.replace(self, **changes)


def _replace_normalised(self: Any, **changes: Any) -> Any:
    """`replace`; a layer with random weights of its own makes channels independent again."""
    replaced = dataclasses.replace(self, **changes)
    return cast(replaced, Kernel) if changes.get("is_gaussian") is True else replaced


# In place of the methods that the decorator makes.
FiniteClassKernel.replace = LogSoftmaxKernel.replace = _replace_finite
NormalisedKernel.replace = _replace_normalised


def cast(k: Kernel, to: Any, **more: Any) -> Any:
    """`k` as a kernel of the class `to`."""
    names = (field.name for field in dataclasses.fields(Kernel))  # pyright: ignore[reportArgumentType]
    return to(**{name: getattr(k, name) for name in names}, **more)


def _as_kernel(k: Any, nngp: Any, ntk: Any) -> Any:
    return cast(k, Kernel).replace(nngp=nngp, ntk=ntk)


def _marking(
    layer_fn: Callable[..., Any], mark: Callable[[Kernel, Any], Kernel]
) -> Callable[..., Any]:
    """neural_tangents' `layer_fn`, whose kernels pass through `mark(kernel, input)`."""

    @functools.wraps(layer_fn)
    def marked_layer_fn(*args: Any, **kwargs: Any) -> Any:
        init_fn, apply_fn, kernel_fn = layer_fn(*args, **kwargs)

        # With the attributes in which `requires` keeps what the layer needs.
        @functools.wraps(kernel_fn)
        def marked_kernel_fn(x1_or_kernel: Any, *args: Any, **kwargs: Any) -> Any:
            result = kernel_fn(x1_or_kernel, *args, **kwargs)
            return mark(result, x1_or_kernel) if isinstance(result, Kernel) else result

        return init_fn, apply_fn, marked_kernel_fn

    return marked_layer_fn


def _normalised(k: Kernel, given: Any) -> Kernel:
    return cast(k, NormalisedKernel)


def _not_one(k: Kernel, given: Any) -> Kernel:
    """Weights of this layer need not sum to 1."""
    return k.replace(sums_to_one=False) if isinstance(k, FiniteClassKernel) else k


def _finite_if_any(k: Kernel, given: Any) -> Kernel:
    """Kernels that are made anew of several: finite where one of them was."""
    finite = [each for each in given if isinstance(each, FiniteClassKernel)]
    if not finite or isinstance(k, FiniteClassKernel):
        return k
    return cast(k, FiniteClassKernel, n_classes=finite[0].n_classes, sums_to_one=False)


LayerNorm = _marking(stax.LayerNorm, _normalised)
AvgPool = _marking(stax.AvgPool, _not_one)
SumPool = _marking(stax.SumPool, _not_one)
GlobalSumPool = _marking(stax.GlobalSumPool, _not_one)
Aggregate = _marking(stax.Aggregate, _not_one)
Dropout = _marking(stax.Dropout, _not_one)
FanInSum = _marking(stax.FanInSum, _finite_if_any)
FanInProd = _marking(stax.FanInProd, _finite_if_any)
FanInConcat = _marking(stax.FanInConcat, _finite_if_any)
