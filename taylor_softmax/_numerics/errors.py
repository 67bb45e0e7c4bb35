"""What the library promises of its errors: one table, which docstrings, tests and reports cite.

A promise holds up to a largest variance of the logits. Beyond the last of a quantity's rows the
docstring of the function says what happens; no value is silently wrong.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from taylor_softmax._numerics.surrogate import LARGEST_FINITE_ORDER, Surrogate


class Promise(NamedTuple):
    """Largest error of one quantity.

    Attributes:
      quantity: what it is of.
      variance: of the logits, up to which it holds.
      float64, float32: the error in either precision, in the unit of its `Table`; infinite where
        nothing is promised.
    """

    quantity: str
    variance: float
    float64: float
    float32: float


# Names of the quantities.
SOFTMAX_VALUE = "softmax over up to 1,000 classes, NNGP"
SOFTMAX_SLOPE = "softmax over up to 1,000 classes, NTK"
SOFTMAX_MANY_VALUE = "softmax over more classes, NNGP"
SOFTMAX_MANY_SLOPE = "softmax over more classes, NTK"
CLOSED_FORM_VALUE = "order 2 over classes, NNGP"
CLOSED_FORM_SLOPE = "order 2 over classes, NTK"
LOW_VALUE = "orders 4 to 8 over classes, NNGP"
LOW_SLOPE = "orders 4 to 8 over 10 classes and more, NTK"
LOW_FEW_SLOPE = "orders 4 to 8 over fewer classes, NTK"
HIGH_VALUE = f"orders 10 to {LARGEST_FINITE_ORDER} over up to 1,000 classes, NNGP"
HIGH_SLOPE = f"orders 10 to {LARGEST_FINITE_ORDER} over up to 1,000 classes, NTK"
HIGH_MANY_VALUE = f"orders 10 to {LARGEST_FINITE_ORDER} over more classes, NNGP"
HIGH_MANY_SLOPE = f"orders 10 to {LARGEST_FINITE_ORDER} over more classes, NTK"
INFINITE_WIDTH = "infinite width, any even order"
INFINITE_WIDTH_SOFTMAX = "infinite width, softmax, whose value is exp of the covariance"
POSITIONS_CLOSED_FORM = "over up to 32 positions, order 2"
POSITIONS_NNGP = "over up to 16 positions, other orders and softmax, NNGP"
POSITIONS_NTK = "over up to 16 positions, other orders and softmax, NTK"
POSITIONS_MANY_NNGP = "over 17 to 64 positions, other orders and softmax, NNGP"
POSITIONS_MANY_NTK = "over 17 to 64 positions, other orders and softmax, NTK"
ATTENTION = "attention over up to 64 tokens, NNGP and NTK"
ATTENTION_ROTARY = "attention, rotary, NNGP and NTK"
PROBABILITIES = "class probabilities, covariance, log-normaliser, up to 1,000 classes"
CORRELATED = "class probabilities and covariance of logits that covary, up to 30 classes"


class Table(NamedTuple):
    """The promises of one layer, which the docs show together.

    Attributes:
      title: the layer, or what stands in its place.
      unit: what its errors are relative to.
      quantities: its rows.
    """

    title: str
    unit: str
    quantities: tuple[str, ...]


# Over an axis of i.i.d. logits: the value at correlation 1 is that of an input with itself, and two
# inputs of different variances have two of them.
_OWN = "relative to the geometric mean of the two inputs' values at correlation 1"

TABLES = (
    Table(
        "Softmax over classes",
        _OWN,
        (SOFTMAX_VALUE, SOFTMAX_SLOPE, SOFTMAX_MANY_VALUE, SOFTMAX_MANY_SLOPE),
    ),
    Table(
        "Taylor softmax over classes",
        _OWN,
        (
            *(CLOSED_FORM_VALUE, CLOSED_FORM_SLOPE),
            *(LOW_VALUE, LOW_SLOPE, LOW_FEW_SLOPE),
            *(HIGH_VALUE, HIGH_SLOPE, HIGH_MANY_VALUE, HIGH_MANY_SLOPE),
        ),
    ),
    Table("Infinite width", _OWN, (INFINITE_WIDTH, INFINITE_WIDTH_SOFTMAX)),
    Table(
        "Softmax over positions, order 2",
        "relative to the largest entry",
        (POSITIONS_CLOSED_FORM,),
    ),
    Table(
        "Softmax over positions, estimates",
        "relative to the geometric mean of the two inputs' largest entries at correlation 1",
        (POSITIONS_NNGP, POSITIONS_NTK, POSITIONS_MANY_NNGP, POSITIONS_MANY_NTK),
    ),
    Table(
        "Attention",
        "relative to the geometric mean of the two inputs' largest entries at correlation 1",
        (ATTENTION, ATTENTION_ROTARY),
    ),
    Table("Class probabilities", "absolute", (PROBABILITIES, CORRELATED)),
)

# Over classes: of value and slope, that is of the NNGP beyond 1/n^2 and of the NTK's factor. A call
# is as good as its largest variance allows.
PROMISES = (
    Promise(SOFTMAX_VALUE, 100.0, 1e-6, 1e-4),
    Promise(SOFTMAX_VALUE, 1e4, 1e-4, 5e-4),
    Promise(SOFTMAX_VALUE, 1e6, 2e-3, 2e-3),
    Promise(SOFTMAX_SLOPE, 100.0, 3e-6, 1e-4),
    Promise(SOFTMAX_SLOPE, 1e4, 1e-4, 5e-4),
    Promise(SOFTMAX_SLOPE, 1e6, 2e-3, 2e-3),
    Promise(SOFTMAX_MANY_VALUE, 1e4, 2e-4, 5e-4),
    Promise(SOFTMAX_MANY_VALUE, 1e6, 2e-3, 2e-3),
    Promise(SOFTMAX_MANY_SLOPE, 1e4, 2e-4, 5e-4),
    Promise(SOFTMAX_MANY_SLOPE, 1e6, 2e-3, 2e-3),
    Promise(CLOSED_FORM_VALUE, 20.0, 2e-7, 1e-4),
    Promise(CLOSED_FORM_VALUE, 1e4, 3e-6, 5e-4),
    Promise(CLOSED_FORM_VALUE, 1e6, 3e-5, 2e-3),
    Promise(CLOSED_FORM_SLOPE, 20.0, 3e-6, 1e-4),
    Promise(CLOSED_FORM_SLOPE, 1e4, 5e-6, 5e-4),
    Promise(CLOSED_FORM_SLOPE, 1e6, 1e-4, 2e-3),
    Promise(LOW_VALUE, 100.0, 2e-5, 1e-4),
    Promise(LOW_VALUE, 1e4, 2e-4, 5e-4),
    Promise(LOW_VALUE, 1e6, 1e-3, 2e-3),
    Promise(LOW_SLOPE, 100.0, 3e-5, 1e-4),
    Promise(LOW_SLOPE, 1e4, 1e-4, 5e-4),
    Promise(LOW_SLOPE, 1e6, 2e-3, 2e-3),
    Promise(LOW_FEW_SLOPE, 100.0, 1e-4, 2e-4),
    Promise(LOW_FEW_SLOPE, 1e4, 2e-4, 5e-4),
    Promise(LOW_FEW_SLOPE, 1e6, 2e-3, 2e-3),
    Promise(HIGH_VALUE, 20.0, 3e-5, 1e-4),
    Promise(HIGH_VALUE, 1e4, 4e-4, 1e-3),
    Promise(HIGH_VALUE, 1e6, 2e-3, 2e-3),
    Promise(HIGH_SLOPE, 20.0, 1e-4, 2e-4),
    Promise(HIGH_SLOPE, 1e4, 4e-4, 1e-3),
    Promise(HIGH_SLOPE, 1e6, 2e-3, 2e-3),
    Promise(HIGH_MANY_VALUE, 20.0, 3e-5, 1e-4),
    Promise(HIGH_MANY_VALUE, 1e6, 7e-3, 7e-3),
    Promise(HIGH_MANY_SLOPE, 20.0, 1e-4, 2e-4),
    Promise(HIGH_MANY_SLOPE, 1e6, 7e-3, 7e-3),
    Promise(INFINITE_WIDTH, 1e3, 1e-12, 1e-5),
    # To where floats go.
    Promise(INFINITE_WIDTH_SOFTMAX, 88.0, 1e-12, 1e-5),
    Promise(INFINITE_WIDTH_SOFTMAX, 709.0, 1e-12, math.inf),
    Promise(POSITIONS_CLOSED_FORM, 4.0, 1e-7, 1e-4),
    Promise(POSITIONS_CLOSED_FORM, 100.0, 1e-5, 1e-4),
    Promise(POSITIONS_CLOSED_FORM, 1e4, 1e-3, 1e-3),
    # With any seed: of i.i.d. positions at all correlations, six seeds of 16 positions come to
    # 1.6e-3, 5.8e-3, 1.6e-2, 3.1e-2 and 3.7e-3, 1.1e-2, 2.6e-2, 6.6e-2; three seeds of 64 positions
    # to 1.4e-2, 2.8e-2, 4.4e-2, 7.0e-2 and 2.0e-2, 3.5e-2, 7.6e-2, 0.12.
    Promise(POSITIONS_NNGP, 1.0, 2.5e-3, 2.5e-3),
    Promise(POSITIONS_NNGP, 4.0, 1e-2, 1e-2),
    Promise(POSITIONS_NNGP, 20.0, 2.5e-2, 2.5e-2),
    Promise(POSITIONS_NNGP, 100.0, 4.5e-2, 4.5e-2),
    Promise(POSITIONS_NTK, 1.0, 6e-3, 6e-3),
    Promise(POSITIONS_NTK, 4.0, 2e-2, 2e-2),
    Promise(POSITIONS_NTK, 20.0, 5e-2, 5e-2),
    Promise(POSITIONS_NTK, 100.0, 0.1, 0.1),
    Promise(POSITIONS_MANY_NNGP, 1.0, 2e-2, 2e-2),
    Promise(POSITIONS_MANY_NNGP, 4.0, 8e-2, 8e-2),
    Promise(POSITIONS_MANY_NNGP, 100.0, 0.15, 0.15),
    Promise(POSITIONS_MANY_NTK, 1.0, 4e-2, 4e-2),
    Promise(POSITIONS_MANY_NTK, 4.0, 8e-2, 8e-2),
    Promise(POSITIONS_MANY_NTK, 20.0, 0.15, 0.15),
    Promise(POSITIONS_MANY_NTK, 100.0, 0.2, 0.2),
    # Of tokens of any covariance, with any seed. The worst are of rank 1 to 3, where few directions
    # carry everything; i.i.d. tokens come to a third of it. From variance 20 on most of it is what
    # polynomials in the correlation of two queries are off.
    Promise(ATTENTION, 1.0, 3e-3, 3e-3),
    Promise(ATTENTION, 4.0, 1.5e-2, 1.5e-2),
    Promise(ATTENTION, 20.0, 5e-2, 5e-2),
    Promise(ATTENTION, 100.0, 0.15, 0.15),
    Promise(ATTENTION_ROTARY, 1.0, 3e-3, 3e-3),
    Promise(ATTENTION_ROTARY, 4.0, 1.5e-2, 1.5e-2),
    Promise(PROBABILITIES, 1e4, 1e-6, 1e-5),
    Promise(CORRELATED, 1.0, 1e-4, 1e-4),
    Promise(CORRELATED, 10.0, 1e-3, 1e-3),
    Promise(CORRELATED, 100.0, 4e-3, 4e-3),
)


def promised(quantity: str, variance: float, dtype: DTypeLike = float) -> float:
    """The promised error of `quantity` at logits of variances up to `variance`.

    Raises:
      KeyError: nothing is promised of it there.
    """
    for promise in PROMISES:
        if promise.quantity == quantity and variance <= promise.variance:
            error = promise.float64 if jnp.finfo(dtype).bits == 64 else promise.float32
            if math.isfinite(error):
                return error
    raise KeyError(f"Nothing is promised of {quantity!r} at variance {variance:g}.")


def class_axis(surrogate: Surrogate, n_classes: int) -> tuple[str, str]:
    """The quantities that are promised of value and slope over classes."""
    if surrogate.has_closed_form:
        return CLOSED_FORM_VALUE, CLOSED_FORM_SLOPE
    if surrogate.is_shift_invariant:
        many = n_classes > 1000
        return (SOFTMAX_MANY_VALUE, SOFTMAX_MANY_SLOPE) if many else (SOFTMAX_VALUE, SOFTMAX_SLOPE)
    assert surrogate.order is not None
    if surrogate.order > 8:
        return (HIGH_MANY_VALUE, HIGH_MANY_SLOPE) if n_classes > 1000 else (HIGH_VALUE, HIGH_SLOPE)
    return LOW_VALUE, LOW_FEW_SLOPE if n_classes < 10 else LOW_SLOPE


def _scientific(x: float) -> str:
    """As 2e-3 and 1.5e-2, on all platforms alike."""
    exponent = math.floor(math.log10(x) + 1e-9)
    return f"{x / 10**exponent:.2g}e{exponent}"


def _cell(quantity: str, variance: float) -> str:
    """The promise of both precisions, or a dash where nothing is promised."""

    def shown(dtype: DTypeLike) -> str:
        try:
            return _scientific(promised(quantity, variance, dtype))
        except KeyError:
            return "-"

    # One for both, where they are equal.
    return " / ".join(dict.fromkeys(map(shown, (jnp.float64, jnp.float32))))


def markdown() -> str:
    """The promises, for the docs: a table for each layer, with variances as its columns."""
    parts = []
    for title, unit, quantities in TABLES:
        variances = sorted({p.variance for p in PROMISES if p.quantity in quantities})
        rows = [
            f"| up to variance | {' | '.join(f'{v:,.0f}' for v in variances)} |",
            "|---|" + "--:|" * len(variances),
        ]
        for quantity in quantities:
            cells = " | ".join(_cell(quantity, variance) for variance in variances)
            rows.append(f"| {quantity} | {cells} |")
        parts.append("\n".join([f"## {title}", "", f"Errors are {unit}.", "", *rows]))
    return "\n\n".join(parts)
