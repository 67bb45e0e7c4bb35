"""Kernels as lazy arrays: the graph of tiles, and the function that workers run."""

import collections
import dataclasses
import functools
import os
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taylor_softmax._distributed.optional import (
    HighLevelGraph,
    LazyArray,
    cloudpickle,
    da,
    import_zarr,
    tokenize,
)
from taylor_softmax._numerics.arguments import Validated, check_integer
from taylor_softmax._numerics.precision import enable_x64

KERNELS = ("nngp", "ntk")


def kernel_array(
    kernel_fn: Validated[Callable[..., Any]],
    x1: Validated[Any],
    x2: Validated[Any] = None,
    get: Validated[str | tuple[str, ...]] = KERNELS,
    *,
    chunks: Validated[int] = 2048,
    dtype: Validated[Any] = None,
) -> Any:
    """Kernel matrices as lazy `dask.array`s, with a task for each tile.

    Where `x2` is None, tiles below the diagonal are the transposed tiles above it. A worker
    compiles `kernel_fn` once for each shape of tiles, of which there are at most four. The function
    leaves the settings of JAX as they are. Workers learn whether float64 is enabled, and no other
    setting.

    Args:
      kernel_fn: as neural_tangents and `taylor_softmax.stax` have it, called as
        `kernel_fn(x1, x2, get)`, with None for `x2` on the diagonal. Set other arguments by
        `functools.partial`. Other processes get it by cloudpickle.
      x1, x2: inputs, `(N1, ...)` and `(N2, ...)`: arrays of NumPy, JAX, dask or zarr, or the path
        of a zarr array, read tile by tile. Also tuples or lists of them, for networks of several
        inputs. Integers count as floating-point numbers, but in a tuple or list remain integers.
      get: "nngp", "ntk" or a tuple of both.
      chunks: number of rows and columns of a tile. Tiles at the end may have fewer.
      dtype: of inputs and results. None leaves it to JAX, to its settings and to the inputs.
        "float64" enables float64 for this kernel. Others disable it.

    Returns:
      An array of shape `(N1, N2)`, or a named tuple of them with the names of `get`. Compute them
      together, with `dask.compute`: each of them computes its tiles anew by itself.

    Raises:
      ImportError: dask is not installed.
      TypeError: `kernel_fn` is not callable, or arguments are of other types; when it is sent to
        other processes, it can't be pickled.
      ValueError: shapes of inputs don't fit, `get` names no kernel, or the kernel is not a plain
        matrix `(N1, N2)`, such as that of a network without a readout.
    """
    plan = make_plan(kernel_fn, x1, x2, get, chunks, dtype)
    tiles = f"tiles-{plan.token}"
    graph = plan.graph(tiles, {(tiles, i, j): plan.task(i, j) for i, j in plan.tiles()})
    arrays = []
    for k, (name, kind) in enumerate(zip(plan.names, plan.dtypes, strict=True)):
        layer, tasks = f"{name}-{plan.token}", {}
        for i, j in np.ndindex(*plan.blocks):
            swap = plan.symmetric and i > j
            tasks[layer, i, j] = (_part, (tiles, j, i) if swap else (tiles, i, j), k, swap)
        whole = HighLevelGraph(
            {**graph.layers, layer: tasks}, {**graph.dependencies, layer: {tiles}}
        )
        arrays.append(da.Array(whole, layer, plan.chunks, dtype=kind, shape=plan.shape))
    return arrays[0] if isinstance(get, str) else named(plan.names, arrays)


