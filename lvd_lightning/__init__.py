"""Latent variable distillation: probabilistic circuits that learn from deep generative models."""

from typing import Any

__all__ = ["Run", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`Run` is imported when it is asked for: users of circuits alone have no need of Lightning."""
    if name != "Run":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lvd_lightning.runs.run import Run

    return Run
