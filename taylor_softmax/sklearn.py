"""A classifier under scikit-learn's contract, of an infinitely wide network.

Needs scikit-learn, which the extra `taylor-softmax[sklearn]` installs.
"""

import sys
import warnings
from collections.abc import Callable
from numbers import Real
from typing import Any

import jax.numpy as jnp
import numpy as np

from taylor_softmax._classifier.likelihoods import Categorical, LeastSquares
from taylor_softmax._classifier.network import Hyperparameters, Network, fully_connected
from taylor_softmax._classifier.search import Maximum, maximise, shown
from taylor_softmax._numerics.arguments import check_integer
from taylor_softmax.predict import (
    InducingKernels,
    LogitPosterior,
    choose_inducing,
    class_probabilities,
)

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "taylor_softmax.sklearn needs scikit-learn 1.6 or later, which the extra "
        "`taylor-softmax[sklearn]` installs."
    ) from error

__all__ = ["InfiniteNetworkClassifier"]

# Where the hyperparameters of the default network start.
_START = {"W_std": 2**0.5, "b_std": 0.3, "last_W_std": 3.0}
# `tol` of the inference while hyperparameters are searched for: the evidence is off by about 0.1
# nats, which is less than what ends the search.
_ROUGHLY = 1e-2
# How many training inputs have their whole kernel; how many inducing inputs stand for more.
_MOST, _INDUCING = 2000, 500


