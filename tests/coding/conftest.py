"""Fixtures of assembled circuits."""

from helpers.assemblies import double_precision, images, one_thread

__all__ = ["double_precision", "images", "one_thread"]
