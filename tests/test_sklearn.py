"""The classifier: scikit-learn's contract, the model behind it, edges, errors."""

import pickle
import subprocess
import sys
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.gaussian_process.kernels import RBF
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from taylor_softmax import predict, stax
from taylor_softmax._classifier import likelihoods, search
from taylor_softmax._classifier.network import Network, fully_connected
from taylor_softmax._numerics.precision import enable_x64
from taylor_softmax._probabilities import regression
from taylor_softmax._probabilities.priors import Exact
from taylor_softmax.sklearn import InfiniteNetworkClassifier

AT = {"W_std": 1.3, "b_std": 0.4, "last_W_std": 2.0}
NAMES = np.array(["ant", "bee", "cow"])


def problem(n=24, seed=0):
    """Inputs, and labels that are mostly a function of them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))
    labels = (x @ rng.normal(size=(3, 3)) + 0.5 * rng.normal(size=(n, 3))).argmax(1)
    return x, labels


X, LABELS = problem()
X_TEST = problem(7, 1)[0]


def fixed(**options):
    """A classifier that keeps its hyperparameters."""
    return InfiniteNetworkClassifier(hyperparameters=AT, optimizer=None, **options)


def kernel_fn(at=AT):
    return fully_connected(3, **at)[2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks([InfiniteNetworkClassifier()])
def test_contract_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.quick
def test_is_the_posterior_of_its_parts():
    """Scaled inputs, the kernel of the network, inference, exact probabilities."""
    classifier = fixed(inference="categorical").fit(X, NAMES[LABELS])
    scale = np.sqrt(np.mean((X - X.mean(0)) ** 2))
    x, x_test = (X - X.mean(0)) / scale, (X_TEST - X.mean(0)) / scale
    k = kernel_fn()
    posterior = predict.categorical_inference(k(x, None, "nngp"), LABELS, n_classes=3, tol=1e-3)
    want = posterior(k(x_test, x, "nngp"), k(x_test, None, "nngp"))
    np.testing.assert_allclose(classifier.predict_proba(X_TEST), want.probabilities, rtol=1e-6)
    np.testing.assert_allclose(classifier.log_evidence_, posterior.log_evidence, rtol=1e-9)
    chosen = NAMES[np.argmax(want.probabilities, 1)]
    np.testing.assert_array_equal(classifier.predict(X_TEST), chosen)
    np.testing.assert_allclose(
        classifier.predict_log_proba(X_TEST), np.log(want.probabilities), rtol=1e-5
    )
    mean, variance = classifier.predict_logits(X_TEST)
    assert mean.shape == variance.shape == (7, 3)
    assert classifier.hyperparameters_ == AT
    assert classifier.converged_
    # Negative control: of other scales.
    other = {**AT, "b_std": 0.5}
    options = {"optimizer": None, "inference": "categorical"}
    again = InfiniteNetworkClassifier(hyperparameters=other, **options).fit(X, LABELS)
    assert np.abs(again.predict_proba(X_TEST) - want.probabilities).max() > 1e-4


@pytest.mark.parametrize("inference", ["categorical", "least_squares"])
def test_hyperparameters_maximise_the_evidence(inference):
    classifier = InfiniteNetworkClassifier(inference=inference, tol=1e-5).fit(X, LABELS)
    assert classifier.converged_
    assert classifier.n_iter_ >= 1

    def evidence(at):
        same = InfiniteNetworkClassifier(
            hyperparameters=at, optimizer=None, inference=inference, tol=1e-5
        )
        return same.fit(X, LABELS).log_evidence_

    found = classifier.hyperparameters_
    assert evidence(found) == pytest.approx(classifier.log_evidence_, abs=1e-3)
    for name in found:
        for factor in (0.7, 1.4):
            moved = {**found, name: factor * found[name]}
            assert evidence(moved) < classifier.log_evidence_ + 0.2
    # By more than a factor of the kernel, which least squares does not see.
    far = {"W_std": found["W_std"] / 4, "b_std": 4 * found["b_std"], "last_W_std": 0.3}
    assert evidence(far) < classifier.log_evidence_ - 0.5


@pytest.mark.parametrize("inference", ["categorical", "least_squares"])
def test_slopes_are_those_of_the_evidence(inference):
    network = Network(fully_connected, 3, "nngp", None)
    likelihood = (
        likelihoods.Categorical(LABELS, 3, 1e-8, 100, False)
        if inference == "categorical"
        else likelihoods.LeastSquares(LABELS, 3)
    )

    def evidence(at):
        return float(likelihood.posterior(network.square(X, at)).log_evidence)

    kernel = network.square(X, AT)
    slopes = network.slopes(X, AT, likelihood.slope(likelihood.posterior(kernel)))
    for name, value in AT.items():
        h = 1e-4 * value
        difference = evidence({**AT, name: value + h}) - evidence({**AT, name: value - h})
        np.testing.assert_allclose(slopes[name], difference / (2 * h), rtol=1e-5, atol=1e-8)
    assert abs(slopes["b_std"]) > 0.1
    # A factor of the kernel changes nothing for least squares.
    assert (abs(slopes["last_W_std"]) > 0.1) == (inference == "categorical")


@pytest.mark.parametrize("n", [1, 5, 24, 25, 64])
@pytest.mark.parametrize("get", ["nngp", "ntk"])
def test_padding_changes_no_kernel(n, get):
    x = problem(n, n)[0]
    network, k = Network(fully_connected, 3, get, None), kernel_fn()
    np.testing.assert_allclose(network.square(x, AT), k(x, None, get), rtol=2e-8)
    np.testing.assert_allclose(network.cross(x, X_TEST, AT), k(x, X_TEST, get), rtol=2e-8)
    np.testing.assert_allclose(network.variances(x, AT), np.diagonal(k(x, None, get)), rtol=2e-8)


def regressed(kernel, labels, noise, unit):
    """Evidence of the targets, and weights of the logits, as defined."""
    t = (np.eye(3)[labels] - 1 / 3) / unit
    noisy = kernel + noise * np.eye(len(kernel))
    density = scipy.stats.multivariate_normal(np.zeros(len(kernel)), noisy)
    # Coordinates of the plane in which the classes sum to 0.
    plane = np.array([[1, -1, 0], [1, 1, -2]]) / np.sqrt([[2], [6]])
    evidence = sum(density.logpdf(each) for each in plane @ t.T)
    return evidence - 2 * len(kernel) * np.log(unit), np.linalg.solve(noisy, t), noisy


def test_least_squares_as_defined():
    kernel = np.asarray(kernel_fn()(X, None, "nngp"))
    posterior = regression.posterior(kernel, LABELS, 3)
    found = scipy.optimize.minimize(
        lambda at: -regressed(kernel, LABELS, *np.exp(at))[0], [0, 0], method="Nelder-Mead"
    )
    np.testing.assert_allclose(posterior.log_evidence, -found.fun, rtol=1e-7)
    noise, unit = np.exp(found.x)
    np.testing.assert_allclose(1 / posterior.site_precision, noise, rtol=1e-3)
    noise = 1 / float(posterior.site_precision[0, 0])
    _, weights, noisy = regressed(kernel, LABELS, noise, unit)
    np.testing.assert_allclose(posterior.alpha, weights, rtol=1e-3)
    cross = np.asarray(kernel_fn()(X_TEST, X, "nngp"))
    own = np.diagonal(np.asarray(kernel_fn()(X_TEST, None, "nngp")))
    logits = posterior(cross, own, latent=True)
    np.testing.assert_allclose(logits.mean, cross @ posterior.alpha, rtol=1e-9)
    reduced = own - np.sum(cross * np.linalg.solve(noisy, cross.T).T, axis=1)
    np.testing.assert_allclose(logits.variance[:, 0], reduced, rtol=1e-9)
    # All training inputs for inducing ones: the same.
    whole = regression.posterior(
        predict.InducingKernels(kernel, kernel, np.diagonal(kernel)), LABELS, 3
    )
    np.testing.assert_allclose(whole.log_evidence, posterior.log_evidence, rtol=1e-6)
    # Negative control: of another noise.
    other = regressed(kernel, LABELS, 2 * noise, unit)
    assert other[0] < posterior.log_evidence - 0.1
    assert np.abs(other[1] / weights - 1).max() > 0.1


def test_a_factor_of_the_kernel_changes_nothing():
    kernel = np.asarray(kernel_fn()(X, None, "nngp"))
    one, other = (regression.posterior(by * kernel, LABELS, 3) for by in (1.0, 1e6))
    np.testing.assert_allclose(one.log_evidence, other.log_evidence, rtol=1e-9)
    np.testing.assert_allclose(one.alpha, 1e3 * other.alpha, rtol=1e-4)


def test_noise_stays_where_it_can_be_computed_with():
    """Labels that the kernel explains without any, and those about which it says nothing."""
    side = np.linspace(-1, 1, 24)
    smooth = np.exp(-((side[:, None] - side) ** 2))
    least = regression.posterior(smooth, (side > 0).astype(int), 2)
    most = regression.posterior(np.ones((24, 24)), LABELS, 3)
    for posterior in (least, most, regression.posterior(np.zeros((24, 24)), LABELS, 3)):
        assert np.isfinite(posterior.log_evidence)
        assert np.all(np.isfinite(posterior.alpha))
        assert 1e-4 < 1 / posterior.site_precision[0, 0] < 1e4


def test_scale_is_that_of_the_largest_leave_one_out_likelihood():
    kernel = np.asarray(kernel_fn()(X, None, "nngp"))
    posterior = regression.posterior(kernel, LABELS, 3)
    omega = float(posterior.site_precision[0, 0])
    # The posterior at the training inputs is that of these targets.
    t = kernel @ posterior.alpha + posterior.alpha / omega
    noisy = kernel + np.eye(len(X)) / omega
    means, variances = [], []
    for i in range(len(X)):
        rest = np.arange(len(X)) != i
        cross = np.linalg.solve(noisy[np.ix_(rest, rest)], kernel[rest, i])
        means.append(cross @ t[rest])
        variances.append(kernel[i, i] - kernel[i, rest] @ cross)
    means, variances = np.array(means), np.array(variances)[:, None]
    sites = regression.Sites(posterior.alpha, posterior.site_precision)
    got = regression._without_each(Exact(jnp.asarray(kernel)), sites)
    np.testing.assert_allclose(got[0], means, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(got[1], variances, rtol=1e-8)

    def likelihood(by):
        p = np.asarray(predict.class_probabilities(by * means, by**2 * variances))
        return np.mean(np.log(p[np.arange(len(X)), LABELS]))

    scale = regression.scale(posterior, np.eye(3)[LABELS])
    best = max(likelihood(by) for by in np.geomspace(0.1, 100, 31))
    assert likelihood(scale) > best - 1e-3
    assert likelihood(scale / 10) < best - 0.01
    classifier = fixed().fit(X, LABELS)
    assert classifier.score(X, LABELS) > 0.8


def test_maximise_finds_a_maximum_and_keeps_the_best_it_saw():
    def parabola(at):
        u = np.log(at["a"] / 3), np.log(at["b"] / 0.2)
        value = -(u[0] ** 2) - 2 * u[1] ** 2
        return value, {"a": -2 * u[0] / at["a"], "b": -4 * u[1] / at["b"]}

    end = search.maximise(parabola, {"a": 1.0, "b": 1.0}, 50)
    assert end.failure is None
    found = end.hyperparameters
    np.testing.assert_allclose([found["a"], found["b"]], [3, 0.2], rtol=0.05)
    short = search.maximise(parabola, {"a": 1.0, "b": 1.0}, 1)
    assert "ITERATIONS" in short.failure.upper()

    def broken(at):
        return (np.nan if at["a"] > 1.05 else np.log(at["a"])), {"a": 1 / at["a"]}

    end = search.maximise(broken, {"a": 1.0}, 50)
    assert "not finite at a=" in end.failure
    assert end.hyperparameters == {"a": 1.0}
    with pytest.raises(ValueError, match="`hyperparameters` must be others to start from"):
        search.maximise(broken, {"a": 2.0}, 50)


def test_neither_offset_nor_unit_matters_nor_constant_columns():
    want = fixed().fit(X, LABELS).predict_proba(X_TEST)
    moved = fixed().fit(1e6 * X - 3e7, LABELS).predict_proba(1e6 * X_TEST - 3e7)
    np.testing.assert_allclose(moved, want, rtol=1e-5)
    tiny = fixed().fit(1e-200 * X, LABELS).predict_proba(1e-200 * X_TEST)
    np.testing.assert_allclose(tiny, want, rtol=1e-5)

    def wider(x):
        return np.concatenate([x, np.full((len(x), 3), 12345.678)], axis=1)

    constant = fixed().fit(wider(X), LABELS)
    # The network divides by the number of columns, and the root mean square makes up for it.
    np.testing.assert_allclose(constant.predict_proba(wider(X_TEST)), want, rtol=1e-5)
    nothing = fixed().fit(np.full_like(X, 5.0), LABELS)
    p = nothing.predict_proba(np.full((2, 3), 5.0))
    assert np.all(np.isfinite(p))
    np.testing.assert_allclose(p[0], p[1])


def convolutional(n_classes, W_std):
    return stax.serial(
        stax.Conv(8, (2,), W_std=W_std), stax.Relu(), stax.Flatten(), stax.Dense(n_classes, 2.0)
    )


def pooled(n_classes):
    return stax.serial(
        stax.Dense(8, 1.0, 0.2), stax.Relu(), stax.GlobalAvgPool(), stax.Dense(n_classes, 2.0)
    )


def test_networks_and_inputs_of_more_axes():
    x = X[:, :, None]
    options = {
        "hyperparameters": {"W_std": 1.0},
        "optimizer": None,
        "inference": "categorical",
    }
    classifier = InfiniteNetworkClassifier(convolutional, **options).fit(x, LABELS)
    k = convolutional(3, 1.0)[2]
    posterior = predict.categorical_inference(k(x, None, "nngp"), LABELS, n_classes=3, tol=1e-3)
    x_test = X_TEST[:, :, None]
    want = posterior(k(x_test, x, "nngp"), k(x_test, None, "nngp")).probabilities
    np.testing.assert_allclose(classifier.predict_proba(x_test), want, rtol=1e-6)
    with pytest.raises(ValueError, match=r"X has inputs of shape \(3, 2\), but .* \(3, 1\)"):
        classifier.predict(np.zeros((4, 3, 2)))
    # The default network takes them as columns.
    flat = fixed().fit(X, LABELS).predict_proba(X_TEST)
    np.testing.assert_allclose(fixed().fit(x, LABELS).predict_proba(x_test), flat, rtol=1e-9)


@pytest.mark.parametrize("mask", [-100.0, np.nan])
def test_masked_positions_are_padding(mask):
    x, x_test = X[:, :, None], X_TEST[:, :, None]
    masked = InfiniteNetworkClassifier(pooled, mask_constant=mask)
    longer = [np.concatenate([each, np.full_like(each[:, :2], mask)], 1) for each in (x, x_test)]
    got = masked.fit(longer[0], LABELS).predict_proba(longer[1])
    want = InfiniteNetworkClassifier(pooled).fit(x, LABELS).predict_proba(x_test)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_inducing_inputs_and_blocks():
    whole = fixed(n_inducing=24).fit(X, LABELS)
    few = fixed(n_inducing=6, batch_size=5).fit(X, LABELS)
    assert len(few.posterior_.prior.weights) == 6
    assert few.posterior_.alpha.shape == (24, 3)
    assert few.log_evidence_ < whole.log_evidence_
    by_one = few.predict_proba(X_TEST)
    few.batch_size = 100
    np.testing.assert_allclose(few.predict_proba(X_TEST), by_one, rtol=1e-9)
    chosen = InfiniteNetworkClassifier(n_inducing=6, inference="categorical").fit(X, LABELS)
    assert set(chosen.hyperparameters_) == set(AT)
    assert chosen.log_evidence_ > -24 * np.log(3)


def test_pipelines_searches_and_pickles(tmp_path):
    scaled = make_pipeline(StandardScaler(), fixed())
    assert cross_val_score(scaled, X, LABELS, cv=2).mean() > 1 / 3
    searched = GridSearchCV(fixed(), {"inference": ["categorical", "least_squares"]}, cv=2)
    searched.fit(X, NAMES[LABELS])
    again = pickle.loads(pickle.dumps(searched))
    np.testing.assert_array_equal(again.predict_proba(X_TEST), searched.predict_proba(X_TEST))


def test_what_has_not_converged_says_so():
    with pytest.warns(ConvergenceWarning, match="The inference has not converged: after 2 iter"):
        classifier = fixed(inference="categorical", max_iterations=2).fit(X, LABELS)
    assert not classifier.converged_
    with pytest.warns(ConvergenceWarning, match="The optimizer has not converged: "):
        classifier = InfiniteNetworkClassifier(max_iter=1).fit(X, LABELS)
    assert not classifier.converged_
    assert classifier.n_iter_ == 1


@pytest.mark.quick
def test_probabilities_are_at_most_1():
    """Metrics of scikit-learn refuse one that rounding has put above, in float32 too."""
    x = np.concatenate([X - 5, X, X + 5])
    labels = np.repeat([0, 1, 2], len(X))
    with enable_x64(False):
        p = fixed().fit(x, labels).predict_proba(np.concatenate([x, 10 * x]))
    assert p.dtype == np.float32
    assert p.max() == 1
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-6)


def exploding(n_classes, W_std):
    """Whose kernel overflows not far from where the search starts."""
    return stax.serial(stax.Dense(8), stax.Relu(), stax.Dense(n_classes, W_std**3000))


def test_a_search_that_meets_overflow_keeps_what_it_has():
    classifier = InfiniteNetworkClassifier(
        exploding, hyperparameters={"W_std": 0.999}, inference="categorical"
    )
    with pytest.warns(ConvergenceWarning, match="not finite at W_std="):
        classifier.fit(X, LABELS)
    assert np.all(np.isfinite(classifier.predict_proba(X_TEST)))


def test_progress_goes_to_stderr(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"inference": "categorical", "max_iterations": 3}
        InfiniteNetworkClassifier(verbose=2, **options).fit(X, LABELS)
    out, err = capsys.readouterr()
    assert not out
    assert "log evidence" in err
    assert "W_std=1.414, b_std=0.3, last_W_std=3" in err
    assert "iteration 1: log evidence" in err


def last_layer_is_not_linear(n_classes):
    return stax.serial(stax.Dense(n_classes), stax.Relu())


def no_network(n_classes):
    return n_classes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": "adam"}, ValueError, "`optimizer` must be 'L-BFGS-B' or None, got 'adam'"),
        ({"inference": "laplace"}, ValueError, "`inference` must be 'least_squares' or"),
        ({"get": "cov1"}, ValueError, "`get` must be 'nngp' or 'ntk', got 'cov1'"),
        ({"max_iter": 0}, ValueError, "`max_iter` must be"),
        ({"batch_size": 1.5}, TypeError, "`batch_size` must be"),
        ({"n_inducing": 0}, ValueError, "`n_inducing` must be"),
        ({"inference": "categorical", "tol": 0.0}, ValueError, "`tol` must be positive"),
        (
            {"hyperparameters": {"W_std": -1.0}},
            ValueError,
            "positive numbers, got -1.0 for 'W_std'",
        ),
        ({"hyperparameters": {"W_std": "1"}}, ValueError, "positive numbers, got '1' for 'W_std'"),
        ({"hyperparameters": {"depth": 2.0}}, TypeError, "unexpected keyword argument 'depth'"),
        ({"network": last_layer_is_not_linear}, ValueError, "`network` must end in its logits"),
        ({"network": no_network}, TypeError, "`network` must return a network of"),
        ({"hyperparameters": {"last_W_std": 1e200}}, ValueError, "must be finite"),
    ],
)
def test_wrong_parameters(options, error, message):
    with pytest.raises(error, match=message):
        InfiniteNetworkClassifier(**options).fit(X, LABELS)


def test_wrong_data():
    classifier = InfiniteNetworkClassifier()
    with pytest.raises(ValueError, match="labels of 2 or more classes, got 1 class"):
        classifier.fit(X, np.zeros(len(X)))
    with pytest.raises(ValueError, match="NaN"):
        classifier.fit(np.where(X > 1, np.nan, X), LABELS)
    with pytest.raises(ValueError, match="Complex data not supported"):
        classifier.fit(X + 0j, LABELS)
    with pytest.raises(ValueError, match="Unknown label type"):
        classifier.fit(X, X[:, 0])
    with pytest.raises(TypeError, match="sample_weight"):
        classifier.fit(X, LABELS, sample_weight=np.ones(len(X)))
    # As many classes as inputs is the most there can be.
    each = fixed().fit(X[:3], NAMES)
    np.testing.assert_array_equal(np.sort(each.predict(X[:3])), NAMES)


@pytest.mark.quick
def test_scikit_learn_is_imported_by_this_module_alone():
    code = "import sys, taylor_softmax, taylor_softmax.predict; assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys; sys.modules['sklearn'] = None; import taylor_softmax.sklearn"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert failed.returncode
    assert "the extra `taylor-softmax[sklearn]` installs" in failed.stderr


@pytest.mark.slow
def test_digits_beside_the_classifier_of_scikit_learn():
    """At least 30 % better in likelihood, in float32 as users have it."""
    x, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, labels = x[order], labels[order]
    n = 500

    def nll(classifier):
        p = classifier.fit(x[:n], labels[:n]).predict_proba(x[n:])
        return -np.mean(np.log(p[np.arange(len(x) - n), labels[n:]]))

    with enable_x64(False):
        ours = nll(InfiniteNetworkClassifier())
    assert ours < 0.7 * nll(GaussianProcessClassifier(1.0 * RBF(20.0)))
