"""The layout of a kernel's spatial axes, for layers that act on several positions together."""

import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array


class SpatialLayout:
    """Which spatial axes of a kernel a layer acts on together (`over`), and which not (`rest`).

    A covariance has shape `(*batch, H1, H2, W1, W2, ...)`: one batch axis where the batch is
    diagonal, otherwise two, and each spatial axis twice, with the sizes that it has in the first
    and in the second inputs. A *group* is the positions along `over` of one input at one position
    along `rest`, such as a row of an image; groups of an input covary.

    Attributes:
      n_rest, n_over: numbers of positions along the axes of either kind, in the first and in the
        second inputs.
    """

    def __init__(
        self,
        shape1: Sequence[int],
        shape2: Sequence[int],
        batch_axis: int,
        channel_axis: int,
        over: Sequence[int],
    ):
        """`shape1` and `shape2` are those of the inputs, `over` names axes of them."""
        self._batch_axis, self._channel_axis = batch_axis, channel_axis
        spatial = [i for i in range(len(shape1)) if i not in (batch_axis, channel_axis)]
        self._sizes = [[shape[i] for i in spatial] for shape in (shape1, shape2)]
        self._over = [spatial.index(i) for i in over]
        self._rest = [i for i in range(len(spatial)) if i not in self._over]
        self.n_rest, self.n_over = (
            tuple(math.prod(sizes[i] for i in axes) for sizes in self._sizes)
            for axes in (self._rest, self._over)
        )

    def split(self, cov: Array, batch_ndim: int) -> Array:
        """`(*batch, H1, H2, W1, W2, ...)` to `(*batch, rest1, rest2, over1, over2)`."""
        batch = cov.shape[:batch_ndim]
        cov = cov.transpose(self._permutation(batch_ndim))
        return cov.reshape(*batch, *self.n_rest, *self.n_over)

    def join(self, array: Array, batch: Sequence[int]) -> Array:
        """What `split` undoes, of any array with as many entries."""
        axes = self._permutation(len(batch))
        doubled = [*batch, *itertools.chain(*zip(*self._sizes, strict=True))]
        array = array.reshape([doubled[i] for i in axes])
        return array.transpose(np.argsort(axes))

    def groups(self, cov: Array, batch_ndim: int) -> Array:
        """Covariance of each group with itself, `(n * rest, over, over)`.

        From the covariance of inputs among each other, of one shape.
        """
        cov = self.split(cov, batch_ndim)
        if batch_ndim == 2:
            cov = jnp.moveaxis(jnp.diagonal(cov), -1, 0)
        cov = jnp.moveaxis(jnp.diagonal(cov, axis1=1, axis2=2), -1, 1)
        return cov.reshape(-1, *self.n_over)

    def present(self, mask: Array | None, n_inputs: int) -> Array:
        """Which positions of each group of the first inputs `mask` leaves, `(n * rest, over)`."""
        shape = n_inputs * self.n_rest[0], self.n_over[0]
        if mask is None:
            return jnp.ones(shape, bool)
        mask = jnp.moveaxis(mask, (self._batch_axis, self._channel_axis), (0, -1))[..., 0]
        mask = jnp.broadcast_to(mask, (n_inputs, *self._sizes[0]))
        return ~mask.transpose(0, *(1 + i for i in (*self._rest, *self._over))).reshape(shape)

    def pairs(self, batch: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the first and the second group of each pair, in the order of `split`."""
        index = np.indices((*batch, *self.n_rest)).reshape(len(batch) + 2, -1)
        # The first and the last of the batch axes: one where the batch is diagonal.
        groups = zip((index[0], index[len(batch) - 1]), index[-2:], self.n_rest, strict=True)
        first, second = (i * n + position for i, position, n in groups)
        return first, second

    def _permutation(self, batch_ndim: int) -> list[int]:
        first, second = (
            [batch_ndim + 2 * i + side for i in range(len(self._sizes[0]))] for side in (0, 1)
        )
        groups = (
            [side[i] for i in axes] for axes in (self._rest, self._over) for side in (first, second)
        )
        return [*range(batch_ndim), *itertools.chain(*groups)]
