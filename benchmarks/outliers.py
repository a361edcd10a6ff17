"""How well bits per dimension tell a run's test images from others: AUROC, and its ROC curves as a picture.

    python benchmarks/outliers.py --run runs/photos_pg --images 200
    python benchmarks/outliers.py --run runs/cifar --others digits.zip -o roc.png
    python benchmarks/outliers.py --run runs/photos_pg --folders sets
    python train.py score --run runs/photos_pg sets/test sets/stripes

The others are made of the test images and by chance: their inverse, their grey, horizontal stripes of random widths and
colours, uniform noise, and scikit-learn's handwritten digits enlarged; and the pictures of `--others`. With `--folders`
every set is written as PNG files, for the command `score`, and nothing is scored here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lvd_lightning.seeds import generator_for
from lvd_lightning.use.pictures import PictureSet, fitted
from lvd_lightning.use.roc import auroc, roc_curve
from lvd_lightning.use.sampling import write_png
from lvd_lightning.use.scoring import bits_per_dimension
from lvd_lightning.use.trained import Trained, open_trained


def stripes(count: int, side: int) -> Tensor:
    """uint8 (count, 3, side, side): two colours by turns, 1 to 4 rows each."""
    generator = generator_for(0, "stripes")
    width = 1 + torch.randint(4, (count, 1), generator=generator)
    colors = torch.randint(256, (2, count, 3, 1, 1), generator=generator)
    first = (torch.arange(side) // width % 2 == 0)[:, None, :, None]
    return torch.where(first, colors[0], colors[1]).expand(count, 3, side, side).to(torch.uint8)


def noise(count: int, side: int) -> Tensor:
    return torch.randint(256, (count, 3, side, side), generator=generator_for(0, "noise")).to(torch.uint8)


def digits(count: int, side: int) -> Tensor:
    from sklearn.datasets import load_digits

    grey = torch.from_numpy(load_digits().images)[:count, None].float() * 255 / 16
    large = interpolate(grey, (side, side), mode="bilinear", align_corners=False)
    return large.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


def in_grey(pixels: Tensor) -> Tensor:
    red, green, blue = pixels.long().unbind(1)
    return ((299 * red + 587 * green + 114 * blue + 500) // 1000).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)


def write_folders(folder: Path, sets: dict[str, Tensor]) -> None:
    for name, pixels in sets.items():
        place = folder / name.split(",")[0]
        place.mkdir(parents=True)
        for number, picture in enumerate(pixels):
            write_png(place / f"{number:04}.png", picture)
        print(f"{place}: {len(pixels)} pictures")


def scores(trained: Trained, pixels: Tensor) -> list[float]:
    return [bits_per_dimension(trained, one[None])[0] for one in pixels]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--images", type=int, default=200, help="of every set")
    parser.add_argument("--others", nargs="*", default=[], help="folders or archives of other pictures")
    parser.add_argument("--folders", type=Path, help="a new folder: write the sets there as pictures, one folder each")
    parser.add_argument("-o", "--out", type=Path, help="the picture")
    chosen = parser.parse_args()
    trained = open_trained(chosen.run)
    assert trained.run is not None
    data = trained.run.data()
    count = min(chosen.images, data.num_examples("test"))
    test = trained.codes.to_rgb(data.batch("test", torch.linspace(0, data.num_examples("test") - 1, count).long()))
    side = trained.size[0]
    sets = {
        "inverted": 255 - test,
        "grey": in_grey(test),
        "stripes": stripes(count, side),
        "noise": noise(count, side),
        "digits, enlarged": digits(count, side),
    }
    for source in chosen.others:
        with PictureSet([source]) as pictures:
            place = torch.linspace(0, len(pictures) - 1, min(count, len(pictures))).long().tolist()
            sets[Path(source).stem] = torch.cat([fitted(pictures[n], trained.size, "resize") for n in place])
    if chosen.folders:
        write_folders(chosen.folders, {"test": test, **sets})
        return
    inside = scores(trained, test)
    print(f"test images of {trained.name}: {count}, {sum(inside) / count:.3f} bits per dimension\n")
    print("| other images | bits per dimension | AUROC |\n|---|---:|---:|")
    curves = {}
    for name, pixels in sets.items():
        outside = scores(trained, pixels)
        curves[name] = roc_curve(inside, outside)
        print(f"| {name} | {sum(outside) / len(outside):.3f} | {auroc(inside, outside):.3f} |", flush=True)
    if chosen.out:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 5), layout="constrained")
        axes = figure.add_subplot(xlabel="share of the test images", ylabel="share of the others")
        for name, curve in curves.items():
            axes.plot(*curve, label=name)
        figure.legend(loc="outside upper center", ncols=3)
        figure.savefig(chosen.out)


if __name__ == "__main__":
    main()
