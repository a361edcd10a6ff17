"""Fixtures: double precision."""

from helpers.assemblies import double_precision

__all__ = ["double_precision"]
