"""What users import has an example in its docstring; pytest runs them where they stand."""

from importlib import import_module
from typing import Any

import pytest

PACKAGES = ("lvd_lightning.circuits", "lvd_lightning.stages", "callbacks", "datamodules")
OTHERS = (
    *(("lvd_lightning", "Run"), ("lvd_lightning.parts", "ImagePatches"), ("lvd_lightning.units", "BitsPerDimension")),
    *(("lvd_lightning.units", "Perplexity"), ("lvd_lightning.units", "Nats")),
)


def public() -> list[Any]:
    named = [(package, name) for package in PACKAGES for name in import_module(package).__all__]
    return [pytest.param(package, name, id=f"{package}.{name}") for package, name in (*named, *OTHERS)]


@pytest.mark.parametrize(("package", "name"), public())
def test_an_example(package: str, name: str) -> None:
    text = getattr(import_module(package), name).__doc__ or ""
    assert ">>> " in text
    assert "+SKIP" not in text
