"""Integrals for many points of logits, in blocks of points that need the same quadrature rule.

If the logits are concrete, the rules that they need are known. A loop in Python then passes blocks
of a fixed shape to one compiled function, which serves any number of points. Under `jit` and `vmap`
the loop is part of the graph. It picks the rule that each block needs, and all rules are compiled.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

from taylor_softmax._numerics.arguments import known
from taylor_softmax._numerics.surrogate import Surrogate
from taylor_softmax._probabilities import rules
from taylor_softmax._probabilities.rules import Logits, Rule

# Number of logits in a block, times that of outer nodes: 1 MB in float64, which stays in cache
# (measured on a CPU with 10,000 points of 10 classes: half of it takes a tenth longer, an eighth
# takes more than twice as long). Up to `_SOME` points have blocks of half the size, which they fill
# more often.
_BLOCK, _SOME = 1 << 17, 1024
# Largest block of up to so many points: a full block would take longer than they need.
_FEW = 32

Result = TypeVar("Result")
ByRule = Callable[[Logits, Rule, Surrogate], Result]


def in_blocks(
    by_rule: ByRule[Result], mean: Array, variance: Array, surrogate: Surrogate, count: int = 1
) -> Result:
    """The results of `by_rule` for `N` points, each with a rule that is fine enough for it.

    Args:
      by_rule: `by_rule(logits, rule, surrogate)` integrates for a block of points.
      mean, variance: of independent logits, `(N, C)`.
      surrogate: function that the softmax normalises.
      count: number of classes that each column stands for.

    Returns:
      What `by_rule` returns, with `N` points along the first axis of each array.
    """
    choices = rules.for_surrogate(surrogate)
    # Under `jit` constants are traced too.
    numbers = [known(x) for x in lax.stop_gradient((mean, variance))]
    if not len(mean) or any(isinstance(x, Tracer) for x in numbers):
        return in_graph(by_rule, mean, variance, surrogate, count, choices)
    # Numbers beyond all promises may overflow. XLA does not warn of that, and NumPy must not
    # either.
    with np.errstate(all="ignore"):
        logits = rules.prepared(numbers[0], numbers[1], surrogate, count)
        fine = rules.fine_enough(logits, choices, surrogate)
    if not isinstance(mean, Tracer) and not isinstance(variance, Tracer):
        return _by_need(by_rule, logits, fine, surrogate)
    # While derivatives are traced the numbers are known, and so are the rules that they need.
    needed = tuple(choices[k] for k in np.unique(np.argmax(fine, axis=0)))
    return in_graph(by_rule, mean, variance, surrogate, count, needed)


def _size(n_points: int, n_classes: int, rule: Rule) -> int:
    """Number of points in a block."""
    block = _BLOCK if n_points > _SOME else _BLOCK // 2
    size = max(1, block // (n_classes * rule.outer))
    return min(size, _FEW) if n_points <= _FEW else size


def _blocks(n: int, size: int) -> np.ndarray:
    """Indices from 0 to `n - 1` in blocks, `(blocks, size)`, filled up with the last index."""
    return np.minimum(np.arange(-(-n // size) * size), n - 1).reshape(-1, size)


def _by_need(by_rule: ByRule[Any], logits: Logits, fine: np.ndarray, surrogate: Surrogate) -> Any:
    """As `in_blocks`, for concrete logits.

    Args:
      fine: whether each rule is fine enough for each point, `(rules, P)`.
    """
    choices = rules.for_surrogate(surrogate)
    n_points, n_classes = logits.mean.shape
    needed_rule = np.argmax(fine, axis=0)
    results, indices = [], []
    waiting = np.arange(n_points)
    # The finest rule comes first. Points that need less fill up its last block.
    for k in np.unique(needed_rule)[::-1]:
        size = _size(n_points, n_classes, choices[k])
        with_rule = waiting[needed_rule[waiting] == k]
        room = -len(with_rule) % size
        coarser = waiting[(needed_rule[waiting] < k) & fine[k, waiting]]
        filling = coarser[np.argsort(-needed_rule[coarser])][:room]
        with_rule = np.concatenate([with_rule, filling])
        waiting = np.setdiff1d(waiting, with_rule)
        blocks = with_rule[_blocks(len(with_rule), size)]
        indices.append(blocks.ravel())
        for points in zip(*(x[blocks] for x in logits), strict=True):
            results.append(_one_block(by_rule, Logits(*points), choices[k], surrogate))
    index = np.concatenate(indices)

    def in_order(*blocks: np.ndarray) -> Array:
        result = np.empty((n_points, *blocks[0].shape[1:]), blocks[0].dtype)
        result[index] = np.concatenate(blocks)
        return jnp.asarray(result)

    return jax.tree.map(in_order, *jax.device_get(results))


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _one_block(by_rule: ByRule[Any], logits: Logits, rule: Rule, surrogate: Surrogate) -> Any:
    return by_rule(logits, rule, surrogate)


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def in_graph(
    by_rule: ByRule[Any],
    mean: Array,
    variance: Array,
    surrogate: Surrogate,
    count: int,
    choices: tuple[Rule, ...],
) -> Any:
    """As `in_blocks`, with the rules `choices`, of which the last one must serve all points."""
    n_points = len(mean)
    logits = rules.prepared(mean, variance, surrogate, count)
    fine = rules.fine_enough(logits, choices, surrogate)

    def with_rule(rule: Rule) -> Callable[[Logits], Any]:
        return lambda logits: by_rule(logits, rule, surrogate)

    branches = [with_rule(rule) for rule in choices]

    # Rematerialised in the backward pass, which otherwise would keep every block's intermediates.
    @jax.checkpoint
    def block(points: Array) -> Any:
        index = jnp.argmax(jnp.all(fine[:, points], axis=1))
        return lax.switch(index, branches, jax.tree.map(lambda x: x[points], logits))

    if not n_points:
        shapes: Any = jax.eval_shape(branches[0], logits)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    # Points that need the same rule come together: a block takes the finest rule of its points.
    by_need = jnp.argsort(jnp.argmax(fine, axis=0))
    size = min(n_points, _size(n_points, mean.shape[1], choices[0]))
    blocks = lax.map(block, by_need[_blocks(n_points, size)])
    restore = jnp.argsort(by_need)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[restore], blocks)
