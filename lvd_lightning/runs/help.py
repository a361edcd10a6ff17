"""What --help prints: the options and the stages of an experiment on one screen, or the settings of one stage."""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lvd_lightning.runs.objects import class_of
from lvd_lightning.stages.stage import Stage

__all__ = ["help_wanted", "overview", "stage_help"]

_WIDTH = 120


def help_wanted(words: Sequence[str]) -> str | None:
    """The stage whose settings `--help STAGE` asks for, "" for the overview, None if nobody asks."""
    for number, word in enumerate(words):
        option, _, name = word.partition("=")
        if option in ("-h", "--help"):
            following = words[number + 1] if number + 1 < len(words) else ""
            return name or (following if not following.startswith("-") else "")
    return None


def overview(stages: Mapping[str, str]) -> str:
    """What follows the options: the stages with their classes (by name, in order), and how to learn more."""
    if not stages:
        return "stages:\n  those of a --config, such as --config photos"
    width = max(map(len, stages))
    listed = [f"  {name:{width}}  {class_path}" for name, class_path in stages.items()]
    return "\n".join(
        ["stages:", *listed, "", f"One stage's settings: --help STAGE, such as --help {next(iter(stages))}"]
    )


def stage_help(name: str, class_path: str, chosen: Mapping[str, Any]) -> str:
    """A stage's class, and a line for each of its settings: the option, its value and what it is.

    chosen: what the config says of it; the other values are defaults.
    """
    kind = class_of(class_path, Stage)
    text = inspect.getdoc(kind) or ""
    rows = []
    for setting, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = "" if parameter.default is parameter.empty else parameter.default
        value = chosen.get(setting, default)
        rows.append((setting, "null" if value is None else str(value), _said(kind, setting)))
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    lines = [f"  {option:{widths[0]}}  {value:{widths[1]}}  {said}".rstrip() for option, value, said in rows]
    return "\n".join(
        [
            f"{name}: {class_path}",
            text.split("\n\n")[0].replace("\n", " "),
            "",
            f"--stages.{name}.model.SETTING VALUE, where SETTING and its value here are",
            *(line if len(line) <= _WIDTH else f"{line[: _WIDTH - 4]} ..." for line in lines),
            "",
            f"--stages.{name}.trainer.ARGUMENT VALUE: of its Trainer; --stages.{name}.data: data of its own",
        ]
    )


def _said(kind: type, setting: str) -> str:
    """What the Args of a class say of a setting, in one line; those of a base that they point to."""
    for base in inspect.getmro(kind):
        text = inspect.cleandoc(base.__doc__ or "")
        found = re.search(rf"^    (?:\w+, )*{setting}(?:, \w+)*: (.*(?:\n        .*)*)", text, re.MULTILINE)
        if found and not found[1].startswith("see "):
            return " ".join(found[1].split())
    return ""
