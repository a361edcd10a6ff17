"""What reading an image raises when its file, or the archive around it, is damaged."""

import struct
import zipfile
import zlib

from PIL import Image

__all__ = ["BROKEN_IMAGE"]

#: Of Pillow's decoders, on damaged files and on kinds that they do not know; and of zip archives.
BROKEN_IMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, OverflowError, NotImplementedError, RuntimeError),
    *(struct.error, zlib.error, Image.DecompressionBombError, zipfile.BadZipFile),
)
