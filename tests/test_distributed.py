"""Kernels by tiles are those of `kernel_fn`, survive what kills a run, predict as `nt.predict`."""

import errno
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import types

import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dask import config
from dask.base import compute
from jax import lax

from taylor_softmax import class_kernel, distributed, nt, stax
from taylor_softmax._distributed import arrays as tiles
from taylor_softmax._distributed import storage
from taylor_softmax._numerics.precision import enable_x64
from taylor_softmax.distributed import Cholesky, ConjugateGradients, kernel_array, solve, store

ROOT = pathlib.Path(__file__).parents[1]
GET = ("nngp", "ntk")
RNG = np.random.default_rng(0)
X1, X2 = RNG.standard_normal((23, 6)), RNG.standard_normal((9, 6))
# As many as fill tiles, where compiling takes long.
IMAGES1, IMAGES2 = RNG.standard_normal((4, 4, 4, 2)), RNG.standard_normal((2, 4, 4, 2))
NETWORK = stax.serial(stax.Dense(16, 1.5, 0.1), stax.Erf(), stax.Dense(4))[2]
READOUT = (stax.GlobalAvgPool(), stax.Dense(1))


@pytest.fixture
def zarr():
    return pytest.importorskip("zarr", minversion="3")


@pytest.fixture(autouse=True)
def _threads():
    """Unless a test has a cluster."""
    with config.set(scheduler="threads"):
        yield


@pytest.fixture
def computed(monkeypatch):
    """The shapes of tiles that are computed in this process."""
    shapes, plain = [], tiles._tile

    def counted(function, x1, x2):
        shapes.append((len(x1[0]), len((x1 if x2 is None else x2)[0])))
        return plain(function, x1, x2)

    monkeypatch.setattr(tiles, "_tile", counted)
    return shapes


def assert_equal(got, want, get=GET, **tolerance):
    for name, kernel in zip(get, compute(*(getattr(got, name) for name in get)), strict=True):
        expected = getattr(want, name)
        np.testing.assert_allclose(kernel, expected, **({"rtol": 1e-6, "atol": 1e-9} | tolerance))
        assert kernel.dtype == expected.dtype


def network(*layers):
    return stax.serial(*layers)[2]


def aggregate():
    """Inputs of nodes, and the graphs between them, which vary with the input."""
    kernel_fn = network(stax.Aggregate(1, 0, 2), stax.Flatten(), stax.Dense(1), stax.Relu())

    def of_pairs(x1, x2, get):
        nodes1, pattern1 = x1
        nodes2, pattern2 = x1 if x2 is None else x2
        return kernel_fn(nodes1, None if x2 is None else nodes2, get, pattern=(pattern1, pattern2))

    def inputs(n):
        return RNG.standard_normal((n, 4, 3)), RNG.integers(0, 2, (n, 4, 4)).astype(float)

    return of_pairs, inputs(5), inputs(3)


CASES = {
    "Erf": lambda: (NETWORK, X1, X2),
    "Softmax": lambda: (
        network(stax.Dense(8), stax.Relu(), stax.Dense(3), stax.Softmax()),
        X1[:20],
        X1[:10],
    ),
    "images": lambda: (network(stax.Conv(8, (3, 3)), stax.Relu(), *READOUT), IMAGES1, IMAGES2),
    "positions": lambda: (
        network(stax.Conv(8, (2, 2)), stax.TaylorSoftmax(2, axis=(1, 2)), stax.Flatten()),
        IMAGES1,
        IMAGES2,
    ),
    "two inputs": lambda: (
        network(stax.parallel(stax.Dense(4), stax.Dense(4)), stax.FanInSum(), stax.Relu()),
        (X1, 2 * X1[:, :3]),
        (X2, X2[:, :3]),
    ),
    "Aggregate": aggregate,
    "empirical": lambda: (
        functools.partial(
            nt.empirical_kernel_fn(lambda params, x: jnp.tanh(x @ params)),
            params=RNG.standard_normal((6, 3)),
        ),
        X1,
        X2,
    ),
    "jit": lambda: (jax.jit(NETWORK, static_argnums=2), X1, X2),
}


