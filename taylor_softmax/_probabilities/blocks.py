"""Integrals over points of logits, in blocks of points that need the same rule.

Where the logits are concrete the rules that they need are known, and a block of points is one
compiled function, of a fixed shape, that a loop in Python feeds: what is compiled serves any number
of points. Under `jit` and `vmap` a loop in the graph takes the rule that each block needs, and all
of them are compiled.
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

# Logits times outer nodes of a block: 1 MB in float64, which stays in cache (measured on a CPU,
# 10,000 points of 10 classes: half of it takes a tenth longer, an eighth more than twice as long).
# Of up to so many points half of it, which they fill more often.
_BLOCK, _SOME = 1 << 17, 1024
# Up to so many points a block has so many: a whole one would take longer than they need.
_FEW = 32

Result = TypeVar("Result")
ByRule = Callable[[Logits, Rule, Surrogate], Result]


def in_blocks(
    by_rule: ByRule[Result], mean: Array, variance: Array, surrogate: Surrogate, count: int = 1
) -> Result:
    """What `by_rule` integrates for points `(N, C)`, each by a rule that is fine enough for it.

    Args:
      count: how many classes each column stands for.
    """
    choices = rules.for_surrogate(surrogate)
    # Tracers, for constants under `jit`, too.
    numbers = [known(x) for x in lax.stop_gradient((mean, variance))]
    if not len(mean) or any(isinstance(x, Tracer) for x in numbers):
        return in_graph(by_rule, mean, variance, surrogate, count, choices)
    # Of what is beyond all promises, as XLA does: without a word.
    with np.errstate(all="ignore"):
        logits = rules.prepared(numbers[0], numbers[1], surrogate, count)
        fine = rules.fine_enough(logits, choices, surrogate)
    if not isinstance(mean, Tracer) and not isinstance(variance, Tracer):
        return _by_need(by_rule, logits, fine, surrogate)
    # While derivatives are traced the numbers are known, and with them which rules they need.
    needed = tuple(choices[k] for k in np.unique(np.argmax(fine, axis=0)))
    return in_graph(by_rule, mean, variance, surrogate, count, needed)


def _size(n_points: int, n_classes: int, rule: Rule) -> int:
    """How many of the points a block has."""
    block = _BLOCK if n_points > _SOME else _BLOCK // 2
    size = max(1, block // (n_classes * rule.outer))
    return min(size, _FEW) if n_points <= _FEW else size


def _blocks(n: int, size: int) -> np.ndarray:
    """Indices below `n` in blocks `(blocks, size)`, the last index repeated."""
    return np.minimum(np.arange(-(-n // size) * size), n - 1).reshape(-1, size)


def _by_need(by_rule: ByRule[Any], logits: Logits, fine: np.ndarray, surrogate: Surrogate) -> Any:
    """What is integrated of concrete logits, by which rules are fine enough, `(rules, P)`."""
    choices = rules.for_surrogate(surrogate)
    n_points, n_classes = logits.mean.shape
    need = np.argmax(fine, axis=0)
    parts, places = [], []
    waiting = np.arange(n_points)
    # From the finest rule on: what room its last block has is for points that need less.
    for k in np.unique(need)[::-1]:
        size = _size(n_points, n_classes, choices[k])
        with_rule = waiting[need[waiting] == k]
        room = -len(with_rule) % size
        others = waiting[(need[waiting] < k) & fine[k, waiting]]
        with_rule = np.concatenate([with_rule, others[np.argsort(-need[others])][:room]])
        waiting = np.setdiff1d(waiting, with_rule)
        blocks = with_rule[_blocks(len(with_rule), size)]
        places.append(blocks.ravel())
        for points in zip(*(x[blocks] for x in logits), strict=True):
            parts.append(_one_block(by_rule, Logits(*points), choices[k], surrogate))
    place = np.concatenate(places)

    def restored(*blocks: np.ndarray) -> Array:
        result = np.empty((n_points, *blocks[0].shape[1:]), blocks[0].dtype)
        result[place] = np.concatenate(blocks)
        return jnp.asarray(result)

    return jax.tree.map(restored, *jax.device_get(parts))


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
    """As `in_blocks`, by the rules `choices`, the last of which has to serve all points."""
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
    # Points that need the same rule come together, so that few wait for what others need.
    by_need = jnp.argsort(jnp.argmax(fine, axis=0))
    size = min(n_points, _size(n_points, mean.shape[1], choices[0]))
    blocks = lax.map(block, by_need[_blocks(n_points, size)])
    restore = jnp.argsort(by_need)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[restore], blocks)
