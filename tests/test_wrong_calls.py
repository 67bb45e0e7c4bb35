"""A hundred wrong calls, and what each message has to say: the argument, and what came."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

import taylor_softmax
from taylor_softmax import losses, monte_carlo, nn, predict, stax
from taylor_softmax.methods import Direct, QuasiMonteCarlo, Series

Z = jnp.array([[0.3, 1.0, -0.4], [0.1, -2.0, 0.5]])
COV = jnp.eye(3)
NAN, INF = jnp.nan, jnp.inf
KEY = random.key(0)


def classes(var1=1.0, cov12=0.5, var2=1.0, *, n_classes=3, **options):
    return taylor_softmax.class_covariance(var1, cov12, var2, n_classes=n_classes, **options)


def joint(cov11=COV, cov12=COV / 2, cov22=COV, **options):
    return taylor_softmax.joint_second_moment(cov11, cov12, cov22, **options)


def attention(cov11=COV, cov12=COV / 2, cov22=COV, **options):
    return taylor_softmax.attention_second_moment(cov11, cov12, cov22, **options)


def sample(var1=1.0, cov12=0.5, var2=1.0, *, n_classes=3, n_samples=10, **options):
    return monte_carlo.class_second_moment(
        KEY, var1, cov12, var2, n_classes=n_classes, n_samples=n_samples, **options
    )


def sample_jointly(cov11=COV, cov12=COV / 2, cov22=COV, *, n_samples=10, **options):
    return monte_carlo.joint_second_moment(KEY, cov11, cov12, cov22, n_samples=n_samples, **options)


def applied(layer, z=Z):
    return layer[1]((), z)


def loss(fx=Z, y=Z, **options):
    return losses.cross_entropy(**options)(fx, y)


p, spread, log_sum = (
    predict.class_probabilities,
    predict.class_probability_covariance,
    predict.expected_log_normalizer,
)
infer = predict.categorical_inference

WRONG = [
    # Orders.
    (lambda: stax.TaylorSoftmax(3), ValueError, "`order` must be even.*3"),
    (lambda: stax.TaylorSoftmax(2.0), TypeError, "`order` must be an integer.*2.0"),
    (lambda: stax.TaylorSoftmax("2"), TypeError, "`order` must be an integer.*'2'"),
    (lambda: stax.TaylorSoftmax(True), TypeError, "`order` must be an integer.*True"),
    (lambda: stax.TaylorSoftmax(34), NotImplementedError, "`order`.*at most 32.*34"),
    (lambda: classes(order=1), ValueError, "`order` must be positive, got 1"),
    (lambda: nn.taylor_softmax(Z, -2), ValueError, "`order` .*-2"),
    (lambda: nn.log_taylor_softmax(Z, 0), ValueError, "`order` .*0"),
    (lambda: p(Z, 1.0, order=5), ValueError, "`order` must be even.*5"),
    (lambda: losses.cross_entropy(7), ValueError, "`order` must be even.*7"),
    (lambda: joint(order=2.5), TypeError, "`order` must be an integer.*2.5"),
    (lambda: sample(order=3), ValueError, "`order` must be even.*3"),
    # Axes.
    (lambda: stax.Softmax(axis=1.5), TypeError, "`axis` must be an integer.*1.5"),
    (lambda: stax.Softmax(axis="a"), TypeError, "`axis` must be an integer.*'a'"),
    (lambda: stax.Softmax(axis=None), TypeError, "`axis` must be an integer.*None"),
    (lambda: stax.Softmax(axis=()), ValueError, "`axis` must name at least one axis"),
    (lambda: stax.Softmax(axis=(1, "a")), TypeError, "`axis` must be an integer.*'a'"),
    (lambda: stax.LogSoftmax(axis=False), TypeError, "`axis` must be an integer.*False"),
    (lambda: applied(stax.Softmax(axis=7)), ValueError, "`axis=7` is out of range"),
    (lambda: applied(stax.LogSoftmax(axis=7)), ValueError, "`axis=7` is out of range"),
    (lambda: applied(stax.Softmax(axis=0)), ValueError, "`axis=0` is the batch axis"),
    (lambda: applied(stax.Softmax(axis=(1, -1))), ValueError, "names an axis twice"),
    (lambda: stax.Softmax(batch_axis="a"), TypeError, "`batch_axis` must be an integer.*'a'"),
    (lambda: stax.Softmax(batch_axis=1.5), TypeError, "`batch_axis` must be an integer.*1.5"),
    (lambda: stax.LogSoftmax(batch_axis=None), TypeError, "`batch_axis` must be an integer.*None"),
    (lambda: applied(stax.Softmax(batch_axis=7)), ValueError, "`batch_axis=7` is out of range"),
    (lambda: stax.Softmax()[0](KEY, ()), ValueError, "`axis=-1` is out of range"),
    (lambda: nn.taylor_softmax(Z, axis=2), ValueError, "`axis=2` is out of range"),
    (lambda: nn.taylor_softmax(Z, axis="a"), TypeError, "`axis` must be an integer.*'a'"),
    (lambda: nn.log_taylor_softmax(1.0), ValueError, "`axis=-1` is out of range"),
    # Other options.
    (lambda: stax.Softmax(infinite_width="no"), TypeError, "`infinite_width` .*boolean.*'no'"),
    (lambda: stax.Softmax(infinite_width=1), TypeError, "`infinite_width` .*boolean.*1"),
    (lambda: stax.Softmax(method="fast"), TypeError, "`method` must be an object.*'fast'"),
    (lambda: stax.LogSoftmax(method=Series()), ValueError, r"`method=Series\(\)` does not apply"),
    (lambda: stax.Softmax(infinite_width=True, method=Direct()), ValueError, "`method=Direct"),
    (lambda: classes(method=QuasiMonteCarlo(8)), ValueError, "`method=Quasi.* does not apply"),
    (lambda: QuasiMonteCarlo(0), ValueError, "`n_points` must be at least 1.*0"),
    (lambda: QuasiMonteCarlo(1e3), TypeError, "`n_points` must be an integer.*1000.0"),
    (lambda: losses.cross_entropy(probabilities="no"), TypeError, "`probabilities` .*'no'"),
    (lambda: losses.cross_entropy(probabilities=0), TypeError, "`probabilities` .*boolean.*0"),
    (lambda: losses.cross_entropy(margin="1"), TypeError, "`margin` must be a number.*'1'"),
    (lambda: losses.cross_entropy(margin=-1), ValueError, "`margin` must be nonnegative.*-1"),
    (lambda: losses.cross_entropy(margin=NAN), ValueError, "`margin` must be nonneg.*nan"),
    (lambda: losses.cross_entropy(2, probabilities=True), ValueError, "`order` applies to logits"),
    (lambda: attention(causal="yes"), TypeError, "`causal` must be a boolean.*'yes'"),
    (lambda: attention(scale=[1.0, 2.0]), ValueError, r"`scale` must be a number.*\(2,\)"),
    (lambda: attention(values_ntk12=COV), ValueError, "`values_ntk12` .*pass `ntk12`"),
    (lambda: attention(ntk12=jnp.eye(2)), ValueError, r"`ntk12` must have shape.*\(2, 2\)"),
    (lambda: attention(values12=jnp.ones((2, 3))), ValueError, r"`values12` .*\(2, 3\)"),
    # Numbers of classes and samples.
    (lambda: classes(n_classes=0), ValueError, "`n_classes` must be at least 1.*0"),
    (lambda: classes(n_classes=3.0), TypeError, "`n_classes` must be an integer.*3.0"),
    (lambda: classes(n_classes=None), TypeError, "`n_classes` must be an integer.*None"),
    (lambda: sample(n_classes="3"), TypeError, "`n_classes` must be an integer.*'3'"),
    (lambda: sample(n_samples=1), ValueError, "`n_samples` must be at least 2.*1"),
    (lambda: sample(n_samples=1e4), TypeError, "`n_samples` must be an integer.*10000.0"),
    (lambda: sample_jointly(n_samples=0), ValueError, "`n_samples` must be at least 2.*0"),
    # No arrays of real numbers.
    (lambda: classes("a"), TypeError, "`var1` must be a real number.*'a'"),
    (lambda: classes(1.0, None), TypeError, "`cov12` must be a real number.*None"),
    (lambda: classes(1j), TypeError, "`var1` .*complex.*Pass its real part"),
    (lambda: classes(var2={}), TypeError, "`var2` must be a real number"),
    (lambda: joint(1j * COV), TypeError, "`cov11` .*complex"),
    (lambda: joint(cov22=None), TypeError, "`cov22` must be a real number.*None"),
    (lambda: sample(cov12=0.5j), TypeError, "`cov12` .*complex"),
    (lambda: sample_jointly("a"), TypeError, "`cov11` must be a real number.*'a'"),
    (lambda: p(None, 1.0), TypeError, "`mean` must be a real number.*None"),
    (lambda: p("ab", 1.0), TypeError, "`mean` must be a real number.*'ab'"),
    (lambda: p(1j * Z, 1.0), TypeError, "`mean` .*complex"),
    (lambda: spread(Z, 1j), TypeError, "`variance` .*complex"),
    (lambda: log_sum(Z, "1"), TypeError, "`variance` must be a real number.*'1'"),
    (lambda: p([[1, 2], [3]], 1.0), TypeError, "`mean` must be a real number"),
    (lambda: nn.taylor_softmax(None), TypeError, "`z` must be a real number.*None"),
    (lambda: nn.taylor_softmax(1j * Z), TypeError, "`z` .*complex"),
    (lambda: nn.taylor_softmax(Z, where="no"), TypeError, "`where` must be a real number"),
    (lambda: applied(stax.Softmax(), 1j * Z), TypeError, "`inputs` .*complex"),
    (lambda: applied(stax.TaylorSoftmax(2), 1j * Z), TypeError, "`inputs` .*complex"),
    (lambda: loss(1j * Z), TypeError, "`fx` .*complex"),
    (lambda: loss(Z, 1j * Z), TypeError, "`y` .*complex"),
    (lambda: loss(None), TypeError, "`fx` must be a real number.*None"),
    # Shapes.
    (lambda: p(1.0, 1.0), ValueError, r"`mean` must have shape \(\.\.\., C\).*\(\)"),
    (lambda: p(Z, jnp.ones(2)), ValueError, r"`variance` must broadcast .*\(2,\)"),
    (lambda: p(Z[0], jnp.ones((2, 3))), ValueError, r"`variance` must broadcast .*\(2, 3\)"),
    (lambda: p(Z), ValueError, "`variance`.*neither"),
    (lambda: p(Z, 1.0, covariance=COV), ValueError, "`variance`.*both"),
    (lambda: p(Z, covariance=jnp.eye(2)), ValueError, r"`covariance` .*\(2, 2\)"),
    (lambda: sample(jnp.ones(2), jnp.ones(3)), ValueError, r"broadcast.*`var1` \(2,\)"),
    (lambda: joint(jnp.eye(2)), ValueError, r"same S, got `cov11` \(2, 2\)"),
    (lambda: joint(1.0), ValueError, r"shape \(\.\.\., S, S\).*`cov11` \(\)"),
    (lambda: joint(jnp.stack([COV] * 2), jnp.stack([COV] * 3)), ValueError, "must broadcast"),
    (lambda: nn.taylor_softmax(Z, where=[True, False]), ValueError, r"`where` .*\(2,\)"),
    (lambda: loss(Z, Z[0]), ValueError, r"`y` must have the shape of `fx`, \(2, 3\), got \(3,\)"),
    (lambda: infer(jnp.ones(3), [0, 1, 2]), ValueError, r"`k_train_train` must have shape"),
    (lambda: infer(COV, [0, 1]), ValueError, r"`y_train` must have shape \(3,\)"),
    # Numbers.
    (lambda: p(Z, -1.0), ValueError, "`variance` must be nonnegative and finite, got -1.0"),
    (lambda: p(Z, [1.0, INF, 1.0]), ValueError, r"`variance` .*finite, got inf at \(1,\)"),
    (lambda: spread(Z, NAN), ValueError, "`variance` .*got nan"),
    (lambda: log_sum(Z, -1e-3), ValueError, "`variance` .*got -0.001"),
    (lambda: p(Z.at[1, 2].set(NAN), 1.0), ValueError, r"`mean` .*got nan at \(1, 2\)"),
    (lambda: p(Z.at[0, 0].set(INF), 1.0), ValueError, r"`mean` .*got inf at \(0, 0\)"),
    (
        lambda: p(jnp.full(3, -INF), 1.0),
        ValueError,
        "`mean` .*for at least one class of each point.*-inf",
    ),
    (lambda: p(Z, covariance=-COV), ValueError, "`covariance` must be positive semi-definite"),
    (lambda: p(Z, covariance=COV.at[0, 1].set(9)), ValueError, "`covariance` must be symmetric"),
    (lambda: classes(-1.0), ValueError, "`var1` must be nonnegative and finite, got -1.0"),
    (lambda: classes(var2=NAN), ValueError, "`var2` must be nonnegative and finite, got nan"),
    (lambda: classes(cov12=INF), ValueError, "`cov12` must be finite, got inf"),
    (lambda: classes(cov12=1.1), ValueError, r"`cov12` must be at most sqrt.*got 1.1"),
    (lambda: classes(jnp.ones(2), jnp.ones(3)), ValueError, r"broadcast.*`var1` \(2,\)"),
    (lambda: sample(-1.0), ValueError, "`var1` must be nonnegative and finite, got -1.0"),
    (lambda: sample(var2=INF), ValueError, "`var2` must be nonnegative and finite, got inf"),
    (lambda: sample(cov12=NAN), ValueError, "`cov12` must be finite, got nan"),
    (lambda: sample(cov12=1.1), ValueError, r"`cov12` must be at most sqrt.*got 1.1"),
    (lambda: joint(-COV), ValueError, r"`cov11` .*nonnegative along its diagonal, got -1.0 at"),
    (lambda: joint(cov12=NAN * COV), ValueError, r"`cov12` must be finite, got nan at \(0, 0\)"),
    (lambda: sample_jointly(INF * COV), ValueError, "`cov11` must be finite"),
    (lambda: infer(NAN * COV, [0, 1, 2]), ValueError, "`k_train_train` must be finite, got nan"),
    (lambda: infer(COV.at[0, 1].set(9), [0, 1, 2]), ValueError, "`k_train_train` .*symmetric"),
    (lambda: infer(COV, [0, 1, 3], n_classes=3), ValueError, "`y_train` must be classes from 0"),
    (lambda: infer(COV, [0.0, 1.0, 2.0]), TypeError, "`y_train` .* must be integers"),
    (lambda: infer(COV, [0, 1, 2], damping=2), ValueError, r"`damping` must be in \(0, 1\].*2"),
    # What is no kernel or no posterior.
    (lambda: taylor_softmax.class_kernel(COV), TypeError, "`kernel` must be a .*Kernel"),
    (lambda: predict.class_posterior(Z), TypeError, "`gaussian` must have `mean` and `covariance`"),
]


@pytest.mark.quick
def test_there_are_a_hundred():
    assert len(WRONG) >= 100


@pytest.mark.quick
@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_call(call, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        call()


@pytest.mark.quick
@pytest.mark.parametrize("axis", [np.int64(-1), jnp.array(-1), np.array(1), (np.int32(1),), [1]])
def test_integers_of_any_kind_are_axes(axis):
    for layer in (stax.Softmax(axis=axis), stax.TaylorSoftmax(axis=axis, batch_axis=np.int64(0))):
        np.testing.assert_allclose(applied(layer), jax.nn.softmax(Z), rtol=1e-12)
    np.testing.assert_allclose(applied(stax.LogSoftmax(axis=axis)), jax.nn.log_softmax(Z))
    np.testing.assert_allclose(nn.taylor_softmax(Z, axis=axis), jax.nn.softmax(Z), rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    z = Z.astype(dtype)
    single = z.astype(jnp.float32)
    variance = jnp.ones(3, dtype)
    for function in (
        lambda z: applied(stax.Softmax(), z),
        lambda z: applied(stax.TaylorSoftmax(32), z),
        lambda z: applied(stax.TaylorSoftmax(32, infinite_width=True), z),
        lambda z: applied(stax.LogSoftmax(), z),
        lambda z: losses.cross_entropy()(z, abs(z)),
        lambda z: losses.cross_entropy(2, margin=0.5)(z, abs(z)),
        lambda z: losses.cross_entropy(probabilities=True)(abs(z), abs(z)),
        lambda z: p(z, variance.astype(z.dtype)),
        lambda z: log_sum(z, variance.astype(z.dtype)),
    ):
        got = function(z)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, function(single).astype(dtype))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_in_kernels_and_inference(dtype):
    x = jax.random.normal(jax.random.key(0), (6, 4), jnp.float32)
    labels = np.arange(6) % 3
    logits = stax.serial(stax.Dense(8), stax.Relu(), stax.Dense(3))[2](x)

    def rounded(to):
        arrays = {name: getattr(logits, name).astype(dtype) for name in ("nngp", "ntk", "cov1")}
        return logits.replace(**{name: array.astype(to) for name, array in arrays.items()})

    for last in (stax.Softmax(), stax.TaylorSoftmax(4), stax.LogSoftmax()):
        half, single = (last[2](rounded(to)) for to in (dtype, jnp.float32))
        for got, want in ((half.nngp, single.nngp), (half.ntk, single.ntk)):
            assert got.dtype == dtype
            np.testing.assert_array_equal(got, want.astype(dtype))
    half = logits.nngp.astype(dtype)
    of_half, of_single = (
        predict.categorical_inference(k, labels) for k in (half, half.astype(jnp.float32))
    )
    assert of_half.log_evidence == of_single.log_evidence
    got, want = (
        of_half(half[:2], half[:2, :2]),
        of_single(*map(jnp.float32, (half[:2], half[:2, :2]))),
    )
    assert got.probabilities.dtype == dtype
    np.testing.assert_array_equal(got.probabilities, want.probabilities.astype(dtype))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_rounding_to_half_precision_is_no_wrong_call(dtype):
    """Of proportional logits, correlation 1, some covariances come out beyond `sqrt(a b)`."""
    var, ratio = np.meshgrid(np.linspace(0.5, 2, 20), np.linspace(0.3, 3, 20))
    given = [jnp.asarray(k, dtype) for k in (var, var * ratio, var * ratio**2)]
    a, c, b = (np.asarray(k, float) for k in given)
    assert np.max(c / np.sqrt(a * b)) > 1 + jnp.finfo(dtype).eps / 2
    got = classes(*given, n_classes=10)
    want = classes(a, np.sqrt(a * b), b, n_classes=10)
    np.testing.assert_allclose(got.astype(float), want, rtol=10 * float(jnp.finfo(dtype).eps))


def test_integers_and_lists_are_taken():
    for z in (jnp.array([[0, 1, 2]]), np.array([[0, 1, 2]])):
        np.testing.assert_allclose(applied(stax.Softmax(), z).sum(), 1, rtol=1e-12)
        np.testing.assert_allclose(applied(stax.LogSoftmax(), z), jax.nn.log_softmax(1.0 * z))
    np.testing.assert_allclose(p([0, 1, 2], 1).sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(p([0, 1, 2], 1), p(jnp.arange(3.0), 1.0))
    assert np.isfinite(loss([[0, 1, 2]], [[0, 1, 0]]))


@pytest.mark.quick
def test_traced_numbers_that_are_wrong_are_nan_alone():
    """Where there is nothing to raise an error: values, and gradients of the others."""
    mean = jnp.tile(Z[:1], (6, 1)).at[4, 0].set(NAN).at[5, 0].set(INF)
    variance = jnp.array([1.0, -1.0, INF, NAN, 1.0, 1.0])[:, None]

    def probabilities(mean, variance):
        return p(mean, variance, order=2)

    got = jax.jit(probabilities)(mean, variance)
    np.testing.assert_allclose(got[0], p(Z[0], 1.0, order=2), rtol=1e-12)
    assert np.all(np.isnan(got[1:]))
    gradient = jax.jit(jax.grad(lambda *at: probabilities(*at)[0, 0]))(mean, variance)
    assert np.all(np.isfinite(gradient[0]))
    # What is known is checked under a transformation, too.
    with pytest.raises(ValueError, match="`variance` must be nonnegative"):
        jax.jit(lambda mean: probabilities(mean, variance))(mean)


def test_softmax_over_one_class_warns():
    for last in (stax.Softmax(), stax.TaylorSoftmax(2), stax.LogSoftmax()):
        *_, kernel_fn = stax.serial(stax.Dense(1), last)
        with pytest.warns(UserWarning, match=r"over one class.*constant.*`Dense\(n_classes\)`"):
            kernel_fn(Z, None, "nngp")
    *_, kernel_fn = stax.serial(stax.Dense(1), stax.Softmax(infinite_width=True))
    assert np.ptp(kernel_fn(Z, None, "nngp")) > 0.1