@pytest.mark.quick(case="Softmax")
@pytest.mark.filterwarnings("ignore:`FanIn` layers assume independent inputs")
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.slow] * (c in ("images", "positions"))) for c in CASES],
)
def test_equals_kernel_fn(case):
    kernel_fn, x1, x2 = CASES[case]()
    chunks = 2 if "images" in case or case in ("positions", "Aggregate") else 10
    for other in (x2, None):
        got = kernel_array(kernel_fn, x1, other, chunks=chunks)
        assert_equal(got, kernel_fn(x1, other, GET))


@pytest.mark.quick
def test_another_kernel_is_another():
    """Negative control."""
    got = kernel_array(network(stax.Dense(16, 1.501, 0.1), stax.Erf(), stax.Dense(4)), X1, chunks=9)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_equal(got, NETWORK(X1, None, GET))


@pytest.mark.quick
def test_half_of_a_symmetric_kernel_is_computed(computed):
    got = kernel_array(NETWORK, X1, chunks=10)
    nngp, ntk = compute(*got)
    assert sorted(computed) == sorted([(10, 10)] * 3 + [(10, 3)] * 2 + [(3, 3)])
    for kernel in (nngp, ntk):
        np.testing.assert_array_equal(kernel[10:, :10], kernel[:10, 10:].T)
    computed.clear()
    compute(*kernel_array(NETWORK, X1, X1, chunks=10))
    assert len(computed) == 9


@pytest.mark.quick
def test_only_what_is_asked_for_is_computed(computed):
    got = kernel_array(NETWORK, X1, get="ntk", chunks=10)
    block = got[:5, 12:15].compute()
    np.testing.assert_allclose(block, NETWORK(X1[:5], X1[12:15], "ntk"), rtol=1e-10)
    assert computed == [(10, 10)]
    assert (got.shape, got.dtype, got.chunks) == ((23, 23), np.float64, ((10, 10, 3),) * 2)


TRACED = []


def traced(x1, x2, get):
    """At the top of a module, so that loading it gives this one."""
    TRACED.append((len(x1), x2 is not None and len(x2)))
    return NETWORK(x1, x2, get)


def test_each_shape_of_tiles_is_compiled_once():
    TRACED.clear()
    got = kernel_array(traced, X1, chunks=5)
    for _ in range(2):
        compute(*got, num_workers=8)
    # The first is of abstract inputs.
    assert sorted(TRACED[1:]) == [(3, False), (5, False), (5, 3), (5, 5)]


@pytest.mark.parametrize("kind", ["list", "jax", "dask", "uint8"])
def test_kinds_of_inputs(kind):
    ints = np.arange(24).reshape(8, 3) * 10 % 256
    x = {
        "list": ints.tolist,
        "jax": lambda: jnp.asarray(ints),
        "dask": lambda: da.from_array(ints, chunks=(5, 2)),
        "uint8": lambda: ints.astype(np.uint8),
    }[kind]()
    got = kernel_array(NETWORK, x, ints[:3], chunks=3)
    assert_equal(got, NETWORK(1.0 * ints, 1.0 * ints[:3], GET))


def test_zarr_arrays_are_inputs(zarr, tmp_path):
    stored = zarr.create_array(tmp_path / "x", shape=X1.shape, chunks=(7, 6), dtype=X1.dtype)
    stored[:] = X1
    for x in (stored, tmp_path / "x", str(tmp_path / "x"), zarr.open_array(tmp_path / "x")):
        assert_equal(kernel_array(NETWORK, x, chunks=10), NETWORK(X1, None, GET))


def test_precision_is_that_asked_for():
    want = NETWORK(X1, X2, GET)
    with enable_x64(False):
        single = kernel_array(NETWORK, X1, X2, chunks=10)
        assert single.nngp.dtype == np.float32
        double = kernel_array(NETWORK, X1, X2, chunks=10, dtype="float64")
        assert jnp.zeros(1).dtype == np.float32
    # Wherever they are computed.
    assert_equal(double, want, rtol=1e-13)
    single = single.nngp.compute()
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, want.nngp, rtol=1e-4, atol=1e-6)
    assert np.max(np.abs(single - want.nngp)) > 1e-9, "negative control"
    again = kernel_array(NETWORK, X1, X2, chunks=10, dtype=np.float32).nngp.compute()
    np.testing.assert_array_equal(again, single)


# Stores.


def bits(url, zarr):
    group = zarr.open_group(url, mode="r")
    return {name: group[name][:].tobytes() for name in group if name != "done"}


