"""Real sizes of a run's test images: this library's `compress` beside PNG, WebP, JPEG XL and a generic compressor.

    python benchmarks/compression.py --run runs/digits
    python benchmarks/compression.py --run runs/photos_pg --images 64

Prints a table: bits per dimension of all bytes of the files, and images a second to write them, on one thread. Formats
get every image as a file of its own, and once more all images side by side as one picture, since headers take much of
small files. The generic compressor (LZMA) gets the pixels of all images as they are. JPEG XL needs `imagecodecs`.
"""

from __future__ import annotations

import argparse
import io
import lzma
import math
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from lvd_lightning.runs.pictures import grid
from lvd_lightning.use.compressing import compress
from lvd_lightning.use.decompressing import decompress
from lvd_lightning.use.pictures import PictureSet
from lvd_lightning.use.sampling import write_png
from lvd_lightning.use.trained import open_trained

Pixels = npt.NDArray[np.uint8]


def by_pillow(kind: str, **settings: object) -> Callable[[Pixels], bytes]:
    def encode(pixels: Pixels) -> bytes:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, format=kind, **settings)
        with Image.open(io.BytesIO(out.getvalue())) as again:
            assert np.array_equal(np.asarray(again.convert("L" if pixels.ndim == 2 else "RGB")), pixels)
        return out.getvalue()

    return encode


def by_jpeg_xl(pixels: Pixels) -> bytes:
    import imagecodecs

    found: bytes = imagecodecs.jpegxl_encode(pixels, lossless=True, effort=9)
    assert np.array_equal(np.asarray(imagecodecs.jpegxl_decode(found)).reshape(pixels.shape), pixels)
    return found


FORMATS: dict[str, Callable[[Pixels], bytes]] = {
    "PNG, optimised": by_pillow("PNG", optimize=True),
    "WebP, lossless": by_pillow("WEBP", lossless=True, quality=100, method=6),
    "JPEG XL, lossless, effort 9": by_jpeg_xl,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--images", type=int, default=None, help="at most so many test images")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    trained = open_trained(chosen.run)
    assert trained.run is not None
    data = trained.run.data()
    count = min(chosen.images or data.num_examples("test"), data.num_examples("test"))
    rows = torch.linspace(0, data.num_examples("test") - 1, count).long()
    rgb = trained.codes.to_rgb(data.batch("test", rows))
    is_grey = trained.codes.is_grey
    num_dims = count * trained.circuit.num_dims
    images = [(one[0] if is_grey else one.permute(1, 2, 0)).contiguous().numpy() for one in rgb]
    side = grid(rgb, math.ceil(math.sqrt(count)), gap=0)
    mosaic = (side[0] if is_grey else side.permute(1, 2, 0)).contiguous().numpy()
    print(f"{count} test images of {trained.name}, {trained.circuit.num_dims} dimensions each, one thread\n")
    print("| | bits per dimension | the same, all in one picture | images a second |\n|---|---:|---:|---:|")
    raw = np.stack(images).tobytes()
    start = time.perf_counter()
    size = len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))
    print(f"| LZMA of all pixels | | {8 * size / num_dims:.4f} | {count / (time.perf_counter() - start):,.0f} |")
    for name, encode in FORMATS.items():
        try:
            start = time.perf_counter()
            size = sum(len(encode(pixels)) for pixels in images)
            speed = count / (time.perf_counter() - start)
            whole = 8 * len(encode(mosaic)) / num_dims
        except ImportError:
            print(f"| {name} | not installed | | |")
            continue
        print(f"| {name} | {8 * size / num_dims:.4f} | {whole:.4f} | {speed:,.0f} |")
    with TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "in").mkdir()
        for number, one in enumerate(rgb):
            write_png(folder / "in" / f"{number:05}.png", one, is_grey)
        with PictureSet([folder / "in"]) as pictures:
            found = compress(trained, pictures, folder / "a.lvd")
        start = time.perf_counter()
        written = decompress(trained, folder / "a.lvd", folder / "back")
        back = count / (time.perf_counter() - start)
        with PictureSet(written) as pictures:
            assert all(torch.equal(one.pixels, before) for one, before in zip(pictures, rgb, strict=True))
    total, speed = 8 * found.num_bytes / num_dims, count / found.seconds
    print(f"| `train.py compress` | | **{total:.4f}** | {speed:.2f}, back {back:.2f} |")
    print(
        f"\nOf {found.num_bytes:,} bytes {found.header_bytes:,} are names, sizes and checksums; the rest is "
        f"{found.bpd:.4f} bits per dimension, where the circuit says {found.model_bpd:.4f}."
    )


if __name__ == "__main__":
    main()
