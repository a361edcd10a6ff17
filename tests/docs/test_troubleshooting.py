"""The page of errors quotes what the program says."""

import re
from functools import cache

import pytest
from helpers.pages import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
#: What stands for something of the user's: words in capitals, single capitals, and what was left out.
STANDS = r"\.\.\.|\b[A-Z]{2,}\b|'?\b[A-Z]\b'?|'val'|above 8|'"


@cache
def source() -> str:
    """All code, with strings that are broken over lines put together."""
    files = [path for folder in ("lvd_lightning", "datamodules") for path in ROOT.glob(f"{folder}/**/*.py")]
    text = "\n".join(path.read_text() for path in [*files, ROOT / "Makefile"])
    text = re.sub(r'"\s*\n\s*f?"', "", text)
    return re.sub(r"\{[^{}]*\}", "{}", text).replace("`", "").replace("'", "")


def quoted() -> list[str]:
    """Of every message its longest piece that is not the user's."""
    messages = re.findall(r"^\| `([^|]+)`", PAGE.read_text(), re.MULTILINE)
    pieces = [re.split(STANDS, message.replace("`", "")) for message in messages]
    return [max((piece.strip(" :;(),") for piece in found), key=len) for found in pieces]


@pytest.mark.parametrize("piece", quoted())
def test_the_program_says_so(piece: str) -> None:
    assert len(piece) >= 7
    assert piece.replace("'", "") in source()


def test_there_are_many() -> None:
    assert len(quoted()) > 40
