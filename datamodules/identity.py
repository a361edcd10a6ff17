"""Digests of examples: whether numbers of images mean what they meant when results were computed from them."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from datamodules.images import ImageRows

__all__ = ["digest", "identity_of_files", "identity_of_images"]

# Images that one thread reads and digests at a time.
BLOCK_IMAGES = 4096
# Of larger splits, images spread evenly over so many bytes are looked at: about ten seconds.
MAX_BYTES = 1 << 32


def digest(*parts: bytes) -> str:
    """32 hexadecimal digits that differ for other bytes, or others between the parts."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()


def identity_of_files(files: Iterable[tuple[str, str]]) -> str:
    """Of images that come from files, by their names and the digests of what the files hold, in order."""
    return digest(*(text.encode("utf-8", "surrogateescape") for name_and_digest in files for text in name_and_digest))


def identity_of_images(images: Tensor | ImageRows) -> str:
    """Of the images of a split, (N, C, H, W), in order; of a split beyond `MAX_BYTES` some stand for all."""
    first = images[:1]
    bytes_per_image = max(1, first.numel() * first.element_size())
    count = min(len(images), max(1, MAX_BYTES // bytes_per_image))
    rows = torch.from_numpy(np.linspace(0, len(images) - 1, count).round().astype(np.int64))

    def digest_block(block: Tensor) -> bytes:
        return digest(images[block].contiguous().numpy().tobytes()).encode()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        blocks = list(pool.map(digest_block, rows.split(BLOCK_IMAGES)))
    return digest(str((*images.shape, first.dtype)).encode(), *blocks)
