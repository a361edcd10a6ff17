"""Which files of a folder or an archive are images, or texts, under which names; what is left out for which reason."""

import os
import stat
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from posixpath import commonpath

__all__ = ["EXTENSIONS", "ImageNames", "names_in_archive", "names_in_folder"]

EXTENSIONS = {".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}

BROKEN_LINK = "broken links"
PACKED_LINK = "links without what they lead to"
READ_BEFORE = "links to folders that are read already"
UNREADABLE_FOLDER = "folders that cannot be read"
UNREADABLE_FILE = "files that cannot be read"
SPECIAL = "neither files nor folders"
REPEATED = "names that come again"
HIDDEN = "hidden"


@dataclass(frozen=True)
class ImageNames:
    """The images, or texts, of a folder or an archive.

    stored: how each image is called where it lies, by its name below the folder that all images share.
    left_out: how many files, folders and links are left out, by the reason.
    """

    stored: dict[str, str]
    left_out: dict[str, int]


def names_in_folder(root: Path, extensions: Collection[str] = EXTENSIONS) -> ImageNames:
    """The images below a folder and in the folders that links lead to.

    A folder is read once, by whatever links it is reached, so that links in a circle end.

    extensions: how the names of files end that are wanted, in lower case.
    """
    left_out: Counter[str] = Counter()
    return _chosen(_walk(root, left_out), left_out, extensions)


def names_in_archive(archive: zipfile.ZipFile, extensions: Collection[str] = EXTENSIONS) -> ImageNames:
    """The images in an archive; of two with one name the last, as when it is unpacked.

    extensions: how the names of files end that are wanted, in lower case.
    """
    left_out: Counter[str] = Counter()
    members = [info for info in archive.infolist() if not info.filename.endswith(("/", "\\"))]
    files = [info.filename for info in members if not stat.S_ISLNK(info.external_attr >> 16)]
    if len(files) < len(members):
        left_out[PACKED_LINK] = len(members) - len(files)
    return _chosen(files, left_out, extensions)


def _chosen(files: Iterable[str], left_out: Counter[str], extensions: Collection[str]) -> ImageNames:
    stored: dict[PurePosixPath, str] = {}
    for file in files:
        name = _plain(file)
        reason = REPEATED if name in stored else _reason(name, extensions)
        if reason:
            left_out[reason] += 1
        if reason in ("", REPEATED):
            stored[name] = file
    common = len(PurePosixPath(commonpath([str(name.parent) for name in stored])).parts) if stored else 0
    below = {PurePosixPath(*name.parts[common:]).as_posix(): file for name, file in stored.items()}
    return ImageNames(below, dict(sorted(left_out.items())))


def _plain(name: str) -> PurePosixPath:
    """A name without what archivers add to it: backslashes, a leading slash or drive, dots for folders."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    if len(parts) > 1 and len(parts[0]) == 2 and parts[0][1] == ":":
        parts = parts[1:]
    return PurePosixPath(*parts)


def _reason(name: PurePosixPath, extensions: Collection[str]) -> str:
    """Why a file is left out, from its name; empty for one that is wanted."""
    if any(part.startswith(".") or part == "__MACOSX" for part in name.parts):
        return HIDDEN
    suffix = name.suffix.lower()
    if suffix in extensions:
        return ""
    return f"{suffix} files" if suffix else "files without an extension"


def _walk(root: Path, left_out: Counter[str]) -> Iterator[str]:
    """The files below a folder, by their paths relative to it with slashes; what cannot be read is counted.

    What links lead to comes last: a folder that lies there and has links to it as well keeps its own name.
    """
    read: set[tuple[int, int]] = set()
    folders, linked = [root], list[Path]()
    while folders or linked:
        folder = folders.pop() if folders else linked.pop(0)
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            left_out[UNREADABLE_FOLDER] += 1
            continue
        if (status.st_dev, status.st_ino) in read:
            left_out[READ_BEFORE] += 1
            continue
        read.add((status.st_dev, status.st_ino))
        for entry in entries:
            try:
                mode = entry.stat().st_mode
            except OSError:
                left_out[BROKEN_LINK if entry.is_symlink() else UNREADABLE_FILE] += 1
                continue
            path = folder / entry.name
            if stat.S_ISREG(mode):
                yield path.relative_to(root).as_posix()
            elif stat.S_ISDIR(mode):
                (linked if entry.is_symlink() else folders).append(path)
            else:
                left_out[SPECIAL] += 1
