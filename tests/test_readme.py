"""The README's example runs as printed."""

import pathlib
import re

import numpy as np


def test_example_runs_and_says_what_it_claims(capsys):
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    namespace = {}
    exec(example, namespace)
    assert namespace["kernel"].nngp.shape == (3, 2)
    assert namespace["classes"].ntk.shape == (3, 2, 10, 10)
    np.testing.assert_allclose(namespace["classes"].nngp.sum((-1, -2)), np.ones((3, 2)), rtol=1e-6)
    assert np.max(np.abs(namespace["scores"])) < 5
    assert capsys.readouterr().out