@pytest.fixture
def whole(zarr, tmp_path):
    """A stored kernel of six tiles."""
    url = tmp_path / "whole"
    got = store(url, NETWORK, X1, chunks=10)
    assert_equal(got, NETWORK(X1, None, GET))
    return url


@pytest.mark.quick
def test_store_is_the_kernel_bit_for_bit(whole, zarr, tmp_path):
    nngp, ntk = compute(*kernel_array(NETWORK, X1, chunks=10))
    assert bits(whole, zarr) == {"nngp": nngp.tobytes(), "ntk": ntk.tobytes()}
    one = store(tmp_path / "one", NETWORK, X1, X2, "ntk", chunks=10)
    np.testing.assert_allclose(one.compute(), NETWORK(X1, X2, "ntk"), rtol=1e-10)
    assert one.shape == (23, 9)


@pytest.mark.quick(reached="data")
@pytest.mark.parametrize("reached", ["nothing", "data", "marker"])
def test_resumed_run_equals_one_that_was_not_stopped(
    reached, whole, zarr, tmp_path, monkeypatch, computed
):
    url, plain, written = tmp_path / "stopped", storage._Target.write, []

    def stopped(target, tile, i, j):
        if len(written) == 2:
            if reached == "data":
                target.arrays[0][target._place(i, j)] = tile[0]
            if reached == "marker":
                plain(target, tile, i, j)
            raise KeyboardInterrupt
        plain(target, tile, i, j)
        written.append((i, j))

    monkeypatch.setattr(storage._Target, "write", stopped)
    with pytest.raises(KeyboardInterrupt), config.set(scheduler="synchronous"):
        store(url, NETWORK, X1, chunks=10)
    monkeypatch.setattr(storage._Target, "write", plain)
    assert np.isnan(zarr.open_group(url)["ntk"][:]).any()
    assert bits(url, zarr) != bits(whole, zarr), "negative control"
    computed.clear()
    store(url, NETWORK, X1, chunks=10, resume=True)
    assert len(computed) == (3 if reached == "marker" else 4)
    assert bits(url, zarr) == bits(whole, zarr)
    computed.clear()
    store(url, NETWORK, X1, chunks=10, resume=True)
    assert not computed


@pytest.mark.quick(damage="other bytes")
@pytest.mark.parametrize("damage", ["cut short", "other bytes", "gone"])
def test_tiles_half_written_are_computed_again(damage, whole, zarr, computed):
    want = bits(whole, zarr)
    (file,) = [path for path in (whole / "ntk").rglob("*") if path.parts[-3:] == ("c", "1", "2")]
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:100] if damage == "cut short" else b"\0" * 8 + content[8:])
    computed.clear()
    store(whole, NETWORK, X1, chunks=10, resume=True)
    assert computed == [(10, 3)]
    assert bits(whole, zarr) == want


@pytest.mark.quick
def test_several_that_start_at_once(whole, zarr, tmp_path, monkeypatch):
    """All come to make the store before any has: the first makes it, the others open it."""
    plain, ready, errors = storage._origin, threading.Barrier(4), []

    def origin(plan):
        result = plain(plan)
        ready.wait(timeout=60)
        return result

    def start():
        try:
            store(tmp_path / "k", NETWORK, X1, chunks=10, resume=True)
        except Exception as error:
            errors.append(error)

    monkeypatch.setattr(storage, "_origin", origin)
    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert bits(tmp_path / "k", zarr) == bits(whole, zarr)


@pytest.mark.parametrize("name", ["ntk/zarr.json", "done/zarr.json", "zarr.json"])
def test_metadata_half_written_is_named(name, whole, zarr, computed):
    want, file = bits(whole, zarr), whole / name
    content = file.read_bytes()
    for half in (content[:40], b""):
        file.write_bytes(half)
        with pytest.raises(ValueError, match=f"metadata.*{name}.*start again"):
            store(whole, NETWORK, X1, chunks=10, resume=True)
    if name == "zarr.json":
        file.write_bytes(content)
    else:
        file.unlink()
    computed.clear()
    store(whole, NETWORK, X1, chunks=10, resume=True)
    assert not computed
    assert bits(whole, zarr) == want


