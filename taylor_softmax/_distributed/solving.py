"""Least squares with kernels of many inputs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.linalg

from taylor_softmax._distributed.optional import LazyArray, compute, da
from taylor_softmax._numerics.arguments import Validated, check_boolean, check_integer
from taylor_softmax._numerics.precision import single_at_least


@dataclasses.dataclass(frozen=True)
class Cholesky:
    """Dask's blocked Cholesky factorisation, which takes `N^3 / 3` operations.

    It runs when the result is computed. The workers together must hold the kernel and its factor.
    """


@dataclasses.dataclass(frozen=True)
class ConjugateGradients:
    """Conjugate gradients, which run at once and read the kernel in each iteration.

    The kernel is best read from a store. The preconditioner is its Nyström approximation from
    evenly spaced inputs. All columns of the right-hand side are solved together, in float64.

    Attributes:
      tol: the iteration stops where, for each column, the norm of the residual is less than `tol`
        times that of the right-hand side.
      max_iterations: the number of iterations after which it raises.
      rank: rank of the approximation, which takes `N * rank` numbers of 8 bytes.

    Raises:
      TypeError, ValueError: `tol` is not positive, or the others are not positive integers.
    """

    tol: Validated[float] = 1e-6
    max_iterations: Validated[int] = 1000
    rank: Validated[int] = 512

    def __post_init__(self) -> None:
        _check_scale("tol", self.tol)
        if not self.tol > 0:
            raise ValueError(f"`tol` must be positive, got {self.tol!r}.")
        for name in ("max_iterations", "rank"):
            object.__setattr__(self, name, check_integer(name, getattr(self, name), least=1))


def solve(
    kernel: Validated[Any],
    y: Validated[Any],
    *,
    diag_reg: Validated[float] = 0.0,
    diag_reg_absolute_scale: Validated[bool] = False,
    method: Validated[Any] = None,
) -> LazyArray:
    """Solves `(K + r I) alpha = y`, least squares with a Gaussian process.

    The mean at test inputs is `k_test_train @ alpha`. It is the mean that
    `nt.predict.gradient_descent_mse_ensemble` has after infinite time with the same `diag_reg`.

    Args:
      kernel: K, symmetric, `(N, N)`, an array of dask, zarr or NumPy.
      y: `(N,)` or `(N, C)`, an array of dask or NumPy.
      diag_reg: `r`, relative to the mean of K's diagonal.
      diag_reg_absolute_scale: `diag_reg` is `r` itself.
      method: `Cholesky()`, the default, or `ConjugateGradients()`.

    Returns:
      alpha, which has the shape of `y`.

    Raises:
      TypeError: `method` is neither of the two, or arguments are of other types.
      ValueError: shapes don't fit, or `diag_reg` is negative.
      numpy.linalg.LinAlgError: `K + r I` is not positive definite; from `Cholesky` when alpha is
        computed.
      RuntimeError: conjugate gradients have not converged.
    """
    method = Cholesky() if method is None else method
    if not isinstance(method, Cholesky | ConjugateGradients):
        raise TypeError(f"`method` must be Cholesky() or ConjugateGradients(), got {method!r}.")
    _check_scale("diag_reg", diag_reg)
    absolute = check_boolean("diag_reg_absolute_scale", diag_reg_absolute_scale)
    kernel, y = da.asarray(kernel), da.asarray(y)
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1]:
        raise ValueError(f"`kernel` must have shape (N, N), got {kernel.shape}.")
    if y.ndim not in (1, 2) or y.shape[0] != kernel.shape[0]:
        n = kernel.shape[0]
        raise ValueError(f"`y` must have shape ({n},) or ({n}, C), got {y.shape}.")
    size = max(kernel.chunks[0])
    kernel = kernel.rechunk((size, size))
    reg = diag_reg if absolute else diag_reg * da.diagonal(kernel).mean()
    columns = y.reshape(-1, 1) if y.ndim == 1 else y
    columns = columns.astype(single_at_least(kernel.dtype))
    if isinstance(method, ConjugateGradients):
        reg, right = compute(reg, columns)
        right = np.asarray(right, np.float64)
        found = _conjugate_gradients(kernel, right, float(reg), method)
        alpha = da.from_array(found, chunks=(size, -1))
    else:
        alpha = _by_cholesky(
            kernel + reg * da.eye(len(kernel), size, dtype=kernel.dtype), columns, size
        )
    return alpha.reshape(y.shape)


def _check_scale(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, float | int | np.number):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    if not 0 <= value < np.inf:
        raise ValueError(f"`{name}` must be nonnegative and finite, got {value!r}.")


def _by_cholesky(matrix: LazyArray, columns: LazyArray, size: int) -> LazyArray:
    """dask factorises equal square chunks: the last ones are filled up with the identity."""
    n, dtype = len(matrix), matrix.dtype
    if more := -n % size:
        corner = da.zeros((n, more), chunks=(size, more), dtype=dtype)
        matrix = da.block([[matrix, corner], [corner.T, da.eye(more, more, dtype=dtype)]])
        columns = da.vstack([columns, da.zeros((more, columns.shape[1]), dtype=columns.dtype)])
    columns = columns.rechunk((size, min(size, columns.shape[1])))
    return da.linalg.solve(matrix.rechunk((size, size)), columns, assume_a="pos")[:n]


def _conjugate_gradients(
    kernel: LazyArray, y: np.ndarray, reg: float, method: ConjugateGradients
) -> np.ndarray:
    def times(p: np.ndarray) -> np.ndarray:
        return kernel.dot(da.from_array(p, chunks=(kernel.chunks[1], -1))).compute() + reg * p

    precondition = _preconditioner(kernel, reg, method.rank)
    enough = method.tol * np.linalg.norm(y, axis=0)
    alpha, residual = np.zeros_like(y), y
    z = precondition(y)
    p, old = z, np.sum(y * z, axis=0)
    for _ in range(method.max_iterations):
        active = np.linalg.norm(residual, axis=0) > enough
        if not np.any(active):
            return alpha
        q = times(p)
        curvature = np.sum(p * q, axis=0)
        if not np.all(curvature[active] > 0):
            raise np.linalg.LinAlgError(
                "`kernel` is not positive definite to its rounding: pass a larger `diag_reg`."
            )
        step = np.divide(old, curvature, out=np.zeros_like(old), where=active)
        alpha, residual = alpha + step * p, residual - step * q
        z = precondition(residual)
        new = np.sum(residual * z, axis=0)
        p = z + np.divide(new, old, out=np.zeros_like(old), where=active) * p
        old = new
    left = np.max(np.linalg.norm(residual, axis=0) / np.linalg.norm(y, axis=0))
    raise RuntimeError(
        f"Conjugate gradients are at a residual of {left:.1e} after `max_iterations`="
        f"{method.max_iterations}: pass a larger `diag_reg`, `rank` or `tol`."
    )


def _preconditioner(kernel: LazyArray, reg: float, rank: int) -> Callable[[np.ndarray], np.ndarray]:
    """`(B B^T + r I)^-1` with `B B^T = K[:, s] K[s, s]^-1 K[s, :]`, by Woodbury's identity."""
    n = len(kernel)
    chosen = np.unique(np.linspace(0, n - 1, min(rank, n)).astype(int))
    columns = kernel[:, chosen].compute().astype(np.float64)
    square = columns[chosen]
    # Inputs may be alike, and the kernel is rounded in its own dtype.
    floor = 10 * float(jnp.finfo(kernel.dtype).eps) * np.trace(square)
    root = np.linalg.cholesky(square + floor * np.eye(len(chosen)))
    b = scipy.linalg.solve_triangular(root, columns.T, lower=True).T
    reg = max(reg, floor)
    inner = scipy.linalg.cho_factor(reg * np.eye(len(chosen)) + b.T @ b)
    return lambda r: (r - b @ scipy.linalg.cho_solve(inner, b.T @ r)) / reg
