"""Closed forms emitted by `python -m derivations`: do not edit."""