class InfiniteNetworkClassifier(ClassifierMixin, BaseEstimator):
    """Calibrated class probabilities from an infinitely wide network, as scikit-learn has them.

    The network's logits are a Gaussian process. `fit` infers their posterior from the labels, and
    class probabilities are the exact expectation of `softmax(logits)`. The scales of weights and
    biases are hyperparameters: `fit` chooses those of the largest evidence, which takes no held-out
    labels.

        classifier = InfiniteNetworkClassifier().fit(x_train, y_train)
        classifier.predict_proba(x_test)
        classifier.score(x_test, y_test), classifier.log_evidence_

    Time grows with `N^3`, for each value of the hyperparameters that the optimizer tries, and with
    `inference="categorical"` for each class and some ten iterations, too. The classifier computes
    in JAX's precision: float32, or float64 where `jax_enable_x64` is set.

    Args:
      network: a function `network(n_classes, **hyperparameters)` that returns a network of
        `taylor_softmax.stax` up to its logits. It gets inputs as they are. Define it in a module if
        the classifier is to be pickled. None is a network of two hidden layers `Dense, Relu` and a
        last `Dense`. From its inputs the mean of each column is subtracted, and they are divided by
        their root mean square, one number for all columns.
      hyperparameters: names and positive values to start from. Those of the default network are
        `W_std` and `b_std` of both hidden layers, and `last_W_std`; it has a start for each.
      optimizer: "L-BFGS-B" maximises the evidence in the logarithms of the hyperparameters. None
        keeps the values given.
      max_iter: the most iterations of the optimizer. It also ends after an iteration that raises
        the evidence by less than 0.002 nats a training input.
      inference: "least_squares" is regression on the labels. Its noise is that of the largest
        evidence, which is the density of the labels as real numbers, whatever their unit: a factor
        of the kernel changes nothing. The scale of its logits is that of the largest leave-one-out
        likelihood. "categorical" is `taylor_softmax.predict.categorical_inference`, where labels
        have the probabilities `softmax(logits)`: it takes more time, its evidence can be compared
        with that of other models of the labels, and its probabilities are less sure than its
        predictions are right where inputs are few. `benchmarks/results/inference.md` has both.
      n_inducing: with more training inputs than this, `choose_inducing` takes so many of them to
        stand for all. The hyperparameters then maximise the evidence of as many training inputs
        drawn at random. None means 500 where there are more than 2,000 training inputs.
      batch_size: how many test inputs have their kernels computed at a time.
      tol: what the residual of `categorical_inference` has to fall to.
      max_iterations: its most iterations, at each value of the hyperparameters.
      get: the kernel of the logits, "nngp" or "ntk".
      mask_constant: the value in inputs that stands for padding, as in `stax`.
      verbose: 1 reports the hyperparameters on stderr, 2 the iterations of the inference too.

    Attributes:
      classes_: the classes, sorted, `(C,)`.
      n_features_in_: how many columns inputs have.
      hyperparameters_: their values after `fit`.
      log_evidence_: of all training inputs, in nats, or a lower bound of it: that of the log
        density of the labels, or of their log probability where `inference="categorical"`.
      n_iter_: iterations of the optimizer, or of the inference where there is no optimizer.
      converged_: whether both have converged.
      posterior_: the posterior of the logits, a `CategoricalPosterior`.
    """

    def __init__(
        self,
        network: Callable[..., Any] | None = None,
        *,
        hyperparameters: Hyperparameters | None = None,
        optimizer: str | None = "L-BFGS-B",
        max_iter: int = 20,
        inference: str = "least_squares",
        n_inducing: int | None = None,
        batch_size: int = 1000,
        tol: float = 1e-3,
        max_iterations: int = 100,
        get: str = "nngp",
        mask_constant: float | None = None,
        verbose: int = 0,
    ) -> None:
        self.network = network
        self.hyperparameters = hyperparameters
        self.optimizer = optimizer
        self.max_iter = max_iter
        self.inference = inference
        self.n_inducing = n_inducing
        self.batch_size = batch_size
        self.tol = tol
        self.max_iterations = max_iterations
        self.get = get
        self.mask_constant = mask_constant
        self.verbose = verbose

    def fit(self, X: Any, y: Any) -> "InfiniteNetworkClassifier":
        """Chooses the hyperparameters, and infers the posterior.

        Args:
          X: training inputs, `(N, D)`, or of more axes as `network` takes them.
          y: their labels, `(N,)`, of any kind.

        Raises:
          TypeError, ValueError: inputs or labels are not what scikit-learn takes, there is one
            class only, a parameter is out of range, or the kernel is not finite.
        """
        self._check_parameters()
        X, y = validate_data(self, X, y, **self._checks_of_inputs())
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                "InfiniteNetworkClassifier needs labels of 2 or more classes, got 1 class: "
                f"{self.classes_[0]!r}."
            )
        self._shape = X.shape[1:]
        self._scaling = _scaling(X) if self.network is None else None
        x = self._scaled(X)
        likelihood = self._likelihood(labels, self.tol)
        if len(x) <= (self.n_inducing or _MOST):
            found = self._search(x, labels)
            self._inputs, kernels = x, self._network().square(x, found.hyperparameters)
        else:
            n = self.n_inducing or _INDUCING
            drawn = np.random.default_rng(0).permutation(len(x))[:n]
            found = self._search(x[drawn], labels[drawn])
            self._inputs, kernels = self._inducing(x, found.hyperparameters, n)
        # From the start, so that it depends on nothing but the kernel.
        self.posterior_ = likelihood.posterior(kernels)
        self._scale = likelihood.scale(self.posterior_)
        self.hyperparameters_ = found.hyperparameters
        self.log_evidence_ = float(self.posterior_.log_evidence)
        self.n_iter_ = found.n_iter or self.posterior_.iterations
        self.converged_ = self.posterior_.converged and found.failure is None
        if found.failure is not None:
            self._warn(f"The optimizer has not converged: {found.failure}.")
        if not self.posterior_.converged:
            self._warn(
                f"The inference has not converged: after {self.posterior_.iterations} iterations "
                f"the residual is {self.posterior_.residual:.1e}, `tol` {self.tol:.1e}. Raise "
                "`max_iterations` or `tol`."
            )
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each input, `(T,)`."""
        chosen = np.argmax(self.predict_proba(X), axis=1)
        return self.classes_[chosen]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes in the order of `classes_`, `(T, C)`."""
        p = np.asarray(class_probabilities(*self.predict_logits(X)))
        # By rounding one may be above 1, which scikit-learn's metrics refuse.
        return p / p.sum(axis=1, keepdims=True)

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Logarithms of `predict_proba`, `(T, C)`."""
        with np.errstate(divide="ignore"):
            return np.log(self.predict_proba(X))

    def predict_logits(self, X: Any) -> LogitPosterior:
        """`mean` and `variance` of the logits, `(T, C)` each; independent over classes."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, **self._checks_of_inputs())
        if X.shape[1:] != self._shape:
            raise ValueError(
                f"X has inputs of shape {X.shape[1:]}, but InfiniteNetworkClassifier is fitted to "
                f"inputs of shape {self._shape}."
            )
        network = self._network()

        def logits(x: np.ndarray) -> LogitPosterior:
            cross = network.cross(x, self._inputs, self.hyperparameters_)
            variances = network.variances(x, self.hyperparameters_)
            return self.posterior_(cross, variances, latent=True)

        parts = [logits(x) for x in self._blocks(self._scaled(X))]
        mean: Any = self._scale * np.concatenate([part.mean for part in parts])
        variance: Any = self._scale**2 * np.concatenate([part.variance for part in parts])
        return LogitPosterior(mean, variance)

    def _check_parameters(self) -> None:
        """In `fit`, where scikit-learn wants it."""
        choices: dict[str, tuple[Any, ...]] = {
            "optimizer": ("L-BFGS-B", None),
            "inference": ("least_squares", "categorical"),
            "get": ("nngp", "ntk"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                names = " or ".join(map(repr, allowed))
                raise ValueError(f"`{name}` must be {names}, got {value!r}.")
        for name in ("max_iter", "batch_size", "max_iterations"):
            check_integer(name, getattr(self, name), least=1)
        if self.n_inducing is not None:
            check_integer("n_inducing", self.n_inducing, least=1)

    def _checks_of_inputs(self) -> dict[str, Any]:
        masked = self.mask_constant is not None and np.isnan(self.mask_constant)
        return {
            "allow_nd": True,
            # Scaled in float64, and then as JAX has it.
            "dtype": np.float64 if self.network is None else jnp.zeros(()).dtype,
            "ensure_all_finite": "allow-nan" if masked else True,
        }

    def _scaled(self, X: np.ndarray) -> np.ndarray:
        """Inputs as the network takes them."""
        if self._scaling is None:
            return X
        mean, scale = self._scaling
        return ((X.reshape(len(X), -1) - mean) / scale).astype(jnp.zeros(()).dtype)

    def _network(self) -> Network:
        build = fully_connected if self.network is None else self.network
        return Network(build, len(self.classes_), self.get, self.mask_constant)

    def _likelihood(self, labels: np.ndarray, tol: float) -> Categorical | LeastSquares:
        n = len(self.classes_)
        if self.inference == "least_squares":
            return LeastSquares(labels, n)
        return Categorical(labels, n, tol, self.max_iterations, self.verbose > 1)

    def _start(self) -> dict[str, float]:
        """Values of the hyperparameters to start from."""
        start: dict[str, Any] = dict(_START if self.network is None else {})
        start |= self.hyperparameters or {}
        for name, value in start.items():
            if not (isinstance(value, Real) and 0 < float(value) < np.inf):
                raise ValueError(
                    f"`hyperparameters` must be positive numbers, got {value!r} for {name!r}."
                )
        return {name: float(value) for name, value in start.items()}

    def _search(self, x: np.ndarray, labels: np.ndarray) -> Maximum:
        """Hyperparameters of the largest evidence of these inputs."""
        start = self._start()
        if self.optimizer is None or not start:
            return Maximum(start, 0, None)
        network = self._network()
        likelihood = self._likelihood(labels, max(self.tol, _ROUGHLY))
        # From one value to the next the posterior changes little.
        last = None

        def evidence(values: dict[str, float]) -> tuple[float, dict[str, float]]:
            nonlocal last
            kernel = network.square(x, values)
            if last is not None and not np.all(np.isfinite(kernel)):
                # At the start it is the user's mistake, which the inference explains.
                raise FloatingPointError(f"the kernel is not finite at {shown(values)}")
            last = likelihood.posterior(kernel, last)
            slopes = network.slopes(x, values, likelihood.slope(last))
            if self.verbose:
                message = f"log evidence {last.log_evidence:.6g} at {shown(values)}"
                print(message, file=sys.stderr, flush=True)
            per_input = {name: slope / len(x) for name, slope in slopes.items()}
            return float(last.log_evidence) / len(x), per_input

        return maximise(evidence, start, self.max_iter)

    def _inducing(
        self, x: np.ndarray, values: Hyperparameters, n: int
    ) -> tuple[np.ndarray, InducingKernels]:
        """At most `n` of the inputs, and their kernels."""
        network, blocks = self._network(), self._blocks(x)

        def with_all(some: np.ndarray) -> np.ndarray:
            return np.concatenate([network.cross(block, some, values) for block in blocks])

        variances = np.concatenate([network.variances(block, values) for block in blocks])
        chosen = choose_inducing(variances, lambda i: with_all(x[i : i + 1])[:, 0], n)
        some = x[chosen]
        return some, InducingKernels(network.square(some, values), with_all(some).T, variances)

    def _blocks(self, x: np.ndarray) -> list[np.ndarray]:
        # Of one size, for which kernels are compiled.
        return np.array_split(x, -(-len(x) // self.batch_size))

    def _warn(self, message: str) -> None:
        warnings.warn(message, ConvergenceWarning, stacklevel=3)


def _scaling(X: np.ndarray) -> tuple[np.ndarray, float]:
    """The mean of each column, and the root mean square of what is left, 1 if nothing is."""
    x = X.reshape(len(X), -1)
    mean = x.mean(axis=0)
    rest = x - mean
    largest = np.abs(rest).max(initial=0)
    return mean, float(largest * np.sqrt(np.mean((rest / largest) ** 2))) if largest > 0 else 1.0
