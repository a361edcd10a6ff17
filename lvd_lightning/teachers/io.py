"""Save and load teachers: arguments as JSON, weights as safetensors; loading runs no code from the files."""

import inspect
import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from lvd_lightning.files import parse_json, write_atomically, write_tensors

__all__ = ["ARGUMENTS_FILE", "WEIGHTS_FILE", "load_teacher", "register_teacher", "save_teacher"]

ARGUMENTS_FILE = "teacher.json"
WEIGHTS_FILE = "teacher.safetensors"

# A number in a teacher's arguments may be as large, however small its weights are.
_ANY_SIZE = 1 << 12

Teacher = TypeVar("Teacher", bound=type[nn.Module])

# The classes that may be named in a file, and the modules of those that are imported when they are needed.
_TEACHERS: dict[str, type[nn.Module] | str] = {
    "Encoder": "lvd_lightning.teachers.encoder",
    "ImageFlow": "lvd_lightning.teachers.image_flow",
    "MAE": "lvd_lightning.teachers.mae",
    "TableFlow": "lvd_lightning.teachers.table_flow",
    "VQVAE": "lvd_lightning.teachers.vqvae",
}


def register_teacher(kind: Teacher) -> Teacher:
    """Let files name a class of teachers; a decorator for the class.

    Call it where the class is defined, and import that module before such a teacher is loaded: the stage that trains it
    is named in the run's configuration, and stands in the same module best. A class may be defined anew, in a notebook
    for example; then the last one counts.

    Raises:
        ValueError: something else than a class of modules, or one whose name another class has.

    Example:
        >>> from torch import nn
        >>> from lvd_lightning.teachers import register_teacher
        >>> @register_teacher
        ... class Pixels(nn.Module):
        ...     contextual, positional, init_args = False, False, {}
    """
    if not (inspect.isclass(kind) and issubclass(kind, nn.Module)):
        raise ValueError(f"register_teacher: expected a class derived from torch.nn.Module, got {kind!r}")
    known = _TEACHERS.get(kind.__name__, kind.__module__)
    module = known if isinstance(known, str) else known.__module__
    if module != kind.__module__:
        raise ValueError(
            f"register_teacher: there is a teacher {kind.__name__} in {module} already; files tell teachers by their "
            "names: choose another"
        )
    _TEACHERS[kind.__name__] = kind
    return kind


def save_teacher(teacher: nn.Module, stage_dir: str | os.PathLike[str]) -> None:
    """Write a teacher into a folder, the arguments last.

    Args:
        teacher: of a class of `lvd_lightning.teachers` or a registered one, with its constructor's arguments in
            `init_args`.

    Raises:
        ValueError: files may not name its class.
    """
    kind = type(teacher)
    known = _TEACHERS.get(kind.__name__)
    if known not in (kind, kind.__module__):
        raise ValueError(f"{kind.__name__} is no teacher that files may name: call register_teacher({kind.__name__})")
    folder = Path(stage_dir)
    folder.mkdir(parents=True, exist_ok=True)
    arguments = json.dumps({"class": type(teacher).__name__, "init_args": teacher.init_args}, indent=2)
    write_tensors(folder / WEIGHTS_FILE, teacher.state_dict())
    write_atomically(folder / ARGUMENTS_FILE, arguments + "\n")


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
        description = parse_json((folder / ARGUMENTS_FILE).read_text())
        _check_sizes(description["init_args"], (folder / WEIGHTS_FILE).stat().st_size)
        teacher = _build(description)
        teacher.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (KeyError, TypeError, RuntimeError, SafetensorError, MemoryError, OverflowError) as error:
        raise ValueError(f"the teacher in {folder} cannot be read ({error!r}): train it again") from error
    return teacher.eval().requires_grad_(False)


def _check_sizes(arguments: Any, num_bytes: int) -> None:
    """Raise a TypeError for a number that stands for more parameters than the weights' file has bytes."""
    found = [arguments]
    while found:
        value = found.pop()
        if isinstance(value, dict):
            found += value.values()
        elif isinstance(value, list):
            found += value
        elif isinstance(value, int) and abs(value) > max(num_bytes, _ANY_SIZE):
            raise TypeError(f"{value} in {ARGUMENTS_FILE}, but {WEIGHTS_FILE} has {num_bytes:,} bytes")


def _build(description: dict[str, Any]) -> nn.Module:
    name = description["class"]
    if name not in _TEACHERS:
        raise ValueError(
            f"teacher class {name!r} is unknown, expected one of {', '.join(sorted(_TEACHERS))}; one of your own is "
            "made known by register_teacher"
        )
    found = _TEACHERS[name]
    kind: type[nn.Module] = getattr(import_module(found), name) if isinstance(found, str) else found
    return kind(**description["init_args"])
