"""Tractable deep generative models by latent variable distillation, on Lightning."""
