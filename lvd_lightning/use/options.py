"""What the commands that use a finished run have in common: their options, and how the run is opened."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from lvd_lightning.use.trained import Trained

__all__ = [
    "Command",
    "CommandParser",
    "add_batch",
    "add_fit",
    "add_out",
    "add_seed",
    "add_sources",
    "folder_of",
    "open_chosen",
]


@dataclass(frozen=True)
class Command:
    """text: one line for the overview. example: follows the options in --help. computes: whether a device matters."""

    text: str
    example: str
    add_options: Callable[[argparse.ArgumentParser], None]
    act: Callable[[argparse.Namespace], None]
    computes: bool = True


class CommandParser(argparse.ArgumentParser):
    """One whose mistakes are errors and no exits."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help tells what it takes")


def open_chosen(chosen: argparse.Namespace) -> Trained:
    """The circuit that --run names, on --device; a ValueError says what is wrong with either."""
    import torch

    from lvd_lightning.use.trained import open_trained

    name = chosen.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device: got {name!r}, which is not there ({str(error).splitlines()[0]}): say cpu"
        ) from error
    return open_trained(chosen.run, device)


def folder_of(chosen: argparse.Namespace, name: str) -> Path:
    """Where a command of this name writes."""
    return Path(chosen.out) if chosen.out else Path(chosen.run) / "use" / name


def add_out(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("-o", "--out", metavar="FOLDER", help=f"where files go (default: use/{name} in the run)")


def add_seed(parser: argparse.ArgumentParser, of: str) -> None:
    parser.add_argument("--seed", type=int, default=0, help=f"of {of} (default: 0)")


def add_fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fit", choices=("resize", "crop", "tile"), help="what to do with pictures of another size (default: refuse)"
    )


def add_sources(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGES|FOLDER|ZIP", help=what)


def add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch", type=int, default=64, help="pictures computed together; changes memory and time alone (default: 64)"
    )
