"""Kernels in zarr groups, tile by tile, and on from where a run was stopped."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from taylor_softmax._distributed.arrays import KERNELS, Plan, make_plan, named
from taylor_softmax._distributed.optional import Delayed, compute, da, delayed, import_zarr
from taylor_softmax._numerics.arguments import Validated, check_boolean

# Of the zarr group, says what the kernel was made from.
_ATTRIBUTE = "taylor_softmax"
# Inputs whose kernel tells one `kernel_fn` from another.
_PROBES = 4


def store(
    url: Validated[Any],
    kernel_fn: Validated[Callable[..., Any]],
    x1: Validated[Any],
    x2: Validated[Any] = None,
    get: Validated[str | tuple[str, ...]] = KERNELS,
    *,
    chunks: Validated[int] = 2048,
    dtype: Validated[Any] = None,
    resume: Validated[bool] = False,
    compute: Validated[bool] = True,
) -> Any:
    """Computes kernels tile by tile into a zarr group, or goes on with what a stopped run left.

    The group has an array `(N1, N2)` for each kernel, in chunks of a tile. An entry that is not
    computed yet is NaN. The array `done` has the checksum of each tile, which is written after the
    tile. A tile that does not have its checksum is computed again.

    Args:
      url: the group, as `zarr.open_group` takes it: a path, or a store. Workers write into it, so
        all workers of a cluster must reach it.
      kernel_fn, x1, x2, get, chunks, dtype: as those of `kernel_array`.
      resume: whether to go on from the tiles that `url` has. It starts where there are none, so the
        same command starts and resumes. Several processes that run at once share the store, and
        each computes what it finds missing.
      compute: False returns a `dask.delayed.Delayed` which writes the tiles when it is computed.

    Returns:
      The stored kernels, in the form that `kernel_array` returns, read from the store.

    Raises:
      ImportError: dask or zarr is not installed.
      FileExistsError: `url` is not empty, and `resume` is False.
      ValueError: `url` holds a kernel of another shape, dtype, `chunks`, `get`, of other inputs or
        of another `kernel_fn`; it holds no kernel; its metadata can't be read; or `kernel_array`
        raises it.
      OSError: the disk is too small, or a tile could not be written. Whole tiles remain.
    """
    resume, compute = check_boolean("resume", resume), check_boolean("compute", compute)
    plan = make_plan(kernel_fn, x1, x2, get, chunks, dtype)
    target = _open(url, plan, resume)
    kept = target.whole_tiles(plan)
    missing = [
        (i, j) for i, j in plan.tiles() if not (kept[i, j] and (not plan.symmetric or kept[j, i]))
    ]
    target.check_space(plan, missing)
    token = uuid.uuid4().hex  # Writing is an effect: never taken for one that was done before.
    graph: dict[Any, Any] = {f"target-{token}": target}
    for i, j in missing:
        graph[f"write-{token}", i, j] = (_write, plan.task(i, j), f"target-{token}", i, j)
    last = f"stored-{token}"
    graph[last] = (len, [(f"write-{token}", i, j) for i, j in missing])
    writing = Delayed(last, plan.graph(last, graph))
    if not compute:
        return writing
    writing.compute()
    made = [da.from_zarr(array) for array in target.arrays]
    return made[0] if isinstance(get, str) else named(plan.names, made)


def _write(tile: tuple[np.ndarray, ...], target: "_Target", i: int, j: int) -> None:
    target.write(tile, i, j)


@dataclasses.dataclass(frozen=True)
class _Target:
    """The arrays of a store: kernels, and of each of their tiles the checksum."""

    url: str
    arrays: tuple[Any, ...]
    done: Any
    size: int
    symmetric: bool

    def __dask_tokenize__(self) -> Any:
        return self.url, uuid.uuid4().hex

    def _place(self, i: int, j: int) -> tuple[slice, slice]:
        return tuple(slice(k * self.size, (k + 1) * self.size) for k in (i, j))  # pyright: ignore

    def write(self, tile: tuple[np.ndarray, ...], i: int, j: int) -> None:
        places = {(i, j): tile}
        if self.symmetric and i != j:
            places[j, i] = tuple(kernel.T for kernel in tile)
        try:
            for place, kernels in places.items():
                checksum = 0
                for array, kernel in zip(self.arrays, kernels, strict=True):
                    array[self._place(*place)] = kernel
                    checksum = zlib.crc32(_bytes(kernel), checksum)
                # After the data, whose absence is 0.
                self.done[place] = _marker(checksum)
        except OSError as error:
            message = (
                f"Tile {(i, j)} can't be written to {self.url}: {error}. Whole tiles remain. Mend "
                f"the cause, and go on from them with `resume=True`."
            )
            raise OSError(error.errno or errno.EIO, message) from error

    def is_whole(self, i: int, j: int, marker: int) -> bool:
        checksum = 0
        try:
            for array in self.arrays:
                checksum = zlib.crc32(_bytes(array[self._place(i, j)]), checksum)
        # What zarr raises for a file that was cut short depends on its version.
        except (OSError, ValueError, RuntimeError):
            return False
        return _marker(checksum) == marker

    def whole_tiles(self, plan: Plan) -> np.ndarray:
        """Of all tiles whether they are there; reads what is marked, in parallel."""
        markers = self.done[:]
        marked = [(int(i), int(j)) for i, j in np.argwhere(markers)]
        check = delayed(_Target.is_whole, pure=False)
        target = delayed(self)
        answers = compute(*(check(target, i, j, int(markers[i, j])) for i, j in marked))
        whole = np.zeros(plan.blocks, bool)
        for place, answer in zip(marked, answers, strict=True):
            whole[place] = answer
        return whole

    def check_space(self, plan: Plan, missing: list[tuple[int, int]]) -> None:
        """Of a local disk, before the hours that fill it."""
        root = getattr(self.done.store, "root", None)
        if root is None or not os.path.isdir(root):
            return
        entries = 0
        for i, j in missing:
            twice = plan.symmetric and i != j
            entries += (1 + twice) * plan.chunks[0][i] * plan.chunks[1][j]
        needed = entries * sum(dtype.itemsize for dtype in plan.dtypes)
        if (free := shutil.disk_usage(root).free) < needed:
            message = (
                f"{self.url} needs {needed / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free"
            )
            raise OSError(errno.ENOSPC, message)


def _marker(checksum: int) -> int:
    """Never 0, which is a tile that is not there."""
    return 1 << 32 | checksum


def _open(url: Any, plan: Plan, resume: bool) -> _Target:
    """The store, made or checked against the plan."""
    zarr = import_zarr()
    where = str(url)
    if isinstance(url, os.PathLike) or (isinstance(url, str) and "://" not in url):
        # Workers may be in other folders.
        url = os.path.abspath(url)
    group = _existing(zarr, url, where)
    found = None if group is None else group.attrs.get(_ATTRIBUTE)
    if group is not None and found is None and (dict(group.attrs) or len(group) > 0):
        raise ValueError(f"`url` must be empty or hold a kernel of this library, got {where}.")
    if found is not None and not resume:
        raise FileExistsError(
            errno.EEXIST,
            f"`url` holds a kernel already, whole or in part. Pass `resume=True` to go on with it, "
            f"or another `url` than {where}",
        )
    origin = _origin(plan)
    # Several may start at once. Each writes the same metadata, and takes what another wrote first:
    # what a group has in it when it is made is never there without what says of what it is.
    if group is None:
        try:
            group = zarr.create_group(store=url, attributes={_ATTRIBUTE: origin})
        except zarr.errors.ContainsGroupError:
            group = _existing(zarr, url, where)
        found = group.attrs.get(_ATTRIBUTE)
    elif found is None:
        group.attrs[_ATTRIBUTE] = found = origin
    _check_origin(where, found, origin, plan.dtypes)
    rows, columns = (min(origin["chunks"], n) for n in plan.shape)
    layout: dict[str, Any] = {"compressors": None, "config": {"write_empty_chunks": True}}

    def array(name: str, shape: Any, dtype: Any, chunks: Any, fill: Any) -> Any:
        with contextlib.suppress(KeyError):
            return _readable(f"{where}/{name}/zarr.json", lambda: group[name])
        try:
            return group.create_array(
                name, shape=shape, dtype=dtype, chunks=chunks, fill_value=fill, **layout
            )
        except zarr.errors.ContainsArrayError:
            return group[name]

    arrays = tuple(
        array(name, plan.shape, dtype, (rows, columns), np.nan)
        for name, dtype in zip(plan.names, plan.dtypes, strict=True)
    )
    done = array("done", plan.blocks, "uint64", (1, 1), 0)
    return _Target(where, arrays, done, origin["chunks"], plan.symmetric)


def _existing(zarr: Any, url: Any, where: str) -> Any:
    """The group that is there, or None."""
    try:
        return _readable(f"{where}/zarr.json", lambda: zarr.open_group(store=url, mode="r+"))
    except FileNotFoundError:
        return None
    except _Unreadable:
        raise
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"`url` must be a zarr group, got {where}: {error}") from error


class _Unreadable(ValueError):
    """Metadata that a run has not written to its end."""


def _readable(file: str, read: Callable[[], Any]) -> Any:
    """What `read` makes of a file of metadata, or says that it can't."""
    try:
        return read()
    except json.JSONDecodeError as error:
        raise _Unreadable(
            f"`url` holds metadata that can't be read, in {file}: {error}. If another run is "
            "writing it, start again. If not, remove this file, and go on from the whole tiles "
            "with `resume=True`."
        ) from error


