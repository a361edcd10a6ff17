"""Which keys `shared:` may have: nothing would read a misspelt one, and the run would be another one than meant."""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

__all__ = ["check_shared", "references"]

_REFERENCE = re.compile(r"\$\{[^}]*?\bshared[.\[]([\w-]+)")


def check_shared(shared: Mapping[str, Any], files: Sequence[Path], arguments: Iterable[str]) -> None:
    """Raise a ValueError if a shared value is neither one of the first config's nor referred to by anything.

    shared: the values of the resolved configuration; files: those given by --config, overlays after the first;
    arguments: the command line, which may hold references as well.
    """
    if not files:
        return
    texts = [*(path.read_text() for path in files), *arguments]
    known = {*_shared_keys(files[0]), *(key for text in texts for key in references(text))}
    for key in shared:
        if key not in known:
            places = [str(path) for path in files[1:] if key in _shared_keys(path)]
            close = get_close_matches(key, sorted(known), n=1)
            raise ValueError(
                f"shared.{key} ({places[0] if places else 'from the command line'}): there is no such shared value in "
                f"{files[0]}, and nothing refers to it as ${{shared.{key}}}; "
                f"{f'did you mean shared.{close[0]}? ' if close else ''}known are {', '.join(sorted(known))}"
            )


def references(text: str) -> list[str]:
    """The keys that a text refers to, as in ${shared.key}."""
    return _REFERENCE.findall(text)


def _shared_keys(path: Path) -> list[str]:
    config = OmegaConf.load(path)
    shared = config.get("shared") if isinstance(config, DictConfig) else None
    return [str(key) for key in shared] if isinstance(shared, DictConfig) else []
