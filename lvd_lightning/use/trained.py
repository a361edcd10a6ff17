"""A trained circuit over pictures, opened for use: from a run, or from a folder that `export` wrote."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from lvd_lightning.files import read_json
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.parts import ImagePatches
from lvd_lightning.use.codes import ImageCodes

if TYPE_CHECKING:
    from lvd_lightning.runs.run import Run

__all__ = ["CONFIG", "FORMAT", "Trained", "from_pretrained", "open_trained"]

#: The file of an exported folder that says what it is, and what stands in it under "format".
CONFIG, FORMAT = "config.json", "lvd_lightning.pretrained.1"


@dataclass(frozen=True)
class Trained:
    """A circuit over whole pictures, with the code that it was trained on.

    folder: of the run, or of what was exported. run: None for the latter.
    """

    circuit: AssembledCircuit
    codes: ImageCodes
    folder: Path
    run: Run | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def parts(self) -> ImagePatches:
        return cast(ImagePatches, self.circuit.parts)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of codes."""
        channels, height, width = self.parts.example_shape
        return channels, height, width

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures that it takes."""
        return self.codes.picture_size(self.shape)

    @property
    def device(self) -> torch.device:
        return self.circuit.prior.device


def open_trained(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Trained:
    """The circuit of a finished run, or of a folder that `export` wrote.

    Raises:
        ValueError: it is neither, the run has no model yet, or its model is none of pictures; the message says what to
            do.
    """
    folder = Path(path)
    config = folder / CONFIG
    if config.is_file():
        return from_pretrained(folder, device)
    if not (folder / "config.yaml").is_file():
        raise ValueError(
            f"{path} is neither a run directory nor an exported folder: it holds no config.yaml and no {CONFIG}; give "
            "the folder that `train.py fit` or `train.py export` wrote"
        )
    from lvd_lightning.runs.run import Run

    run = Run.open(folder)
    circuit = _of_pictures(run.model(device), folder)
    return Trained(circuit, ImageCodes.of_data(run.experiment.data()), run.dir, run)


def from_pretrained(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> Trained:
    """The circuit in a folder that `export` wrote, or in a copy of it. No code is run that is in the folder.

    Raises:
        ValueError: the folder is none of these, is of a newer format, or is damaged.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} is no exported folder: it holds no {CONFIG}; `train.py export` writes such folders")
    config: Any = read_json(path)
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: its format is {found!r}, this program reads {FORMAT!r}; export it again")
    try:
        codes = ImageCodes(**config["codes"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: does not say how pictures are encoded ({error}); export it again") from error
    circuit = _of_pictures(AssembledCircuit.load(folder), folder).to(device).eval()
    return Trained(circuit, codes, folder.resolve())


def _of_pictures(circuit: Any, folder: Path) -> AssembledCircuit:
    if not isinstance(circuit, AssembledCircuit) or not isinstance(circuit.parts, ImagePatches):
        what = f"a {type(circuit).__name__}" if not isinstance(circuit, AssembledCircuit) else "a circuit"
        raise ValueError(
            f"{folder}: its model is {what} that is not over pictures; `train.py infill` is for texts, and "
            "`Run.open(...).model()` gives any model in Python"
        )
    return circuit
