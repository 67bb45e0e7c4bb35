"""The table of promises: that it is one, and that what cites it does."""

import pathlib

import numpy as np
import pytest

from taylor_softmax._numerics import errors
from taylor_softmax._numerics.surrogate import parse

pytestmark = pytest.mark.quick


def test_promises_weaken_with_the_variance():
    for quantity in {promise.quantity for promise in errors.PROMISES}:
        rows = [promise for promise in errors.PROMISES if promise.quantity == quantity]
        assert rows
        assert [p.variance for p in rows] == sorted(p.variance for p in rows)
        for column in ("float64", "float32"):
            limits = [getattr(promise, column) for promise in rows]
            assert limits == sorted(limits)
        assert all(promise.float64 <= promise.float32 for promise in rows)


def test_look_up_at_the_edges():
    value, slope = errors.class_axis(parse(None), 10)
    assert errors.promised(value, 100.0) == 1e-6
    assert errors.promised(value, 100.1) == 1e-4
    assert errors.promised(slope, 1e4, np.float32) == 5e-4
    assert errors.class_axis(parse(None), 1001) != (value, slope)
    few, many = (errors.class_axis(parse(4), n) for n in (9, 10))
    assert few != many
    with pytest.raises(KeyError, match=r"Nothing is promised of .*orders 4 to 8.* at variance"):
        errors.promised(many[1], 1.1e6)


def test_every_promise_stands_in_one_small_table():
    shown = [quantity for table in errors.TABLES for quantity in table.quantities]
    assert len(set(shown)) == len(shown)
    assert set(shown) == {promise.quantity for promise in errors.PROMISES}
    assert max(len(table.quantities) for table in errors.TABLES) <= 10
    text = errors.markdown()
    assert "| order 2 over classes, NNGP | 2e-7 / 1e-4 | 3e-6 / 5e-4 |" in text
    # Of other variances than those of its own rows: the next larger one's, or nothing.
    assert f"| {errors.CORRELATED} | 1e-4 | 1e-3 | 4e-3 | - |" in text


def test_the_docs_show_these_tables():
    docs = pathlib.Path(__file__).parents[1] / "docs" / "promises.md"
    assert errors.markdown() in docs.read_text()
