"""Latent variables from features: which patches see which, features on disk, K-means, assignments."""

from lvd_lightning.latents.assignments import load_assignments, load_latents_info
from lvd_lightning.latents.settings import LatentsSettings

__all__ = ["LatentsSettings", "load_assignments", "load_latents_info"]
