"""What may import what: the circuits hardly anything, and the contracts of import-linter name every dependency."""

import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import grimp
import pytest

if sys.version_info < (3, 11):
    pytest.skip("tomllib is of Python 3.11", allow_module_level=True)

import tomllib

ALLOWED = {"torch", "numpy", "scipy", "safetensors"}
BESIDES = {"typing_extensions", "triton", "pyjuice"}  # the first two come with torch; the last one is asked for by name


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())


def test_circuits_import_few_packages() -> None:
    graph = grimp.build_graph("lvd_lightning", include_external_packages=True, cache_dir=None)
    found = set()
    for module in graph.find_descendants("lvd_lightning.circuits") | {"lvd_lightning.circuits"}:
        found |= {name.split(".")[0] for name in graph.find_modules_directly_imported_by(module)}
    assert found - set(sys.stdlib_module_names) - {"lvd_lightning"} <= ALLOWED | BESIDES


def test_every_other_dependency_is_forbidden_to_circuits(project: dict[str, Any]) -> None:
    needed = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["wandb"]
    forbidden = next(
        set(contract["forbidden_modules"])
        for contract in project["tool"]["importlinter"]["contracts"]
        if contract["name"].startswith("Circuits import")
    )
    modules: dict[str, set[str]] = {}  # of every distribution
    for module, names in packages_distributions().items():
        for name in names:
            modules.setdefault(name.lower().replace("_", "-"), set()).add(module)
    names = {re.split(r"[\[<>=]", text)[0] for text in needed} - ALLOWED - {"typing-extensions"}
    assert len(names) > 8
    for name in names:
        # Where wandb is not installed its name stands for itself.
        assert modules.get(name, {name}) & forbidden, f"pyproject.toml: {name} is missing among the forbidden modules"
