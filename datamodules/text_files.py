"""Texts in a file, in the files of a folder or of a .zip archive: read as UTF-8, or refused with the file's name."""

import codecs
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from datamodules.files import require
from datamodules.identity import digest
from lvd_lightning.archives import check_members, open_archive, read_member
from lvd_lightning.image_names import names_in_archive, names_in_folder

__all__ = ["TEXT_EXTENSIONS", "TextFile", "decode_text", "read_texts"]

TEXT_EXTENSIONS = {".md", ".rst", ".tex", ".text", ".tokens", ".txt"}
EXPECTED = "expected a text file, a folder of text files or a .zip archive of them"

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_REMEDY = "save it as UTF-8 (iconv -f {} -t UTF-8)"


@dataclass(frozen=True)
class TextFile:
    """A text. name: where it was read, for messages; lines: without their ends; digest: of the file's bytes."""

    name: str
    lines: list[str]
    digest: str


def read_texts(path: Path) -> tuple[list[TextFile], dict[str, int]]:
    """The texts at a path, by their names, and how many files are left out for which reason.

    Of folders and archives, files are read whose names end like a text's; a file that is named itself may end in
    anything.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: a file is empty, binary or not UTF-8; the message names it.
    """
    if path.is_dir():
        names = names_in_folder(path, TEXT_EXTENSIONS)
        contents = [(str(path / stored), (path / stored).read_bytes()) for _, stored in sorted(names.stored.items())]
        left_out = names.left_out
    elif path.suffix.lower() == ".zip":
        require([path], EXPECTED)
        contents, left_out = _read_archive(path)
    else:
        require([path], EXPECTED)
        contents, left_out = [(str(path), path.read_bytes())], {}
    if not contents:
        told = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise ValueError(
            f"{path}: holds no texts; expected files that end in {', '.join(sorted(TEXT_EXTENSIONS))}"
            + (f" (left out: {told})" if told else "")
        )
    return [TextFile(name, decode_text(name, content), digest(content)) for name, content in contents], left_out


def decode_text(name: str, content: bytes) -> list[str]:
    """The lines of a text file.

    Raises:
        ValueError: it is empty, binary or not UTF-8.
    """
    if not content.strip():
        raise ValueError(f"{name}: is empty, expected text")
    if content.startswith(_UTF16):
        raise ValueError(f"{name}: is UTF-16, expected UTF-8: {_REMEDY.format('UTF-16')}")
    if b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        raise ValueError(f"{name}: is a binary file (a zero byte in line {line}), expected text")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{name}: is not UTF-8 (byte 0x{content[error.start]:02x} in line {line}): {_REMEDY.format('LATIN1')}"
        ) from error
    lines = re.split(r"\r\n|\r|\n", text)
    return lines[:-1] if not lines[-1] else lines


def _read_archive(path: Path) -> tuple[list[tuple[str, bytes]], dict[str, int]]:
    with open_archive(path, of="texts") as archive:
        names = names_in_archive(archive, TEXT_EXTENSIONS)
        check_members(archive, path, names.stored.values(), of="texts")
        contents = []
        for _, stored in sorted(names.stored.items()):
            try:
                contents.append((f"{path}: {stored}", read_member(archive, path, stored)))
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:
                raise ValueError(f"{path}: {stored} cannot be read ({error}): pack the archive again") from error
    return contents, names.left_out
