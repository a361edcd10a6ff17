"""Seeds of random numbers, derived from what they are for."""

import hashlib

import torch

__all__ = ["derive_seed", "generator_for"]


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^32) that is a function of `parts` alone: the same in every process and on every machine.

    Python's own `hash` is salted per process, and sums of seeds collide (seed 0, epoch 1 against seed 1, epoch 0).
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def generator_for(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by `derive_seed(*parts)`."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))
