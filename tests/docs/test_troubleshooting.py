"""The page of errors quotes what the program says."""

import re
from functools import cache

import pytest
from helpers.messages import Message, messages, pattern, quotes
from helpers.pages import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
#: What stands for something of the user's: words in capitals, single capitals, and what was left out.
STANDS = r"\.\.\.|\b[A-Z]{2,}\b|'?\b[A-Z]\b'?|'val'|above 8|'"


@cache
def source() -> str:
    """All code, with strings that are broken over lines put together."""
    files = [
        path for folder in ("lvd_lightning", "datamodules", "callbacks") for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    text = "\n".join(path.read_text() for path in [*files, ROOT / "Makefile"])
    text = re.sub(r'"\s*\n\s*f?"', "", text)
    return re.sub(r"\{[^{}]*\}", "{}", text).replace("`", "").replace("'", "")


def lines(text: str) -> list[str]:
    """The messages in the first cells of the page's tables, or of those of a part of it."""
    cells = re.findall(r"^\| (`.*?) \| ", text, re.MULTILINE)
    return [line for cell in cells for line in re.findall(r"`([^`]+)`", cell)]


def quoted() -> list[str]:
    """Of every message its longest piece that is not the user's."""
    pieces = [re.split(STANDS, line) for line in lines(PAGE.read_text())]
    return [max((piece.strip(" :;(),") for piece in found), key=len) for found in pieces]


@pytest.mark.parametrize("piece", quoted())
def test_the_program_says_so(piece: str) -> None:
    assert len(piece) >= 4
    assert piece.replace("'", "") in source()


def test_there_are_many() -> None:
    assert len(quoted()) > 40


def of_circuits(found: Message) -> bool:
    return found.where.startswith("lvd_lightning/circuits/")


def missing(section: str, found: list[Message]) -> list[str]:
    """The messages that no row of a part of the page quotes."""
    patterns = [pattern(line) for line in lines(section)]
    return [f"{one.where}: {one.text}" for one in found if not quotes(patterns, one)]


def test_every_message_of_the_commands_is_on_the_page() -> None:
    """A new message needs a row: what it says, with words in capitals for what it puts in, and what to do."""
    commands, _ = PAGE.read_text().split("## The circuit library")
    assert missing(commands, [found for found in messages() if not of_circuits(found)]) == []


def test_rows_of_the_commands_say_more_than_a_word() -> None:
    commands, _ = PAGE.read_text().split("## The circuit library")
    short = [line for line in lines(commands) if len(re.findall("[a-z]", line)) < 7]
    assert short == []


def test_every_message_of_the_circuit_library_is_on_the_page() -> None:
    """Its rows are coarser: they say how a line begins."""
    assert missing(PAGE.read_text(), [found for found in messages() if of_circuits(found)]) == []


def test_the_walk_finds_messages() -> None:
    assert len(messages()) > 450
    texts = [found.text for found in messages()]
    assert "{}: is there and holds something; give a new folder" in texts
    assert not quotes([pattern("`x: got Y, expected Z`")], Message("", "x: has {}"))
    assert quotes([pattern("`FILE: has N pixels`")], Message("", "{}: has {} pixels, expected {}"))
