"""Fixtures: small assembled circuits with their mathematics by brute force, and small runs of the circuit students."""

from helpers.assemblies import (
    assembled,
    double_precision,
    images,
    make_assembly,
    make_run,
    one_thread,
    run,
    small_images,
)

__all__ = ["assembled", "double_precision", "images", "make_assembly", "make_run", "one_thread", "run", "small_images"]
