"""The classifier: scikit-learn's contract, the model behind it, edges, errors."""

from sklearn.utils.estimator_checks import parametrize_with_checks

from taylor_softmax.sklearn import InfiniteNetworkClassifier


@parametrize_with_checks([InfiniteNetworkClassifier()])
def test_contract_of_scikit_learn(estimator, check):
    check(estimator)
