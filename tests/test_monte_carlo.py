"""Sampling against values known otherwise, its standard errors and its chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from oracles import class_axis as brute_force
from taylor_softmax import monte_carlo
from taylor_softmax._numerics.surrogate import parse

VAR1, COV12, VAR2 = np.array([[0.5, 2.0], [0.3, -1.5], [0.4, 2.0]])


@pytest.mark.quick(order=6)
@pytest.mark.parametrize("order", [2, 6, None])
def test_means_and_standard_errors(order):
    """Scores of many independent estimates are standard normal: mean square 1, none extreme."""
    exact = np.stack(
        [
            np.full((3, 3), float(m.cross)) + np.eye(3) * float(m.same - m.cross)
            for m in (
                brute_force.moments(
                    *(jnp.asarray(x) for x in (a, c / np.sqrt(a * b), b)), n=3, order=order
                )
                for a, c, b in zip(VAR1, COV12, VAR2, strict=True)
            )
        ]
    )
    scores = []
    for key in random.split(random.key(5), 60):
        mean, stderr = monte_carlo.class_second_moment(
            key, VAR1, COV12, VAR2, n_classes=3, order=order, n_samples=4000
        )
        assert mean.shape == stderr.shape == (2, 3, 3)
        scores.append((np.asarray(mean) - exact) / np.asarray(stderr))
    scores = np.stack(scores)
    assert np.max(np.abs(scores)) < 5.5
    # 60 independent estimates an entry: mean square within 5 standard deviations of 1.
    assert np.max(np.abs(np.mean(scores**2, 0) - 1)) < 5 * np.sqrt(2 / 60)
    # Control: a bias of one per cent is found.
    biased = scores + 0.01 * exact / np.asarray(stderr)
    assert np.mean(biased**2) > 1.5 * np.mean(scores**2)


@pytest.mark.quick
def test_chunks_add_up(monkeypatch):
    """The estimate does not depend on how the standard error is accumulated."""
    arguments = {"n_classes": 4, "order": 2, "n_samples": 1000}
    whole = monte_carlo.class_second_moment(random.key(0), 1.0, 0.5, 1.0, **arguments)
    monkeypatch.setattr(monte_carlo, "_CHUNK", 24 * 96)
    chunked = monte_carlo.class_second_moment(random.key(0), 1.0, 0.5, 1.0, **arguments)
    np.testing.assert_allclose(chunked.stderr, whole.stderr, rtol=0.2)
    scores = (chunked.mean - whole.mean) / np.hypot(chunked.stderr, whole.stderr)
    assert np.max(np.abs(scores)) < 5
    assert np.max(np.abs(scores)) > 0


def test_memory_does_not_grow_with_the_samples():
    def temporary_bytes(n_chunks):
        compiled = monte_carlo._second_moment.lower(
            random.key(0),
            jnp.ones((3, 1)),
            monte_carlo._draw_classes,
            shape=(1, 10),
            surrogate=parse(2),
            n_samples=1000 * n_chunks,
            at_once=1000 * 120,
        ).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(1000) == temporary_bytes(10) > 0


@pytest.mark.quick
def test_same_key_same_samples():
    estimates = [
        monte_carlo.class_second_moment(
            random.key(3), 1.0, 1.0, 1.0, n_classes=3, n_samples=500
        ).mean
        for _ in range(2)
    ]
    np.testing.assert_array_equal(*estimates)


@pytest.mark.quick
def test_degenerate_logits():
    for covariances in ((0.0, 0.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 1.0)):
        mean, stderr = monte_carlo.class_second_moment(
            random.key(1), *covariances, n_classes=3, n_samples=1000
        )
        assert np.isfinite(mean).all()
        assert np.isfinite(stderr).all()
        np.testing.assert_allclose(mean.sum(), 1, rtol=1e-12)
    assert mean.dtype == jnp.float64
    single = monte_carlo.class_second_moment(
        random.key(1), *jnp.ones((3, 2), jnp.float32), n_classes=3, n_samples=10
    )
    assert jax.tree.map(lambda x: x.dtype, single) == (jnp.float32, jnp.float32)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"n_samples": 1}, ValueError, "`n_samples`.*1"),
        ({"n_samples": 10.0}, TypeError, "`n_samples`.*10.0"),
        ({"n_classes": 0}, ValueError, "`n_classes`.*0"),
        ({"order": 3}, ValueError, "`order`.*3"),
    ],
)
def test_errors_name_the_argument(changed, error, message):
    arguments = {"n_classes": 3, "order": 2, "n_samples": 10} | changed
    with pytest.raises(error, match=message):
        monte_carlo.class_second_moment(random.key(0), 1.0, 0.5, 1.0, **arguments)
