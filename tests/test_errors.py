"""The table of promises: that it is one, and that what cites it does."""

import pathlib
import re

import numpy as np
import pytest

from taylor_softmax._numerics import errors
from taylor_softmax._numerics.surrogate import parse

pytestmark = pytest.mark.quick


def test_promises_weaken_with_the_variance():
    for quantity in errors.UNITS:
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


def test_the_docs_show_this_table():
    docs = pathlib.Path(__file__).parents[1] / "docs" / "promises.md"
    assert errors.markdown() in docs.read_text()


def test_the_readme_promises_nothing_else():
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    rows = [line for line in readme.splitlines() if line.startswith("| `")]
    said = {float(number) for row in rows for number in re.findall(r"\d+(?:\.\d+)?e-\d+", row)}
    assert said
    assert said <= {promise.float64 for promise in errors.PROMISES}
