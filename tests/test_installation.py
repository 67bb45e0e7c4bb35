"""What the README says of installing works in a fresh environment, and the wheel is whole.

Then the two ways into the library that the README shows are followed and timed.

Needs a network, and minutes: `make test-install`, not `make test`.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import zipfile

import pytest

pytestmark = pytest.mark.install

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
INSTALL, _ = README.split("[end:install]")
CLASSIFIER, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BLOCKS = {
    "uv" if block.startswith("uv") else "pip": block
    for block in re.findall(r"```bash\n(.*?)```", INSTALL, re.DOTALL)
}
# Seconds: three times the aim on two idle cores, for machines that do something else, too.
LONGEST = 30
# A kernel at a variance that is served by the samples that come with the package.
SMOKE = """
import importlib.util
import pathlib
import sys

import taylor_softmax

assert "site-packages" in taylor_softmax.__file__, taylor_softmax.__file__
assert importlib.util.find_spec("tensorflow") is None
value = float(taylor_softmax.class_covariance(400.0, 390.0, 400.0, n_classes=10))
assert 0.05 < value < 0.1, value
from jax.numpy import ones
from taylor_softmax import stax

kernel_fn = stax.serial(stax.Dense(8), stax.Softmax(infinite_width=True))[2]
assert kernel_fn(ones((3, 2)), None, "ntk").shape == (3, 3)
"""


@pytest.fixture
def clone(tmp_path):
    """The files that git knows, as a fresh clone has them."""
    names = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    for name in names:
        if (ROOT / name).is_file():
            to = tmp_path / "clone" / name
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to)
    return tmp_path / "clone"


def run(command, cwd):
    """What `command` prints, in a shell outside of the environment of these tests."""
    inside = pathlib.Path(sys.executable).parent
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    # The commands `python`, of the interpreter below this environment, and `uv`, which is in it.
    bin_dir = cwd.parent / "bin"
    bin_dir.mkdir(exist_ok=True)
    for name, target in (("python", pathlib.Path(sys._base_executable)), ("uv", inside / "uv")):
        if not (bin_dir / name).exists():
            (bin_dir / name).symlink_to(target)
    env["PATH"] = f"{bin_dir}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("tool", ["uv", "pip"])
def test_block_of_the_readme(tool, clone, tmp_path):
    run(BLOCKS[tool], clone)
    (tmp_path / "smoke.py").write_text(SMOKE)
    run("clone/.venv/bin/python smoke.py", tmp_path)

    assert len([line for line in CLASSIFIER.splitlines() if line]) <= 10
    (tmp_path / "classifier.py").write_text(CLASSIFIER)
    start = time.perf_counter()
    accuracy, nll = map(float, run("clone/.venv/bin/python classifier.py", tmp_path).split())
    seconds = time.perf_counter() - start
    print(f"The first example, installed with {tool}: {seconds:.1f} s.")
    assert accuracy > 0.9
    assert nll < 0.3
    assert seconds < LONGEST


def test_demo(clone):
    """`make demo`, which installs the examples' extra alone."""
    start = time.perf_counter()
    printed = run("make demo", clone)
    print(f"make demo, with its installation: {time.perf_counter() - start:.0f} s.")
    assert "test accuracy" in printed
    assert (clone / "examples" / "digits.png").exists()
    listed = run(".venv/bin/python -m pip list --format=freeze", clone)
    packages = {line.partition("==")[0] for line in listed.splitlines()}
    assert "matplotlib" in packages
    assert packages.isdisjoint({"pytest", "pyright", "beartype"})


def test_wheel_is_whole_and_works(clone, tmp_path):
    """It holds the samples of every order, and the mark of a typed package, and nothing else."""
    run("uv build --quiet", clone)
    (wheel,) = (clone / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {
        str(path.relative_to(clone))
        for path in (clone / "taylor_softmax").rglob("*")
        if path.is_file()
    }
    assert package == {name for name in names if ".dist-info/" not in name}
    assert any(name.endswith(".npz") for name in package)
    assert "taylor_softmax/py.typed" in package

    requirements = "'jax>=0.4.38' 'jaxtyping>=0.2.34' 'mpmath>=1.3' frozendict"
    run(
        f"uv venv --quiet && uv pip install --quiet {requirements} && "
        f"uv pip install --quiet --no-deps neural-tangents==0.6.5 {wheel}",
        clone,
    )
    (tmp_path / "smoke.py").write_text(SMOKE)
    run("clone/.venv/bin/python smoke.py", tmp_path)
