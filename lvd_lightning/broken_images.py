"""What reading an image raises when its file, or the archive around it, is damaged."""

import struct
import zipfile
import zlib

from PIL import Image, UnidentifiedImageError

__all__ = ["BROKEN_IMAGE", "why_broken"]

#: Of Pillow's decoders, on damaged files and on kinds that they do not know; and of zip archives.
BROKEN_IMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, OverflowError, NotImplementedError, RuntimeError),
    # Of a TIFF whose places of pixels are said to be fractions.
    *(TypeError, AttributeError, MemoryError),
    *(struct.error, zlib.error, Image.DecompressionBombError, zipfile.BadZipFile),
)


def why_broken(error: Exception) -> str:
    """What to tell of one of these; Pillow's own words for what it does not know name an object in memory."""
    return "its contents are no image" if isinstance(error, UnidentifiedImageError) else str(error)
