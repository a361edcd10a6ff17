"""Exact samples of a circuit as pictures."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lvd_lightning.checks import check_at_least, check_counts
from lvd_lightning.files import write_atomically
from lvd_lightning.runs.pictures import grid, save_image
from lvd_lightning.seeds import generator_for
from lvd_lightning.use.folders import check_place
from lvd_lightning.use.progress import tracked
from lvd_lightning.use.trained import Trained

__all__ = ["sample", "write_png"]

#: Samples that are drawn together, each such batch by a generator of its own: the first ones do not depend on how many
#: follow.
_BATCH = 32
#: Samples in the grid at most.
_IN_GRID = 1024


def sample(trained: Trained, num_samples: int, out: Path, *, seed: int = 0) -> Tensor:
    """Draw pictures, and write them into a folder: `grid.png`, each as PNG in `samples/`, all in `samples.npz`.

    The grid shows 1,024 at most. The archive holds `rgb`, uint8 (n, 3, H, W), and `codes`, the values that the circuit
    drew, int16 (n, C, H, W) unless leaves are densities. Until it is written they lie on disk as well, not in memory.

    Args:
        trained: see `open_trained`.
        num_samples: n.
        out: the folder.
        seed: equal seeds on one kind of device give equal pictures.

    Returns:
        The pictures, uint8 RGB (n, 3, H, W), on disk as long as somebody has them.

    Raises:
        ValueError: a number is out of range.
    """
    check_counts(num_samples=num_samples)
    check_place(out)
    check_at_least(0, seed=seed)
    folder = out / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    digits, starts = len(str(num_samples - 1)), range(0, num_samples, _BATCH)
    arrays: dict[str, np.memmap] = {}
    for start in tracked(starts, "samples", len(starts)):
        generator = generator_for(seed, "sample", start, device=trained.device)
        codes = _small(trained.circuit.sample(_BATCH, generator=generator))[: num_samples - start]
        rgb = trained.codes.to_rgb(codes)
        for name, batch in (("rgb", rgb), ("codes", codes)):
            if name not in arrays:
                arrays[name] = _on_disk(out, batch, num_samples)
            arrays[name][start : start + len(batch)] = batch.numpy()
        for number, picture in enumerate(rgb, start):
            write_png(folder / f"{number:0{digits}}.png", picture)
    write_atomically(out / "samples.npz", lambda target: np.savez_compressed(target, **arrays))  # type: ignore[arg-type]
    found = torch.from_numpy(np.asarray(arrays["rgb"]))
    shown = found[:_IN_GRID]
    save_image(out / "grid.png", grid(shown, math.ceil(math.sqrt(len(shown)))), found.shape[-1])
    return found


def _on_disk(folder: Path, first: Tensor, size: int) -> np.memmap:
    """Room for (size, ...) numbers like those of the first batch, in a file without a name."""
    numbers = first.numpy()
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, dtype=numbers.dtype, mode="w+", shape=(size, *numbers.shape[1:]))


def _small(codes: Tensor) -> Tensor:
    """On the CPU, whole numbers in two bytes each: no code has more than 511 values."""
    return codes.cpu() if codes.is_floating_point() else codes.cpu().to(torch.int16)


def write_png(path: Path, picture: Tensor, is_grey: bool = False) -> None:
    """Write uint8 RGB (3, H, W) as PNG, pixel by pixel; `is_grey`: all channels are equal, and one is written."""
    from PIL import Image

    image = Image.fromarray((picture[0] if is_grey else picture.permute(1, 2, 0)).contiguous().numpy())
    write_atomically(path, lambda target: image.save(target, format="PNG", optimize=True))
