"""Everything that `neural_tangents.stax` has, and softmax layers with analytic kernels.

```python
init_fn, apply_fn, kernel_fn = stax.serial(
    stax.Dense(512), stax.Relu(), stax.Dense(10), stax.Softmax()
)
```
"""

from neural_tangents.stax import *  # noqa: F403  # pyright: ignore[reportWildcardImportFromLibrary]

from taylor_softmax._layers.attention import GlobalCrossAttention, GlobalSelfAttention
from taylor_softmax._layers.finite import (
    Aggregate,
    AvgPool,
    Dropout,
    FanInConcat,
    FanInProd,
    FanInSum,
    GlobalSumPool,
    LayerNorm,
    SumPool,
)
from taylor_softmax._layers.log_softmax import LogSoftmax
from taylor_softmax._layers.softmax import Softmax, TaylorSoftmax

__all__ = [  # noqa: F405
    "ABRelu",
    "Abs",
    "Aggregate",
    "AggregateImplementation",
    "AttentionMechanism",
    "AvgPool",
    "Bool",
    "Conv",
    "ConvLocal",
    "ConvTranspose",
    "Cos",
    "Dense",
    "Diagonal",
    "DotGeneral",
    "Dropout",
    "Elementwise",
    "ElementwiseNumerical",
    "Erf",
    "Exp",
    "ExpNormalized",
    "FanInConcat",
    "FanInProd",
    "FanInSum",
    "FanOut",
    "Flatten",
    "Gabor",
    "Gaussian",
    "Gelu",
    "GlobalAvgPool",
    "GlobalCrossAttention",
    "GlobalSelfAttention",
    "GlobalSumPool",
    "Hermite",
    "Identity",
    "ImageResize",
    "Index",
    "LayerNorm",
    "LeakyRelu",
    "LogSoftmax",
    "MaskedArray",
    "Monomial",
    "Padding",
    "Polynomial",
    "PositionalEmbedding",
    "Rbf",
    "RectifiedMonomial",
    "Relu",
    "Sigmoid_like",
    "Sign",
    "Sin",
    "Slice",
    "Softmax",
    "SumPool",
    "TaylorSoftmax",
    "layer",
    "parallel",
    "repeat",
    "requires",
    "serial",
    "supports_masking",
    "unmask_fn",
]
