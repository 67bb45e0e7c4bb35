"""Layers under the contract of `neural_tangents.stax`: what becomes of a `Kernel`.

They know of neural_tangents and call the mathematics, which does not.
"""
