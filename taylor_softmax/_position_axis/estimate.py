"""Means over scramblings of quasi-random points, whose spread says how wrong they are.

Eight scramblings of 1,024 points are as good as one set of 8,192 (16 positions, variances 0.25 to
20, measured), and tell their own error. Errors are relative to the scale of the kernel: of an NNGP
to `sqrt(max E[y y^T](x, x) max E[y y^T](x', x'))`, of an NTK to the same of `E[J X J^T]`, with `X`
of the shape of the covariance and the size of `Theta`; see `units`.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float

from taylor_softmax._numerics.statistics import Running, none_yet, sum_over
from taylor_softmax._position_axis import sampling
from taylor_softmax._position_axis.components import Components
from taylor_softmax.methods import QuasiMonteCarlo

# Share of an asked-for error at which scramblings end. What ends at the first spread that is small
# enough prefers spreads that are too small by chance.
_REACHED = 0.9

# As many times the default number of points are drawn at most where an error is asked for.
_MORE = 8

# The spread of fewer scramblings says nothing.
_FEWEST = 4

# How often the largest error is below the reported one, by Student's distribution: of standard
# errors 4.5 from the spread of 3 scramblings, 2.4 from that of 8, 2 from that of many.
_LEVEL = 0.9545

# By default all points of a scrambling are drawn from so many positions on, below as large a share
# as there are positions, at least a quarter; and all scramblings from a variance of 1 on, below as
# large a share as it is, at least three.
_ALL_FROM, _LEAST_SHARE, _LEAST = 16, 4, 3


class Default(NamedTuple):
    """What is drawn where neither a number of points nor an error is named.

    Attributes:
      n_scramblings: how many, for pairs that need all of them.
      n_points: of each, at most.
      limits: estimated errors of NNGP and NTK beyond which it warns.
    """

    n_scramblings: int
    n_points: int
    limits: tuple[float, float]


POSITIONS = Default(12, 1 << 10, (2e-2, 6e-2))


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a `QuasiMonteCarlo` comes to.

    Attributes:
      n_points: of each scrambling.
      n_scramblings: at most.
      seed: names them.
      error: at which they end, or None.
      by_need: whether fewer are drawn where variances are small or positions few.
    """

    n_points: int
    n_scramblings: int
    seed: int
    error: float | None
    by_need: bool

    @classmethod
    def of(
        cls, method: QuasiMonteCarlo, size: int = _ALL_FROM, default: Default = POSITIONS
    ) -> "Budget":
        """Of pairs of inputs of up to `size` positions."""
        total = method.n_points
        if total is None:
            total = default.n_scramblings * default.n_points
            total *= 1 if method.error is None else _MORE
        # A power of two is what balances them.
        n_points = 1 << max(0, total // default.n_scramblings - 1).bit_length()
        n_points = min(default.n_points, n_points)
        by_need = method.n_points is None and method.error is None
        if by_need and size < _ALL_FROM:
            share = 1 << (_ALL_FROM // size).bit_length() - 1
            n_points //= min(share, _LEAST_SHARE)
            total = n_points * default.n_scramblings
        return cls(n_points, total // n_points, method.seed, method.error, by_need)

    def scramblings(self, dimension: int, dtype: Any) -> Float[Array, "k dims points"]:
        """The points of all pairs."""
        return sampling.scramblings(
            self.n_scramblings, self.n_points, dimension, dtype, sampling.PAIRS, self.seed
        )

    def points(self, sizes: Sequence[int], dtype: Any) -> Float[Array, "k blocks dims points"]:
        """Those of all pairs of `S` and `T` positions, in blocks, `S + 2 T` dimensions.

        On a CPU the arrays of a block stay in the cache of the second level: in one block 8,192
        points take 1.9 times as long (8, 16 and 32 positions, float32, measured).
        """
        at_once = min(self.n_points, 1 << max(7, 13 - (max(sizes) - 1).bit_length()))
        if jax.default_backend() != "cpu":
            at_once = self.n_points
        dimension = sum(sizes)
        points = self.scramblings(dimension, dtype)
        blocks = points.reshape(self.n_scramblings, dimension, -1, at_once)
        return jnp.moveaxis(blocks, 2, 1)

    def limit(self, variance: Array) -> Array | int:
        """How many scramblings a pair of inputs gets at most.

        Args:
          variance: the largest of the logits.
        """
        if not self.by_need:
            return self.n_scramblings
        share = jnp.minimum(1, variance)
        return jnp.clip(jnp.ceil(self.n_scramblings * share), _LEAST, self.n_scramblings)


def average(
    sample: Callable[[Any], Float[Array, "*shape"]],
    points: Any,
    budget: Budget,
    variance: Array,
    error: Callable[[Running], Float[Array, " results"]],
) -> tuple[Float[Array, "*shape"], Float[Array, " results"], Float[Array, ""]]:
    """Mean of `sample` over as many scramblings as it takes, its error, and how many it took.

    Not differentiable in reverse mode: see `mean_of_first`.

    Args:
      sample: an unbiased estimate from one scrambling.
      points: a tree of arrays, whose first axis is that of scramblings.
      variance: the largest of the logits, for `Budget.limit`.
      error: the estimated errors of the means so far.
    """
    limit = budget.limit(variance)
    sample = jax.jit(sample)  # Traced once for its shape and its value.
    like = jax.eval_shape(sample, _scrambling(points, 0))
    start = none_yet(jnp.zeros(like.shape, like.dtype))

    def more(state: Running) -> Array:
        left = state.n < limit
        if budget.error is None:
            return left
        reached = jnp.all(error(state) <= _REACHED * budget.error)
        return left & ((state.n < _FEWEST) | ~reached)

    def draw(state: Running) -> Running:
        return state.add(sample(_scrambling(points, state.n.astype(int)))[None])

    total = lax.while_loop(more, draw, start)
    return total.mean, error(total), total.n


def mean_of_first(
    sample: Callable[[Any], Float[Array, "*shape"]], points: Any, n: Array
) -> Float[Array, "*shape"]:
    """Mean of `sample` over the first `n` of the scramblings `points`.

    Differentiable in both modes; nothing of a scrambling is kept for the backward pass.
    """
    sample = jax.jit(sample)
    like = jax.eval_shape(sample, _scrambling(points, 0))

    def term(given: tuple[Any, Array]) -> Array:
        scrambling, k = given
        return lax.cond(k < n, sample, lambda _: jnp.zeros(like.shape, like.dtype), scrambling)

    index = jnp.arange(len(jax.tree.leaves(points)[0]), dtype=n.dtype)
    return sum_over(term, (points, index)) / n


def _scrambling(points: Any, i: Any) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), points)


def relative_error(
    stderr: Float[Array, "k S T"], units: Float[Array, " k"], n: Array, most: int
) -> Float[Array, " k"]:
    """The largest error that standard errors let expect, relative to `units`.

    Args:
      n: number of scramblings that they come of, up to `most`.
    """
    # Fewer than two have no spread, and no quantile: debuggers of NaN would find it.
    degrees = np.maximum(np.arange(most + 1) - 1, 1)
    quantiles = scipy.stats.t.ppf((1 + _LEVEL) / 2, degrees)
    quantile = jnp.asarray(quantiles, stderr.dtype)[n.astype(int)]
    tiny = float(jnp.finfo(stderr.dtype).tiny)
    return quantile * jnp.max(stderr, (1, 2)) / jnp.maximum(units, tiny)


def units(one: Components, two: Components, theta: Array | None) -> Float[Array, " k"]:
    """What errors of the NNGP are relative to, and unless `theta` is None those of the NTK."""
    of_value = jnp.sqrt(one.value_scale) * jnp.sqrt(two.value_scale)
    if theta is None:
        return of_value[None]
    of_slope = jnp.sqrt(one.slope_scale) * jnp.sqrt(two.slope_scale)
    return jnp.stack([of_value, of_slope * jnp.sqrt(jnp.sum(theta**2))])


def warn(errors: Sequence[Array], method: Any, what: str, *, default: Default = POSITIONS) -> None:
    """Says so where estimates miss the error that was asked for, or that the default stands for.

    Args:
      errors: estimated, each of some pairs of inputs, of their NNGP and maybe of their NTK,
        `(pairs, 1 or 2)`.
      what: is estimated, for the message.
    """
    if not isinstance(method, QuasiMonteCarlo):
        return
    if method.error is None and method.n_points is not None:
        # Whoever names a number of points gets that number.
        return
    if any(isinstance(each, Tracer) for each in errors):
        return
    limits = default.limits if method.error is None else (method.error,) * 2
    found = [
        (float(np.max(column)), limit, name)
        for each in errors
        for column, limit, name in zip(np.asarray(each).T, limits, ("NNGP", "NTK"), strict=False)
        if column.size
    ]
    error, limit, name = max(found, key=lambda x: x[0] / x[1], default=(0.0, 1.0, ""))
    if not error > limit:
        return
    budget = Budget.of(method, default=default)
    drawn = budget.n_points * budget.n_scramblings
    needed = 1 << math.ceil(math.log2(drawn * max(1.0, (error / limit) ** 2)))
    missed = "" if method.error is None else f" `error={method.error:g}` is not reached."
    warnings.warn(
        f"{what}: the estimated error of the {name} is {error:.1g}, relative to its scale.{missed} "
        f"`method=methods.QuasiMonteCarlo({needed}, error={limit:g})` draws more points where it "
        f"takes more.",
        UserWarning,
        stacklevel=4,
    )