class Function:
    """`kernel_fn` where it runs: compiled when a process first calls it with a shape."""

    def __init__(self, parts: Any, payload: bytes | None):
        self._parts = parts
        self._payload = payload
        self._lock = threading.Lock()
        self._compiled: dict[str, Any] = {}
        self.token = uuid.uuid4().hex if payload is None else tokenize(payload)

    def __reduce__(self) -> Any:
        # Raises here if it has to: threads of this process do without.
        payload = cloudpickle.dumps(self._parts) if self._payload is None else self._payload
        return _loaded, (payload,)

    def abstract(self, x1: list[Any], x2: list[Any]) -> tuple[Any, ...]:
        """Shapes and dtypes of results, for those of inputs."""
        with enable_x64(self._parts[2]):
            return jax.eval_shape(self._call, x1, x2)

    def _call(self, x1: list[Any], x2: list[Any] | None) -> tuple[Any, ...]:
        kernel_fn, names, _, structure = self._parts
        tree = functools.partial(jax.tree.unflatten, jax.tree.structure(structure))
        kernel = kernel_fn(tree(x1), None if x2 is None else tree(x2), names)
        return tuple(getattr(kernel, name) for name in names)

    def __call__(self, x1: list[Any], x2: list[Any] | None) -> tuple[np.ndarray, ...]:
        with enable_x64(self._parts[2]):
            x1, x2 = jax.tree.map(jnp.asarray, (x1, x2))
            kinds = str(jax.tree.map(lambda x: (x.shape, x.dtype), (x1, x2)))
            # Threads of a worker that start together would otherwise compile together.
            with self._lock:
                if kinds not in self._compiled:
                    self._compiled[kinds] = jax.jit(self._call).lower(x1, x2).compile()
            return tuple(np.asarray(kernel) for kernel in self._compiled[kinds](x1, x2))


def _function(*parts: Any) -> Function:
    """Of `kernel_fn`, names of kernels, whether in float64, and the structure of inputs."""
    try:
        payload = cloudpickle.dumps(parts)
    except Exception:
        return Function(parts, None)
    return _loaded(payload)


@functools.lru_cache(maxsize=8)
def _loaded(payload: bytes) -> Function:
    """One for all tiles that a process computes, and for its next call."""
    return Function(cloudpickle.loads(payload), payload)


def _tile(function: Function, x1: list[Any], x2: list[Any] | None) -> tuple[np.ndarray, ...]:
    return function(x1, x2)