def test_resume_begins_where_there_is_nothing(zarr, tmp_path):
    writing = store(tmp_path / "k", NETWORK, X1, chunks=10, resume=True, compute=False)
    assert np.isnan(zarr.open_group(tmp_path / "k")["nngp"][:]).all()
    writing.compute()
    np.testing.assert_allclose(
        da.from_zarr(tmp_path / "k", component="nngp").compute(),
        NETWORK(X1, None, "nngp"),
        rtol=1e-6,
    )


OTHER = network(stax.Dense(16, 1.5002, 0.1), stax.Erf(), stax.Dense(4))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((NETWORK, X1[:-1]), {}, r"another shape: \[23, 23\].*\[22, 22\]"),
        ((NETWORK, X1, X1), {}, "another symmetric"),
        ((NETWORK, X1, None, "ntk"), {}, "another get"),
        ((NETWORK, X1), {"chunks": 9}, "another chunks: 10, .*9"),
        ((NETWORK, X1), {"dtype": np.float32}, "another dtype.*float32"),
        ((NETWORK, np.where(np.arange(23)[:, None] == 11, X1 + 1e-9, X1)), {}, "other data: `x1`"),
        ((OTHER, X1), {}, "another `kernel_fn`: entries of `nngp` differ by up to"),
    ],
)
def test_another_kernel_is_not_resumed(arguments, options, message, whole, zarr):
    want = bits(whole, zarr)
    with pytest.raises(ValueError, match=message):
        store(whole, *arguments, **({"chunks": 10} | options), resume=True)
    assert bits(whole, zarr) == want


def test_what_is_there_is_not_written_over(whole, zarr, tmp_path):
    with pytest.raises(FileExistsError, match=r"`resume=True`.*whole"):
        store(whole, NETWORK, X1, chunks=10)
    zarr.create_group(tmp_path / "g").create_array("x", shape=(2,), dtype="f4")
    with pytest.raises(ValueError, match="`url` must be empty or hold a kernel"):
        store(tmp_path / "g", NETWORK, X1, resume=True)
    zarr.create_array(tmp_path / "a", shape=(2,), dtype="f4")
    with pytest.raises(ValueError, match="`url` must be a zarr group"):
        store(tmp_path / "a", NETWORK, X1, resume=True)
    with pytest.raises(TypeError, match="`url` must be a zarr group"):
        store(3, NETWORK, X1)


@pytest.mark.quick
def test_full_disk(zarr, tmp_path, monkeypatch, computed):
    url, needed = tmp_path / "k", 2 * 8 * 23**2
    usage = types.SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"needs 0\.00 GB") as caught:
        store(url, NETWORK, X1, chunks=10)
    assert caught.value.errno == errno.ENOSPC
    assert not computed
    usage.free = needed

    # Another program fills it meanwhile.
    plain = zarr.Array.__setitem__

    def full(array, place, value):
        if array.basename == "ntk" and place[0].start == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(array, place, value)

    monkeypatch.setattr(zarr.Array, "__setitem__", full)
    with pytest.raises(OSError, match=r"Tile \(.*No space left.*`resume=True`") as caught:
        store(url, NETWORK, X1, chunks=10, resume=True)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.setattr(zarr.Array, "__setitem__", plain)
    assert_equal(store(url, NETWORK, X1, chunks=10, resume=True), NETWORK(X1, None, GET))


# Clusters.


@pytest.fixture(scope="module")
def client():
    """Of two processes, for all tests that have one."""
    distributed_ = pytest.importorskip("distributed")
    cluster = distributed_.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    )
    with cluster, distributed_.Client(cluster) as client:
        yield client


def slow_network():
    """Where tiles take long enough to be interrupted. Nested, so that it travels by value."""

    def kernel_fn(x1, x2, get):
        kernel = NETWORK(x1, x2, get)
        wait = lax.fori_loop(0, 30_000, lambda _, v: jnp.cos(v), kernel.nngp[0, 0])
        return kernel._replace(nngp=kernel.nngp + 0 * wait)

    return kernel_fn


