"""The program for GPUs: all of it in small on whatever there is, and what it says and survives."""

import importlib.util
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import parts
from benchmarks.report import sections
from taylor_softmax import stax


@pytest.fixture
def without(monkeypatch):
    """As if packages were not installed."""

    def absent(*names):
        found = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name in names else found(name)
        )

    return absent


def test_quick_run_measures_all(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    assert program.main(["--quick", "--to", str(tmp_path)]) == 0
    said = capfd.readouterr()
    assert said.out.splitlines()[-1].startswith("inference: done in")
    for part in program.PARTS:
        assert f"  {part.name}: {part.what}" in said.err
    report = (tmp_path / "gpu.md").read_text()
    assert list(sections(report)) == [part.name for part in program.PARTS[1:]]
    assert "nan" not in report
    # Errors of 256 points; those of inputs that differ would be near 1.
    errors = re.findall(r"(\d\.?\d*e[-+]\d+) / (\d\.?\d*e[-+]\d+)", report)
    assert len(errors) == 6
    assert np.max(np.array(errors, float)) < 0.1
    accuracy = (tmp_path / "accuracy_gpu.md").read_text()
    assert "## Beside another run" in accuracy
    assert "## Figures" in accuracy
    assert (tmp_path / "accuracy_gpu.json").exists()


def test_a_missing_gpu_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="JAX finds no GPU here, but cpu"):
        program.main(["--to", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_what_all_parts_need_is_named_before_anything_runs(without, tmp_path):
    without("neural_tangents", "mpmath")
    with pytest.raises(SystemExit, match="needed by everything: neural-tangents mpmath"):
        program.main(["--quick", "--to", str(tmp_path)])


def test_parts_without_their_package_are_left_out(without, monkeypatch, tmp_path, capsys):
    ran = []
    monkeypatch.setattr(program, "run", lambda part, *_: ran.append(part.name) or "done")
    without("sklearn", "tqdm")
    assert program.main(["--quick", "--to", str(tmp_path)]) == 0
    assert ran == [part.name for part in program.PARTS if part.name != "inference"]
    said = capsys.readouterr().err
    assert "scikit-learn is not installed: inference is left out" in said
    assert "tqdm is not installed" in said
    assert "matplotlib" not in said


def test_limits_make_nine_minutes():
    assert sum(part.limit for part in program.PARTS) <= 9 * 60
    assert program.SECONDS >= 4 * 60
    assert program.SAMPLES >= 10**7


@pytest.mark.quick
def test_a_part_that_hangs_or_fails_ends_no_other(monkeypatch, tmp_path, capsys):
    scripts = {
        "attention": "import time; time.sleep(100)",
        "positions": "raise SystemExit(3)",
        "tiles": "",
    }
    monkeypatch.setattr(
        program, "command", lambda part, *_: [sys.executable, "-c", scripts[part.name]]
    )
    limited = [part._replace(limit=2) for part in program.PARTS]
    monkeypatch.setattr(program, "PARTS", limited)
    monkeypatch.setattr(program, "chosen", lambda _: [p for p in limited if p.name in scripts])
    start = time.monotonic()
    assert program.main(["--quick", "--to", str(tmp_path)]) == 1
    assert time.monotonic() - start < 60
    hung, failed, fine = capsys.readouterr().out.splitlines()
    assert hung.startswith("attention: ended by its limit")
    assert failed.startswith("positions: FAILED")
    assert failed.endswith("status 3")
    assert fine.startswith("tiles: done")


def test_products_by_tiles_are_those_of_the_kernels():
    kernel_fn = stax.serial(stax.Dense(10), stax.Softmax())[2]
    rng = np.random.default_rng(0)
    x, v = jnp.asarray(rng.standard_normal((6, 4))), jnp.asarray(rng.standard_normal(6))
    kernel = kernel_fn(x, None, parts.BOTH)
    expected = np.stack([kernel.nngp @ v, kernel.ntk @ v])
    np.testing.assert_allclose(parts.kernel_products(kernel_fn, 2)(x, v), expected, rtol=1e-12)
