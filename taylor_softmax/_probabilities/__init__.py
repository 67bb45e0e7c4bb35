"""Softmax of Gaussian logits: class probabilities, and the posterior that class labels give."""