def _check_origin(
    url: str, found: dict[str, Any], origin: dict[str, Any], dtypes: tuple[np.dtype, ...]
) -> None:
    for what in ("get", "shape", "symmetric", "dtype", "dtype of inputs", "chunks"):
        if found.get(what) != origin[what]:
            raise ValueError(
                f"`url` {url} holds a kernel of another {what}: {found.get(what)}, and this call "
                f"makes {origin[what]}."
            )
    for x in ("x1", "x2"):
        if found.get(x) != origin[x]:
            raise ValueError(f"`url` {url} holds the kernel of other data: `{x}` is not the same.")
    for name, dtype, there, here in zip(
        origin["get"], dtypes, found["probe"], origin["probe"], strict=True
    ):
        there, here = np.array(there), np.array(here)
        # More than another version or processor makes of it, less than another network does.
        allowed = float(jnp.finfo(dtype).eps) ** 0.75 * np.max(np.abs(here))
        if not np.allclose(there, here, rtol=0, atol=allowed, equal_nan=True):
            raise ValueError(
                f"`url` {url} holds the kernel of another `kernel_fn`: entries of `{name}` differ "
                f"by up to {np.max(np.abs(there - here)):.1e}."
            )


def _origin(plan: Plan) -> dict[str, Any]:
    """What tells this kernel from another, as JSON, read from all the inputs once."""
    xs = {"x1": plan.x1, "x2": plan.x2 or []}
    digest = delayed(_digest)
    blocks = {
        k: [digest(b) for x in each for b in x.to_delayed().ravel()] for k, each in xs.items()
    }
    # Inputs with others, not with themselves, where an NTK is as exact as the root of rounding.
    first, others = plan.x1, plan.x2 or plan.x1
    few = [x[_spread(len(x))[::2]] for x in first], [x[_spread(len(x))[-1::-2]] for x in others]
    digests, few = compute(blocks, few)
    probe = plan.function(*few)
    return {
        "get": list(plan.names),
        "shape": list(plan.shape),
        "dtype": [str(dtype) for dtype in plan.dtypes],
        "dtype of inputs": [str(x.dtype) for x in plan.x1 + (plan.x2 or [])],
        "chunks": max(map(max, plan.chunks)),
        "symmetric": plan.symmetric,
        **{k: hashlib.sha256(b"".join(each)).hexdigest() for k, each in digests.items()},
        "probe": [np.float64(kernel).tolist() for kernel in probe],
    }


def _digest(block: np.ndarray) -> bytes:
    return hashlib.sha256(_bytes(block)).digest()


def _bytes(array: np.ndarray) -> memoryview:
    """In the order of C."""
    return np.ascontiguousarray(array).view(np.uint8).data


def _spread(n: int) -> np.ndarray:
    """An even number of inputs, where there are as many."""
    return np.unique(np.linspace(0, n - 1, min(n, 2 * _PROBES)).astype(int))
