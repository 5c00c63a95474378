"""FAME and its baselines for sequential recommendation, in JAX."""

__version__ = '0.1.0'
