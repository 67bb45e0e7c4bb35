"""Numerical tools that all axes share; nothing here knows of networks."""
