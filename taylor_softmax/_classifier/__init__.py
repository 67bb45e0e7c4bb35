"""What `taylor_softmax.sklearn` is made of, nothing of it scikit-learn's."""