def kill_one_worker(client):
    address, pid = next(iter(client.run(os.getpid).items()))
    os.kill(pid, signal.SIGKILL)
    return address


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_killed_worker_loses_nothing(client, zarr, tmp_path):
    """Of a kernel in the memory of workers, and of one on its way to a store."""
    x, kernel_fn = RNG.standard_normal((100, 6)), slow_network()
    want = NETWORK(x, None, GET)
    got = client.compute(kernel_array(kernel_fn, x, chunks=10))
    wait_until(lambda: all(len(keys) > 15 for keys in client.has_what().values()))
    assert not any(future.done() for future in got), "negative control: it ends in mid-run"
    killed = kill_one_worker(client)
    got = {name: future.result() for name, future in zip(GET, got, strict=True)}
    for name, kernel in got.items():
        np.testing.assert_allclose(kernel, getattr(want, name), rtol=1e-6, atol=1e-9)
        # Workers have JAX's default, float32, and compute in the precision of this process.
        assert kernel.dtype == np.float64
    wait_until(lambda: len(client.scheduler_info()["workers"]) == 2)
    assert killed not in client.scheduler_info()["workers"]

    url = tmp_path / "k"
    writing = client.compute(store(url, kernel_fn, x, chunks=10, compute=False))
    done = zarr.open_group(url)["done"]
    wait_until(lambda: np.count_nonzero(done[:]) > 15)
    kill_one_worker(client)
    writing.result()
    assert np.all(done[:])
    assert bits(url, zarr) == {name: kernel.tobytes() for name, kernel in got.items()}


def test_kernel_fn_that_cannot_travel_is_for_threads(client):
    lock = threading.Lock()

    def kernel_fn(x1, x2, get):
        with lock:
            return NETWORK(x1, x2, get)

    got = kernel_array(kernel_fn, X1, chunks=10)
    assert_equal(got, NETWORK(X1, None, GET))
    with pytest.raises(TypeError, match=r"[Cc]ould not serialize|cannot pickle"):
        client.compute(got.nngp).result()


