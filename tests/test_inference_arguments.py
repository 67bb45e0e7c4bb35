"""Labels and kernels as users pass them to inference, and what is said of those that are wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taylor_softmax import predict, stax
from taylor_softmax._probabilities.arguments import read_labels, read_observations

LABELS = np.array([0, 1, 2, 0, 1, 2])
X = np.random.default_rng(0).standard_normal((6, 5))
KERNEL = X @ X.T / 5 + 0.1 * np.eye(6)


def logits(*last, **options):
    return stax.serial(stax.Dense(8), stax.Relu(), stax.Dense(3), *last)[2](X, None, **options)


@pytest.mark.quick
def test_concrete_labels_are_read_under_any_transformation():
    """Where `jax.numpy` would trace them: values are those outside."""

    def loss(y, n_classes=None):
        return lambda scale: predict.categorical_log_evidence(
            scale * KERNEL, y, n_classes=n_classes, max_iterations=5
        )

    given = {
        "jax": loss(jnp.asarray(LABELS), 3),
        "jax, without a number": loss(jnp.asarray(LABELS)),
        "numpy": loss(LABELS),
        "list": loss(LABELS.tolist()),
        "one-hot": loss(jax.nn.one_hot(LABELS, 3)),
    }
    for name, function in given.items():
        gradients = jax.jit(jax.vmap(jax.grad(jax.checkpoint(function))))
        assert jax.eval_shape(gradients, jnp.ones(2)).shape == (2,), name
    want = float(loss(LABELS)(2.0))
    assert float(jax.jit(given["one-hot"])(2.0)) == pytest.approx(want, rel=1e-9)
    # A concrete kernel is checked there, too, as are labels.
    indefinite = np.eye(6) - 0.3 * (1 - np.eye(6))
    with pytest.raises(ValueError, match="`k_train_train` must be positive semi-definite"):
        jax.jit(lambda s: s * predict.categorical_log_evidence(indefinite, LABELS))(1.0)
    with pytest.raises(ValueError, match="`y_train` must be classes from 0 to 1, got 2"):
        jax.jit(lambda s: loss(LABELS, 2)(s))(1.0)


def test_traced_arguments_that_are_wrong_are_nan():
    def read(kernel, y):
        _, labels, _ = read_observations(kernel, y, 3)
        return labels

    read = jax.jit(read)
    np.testing.assert_array_equal(read(KERNEL, LABELS), np.eye(3)[LABELS])
    soft = np.full((6, 3), 1 / 3)
    np.testing.assert_array_equal(read(KERNEL, soft), soft)
    indefinite = np.eye(6) - 0.3 * (1 - np.eye(6))
    for kernel in (indefinite, KERNEL + np.eye(6, k=1), KERNEL * np.nan, -KERNEL):
        assert np.all(np.isnan(read(kernel, LABELS)))
    for y in (np.where(LABELS == 2, 3, LABELS), LABELS - 1):
        wrong = (y < 0) | (y > 2)
        np.testing.assert_array_equal(np.isnan(read(KERNEL, y)).all(1), wrong)
    for y in (soft / 2, soft - [1, 0, -1], soft * np.inf):
        assert np.all(np.isnan(read(KERNEL, y)))
    # And what is NaN here is NaN in the bound.
    bound = jax.jit(lambda k: predict.categorical_log_evidence(k, LABELS, max_iterations=5))
    assert np.isnan(bound(indefinite))
    assert np.isfinite(bound(KERNEL))


@pytest.mark.quick
def test_inference_under_a_transformation_names_what_works_there():
    def fitted(scale):
        return predict.categorical_inference(scale * KERNEL, LABELS).log_evidence

    for function, scale in (
        (jax.jit(fitted), 2.0),
        (jax.grad(fitted), 2.0),
        (jax.vmap(fitted), np.ones(2)),
    ):
        with pytest.raises(TypeError, match=r"`categorical_inference`.*`categorical_log_evidence`"):
            function(scale)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint64])
def test_labels_of_any_integers(dtype):
    labels, _ = read_labels(LABELS.astype(dtype), 6, 300)
    np.testing.assert_array_equal(np.argmax(labels, 1), LABELS)
    assert labels.shape == (6, 300)


@pytest.mark.quick(dtype=jnp.float16)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_sums_of_soft_labels_in_half_precision(dtype):
    """They may be off by twice the rounding of the dtype that the labels came in, and no more."""
    thirds = jnp.full((6, 3), 1 / 3, dtype)
    plain = np.asarray(thirds, np.float32)
    assert np.all(abs(plain.sum(1) - 1) > 2e-4)
    labels, _ = read_labels(thirds, 6, None)
    assert labels.dtype == np.float32
    np.testing.assert_array_equal(labels, plain)
    # Control: float32 does not round by as much.
    with pytest.raises(ValueError, match=r"`y_train` .*sum to 1"):
        read_labels(plain, 6, None)

    def short_by(missing):
        return jnp.tile(jnp.array([0.5, 0.25, 0.25 - missing], dtype), (6, 1))

    eps = float(jnp.finfo(dtype).eps)
    read_labels(short_by(1.5 * eps), 6, None)
    # Control: this much is no rounding of the dtype, though it would be of a coarser one.
    with pytest.raises(ValueError, match=r"`y_train` .*sum to 1"):
        read_labels(short_by(2.5 * eps), 6, None)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (np.array([*LABELS[:5], 2**32 + 2]), ValueError, "got 4294967298 among 6.*np.unique"),
        (np.array([*LABELS[:5], 2**63], np.uint64), ValueError, "got 9223372036854775808"),
        ([*LABELS[:5], 2**70], TypeError, "`y_train` must be numbers.*np.unique"),
        (list("abcabc"), TypeError, "`y_train` must be numbers, got .*'a'.*np.unique"),
        (np.array(list("abcabc")), TypeError, r"`y_train` .*shape \(6,\) and dtype <U1.*np.unique"),
        (np.array(list("abcabc"), object), TypeError, "`y_train` must be numbers.*dtype object"),
        ([None] * 6, TypeError, "`y_train` must be numbers"),
        (None, TypeError, "`y_train` must be numbers, got None"),
        ([[0, 1], [2]], TypeError, "`y_train` must be numbers"),
        (LABELS == 1, TypeError, "`y_train` .*must be integers.*bool"),
        (LABELS * np.nan, TypeError, "`y_train` .*must be integers.*float64"),
        (LABELS.astype("datetime64[s]"), TypeError, "`y_train` must be numbers.*datetime64"),
        (LABELS[:, None], ValueError, r"two or more columns.*\(6, 1\).*\(6,\)"),
        (1j * np.eye(6)[:, :3], TypeError, "`y_train` must be real, got dtype complex"),
        (np.full((6, 3), np.nan), ValueError, r"`y_train` .*sum to 1.*got nan at \(0, 0\)"),
    ],
)
def test_labels_that_are_no_classes(y, error, message):
    with pytest.raises(error, match=message) as raised:
        predict.categorical_inference(KERNEL, y)
    assert "\n" not in str(raised.value)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (
            np.float32([[1, -1.5], [-1.5, 1]]),
            r"a covariance that the variances.*got -1.5 at \(0, 1\)",
        ),
        (np.eye(2)[[0, 0]] * [[1.0, 0], [0, 0]] + [[0, 1e-3], [1e-3, 0]], "a covariance"),
        (np.float32(np.eye(3) - 0.8 * (1 - np.eye(3))), "eigenvalue of -0.6 .* up to 1.*add 0.6"),
        (np.eye(3) - 0.52 * (1 - np.eye(3)), "eigenvalue of -0.04 "),
        (4e4 * (np.eye(3) - 0.52 * (1 - np.eye(3))), r"eigenvalue of -1.6e\+03 .*up to 4e\+04"),
    ],
)
def test_kernels_that_are_of_nothing(kernel, message):
    with pytest.raises(ValueError, match=f"`k_train_train` must be .*{message}"):
        predict.categorical_inference(kernel, np.arange(len(kernel)) % 3)
    cross = np.full((len(kernel), 4), 0.0), np.ones(4)
    with pytest.raises(ValueError, match="`k_inducing_inducing` must be"):
        predict.categorical_inference(predict.InducingKernels(kernel, *cross), [0, 1, 1, 0])


def test_kernels_with_rounding_are_taken():
    """Singular ones, in float32 and half precision; the NTK of inputs that nearly are alike."""
    x = np.random.default_rng(1).standard_normal((60, 4)).astype(np.float32)
    x = np.concatenate([x, x + np.float32(1e-5), x])
    k = stax.serial(*(stax.Dense(8), stax.Relu()) * 4, stax.Dense(3))[2](x, None)
    for kernel in (k.nngp, k.ntk, k.ntk.astype(jnp.float16), k.nngp.astype(jnp.bfloat16)):
        read_observations(kernel, np.arange(180) % 3, None)
    assert np.linalg.eigvalsh(np.asarray(k.ntk))[0] < 0
    # Control: an eigenvalue of two hundredths of the variance is none of rounding.
    vector = np.linalg.eigh(np.asarray(k.nngp))[1][:, :1]
    lower = k.nngp - 0.02 * np.max(np.diagonal(k.nngp)) * vector @ vector.T
    with pytest.raises(ValueError, match="must be positive semi-definite"):
        read_observations(lower, np.arange(180) % 3, None)


@pytest.mark.quick
def test_kernels_as_kernel_fn_returns_them():
    k = logits()
    tuples = logits(get=("nngp", "ntk")), logits(get=("ntk",))
    for given, get, want in (
        (k, "nngp", k.nngp),
        (tuples[0], "nngp", k.nngp),
        (tuples[1], "ntk", k.ntk),
        (k.nngp, None, k.nngp),
        (np.asarray(k.ntk), None, k.ntk),
    ):
        prior, _, of = read_observations(given, LABELS, None)
        assert of == get
        np.testing.assert_array_equal(prior.kernel, want)
    inducing = predict.InducingKernels(logits(), tuples[0], jnp.diagonal(k.nngp))
    assert read_observations(inducing, LABELS, None).get == "nngp"
    # NNGP of some inputs and NTK of others are no kernel.
    inducing = predict.InducingKernels(tuples[1], tuples[0], jnp.diagonal(k.nngp))
    assert read_observations(tuples[1], LABELS, None).get == "ntk"
    assert repr(inducing).startswith("InducingKernels(k_inducing_inducing=")
    assert "\n" not in repr(inducing)


def test_a_posterior_takes_test_kernels_as_kernel_fn_returns_them():
    k = logits()
    of_kernel = predict.categorical_inference(k, LABELS, max_iterations=50)
    of_array = predict.categorical_inference(k.nngp, LABELS, max_iterations=50)
    want = of_array(k.nngp, k.nngp).probabilities
    np.testing.assert_array_equal(of_kernel(k, k).probabilities, want)
    with pytest.raises(ValueError, match=r"`k_test_train` holds NNGP and NTK.*Pass"):
        of_array(k, k)
    with pytest.raises(ValueError, match=r"`k_test_train` must hold the NNGP.*got ntk"):
        of_kernel(logits(get=("ntk",)), k)
    full = logits(stax.Softmax())
    with pytest.raises(ValueError, match="`k_test_test` must be the kernel of the logits"):
        of_kernel(k, full)
    # Traced and wrong: NaN at that input alone.
    cross = np.asarray(k.nngp) * np.where(np.arange(6) == 1, 9, 1)[:, None]
    got = jax.jit(lambda cross: of_array(cross, k.nngp).probabilities)(cross)
    np.testing.assert_array_equal(np.isnan(got).all(1), np.arange(6) == 1)
    for each in (of_array, of_array(k.nngp, k.nngp), of_array(k.nngp, k.nngp, latent=True)):
        assert len(repr(each)) < 150
        assert "\n" not in repr(each)
    assert "6 inputs, 3 classes, log_evidence=-" in repr(of_array)


@pytest.mark.quick
def test_kernels_of_other_outputs_than_logits_are_refused():
    mixture = logits(stax.Softmax(), stax.Dense(3))
    for k in (logits(stax.Softmax()), logits(stax.LogSoftmax()), logits(stax.Relu()), mixture):
        with pytest.raises(ValueError, match=r"`k_train_train` must be the kernel of .*logits.*De"):
            predict.categorical_inference(k, LABELS)
    with pytest.raises(TypeError, match=r"`gaussian` must have `mean` and `covariance`.*predict"):
        predict.class_posterior(logits())
    # A message is one line, whatever came.
    with pytest.raises(TypeError) as raised:
        predict.choose_inducing(logits(), lambda i: X[i], 2)
    assert str(raised.value).count("\n") == 0
    assert len(str(raised.value)) < 150
