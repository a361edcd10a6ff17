"""Latent variable distillation: probabilistic circuits that learn from deep generative models."""

__all__ = ["__version__"]

__version__ = "0.1.0"