@pytest.mark.slow
def test_command_that_is_killed_and_resumed(client, zarr, tmp_path):
    """examples/large_kernel.py: on this machine, killed and resumed, and on a cluster."""

    def command(folder, *options):
        program = [sys.executable, str(ROOT / "examples" / "large_kernel.py")]
        arguments = ["--inputs", "600", "--chunks", "30", "--out", str(tmp_path / folder)]
        return subprocess.Popen(
            [*program, *arguments, *options],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def marked(folder):
        return (tmp_path / folder / "done").exists() and np.count_nonzero(
            zarr.open_group(tmp_path / folder, mode="r")["done"][:]
        )

    killed = command("resumed")
    wait_until(lambda: marked("resumed") > 30)
    killed.kill()
    killed.communicate()
    assert 30 < marked("resumed") < 400, "negative control: it ends in mid-run"

    for folder, options in (
        ("resumed", ["--resume"]),
        ("cluster", ["--scheduler", client.scheduler.address]),
    ):
        run = command(folder, *options)
        out, _ = run.communicate(timeout=120)
        assert run.returncode == 0, out
        assert "100%" in out
        assert "600 inputs are in" in out
        assert marked(folder) == 400
    assert bits(tmp_path / "resumed", zarr) == bits(tmp_path / "cluster", zarr)


# Least squares.


def predictions(n, method, zarr, tmp_path, diag_reg):
    """Means at test inputs, of dask and of `nt.predict`."""
    x, x_test = RNG.standard_normal((n, 10)), RNG.standard_normal((50, 10))
    y = np.stack([np.sin(x[:, 0]), x[:, 1] * x[:, 2]], -1)
    predict_fn = nt.predict.gradient_descent_mse_ensemble(NETWORK, x, y, diag_reg=diag_reg)
    want = predict_fn(t=None, x_test=x_test, get=GET)
    chunks = n // 3 + 1  # the last is smaller
    kernels = store(tmp_path / "train", NETWORK, x, chunks=chunks)
    cross = kernel_array(NETWORK, x_test, x, chunks=chunks)
    for name in GET:
        alpha = solve(getattr(kernels, name), y, diag_reg=diag_reg, method=method)
        yield (getattr(cross, name) @ alpha).compute(), getattr(want, name)


METHODS = [None, Cholesky(), ConjugateGradients(1e-10, rank=20)]


@pytest.mark.quick(method=METHODS[2])
@pytest.mark.parametrize("method", METHODS, ids=["default", "Cholesky", "CG"])
def test_predictions_are_those_of_nt_predict(method, zarr, tmp_path):
    (nngp, want_nngp), (ntk, want_ntk) = predictions(100, method, zarr, tmp_path, 1e-3)
    np.testing.assert_allclose(nngp, want_nngp, atol=1e-6)
    np.testing.assert_allclose(ntk, want_ntk, atol=1e-6)
    assert np.max(np.abs(nngp - want_ntk)) > 1e-3, "negative control"


@pytest.mark.slow
@pytest.mark.parametrize("method", [Cholesky(), ConjugateGradients(1e-8)], ids=["Cholesky", "CG"])
def test_predictions_of_2000_inputs_are_those_of_nt_predict(method, zarr, tmp_path):
    for got, want in predictions(2000, method, zarr, tmp_path, 1e-4):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("method", METHODS[1:])
def test_solutions_have_the_shape_of_targets(method):
    kernel = da.from_array(np.asarray(NETWORK(X1, None, "nngp")), chunks=10)
    for y in (X1[:, 0], X1[:, :3], da.from_array(X1[:, :2], chunks=(4, 1))):
        alpha = solve(kernel, y, diag_reg=0.3, diag_reg_absolute_scale=True, method=method)
        assert alpha.shape == y.shape
        want = np.linalg.solve(kernel.compute() + 0.3 * np.eye(23), np.asarray(y))
        np.testing.assert_allclose(alpha.compute(), want, rtol=1e-6, atol=1e-8)


@pytest.mark.quick(method=METHODS[1])
@pytest.mark.parametrize("method", METHODS[1:])
def test_indefinite_kernels_raise(method):
    kernel = np.diag(np.where(np.arange(30) % 2, -1.0, 1.0))
    with pytest.raises(np.linalg.LinAlgError):
        solve(kernel, np.ones(30), method=method).compute()


@pytest.mark.quick
def test_what_has_not_converged_raises():
    kernel = np.diag(np.geomspace(1e-9, 1, 100))
    with pytest.raises(RuntimeError, match="`max_iterations`=3"):
        solve(kernel, np.ones(100), method=ConjugateGradients(rank=2, max_iterations=3))


# Wrong calls.

WRONG = [
    (lambda: kernel_array(stax.Dense(3), X1), TypeError, "`kernel_fn` .*Pass the third"),
    (lambda: kernel_array(None, X1), TypeError, "`kernel_fn` must be callable, got None"),
    (lambda: kernel_array(NETWORK, None), TypeError, "`x1` must be an array of real numbers"),
    (lambda: kernel_array(NETWORK, 1j * X1), TypeError, "`x1` .*complex128"),
    (lambda: kernel_array(NETWORK, X1, [["a"]]), TypeError, "`x2` must be an array of real"),
    (lambda: kernel_array(NETWORK, [[1, 2], [3]]), TypeError, "`x1` must be an array"),
    (lambda: kernel_array(NETWORK, 3.0), ValueError, r"`x1` must have shape \(N, ...\).*\(\)"),
    (lambda: kernel_array(NETWORK, X1[:0]), ValueError, r"`x1` must have shape.*\(0, 6\)"),
    (lambda: kernel_array(NETWORK, X1, X2[:, 1:]), ValueError, r"`x1` and `x2` .*\(5,\)"),
    (lambda: kernel_array(NETWORK, (X1, X2)), ValueError, "`x1` must have as many.*9"),
    (lambda: kernel_array(NETWORK, X1, get="cov1"), ValueError, "`get` must be.*'cov1'"),
    (lambda: kernel_array(NETWORK, X1, get=()), ValueError, "`get` must be"),
    (lambda: kernel_array(NETWORK, X1, get=("ntk", "ntk")), ValueError, "`get` must be"),
    (lambda: kernel_array(NETWORK, X1, get=None), TypeError, "`get` must be.*None"),
    (lambda: kernel_array(NETWORK, X1, chunks=0), ValueError, "`chunks` must be at least 1"),
    (lambda: kernel_array(NETWORK, X1, chunks=2.5), TypeError, "`chunks` must be an integer.*2.5"),
    (lambda: kernel_array(NETWORK, X1, dtype=int), TypeError, "`dtype` must be a floating.*int"),
    (lambda: kernel_array(NETWORK, X1, dtype="x"), TypeError, "`dtype` must be a floating.*'x'"),
    (
        lambda: kernel_array(network(stax.Conv(4, (2, 2))), IMAGES1),
        ValueError,
        r"`kernel_fn` must give a matrix.*`nngp`.*\(2, 3, 3, 3, 3, 3\)",
    ),
    (
        lambda: kernel_array(lambda *args: class_kernel(CASES["Softmax"]()[0](*args[:2])), X1),
        ValueError,
        r"`kernel_fn` must give a matrix.*\(2, 3, 3, 3\)",
    ),
    (lambda: store("unused", NETWORK, X1, resume=1), TypeError, "`resume` must be a boolean"),
    (lambda: store("unused", NETWORK, X1, compute="no"), TypeError, "`compute` must be a bool"),
    (lambda: solve(X1, X1), ValueError, r"`kernel` must have shape \(N, N\).*\(23, 6\)"),
    (lambda: solve(np.eye(3), np.ones(4)), ValueError, r"`y` must have shape \(3,\).*\(4,\)"),
    (lambda: solve(np.eye(3), np.ones(3), method="cg"), TypeError, "`method` must be.*'cg'"),
    (lambda: solve(np.eye(3), np.ones(3), diag_reg=-1), ValueError, "`diag_reg` .*-1"),
    (lambda: solve(np.eye(3), np.ones(3), diag_reg="1"), TypeError, "`diag_reg` .*'1'"),
    (lambda: ConjugateGradients(tol=0), ValueError, "`tol` must be positive, got 0"),
    (lambda: ConjugateGradients(rank=0), ValueError, "`rank` must be at least 1"),
    (lambda: ConjugateGradients(max_iterations=1.5), TypeError, "`max_iterations` must be an"),
]


@pytest.mark.quick
@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_call(call, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        call()


@pytest.mark.quick
def test_without_dask(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("taylor_softmax._distributed")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, distributed.__name__)
    monkeypatch.setitem(sys.modules, "dask.array", None)
    with pytest.raises(ImportError, match=r"taylor-softmax\[dask\]"):
        __import__(distributed.__name__)


@pytest.mark.quick
def test_without_zarr(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ImportError, match=r"taylor-softmax\[dask\]"):
        store(tmp_path / "k", NETWORK, X1)


# Many JAX hosts.

BEFORE = """
import functools, json, sys
import jax
port, i = sys.argv[1:]
if "jax_cpu_collectives_implementation" in jax.config.values:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize = functools.partial(
    jax.distributed.initialize, f"localhost:{port}", num_processes=2, process_id=int(i)
)
import numpy as np
from taylor_softmax import stax
kernel_fn = stax.serial(stax.Dense(8), stax.Softmax(infinite_width=True))[2]
x = np.random.default_rng(1).standard_normal((8, 5)).astype(np.float32)
x2, x1_here = -x[:3], x[4 * int(i) : 4 * int(i) + 4]
"""
AFTER = """
assert kernel.ntk.shape == (8, 3)
print(json.dumps({"rows": rows_here.tolist(), "devices": len(jax.devices())}))
"""


def test_rows_of_a_kernel_on_two_hosts():
    """What docs/compatibility.md says of several hosts, by two processes on this machine."""
    page = (ROOT / "docs" / "compatibility.md").read_text()
    blocks = [textwrap.dedent(block) for block in re.findall(r"(?:^ {4}.*\n|^\n)+", page, re.M)]
    (recipe,) = [block for block in blocks if "jax.distributed.initialize()" in block]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", BEFORE + recipe + AFTER, port, str(i)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    rows = []
    for host in hosts:
        out, err = host.communicate(timeout=120)
        assert host.returncode == 0, err
        rows.append(json.loads(out.splitlines()[-1]))
    assert [each["devices"] for each in rows] == [2, 2]
    x = np.random.default_rng(1).standard_normal((8, 5)).astype(np.float32)
    kernel_fn = network(stax.Dense(8), stax.Softmax(infinite_width=True))
    with enable_x64(False):
        want = kernel_fn(jnp.asarray(x), -jnp.asarray(x[:3]), "ntk")
    for i, each in enumerate(rows):
        assert np.shape(each["rows"]) == (4, 3)
        np.testing.assert_allclose(each["rows"], want[4 * i : 4 * i + 4], rtol=1e-4)
    assert np.max(np.abs(np.subtract(rows[0]["rows"], rows[1]["rows"]))) > 1e-3, "other rows"
