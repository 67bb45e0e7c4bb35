"""Strict promotion of dtypes, under which all graphs have to be traced: a call of each kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import taylor_softmax
from taylor_softmax import losses, monte_carlo, nn, predict, stax
from taylor_softmax._numerics.precision import enable_x64

X = np.float32([[0.0, 1.0, 2.0], [3.0, -1.0, 0.5]])
LABELS = np.array([0, 1])
ATTENTION = (8, 8, 8, 2, False)


def kernel(*layers, get="ntk"):
    kernel_fn = stax.serial(*layers)[2]
    return lambda x: kernel_fn(x, None, get)


def of_tokens(layer):
    return lambda x: kernel(stax.Dense(8), layer)(x[:, :, None])


def identity(x):
    return np.eye(3, dtype=x.dtype)


def kernel_with(x):
    return jnp.exp(-((x[:, None] - x) ** 2).sum(-1))


CALLS = {
    "classes": kernel(stax.Dense(3), stax.Softmax()),
    "order 4 over classes": kernel(stax.Dense(3), stax.TaylorSoftmax(4)),
    "log-softmax": kernel(stax.Dense(3), stax.LogSoftmax()),
    "infinite width": kernel(stax.Dense(8), stax.TaylorSoftmax(4, infinite_width=True)),
    "positions": of_tokens(stax.Softmax(axis=1)),
    "order 2 over positions": of_tokens(stax.TaylorSoftmax(2, axis=1)),
    "attention": of_tokens(stax.GlobalSelfAttention(*ATTENTION)),
    "causal attention": of_tokens(stax.GlobalSelfAttention(*ATTENTION, causal=True)),
    "rotary attention": of_tokens(stax.GlobalSelfAttention(*ATTENTION, rotary=1e4)),
    "joint second moment": lambda x: taylor_softmax.joint_second_moment(*(x.T @ x,) * 3),
    "class covariance": lambda x: taylor_softmax.class_covariance(
        x[0, 1], x[0, 0], x[0, 1], n_classes=5
    ),
    "probabilities": lambda x: predict.class_probabilities(x, x.dtype.type(1)),
    "probabilities of integers": lambda x: predict.class_probabilities(x, np.array([1, 2, 3])),
    "covariance of probabilities": lambda x: predict.class_probability_covariance(x, x**2),
    "logits that covary": lambda x: predict.class_probabilities(x, covariance=identity(x)),
    "log-normaliser": lambda x: predict.expected_log_normalizer(x, x**2),
    "evidence": lambda x: predict.categorical_log_evidence(kernel_with(x), LABELS),
    "cross entropy": lambda x: losses.cross_entropy(2, margin=0.5)(x, identity(x)[:2]),
    "log of a Taylor softmax": lambda x: nn.log_taylor_softmax(x, order=4),
    "sampled logits": lambda x: monte_carlo.joint_second_moment(
        jax.random.key(0), *(x.T @ x,) * 3, n_samples=10
    ),
}


def leaves(x):
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(x))


@pytest.mark.quick
def test_a_fault_is_found():
    with jax.numpy_dtype_promotion("strict"), pytest.raises(ValueError, match="promotion"):
        jax.eval_shape(lambda x: x + jnp.int32(1), X)


@pytest.mark.quick(name="classes", x64=True)
@pytest.mark.quick(name="causal attention", x64=False)
@pytest.mark.quick(name="logits that covary", x64=False)
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients(name, x64):
    with jax.numpy_dtype_promotion("strict"), enable_x64(x64):
        x = X.astype(np.float64 if x64 else np.float32)
        value = jax.eval_shape(CALLS[name], x)
        assert {leaf.dtype for leaf in jax.tree.leaves(value)} == {x.dtype}
        if name != "sampled logits":
            slope = jax.eval_shape(jax.grad(lambda x: leaves(CALLS[name](x))), x)
            assert slope.dtype == x.dtype
