"""Softmax attention at 1/sqrt(d), whose queries and keys have any covariance."""
