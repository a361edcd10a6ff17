"""Runs that were begun when `ycocg_r` meant codes that wrap around: what is in them tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lvd_lightning.circuits.io import stored_leaves
from lvd_lightning.files import read_json
from lvd_lightning.runs.experiment import Experiment
from lvd_lightning.teachers.io import ARGUMENTS_FILE

__all__ = ["check_codes"]

_BYTES = 256


def check_codes(experiment: Experiment) -> None:
    """Raise a ValueError if a run under `ycocg_r` holds circuits or teachers of the bytes that it once stood for.

    The chroma of its codes has 511 values now, and had 256.
    """
    for stage in experiment.stages:
        arguments = (stage.config.get("data") or {}).get("init_args") or {}
        folder = experiment.run_dir / stage.name
        if arguments.get("color") == "ycocg_r" and folder.is_dir() and _most_values(folder) == _BYTES:
            raise ValueError(
                f"{experiment.run_dir} was begun with ycocg_r codes that wrap around in bytes, which are called "
                "ycocg_r_mod256 now: write color: ycocg_r_mod256 there (in its config.yaml files), or choose another "
                "--name"
            )


def _most_values(folder: Path) -> int | None:
    """The most values that a variable of a stage's circuits or teacher has; None if it has neither."""
    found = [number for path in folder.glob("*.safetensors") for number in _values_of_circuit(path)]
    path = folder / ARGUMENTS_FILE
    if path.is_file():
        content = read_json(path)
        # The first ones of ours knew bytes alone and did not say so; of others nothing is known.
        silent: Any = _BYTES if content.get("class") in ("MAE", "VQVAE") else []
        numbers: Any = content.get("init_args", {}).get("num_categories", silent)
        found += [numbers] if isinstance(numbers, int) else list(numbers)
    return max(found, default=None)


def _values_of_circuit(path: Path) -> list[int]:
    """Values of a circuit's variables; none of evidence, of continuous ones and in other files."""
    try:
        leaves = stored_leaves(path)
    except ValueError:
        return []
    return [leaf.num_outcomes for leaf in leaves if leaf.num_outcomes is not None and not leaf.is_evidence]
