"""Pictures from files, folders and archives, and how they are fitted to a circuit's size."""

import zipfile
from pathlib import Path

import pytest
import torch
from helpers.trained_runs import picture_folder, random_pictures
from PIL import Image

from lvd_lightning.use.codes import ImageCodes
from lvd_lightning.use.pictures import Picture, PictureSet, fitted, joined, tiled


def test_a_folder_and_an_archive_of_it_hold_the_same(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "many", random_pictures(4))
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for path in folder.rglob("*.png"):
            archive.write(path, path.relative_to(tmp_path))
    with PictureSet([folder]) as plain, PictureSet([tmp_path / "many.zip"]) as packed:
        assert plain.names == packed.names == ["00.png", "02.png", "more/01.png", "more/03.png"]
        for one, other in zip(plain, packed, strict=True):
            assert torch.equal(one.pixels, other.pixels)


def test_grey_and_transparent_files_are_noticed(tmp_path: Path) -> None:
    Image.new("L", (3, 2), 7).save(tmp_path / "grey.png")
    Image.new("RGBA", (3, 2), (1, 2, 3, 200)).save(tmp_path / "glass.png")
    Image.new("RGBA", (3, 2), (1, 2, 3, 255)).save(tmp_path / "solid.png")
    with PictureSet([tmp_path]) as pictures:
        found = {picture.name: (picture.is_grey, picture.is_opaque) for picture in pictures}
    assert found == {"glass.png": (False, False), "grey.png": (True, True), "solid.png": (False, True)}


def test_tiles_make_the_picture_again() -> None:
    pixels = torch.randint(256, (3, 11, 13), dtype=torch.uint8)
    tiles = tiled(pixels, (4, 5))
    assert tiles.shape == (9, 3, 4, 5)
    assert torch.equal(tiles[0], pixels[:, :4, :5])
    assert torch.equal(joined(tiles, (11, 13)), pixels)


def test_other_sizes_are_refused_or_fitted() -> None:
    picture = Picture("wide.png", torch.arange(12, dtype=torch.uint8).repeat_interleave(2).expand(3, 8, 24))
    with pytest.raises(ValueError, match="wide.png: has 24 x 8 pixels, the circuit's pictures have 8 x 8: say --fit"):
        fitted(picture, (8, 8))
    assert fitted(picture, (8, 8), "crop")[0, 0, 0].tolist() == [4, 4, 5, 5, 6, 6, 7, 7]
    assert fitted(picture, (4, 4), "resize").shape == (1, 3, 4, 4)
    assert fitted(picture, (16, 16), "resize").shape == (1, 3, 16, 16)
    assert fitted(picture, (8, 8), "tile").shape == (3, 3, 8, 8)
    with pytest.raises(ValueError, match="fewer than the 16 x 16 that are to be cropped"):
        fitted(picture, (16, 16), "crop")


@pytest.mark.parametrize("color", ["rgb", "ycocg_r", "ycocg_r_mod256"])
def test_codes_of_whole_pictures_lose_nothing(color: str) -> None:
    pixels = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    codes = ImageCodes(color)
    assert torch.equal(codes.to_rgb(codes.encode(pixels)), pixels)
    assert codes.is_exact(pixels).all()


def test_codes_that_lose_something_say_so() -> None:
    pixels = torch.full((2, 3, 4, 4), 16, dtype=torch.uint8)
    pixels[1, 0, 2, 2] = 17
    assert ImageCodes("grey", num_levels=17).is_exact(pixels).tolist() == [True, False]
    assert not ImageCodes("ycbcr_lossy").is_exact(pixels).any()
    assert not ImageCodes("rgb", "quadrant").is_exact(pixels).any()
    assert ImageCodes("rgb", "quadrant").encode(pixels).shape == (2, 3, 2, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nothing", "there is no such file or folder"),
        (lambda folder: folder, "holds no pictures; expected files that end in .bmp"),
        (lambda folder: _write(folder / "a.txt", b"text"), "is no picture by its name"),
        (lambda folder: _write(folder / "a.zip", b"text"), "intact .zip archive"),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PictureSet([make(tmp_path)])  # type: ignore[operator]


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "bad.png", b"\x89PNG\r\n\x1a\n")
    with PictureSet([tmp_path]) as pictures, pytest.raises(ValueError, match="bad.png: cannot be read as a picture"):
        list(pictures)


def _write(path: Path, contents: bytes) -> Path:
    path.write_bytes(contents)
    return path
