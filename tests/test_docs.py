"""Code in the README and in the docs runs as printed, and says what it claims."""

import pathlib
import re

import mktestdocs
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page, capsys):
    """All of a page, one after the other, in one namespace."""
    mktestdocs.check_md_file(page, memory=True)


def test_example_of_the_readme_says_what_it_claims(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    namespace = {}
    exec(example, namespace)
    assert namespace["kernel"].nngp.shape == (3, 2)
    assert namespace["classes"].ntk.shape == (3, 2, 10, 10)
    np.testing.assert_allclose(namespace["classes"].nngp.sum((-1, -2)), np.ones((3, 2)), rtol=1e-6)
    assert np.max(np.abs(namespace["scores"])) < 5
    assert capsys.readouterr().out


def test_a_block_that_fails_is_noticed(tmp_path):
    """Negative control."""
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError):
        mktestdocs.check_md_file(page, memory=True)
