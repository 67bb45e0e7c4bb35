"""Softmax of independent Gaussian logits: class probabilities and what follows from them."""
