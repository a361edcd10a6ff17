"""Latent variable distillation: probabilistic circuits that learn from deep generative models."""

from lvd_lightning.lazy import lazy_names

__all__ = ["Run", "__version__"]

__version__ = "0.1.0"

# Users of circuits alone have no need of Lightning, which `Run` imports.
__getattr__, _ = lazy_names(__name__, {"Run": "runs.run"})
