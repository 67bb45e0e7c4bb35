"""Softmax over positions, whose logits have any covariance."""
