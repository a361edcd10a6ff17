"""Zip archives of users: what Python cannot read is said in one line, before anything is decoded."""

import struct
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_members", "check_size", "open_archive", "read_member"]

# Kinds of compression by their numbers in the format.
COMPRESSIONS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "XZ", 96: "JPEG", 98: "PPMd", 99: "AES"}
# Bits of a member's flags: encrypted, patched data, strongly encrypted.
ENCRYPTED, PATCHED, STRONGLY_ENCRYPTED = 0x1, 0x20, 0x40
# A member that unpacks to more than this many bytes, and to so many times what it takes packed, is no data.
MOST_BYTES, MOST_RATIO = 1 << 28, 200
REMEDY = "unpack it and give the folder, or pack it again in the ordinary way (zip -r)"


@contextmanager
def open_archive(path: Path, of: str = "images") -> Iterator[zipfile.ZipFile]:
    """Open a .zip archive.

    of: what it is expected to hold, for messages.

    Raises:
        ValueError: it is none, is damaged or is of a kind that cannot be read; the message names it.
    """
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        what = f"expected a folder or an intact .zip archive of {of}"
        raise ValueError(f"{path}: {what} ({error})" + (f": {REMEDY}" if "disk" in str(error) else "")) from error
    except NotImplementedError as error:
        raise ValueError(f"{path}: this kind of archive cannot be read ({error}): {REMEDY}") from error
    except (OverflowError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a folder or an intact .zip archive of {of} ({error})") from error
    with archive:
        yield archive


def check_members(archive: zipfile.ZipFile, path: Path, names: Iterable[str], of: str = "images") -> None:
    """Raise a ValueError that says why, if members of an archive are encrypted or packed in a way that cannot be read.

    names: the members that will be read; of: what they are, for messages.
    """
    obstacles: dict[tuple[int, int], str] = {}
    unreadable: dict[str, str] = {}
    for name in names:
        info = archive.getinfo(name)
        kind = info.compress_type, info.flag_bits & (ENCRYPTED | PATCHED | STRONGLY_ENCRYPTED)
        if kind not in obstacles:
            obstacles[kind] = _obstacle(archive, info)
        if obstacles[kind]:
            unreadable[name] = obstacles[kind]
    if unreadable:
        first, obstacle = next(iter(unreadable.items()))
        raise ValueError(f"{path}: {len(unreadable)} of its {of} are {obstacle}, {first} for one: {REMEDY}")


def read_member(archive: zipfile.ZipFile, path: Path, name: str) -> bytes:
    """The contents of a member; never more than its entry says.

    Raises:
        ValueError: it unpacks to far more than it takes packed: a few bytes would fill all memory.
    """
    check_size(archive.getinfo(name), path)
    return archive.read(name)


def check_size(info: zipfile.ZipInfo, path: Path) -> None:
    """Raise a ValueError for a member that unpacks to far more than it takes packed."""
    if info.file_size > max(MOST_BYTES, MOST_RATIO * info.compress_size):
        raise ValueError(
            f"{path}: {info.filename} unpacks from {info.compress_size:,} to {info.file_size:,} bytes, expected at "
            f"most {MOST_BYTES:,} or {MOST_RATIO} times as many: if it is no trap, unpack it and give what is in it"
        )


def _obstacle(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> str:
    """Why a member cannot be read; empty if nothing stands against it. Damages are noticed when it is read."""
    if info.flag_bits & (ENCRYPTED | STRONGLY_ENCRYPTED):
        return "encrypted"
    try:
        archive.open(info).close()
    except (NotImplementedError, RuntimeError) as error:
        method = COMPRESSIONS.get(info.compress_type, f"method {info.compress_type}")
        return f"compressed with {method}, which Python cannot read here ({error})"
    except (OSError, ValueError, zipfile.BadZipFile):
        return ""
    return ""
