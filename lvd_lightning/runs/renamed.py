"""Names that configurations had before, each refused with the one that it has now."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["check_renamed"]

_NOW = "model: {class_path: lvd_lightning.stages.Latents, init_args: "
# What a value on the command line or in a file begins with, and what it is now.
_CLASSES = {
    "JointStudent": "FinetuneStudent",
    "lvd_lightning.modules.": "lvd_lightning.stages.",
}


def check_renamed(contents: Sequence[Mapping[str, Any]], files: Sequence[Path], words: Sequence[str]) -> None:
    """Raise a ValueError for the first old name, with the new one.

    contents: of the config files, as they are written; words: the command line.
    """
    for content, path in zip(contents, files):
        for message in _in_config(content):
            raise ValueError(f"{path}: {message}")
    for word in words:
        for message in _in_word(word):
            raise ValueError(message)


def _in_config(content: Mapping[str, Any]) -> Iterator[str]:
    stages = content.get("stages")
    for name, settings in stages.items() if isinstance(stages, Mapping) else ():
        if not isinstance(settings, Mapping):
            continue
        known = {key: value for key, value in settings.items() if key not in ("model", "data", "trainer")}
        if name == "latents" and known:
            old = ", ".join(f"{key}: {value}" for key, value in known.items())
            yield f"stages.latents is a stage like the others now: write latents: {{{_NOW}{{{old}}}}}}}"
        model = settings.get("model")
        if isinstance(model, Mapping):
            yield from _in_class(str(model.get("class_path", "")))
            arguments = model.get("init_args")
            if isinstance(arguments, Mapping) and "num_latents" in arguments:
                yield f"stages.{name}.model.init_args.num_latents is called num_units now"
            if isinstance(arguments, Mapping) and "num_threads" in arguments:
                yield f"stages.{name}.model.init_args.num_threads is gone: clusters are found with torch's threads"


def _in_word(word: str) -> Iterator[str]:
    option, _, value = word.partition("=")
    found = re.fullmatch(r"--stages\.latents\.(?!model\b|data\b|trainer\b)(\w+)", option)
    if found:
        yield f"{option} is called --stages.latents.model.{found.group(1)} now"
    found = re.fullmatch(r"(--stages\.\w+\.model)(?:\.init_args)?\.num_latents", option)
    if found:
        yield f"{option} is called {found.group(1)}.num_units now"
    yield from _in_class(value or word)


def _in_class(class_path: str) -> Iterator[str]:
    """A class path, or a value that contains one."""
    new = class_path
    for old, now in _CLASSES.items():
        new = re.sub(rf"(?<![\w.]){re.escape(old)}" if "." in old else rf"\b{old}\b", now, new)
    if new != class_path:
        yield f"{class_path} is called {new} now"
