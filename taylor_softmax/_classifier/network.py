"""Kernels of a network with hyperparameters, compiled once for all their values."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from taylor_softmax import stax

Hyperparameters = Mapping[str, float]


def fully_connected(n_classes: int, W_std: Any, b_std: Any, last_W_std: Any) -> Any:
    """The default network: two hidden layers of the same scales, and the logits."""
    hidden = [stax.Dense(512, W_std, b_std), stax.Relu()]
    return stax.serial(*hidden, *hidden, stax.Dense(n_classes, last_W_std))


class Network(NamedTuple):
    """Kernels of a network, as NumPy arrays.

    They are compiled once for all values of the hyperparameters, and, since inputs are padded, for
    a few numbers of inputs.

    Attributes:
      build: a function of the number of classes and hyperparameters that returns the network.
      get: "nngp" or "ntk".
      mask_constant: as in `stax`.
    """

    build: Callable[..., Any]
    n_classes: int
    get: str
    mask_constant: float | None

    def square(self, x: np.ndarray, hyperparameters: Hyperparameters) -> np.ndarray:
        """The kernel of inputs with themselves, `(N, N)`."""
        n = len(x)
        return np.asarray(_square(self, _padded(x), hyperparameters))[:n, :n]

    def cross(self, x1: np.ndarray, x2: np.ndarray, hyperparameters: Hyperparameters) -> np.ndarray:
        """The kernel of `x1` with `x2`, `(N1, N2)`."""
        kernel = _cross(self, _padded(x1), _padded(x2), hyperparameters)
        return np.asarray(kernel)[: len(x1), : len(x2)]

    def variances(self, x: np.ndarray, hyperparameters: Hyperparameters) -> np.ndarray:
        """The diagonal of `square`, `(N,)`."""
        return np.asarray(_variances(self, _padded(x), hyperparameters))[: len(x)]

    def slopes(
        self, x: np.ndarray, hyperparameters: Hyperparameters, cotangent: np.ndarray
    ) -> dict[str, float]:
        """The slopes of `sum(cotangent * square)` in the hyperparameters."""
        padded = _padded(x)
        padding = len(padded) - len(x)
        slopes = _slopes(self, padded, hyperparameters, np.pad(cotangent, (0, padding)))
        return {name: float(slope) for name, slope in slopes.items()}

    def traced(self, x1: Array, x2: Array | None, hyperparameters: Mapping[str, Array]) -> Array:
        """The kernel of the network."""
        layers = self.build(self.n_classes, **hyperparameters)
        if not (isinstance(layers, tuple) and len(layers) == 3):
            raise TypeError(
                "`network` must return a network of `taylor_softmax.stax`, its functions "
                f"`(init_fn, apply_fn, kernel_fn)`, got {type(layers).__name__}."
            )
        masked = {} if self.mask_constant is None else {"mask_constant": self.mask_constant}
        kernel = layers[2](x1, x2, (self.get, "is_gaussian"), **masked)
        if not kernel.is_gaussian:
            raise ValueError(
                "`network` must end in its logits, a layer such as `stax.Dense(n_classes)`. The "
                "inference puts the softmax on top."
            )
        return getattr(kernel, self.get)


@functools.partial(jax.jit, static_argnums=0)
def _square(network: Network, x: Array, hyperparameters: Mapping[str, Array]) -> Array:
    return network.traced(x, None, hyperparameters)


@functools.partial(jax.jit, static_argnums=0)
def _cross(network: Network, x1: Array, x2: Array, hyperparameters: Mapping[str, Array]) -> Array:
    return network.traced(x1, x2, hyperparameters)


@functools.partial(jax.jit, static_argnums=0)
def _variances(network: Network, x: Array, hyperparameters: Mapping[str, Array]) -> Array:
    return jax.vmap(lambda one: network.traced(one[None], None, hyperparameters)[0, 0])(x)


@functools.partial(jax.jit, static_argnums=0)
def _slopes(
    network: Network, x: Array, hyperparameters: Mapping[str, Array], cotangent: Array
) -> Mapping[str, Array]:
    return jax.vjp(lambda values: network.traced(x, None, values), hyperparameters)[1](cotangent)[0]


def _padded(x: np.ndarray) -> np.ndarray:
    """`x` and copies of its first input, up to a power of two or three fourths of one."""
    size = 1 << (len(x) - 1).bit_length()
    if len(x) <= 3 * size // 4:
        size = 3 * size // 4
    return np.concatenate([x, np.broadcast_to(x[:1], (size - len(x), *x.shape[1:]))])
