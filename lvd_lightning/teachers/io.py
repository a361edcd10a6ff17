"""Save and load teachers: arguments as JSON, weights as safetensors; loading runs no code from the files."""

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

__all__ = ["ARGUMENTS_FILE", "WEIGHTS_FILE", "load_teacher", "save_teacher"]

ARGUMENTS_FILE = "teacher.json"
WEIGHTS_FILE = "teacher.safetensors"

# The classes that may be named in a file, and their modules: a new teacher adds its line.
_TEACHERS = {"MAE": "lvd_lightning.teachers.mae", "VQVAE": "lvd_lightning.teachers.vqvae"}


def save_teacher(teacher: nn.Module, stage_dir: str | os.PathLike[str]) -> None:
    """Write a teacher into a folder, each file under a temporary name first; the arguments last.

    Args:
        teacher: one of the classes of `lvd_lightning.teachers`, with its constructor's arguments in `init_args`.
    """
    folder = Path(stage_dir)
    folder.mkdir(parents=True, exist_ok=True)
    arguments = json.dumps({"class": type(teacher).__name__, "init_args": teacher.init_args}, indent=2)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in teacher.state_dict().items()}
    save_file(weights, folder / (WEIGHTS_FILE + ".partial"))
    os.replace(folder / (WEIGHTS_FILE + ".partial"), folder / WEIGHTS_FILE)
    (folder / (ARGUMENTS_FILE + ".partial")).write_text(arguments + "\n")
    os.replace(folder / (ARGUMENTS_FILE + ".partial"), folder / ARGUMENTS_FILE)


def load_teacher(stage_dir: str | os.PathLike[str]) -> nn.Module:
    """The teacher that `save_teacher` wrote, on the CPU, in evaluation mode and without gradients.

    Raises:
        FileNotFoundError: if there is no teacher in the folder.
        ValueError: if its files are damaged or do not belong together.
    """
    folder = Path(stage_dir)
    for name in (ARGUMENTS_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}: run stage {folder.name} first")
    try:
        teacher = _build(json.loads((folder / ARGUMENTS_FILE).read_text()))
        teacher.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (KeyError, TypeError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"the teacher in {folder} cannot be read ({error!r}): train it again") from error
    return teacher.eval().requires_grad_(False)


def _build(description: dict[str, Any]) -> nn.Module:
    name = description["class"]
    if name not in _TEACHERS:
        raise ValueError(f"teacher class {name!r} is unknown, expected one of {', '.join(sorted(_TEACHERS))}")
    module: nn.Module = getattr(import_module(_TEACHERS[name]), name)(**description["init_args"])
    return module
