"""What is validated: layers on Gaussian logits of every kind, and wide finite networks.

A problem knows its network, whose `kernel_fn` gives the analytic kernels, and how to sample them
from the network's `apply_fn` and its derivatives by JAX, with none of the formulas under test. Of
layers on Gaussian logits, with `y` the outputs at two inputs and `dy` their derivatives along
random tangents that have the covariance of the logits,

    nngp = E[y(x1) y(x2)^T],    ntk = E[dy(x1) dy(x2)^T];

of networks, the empirical kernels of neural_tangents. Attention over tokens with covariance K has
matrix-normal logits, K (x) K. Behind a dense layer its NTK is three times the NNGP (for the weights
of outputs and values, and those before the values) and the mean of dy K dy^T along tangents of
covariance 4 K (x) K (for the weights of queries and keys, and those before them).
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
from jax import Array, random

from taylor_softmax import stax
from taylor_softmax._numerics import errors

# The axes that a softmax can have; of attention, over keys, with a softmax for every query.
CLASSES, POSITIONS, WIDTH, ATTENTION = "classes", "positions", "infinite width", "attention"


def softmax_layer(axis: str, order: int | None) -> Any:
    if axis == ATTENTION:
        return stax.GlobalSelfAttention(1, 1, 1, 1, linear_scaling=False, order=order)
    options = {"axis": 1 if axis == POSITIONS else -1, "infinite_width": axis == WIDTH}
    return stax.Softmax(**options) if order is None else stax.TaylorSoftmax(order, **options)


def layer_name(order: int | None) -> str:
    return "Softmax" if order is None else f"TaylorSoftmax({order})"


@dataclass(frozen=True)
class LayerProblem:
    """One softmax layer on the logits of a pair of inputs.

    Attributes:
      axis: `CLASSES`, `POSITIONS`, `WIDTH` or `ATTENTION`.
      order: of the Taylor softmax; None for softmax.
      size: number of classes, positions or tokens; 1 over an infinitely wide axis.
      var1, var2: variances of the logits.
      rho: their correlation; of positions, scale of the correlations between inputs.
      kind: of the covariance between positions.
    """

    axis: str
    order: int | None
    size: int
    var1: float
    var2: float
    rho: float
    kind: str = ""

    @property
    def name(self) -> str:
        of = {
            CLASSES: f"{self.size} classes",
            WIDTH: WIDTH,
            ATTENTION: f"attention over {self.size} {self.kind} tokens",
        }
        what = of.get(self.axis, f"{self.size} {self.kind} {self.axis}")
        variances = f"variances {self.var1:g}, {self.var2:g}"
        return f"{layer_name(self.order)}, {what}, {variances}, correlation {self.rho:g}"

    @property
    def group(self) -> str:
        if self.axis == WIDTH:
            return WIDTH
        return f"{self.axis}, {'estimates' if self.is_estimated else 'finite'}"

    @property
    def is_estimated(self) -> bool:
        """Whether the kernel is itself an estimate, held to the promised error."""
        return self.axis in (POSITIONS, ATTENTION) and self.order != 2

    def tolerance(self, kernel: str) -> float:
        """Promised error of "nngp" or "ntk", relative to its scale; 0 of an exact kernel."""
        if not self.is_estimated:
            return 0.0
        of_positions = {"nngp": errors.POSITIONS_NNGP, "ntk": errors.POSITIONS_NTK}
        quantity = errors.ATTENTION if self.axis == ATTENTION else of_positions[kernel]
        return errors.promised(quantity, max(self.var1, self.var2))

    @property
    def is_biased(self) -> bool:
        """Whether more draws of the same units would show that these are finitely many."""
        return self.axis == WIDTH

    @property
    def n_positions(self) -> int:
        return self.size if self.axis in (POSITIONS, ATTENTION) else 1

    def weights(self) -> np.ndarray:
        """`A` of the number `sum_pq A_pq K_pq` that is compared, `(positions, positions)`.

        One number for each kernel, so that scores are independent; over positions a random one,
        which an error in any entry changes.
        """
        n = self.n_positions
        return np.random.default_rng(1).standard_normal((n, n)) / n if n > 1 else np.ones((1, 1))

    def root(self) -> np.ndarray:
        """A matrix root of the joint covariance of the logits of one unit at both inputs.

        For attention of the tokens, by whose variances the logits have the product of two.
        """
        var1, var2 = self.var1, self.var2
        if self.axis == ATTENTION:
            var1, var2 = np.sqrt(var1), np.sqrt(var2)
        cross = self.rho * np.sqrt(var1 * var2)
        if self.kind == "equicorrelated":
            within = 0.5 * np.eye(self.size) + 0.5
        else:
            rng = np.random.default_rng(self.size)
            # Singular where there are fewer dimensions than positions.
            rank = max(1, self.size // 2) if self.kind == "singular" else self.size + 2
            features = rng.standard_normal((self.n_positions, rank))
            features /= np.linalg.norm(features, axis=1, keepdims=True)
            within = features @ features.T
        joint = np.kron([[var1, cross], [cross, var2]], within)
        values, vectors = np.linalg.eigh(joint)
        return vectors * np.sqrt(np.maximum(values, 0))

    def inputs(self) -> tuple[Array, Array]:
        """Inputs that `Dense` or `Conv`, with weights of variance 1, takes to those logits."""
        root = self.root() * np.sqrt(2 * self.n_positions)
        first, second = jnp.asarray(np.split(root, 2))
        if self.axis in (POSITIONS, ATTENTION):
            return first[None], second[None]
        return first, second

    def analytic(self) -> tuple[np.ndarray, np.ndarray]:
        """NNGP and NTK of the layer, `(positions, positions)`."""
        nngp, ntk = _layer_kernel(self.axis, self.order, self.size)(*self.inputs())
        shape = self.n_positions, self.n_positions
        return np.asarray(nngp).reshape(shape), np.asarray(ntk).reshape(shape)

    def scales(self, own: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
        """What errors of NNGP and NTK are relative to, `own` being the `analytic` kernels.

        The largest entry; of estimates, as promises have it, the geometric mean of the largest
        entries at correlation 1, of the NTK with an incoming one of the same size. That of
        attention is less than the promise has, which takes only the incoming part by the size.
        """
        if not self.is_estimated:
            return largest_entries(own)
        first, second = (
            largest_entries(dataclasses.replace(self, var1=v, var2=v, rho=1.0).analytic())
            for v in (self.var1, self.var2)
        )
        nngp, ntk = (float(np.sqrt(a * b)) for a, b in zip(first, second, strict=True))
        return nngp, abs(self.rho) * ntk

    def departure(self, own: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
        """Largest difference of the `analytic` kernels from softmax's own, over its largest entry.

        Of classes' NNGP the part beyond the squared mean, `1 / n^2`, which both have.
        """
        softmax = dataclasses.replace(self, order=None).analytic()
        means = (1 / self.size**2 if self.axis == CLASSES else 0.0), 0.0
        nngp, ntk = (
            float(np.max(np.abs(a - b)) / np.max(np.abs(b - mean)))
            for a, b, mean in zip(own, softmax, means, strict=True)
        )
        return nngp, ntk

    def units(self, n_samples: int) -> int:
        """Units of one draw; for an infinitely wide axis, the width that stands in for it.

        The mean over a width `N` is biased by `1 / N`, while the standard error of `n / N` draws
        falls as `n^-1/2`: at `N = 10 sqrt(n)` the bias is a small part of it at any `n`.
        """
        if self.axis == WIDTH:
            return 1 << int(np.ceil(np.log2(10 * np.sqrt(n_samples))))
        return self.size if self.axis == CLASSES else 1

    def n_draws(self, n_samples: int) -> int:
        """Draws that make `n_samples`; over an infinitely wide axis, one unit is a sample."""
        if self.axis == WIDTH:
            # Enough for the standard error to be known to a few percent.
            return max(256, -(-n_samples // self.units(n_samples)))
        return n_samples

    def numbers_per_draw(self, units: int) -> int:
        if self.axis == ATTENTION:
            return 8 * self.size**2
        return 4 * self.n_positions * units

    def template(self) -> "LayerProblem":
        """What of the problem `draw` depends on: compiled once for all with the same."""
        return dataclasses.replace(self, var1=1.0, var2=1.0, rho=0.0, kind="")

    def dtype(self) -> Any:
        # Outputs over finite axes are at most 1, and rounding of the logits averages out. Over an
        # infinitely wide axis they are not, and the normal distribution's tail, which float32
        # samples up to 5 standard deviations only, is part of the kernel.
        return jnp.float64 if self.axis == WIDTH else jnp.float32

    def parameters(self) -> Array:
        return jnp.asarray(self.root(), self.dtype())

    def draw(self, key: Array, root: Array, n: int, units: int) -> tuple[Array, Array]:
        """Samples of NNGP and NTK, averaged over units, `(n, positions, positions)`."""
        if self.axis == ATTENTION:
            return self._draw_attention(key, root, n)
        noise = random.normal(key, (2, n, units, len(root)), root.dtype)
        # (2, n, units, input and position) to two of (2, n, positions, units).
        logits = jnp.swapaxes(jnp.matmul(noise, root.T, precision="highest"), -1, -2)
        first, second = jnp.split(logits, 2, axis=-2)
        _, apply_fn, _ = softmax_layer(self.axis, self.order)

        def with_tangent(z: Array) -> tuple[Array, Array]:
            return jax.jvp(functools.partial(apply_fn, ()), (z[0],), (z[1],))

        def product(first: Array, second: Array) -> Array:
            return jnp.einsum("npi,nqi->npq", first, second, precision="highest") / units

        nngp, ntk = map(product, with_tangent(first), with_tangent(second))
        return nngp, ntk

    def _draw_attention(self, key: Array, root: Array, n: int) -> tuple[Array, Array]:
        size = self.size
        noise = random.normal(key, (2, n, 2 * size, 2 * size), root.dtype)
        both = jnp.einsum("ai,tnij,bj->tnab", root, noise, root, precision="highest")
        cross = jnp.matmul(root, root.T, precision="highest")[:size, size:]
        _, apply_fn, _ = softmax_layer(CLASSES, self.order)
        attend = functools.partial(apply_fn, ())
        (y1, dy1), (y2, dy2) = (
            jax.jvp(attend, (z[0],), (2 * z[1],))
            for z in (both[..., :size, :size], both[..., size:, size:])
        )

        def product(first: Array, second: Array) -> Array:
            return jnp.einsum("nap,pq,nbq->nab", first, cross, second, precision="highest")

        nngp = product(y1, y2)
        return nngp, 3 * nngp + product(dy1, dy2)


def largest_entries(kernels: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    nngp, ntk = (float(np.max(np.abs(kernel))) for kernel in kernels)
    return nngp, ntk


@functools.cache
def _layer_kernel(axis: str, order: int | None, size: int) -> Any:
    units = size if axis == CLASSES else 1
    body = stax.Conv(units, (1,)) if axis in (POSITIONS, ATTENTION) else stax.Dense(units)
    *_, kernel_fn = stax.serial(body, softmax_layer(axis, order))
    return jax.jit(lambda x1, x2: _both(kernel_fn(x1, x2)))


def _both(kernel: Any) -> tuple[Array, Array]:
    return kernel.nngp, kernel.ntk


@dataclass(frozen=True)
class NetworkProblem:
    """A network of finite width, whose kernels approach the analytic ones as `1 / width`."""

    network: str
    width: int

    is_estimated = False
    # By more than the line in 1 / width, along which they are taken to the limit.
    is_biased = True

    def tolerance(self, kernel: str) -> float:
        return 0.0

    @property
    def name(self) -> str:
        return f"{self.network}, width {self.width}"

    @property
    def group(self) -> str:
        return f"networks, {self.network}"

    @property
    def n_positions(self) -> int:
        return 5 if self.network == POSITIONS else 1

    def layers(self) -> tuple[Any, Any, Any]:
        dense = functools.partial(stax.Dense, W_std=1.5, b_std=0.2)
        conv = functools.partial(stax.Conv, W_std=1.5, b_std=0.2)
        width = self.width
        if self.network == CLASSES:
            return stax.serial(dense(width), stax.Relu(), dense(10), softmax_layer(CLASSES, None))
        if self.network == WIDTH:
            return stax.serial(stax.Dense(width, W_std=1.3), softmax_layer(WIDTH, 4), dense(10))
        layer = softmax_layer(POSITIONS, 2)
        return stax.serial(conv(width, (3,), padding="SAME"), stax.Relu(), conv(8, (1,)), layer)

    def scales(self, own: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
        return largest_entries(own)

    def weights(self) -> np.ndarray:
        """The mean over positions: deviations are relative to it, and it is far from 0."""
        return np.eye(self.n_positions) / self.n_positions

    def inputs(self) -> tuple[Array, Array]:
        rng = np.random.default_rng(0)
        shape = (2, 1, self.n_positions, 6) if self.network == POSITIONS else (2, 1, 6)
        first, second = rng.standard_normal(shape)
        return jnp.asarray(first), jnp.asarray(0.6 * first + 0.8 * second)

    def analytic(self) -> tuple[np.ndarray, np.ndarray]:
        nngp, ntk = _network_kernel(self.network)
        shape = self.n_positions, self.n_positions
        return nngp.reshape(shape), ntk.reshape(shape)

    def departure(self, own: tuple[np.ndarray, np.ndarray]) -> tuple[None, None]:
        return None, None

    def units(self, n_samples: int) -> int:
        return 8 if self.network == POSITIONS else 10

    def n_draws(self, n_samples: int) -> int:
        # In about the same time at any width: what networks deviate by falls as the width grows.
        # Jacobians of all positions cost the more.
        share = 2 if self.network == POSITIONS else 10
        return max(100, share * n_samples // self.width)

    def numbers_per_draw(self, units: int) -> int:
        # Jacobians of all outputs at both inputs.
        return 2 * units * self.n_positions * 26 * self.width

    def template(self) -> "NetworkProblem":
        return self

    def parameters(self) -> Array:
        return jnp.asarray(self.inputs())

    def draw(self, key: Array, x: Array, n: int, units: int) -> tuple[Array, Array]:
        """NNGP and NTK of `n` networks, averaged over units, `(n, positions, positions)`."""
        init_fn, apply_fn, _ = self.layers()
        options = {"trace_axes": (-1,), "diagonal_axes": ()}

        def one(key: Array) -> Any:
            _, params = init_fn(key, x.shape[1:])
            return tuple(
                empirical(apply_fn, **options)(x[0], x[1], params)
                for empirical in (nt.empirical_nngp_fn, nt.empirical_ntk_fn)
            )

        nngp, ntk = jax.vmap(one)(random.split(key, n))
        shape = n, self.n_positions, self.n_positions
        return nngp.reshape(shape), ntk.reshape(shape)


@functools.cache
def _network_kernel(network: str) -> tuple[np.ndarray, np.ndarray]:
    # The kernel does not depend on the width.
    problem = NetworkProblem(network, 1)
    *_, kernel_fn = problem.layers()
    nngp, ntk = jax.jit(lambda x1, x2: _both(kernel_fn(x1, x2)))(*problem.inputs())
    return np.asarray(nngp), np.asarray(ntk)


Problem = LayerProblem | NetworkProblem


# Variances and correlation of the logits at both inputs.
PAIRS = ((0.25, 0.25, 0.5), (1.0, 1.0, 0.9), (1.0, 4.0, -0.6), (4.0, 4.0, 0.3), (4.0, 4.0, 0.99))
# Of class softmaxes.
LARGE_ORDERS = (2, 8, 16, None)
LARGE_PAIRS = (
    *((25.0, 25.0, 0.9), (100.0, 100.0, 0.5), (1.0, 100.0, -0.6)),
    *((1e3, 1e3, 0.9), (1e4, 1e4, 0.3), (1e4, 1e4, 0.99)),
)
# Products of exponentials of Gaussians of larger variance are too heavy-tailed to sample.
WIDE_PAIRS = ((0.25, 0.25, 0.5), (0.5, 1.0, -0.6), (0.5, 0.5, 0.9), (1.0, 1.0, 0.5))


def layer_problems(quick: bool) -> list[LayerProblem]:
    if quick:
        orders, sizes, pairs = (2, None), (10,), PAIRS[:3]
        large_orders: tuple[int | None, ...] = ()
        wide_orders: tuple[int | None, ...] = (4,)
        exact, estimated = ((5, "random"),), ((4, 1.0),)
        estimated_orders: tuple[int | None, ...] = (None,)
    else:
        orders, sizes, pairs, wide_orders = (
            (2, 4, 8, 16, None),
            (2, 10, 100),
            PAIRS,
            (2, 4, 8, None),
        )
        large_orders = LARGE_ORDERS
        exact = ((2, "random"), (5, "random"), (5, "singular"), (16, "equicorrelated"))
        estimated = tuple((s, v) for s in (4, 8, 16) for v in (0.5, 1.0, 4.0))
        estimated_orders = (8, None)
    return [
        *(LayerProblem(CLASSES, o, n, *p) for o in orders for n in sizes for p in pairs),
        *(LayerProblem(CLASSES, o, 10, *p) for o in large_orders for p in LARGE_PAIRS),
        *(LayerProblem(WIDTH, o, 1, *p) for o in wide_orders for p in WIDE_PAIRS),
        *(LayerProblem(POSITIONS, 2, s, *p, kind) for s, kind in exact for p in pairs[:4]),
        *(
            LayerProblem(POSITIONS, o, s, v, v, 0.8, "random")
            for o in estimated_orders
            for s, v in estimated
        ),
        *(LayerProblem(ATTENTION, None, s, v, v, 0.8, "random") for s, v in estimated),
        *(LayerProblem(ATTENTION, 2, 4, *p, "random") for p in pairs[:2]),
    ]


def network_problems(quick: bool) -> list[NetworkProblem]:
    networks = (CLASSES,) if quick else (CLASSES, WIDTH, POSITIONS)
    widths = (128, 512) if quick else (128, 256, 512, 1024, 2048, 4096)
    return [NetworkProblem(network, width) for network in networks for width in widths]
