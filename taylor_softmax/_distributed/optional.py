"""dask and zarr, which come with the extra `taylor-softmax[dask]`."""

from typing import TYPE_CHECKING, Any, TypeAlias

try:
    import cloudpickle as cloudpickle
    import dask.array
    from dask.base import compute as compute
    from dask.base import tokenize as tokenize
    from dask.delayed import Delayed as Delayed
    from dask.delayed import delayed as delayed
    from dask.highlevelgraph import HighLevelGraph as HighLevelGraph
except ImportError as error:
    raise ImportError(
        "taylor_softmax.distributed needs dask, which the extra `taylor-softmax[dask]` installs."
    ) from error

# Untyped: dask annotates little of what its arrays have, and some of it otherwise than it works.
da: Any = dask.array

if TYPE_CHECKING:
    LazyArray: TypeAlias = Any
else:
    LazyArray = dask.array.Array


def import_zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise ImportError(
            "Zarr arrays and stores need zarr 3, which the extra `taylor-softmax[dask]` installs "
            "on Python 3.11 and later."
        ) from error
    return zarr