def _part(tile: tuple[np.ndarray, ...], k: int, swap: bool) -> np.ndarray:
    return tile[k].T if swap else tile[k]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What tiles are computed, and from what."""

    names: tuple[str, ...]
    function: Function
    x1: list[LazyArray]
    x2: list[LazyArray] | None
    dtypes: tuple[np.dtype, ...]

    @property
    def symmetric(self) -> bool:
        return self.x2 is None

    @property
    def chunks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.x1[0].chunks[0], (self.x2 or self.x1)[0].chunks[0]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(self.chunks[0]), sum(self.chunks[1])

    @property
    def blocks(self) -> tuple[int, int]:
        return len(self.chunks[0]), len(self.chunks[1])

    @functools.cached_property
    def token(self) -> str:
        names = [x.name for x in self.x1 + (self.x2 or [])]
        return tokenize(self.function.token, names, self.symmetric)

    def tiles(self) -> list[tuple[int, int]]:
        """Those to compute."""
        return [ij for ij in np.ndindex(*self.blocks) if not (self.symmetric and ij[0] > ij[1])]

    def task(self, i: int, j: int) -> tuple[Any, ...]:
        def block(xs: list[LazyArray], i: int) -> list[Any]:
            return [(x.name, i) + (0,) * (x.ndim - 1) for x in xs]

        on_diagonal = self.symmetric and i == j
        second = None if on_diagonal else block(self.x2 or self.x1, j)
        return (_tile, self._function_key, block(self.x1, i), second)

    @property
    def _function_key(self) -> str:
        """A task of its own, so that `kernel_fn` travels once to each worker."""
        return f"kernel-fn-{self.token}"

    def graph(self, name: str, tasks: Mapping[Any, Any]) -> HighLevelGraph:
        tasks = {self._function_key: self.function, **tasks}
        return HighLevelGraph.from_collections(name, tasks, self.x1 + (self.x2 or []))


def named(names: tuple[str, ...], arrays: list[LazyArray]) -> Any:
    return collections.namedtuple("KernelArrays", names)(*arrays)


def make_plan(kernel_fn: Any, x1: Any, x2: Any, get: Any, chunks: Any, dtype: Any) -> Plan:
    if not callable(kernel_fn):
        hint = " Pass the third of init_fn, apply_fn, kernel_fn." * isinstance(kernel_fn, tuple)
        kind = type(kernel_fn).__name__
        raise TypeError(f"`kernel_fn` must be callable, got {kernel_fn!r} of type {kind}.{hint}")
    names = (get,) if isinstance(get, str) else get
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`get` must be a string or a tuple of them, got {get!r}.")
    if not names or set(names) - set(KERNELS) or len(set(names)) < len(names):
        raise ValueError(f'`get` must be "nngp", "ntk" or a tuple of both, got {get!r}.')
    size = check_integer("chunks", chunks, least=1)
    default = jax.dtypes.canonicalize_dtype(float)
    if dtype is not None:
        try:
            dtype = jnp.dtype(dtype)
        except TypeError:
            raise TypeError(f"`dtype` must be a floating-point dtype, got {dtype!r}.") from None
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"`dtype` must be a floating-point dtype, got {dtype}.")
    x64 = (default if dtype is None else dtype) == np.float64
    first, structure = _blocks("x1", x1, size, dtype, x64)
    second = None
    if x2 is not None:
        second, other = _blocks("x2", x2, size, dtype, x64)
        shapes1, shapes2 = ([x.shape[1:] for x in xs] for xs in (first, second))
        if structure != other or shapes1 != shapes2:
            raise ValueError(
                f"`x1` and `x2` must be alike but for their number, got inputs of shapes {shapes1} "
                f"and {shapes2}."
            )
    function = _function(kernel_fn, tuple(names), x64, structure)
    # Of two and three inputs, which tells the axes of the kernel from each other.
    few = [[jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype) for x in first] for n in (2, 3)]
    kernels = function.abstract(*few)
    for name, kernel in zip(names, kernels, strict=True):
        shape = getattr(kernel, "shape", None)
        if shape != (2, 3):
            raise ValueError(
                f"`kernel_fn` must give a matrix (N1, N2) as `{name}`, got shape {shape} for two "
                f"and three inputs. Kernels between positions or classes are not stored: end the "
                f"network in a readout, such as Flatten, or GlobalAvgPool and Dense."
            )
    return Plan(tuple(names), function, first, second, tuple(np.dtype(k.dtype) for k in kernels))


def _blocks(name: str, x: Any, size: int, dtype: Any, x64: bool) -> tuple[list[LazyArray], Any]:
    """The arrays of `x` in blocks of `size` inputs, and its structure."""
    leaves, tree = jax.tree.flatten(x)
    if isinstance(x, tuple | list) and all(hasattr(leaf, "shape") for leaf in leaves):
        structure = jax.tree.unflatten(tree, range(len(leaves)))
    else:
        leaves, structure = [x], 0
    arrays = []
    for leaf in leaves:
        array = _lazy(name, leaf, size)
        if not array.shape or not array.shape[0] > 0:
            raise ValueError(f"`{name}` must have shape (N, ...), N > 0, got {array.shape}.")
        if jnp.issubdtype(array.dtype, jnp.floating) or structure == 0:
            kind = array.dtype if jnp.issubdtype(array.dtype, jnp.floating) else np.dtype(float)
            # As JAX takes what is float64 where that is not enabled.
            kind = np.dtype(np.float32) if kind == np.float64 and not x64 else kind
            array = array.astype(kind if dtype is None else dtype)
        arrays.append(array.rechunk({0: size, **dict.fromkeys(range(1, array.ndim), -1)}))
    if len(numbers := {len(array) for array in arrays}) > 1:
        raise ValueError(f"`{name}` must have as many inputs in each array, got {numbers}.")
    return arrays, structure


def _lazy(name: str, x: Any, size: int) -> LazyArray:
    if isinstance(x, str | os.PathLike):
        x = import_zarr().open_array(os.fspath(x), mode="r")
    known = isinstance(x, np.ndarray | jax.Array) or not hasattr(x, "shape")
    try:
        array = np.asarray(x) if known else x
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{name}` must be an array of real numbers, got {x!r}: {error}") from None
    kind: Any = getattr(array, "dtype", None)
    numeric = (jnp.integer, jnp.floating, jnp.bool_)
    if kind is None or not any(jnp.issubdtype(kind, each) for each in numeric):
        raise TypeError(
            f"`{name}` must be an array of real numbers, got dtype {kind} of {type(x).__name__}."
        )
    if isinstance(array, LazyArray) or not array.shape:
        return da.asarray(array)
    return da.from_array(array, chunks=(size, *array.shape[1:]))
