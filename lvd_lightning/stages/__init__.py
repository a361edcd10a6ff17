"""Stages of experiments, one file each; each is imported when it is first asked for."""

from importlib import import_module
from typing import Any

_HOMES = {
    "MAETeacher": "mae_teacher",
    "VQVAETeacher": "vqvae_teacher",
    "Latents": "latents",
    "ConditionalStudent": "conditional",
    "PriorStudent": "prior",
    "FinetuneStudent": "finetune",
    "CircuitBaseline": "baseline",
    "PlainStage": "stage",
    "Stage": "stage",
    "StageModule": "stage",
}

__all__ = [
    "CircuitBaseline",
    "ConditionalStudent",
    "FinetuneStudent",
    "Latents",
    "MAETeacher",
    "PlainStage",
    "PriorStudent",
    "Stage",
    "StageModule",
    "VQVAETeacher",
]


def __getattr__(name: str) -> Any:
    """A circuit user does not pay for importing a teacher, and the other way round."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
