"""Completions of a picture against the circuit's own answers, and which pixels are missing."""

from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.trained_runs import random_pictures, trained_run
from PIL import Image

from lvd_lightning.use.inpainting import inpaint
from lvd_lightning.use.missing import missing_box, missing_half, missing_in
from lvd_lightning.use.pictures import Picture
from lvd_lightning.use.sampling import write_png

BOX = partial(missing_box, "2,1,4,5")


def test_given_pixels_stay_and_missing_ones_do_not_matter(tmp_path: Path) -> None:
    trained = trained_run(tmp_path / "run")
    pixels = random_pictures(1)[0]
    found = inpaint(trained, Picture("a.png", pixels), BOX, tmp_path / "out", num_samples=3, seed=1)
    missing = BOX((8, 8))
    assert int(missing.sum()) == 20
    for completed in (*found.samples, found.mean, found.best):
        assert torch.equal(completed[:, ~missing], pixels[:, ~missing])
    assert not torch.equal(found.samples[0], found.samples[1])
    assert bool((found.deviation[missing] > 0).all())
    assert not bool(found.deviation[~missing].any())
    other = torch.where(missing, 255 - pixels, pixels)
    again = inpaint(trained, Picture("a.png", other), BOX, tmp_path / "again", num_samples=3, seed=1)
    for name in ("samples", "mean", "best", "deviation"):
        assert torch.equal(getattr(again, name), getattr(found, name))


def test_mean_and_deviation_are_those_of_many_samples(tmp_path: Path) -> None:
    trained = trained_run(tmp_path / "run", "rgb")
    found = inpaint(trained, Picture("a.png", random_pictures(1)[0]), BOX, tmp_path / "out", num_samples=1)
    codes, observed = trained.codes.encode(found.original[None]), ~BOX((8, 8))
    drawn = trained.circuit.inpaint(
        codes.expand(2000, -1, -1, -1), observed, generator=torch.Generator().manual_seed(0)
    ).double()
    missing = ~observed
    assert float((drawn.mean(0) - found.mean.double())[:, missing].abs().max()) < 8
    deviation = drawn.var(0).mean(0).sqrt()
    torch.testing.assert_close(deviation[missing], found.deviation.double()[missing], rtol=0.08, atol=0.5)


@pytest.mark.parametrize("animation", ["gif", "webp"])
def test_files_can_be_opened(tmp_path: Path, animation: str) -> None:
    trained = trained_run(tmp_path / "run", "grey")
    picture = Picture("a.png", random_pictures(1, levels=17)[0])
    found = inpaint(trained, picture, BOX, tmp_path / "out", num_samples=2, animation=animation)
    names = {"best", "deviation", "given", "grid", "mean", "original", "sample_00", "sample_01", "samples"}
    assert {path.stem for path in (tmp_path / "out").iterdir()} == names
    with Image.open(tmp_path / "out" / f"samples.{animation}") as animated:
        assert getattr(animated, "n_frames", 1) == 2
        assert animated.size == (192, 192)
    with Image.open(tmp_path / "out" / "mean.png") as mean:
        assert mean.size == tuple(found.mean.shape[1:])


def test_a_large_picture_is_completed_tile_by_tile(tmp_path: Path) -> None:
    trained = trained_run(tmp_path / "run")
    pixels = random_pictures(1, side=20)[0]
    missing = partial(missing_half, "top")
    found = inpaint(trained, Picture("a.png", pixels), missing, tmp_path / "out", num_samples=1, fit="tile")
    assert found.samples.shape == (1, 3, 20, 20)
    assert torch.equal(found.samples[0, :, 10:], pixels[:, 10:])


def test_bright_pixels_of_a_mask_are_missing(tmp_path: Path) -> None:
    mask = torch.zeros(3, 8, 8, dtype=torch.uint8)
    mask[:, 2:4, 5:] = 255
    write_png(tmp_path / "mask.png", mask)
    assert torch.equal(missing_in(tmp_path / "mask.png", (8, 8)), mask[0] == 255)
    with pytest.raises(ValueError, match="mask.png has 8 x 8 pixels, expected 9 x 8, those of the picture"):
        missing_in(tmp_path / "mask.png", (8, 9))
    write_png(tmp_path / "dark.png", torch.zeros_like(mask))
    with pytest.raises(ValueError, match="nothing is missing by it"):
        missing_in(tmp_path / "dark.png", (8, 8))
    with pytest.raises(ValueError, match="nowhere.png: there is no such file"):
        missing_in(tmp_path / "nowhere.png", (8, 8))


def test_halves_and_boxes() -> None:
    for half, opposite in (("left", "right"), ("top", "bottom")):
        assert torch.equal(missing_half(half, (5, 7)), ~missing_half(opposite, (5, 7)))
    assert missing_half("left", (2, 4))[:, :2].all()
    for box in ("1,2,3", "a,b,c,d", "0,0,9,1", "0,0,8,8", "0,0,0,3"):
        with pytest.raises(ValueError, match="box: got"):
            missing_box(box, (8, 8))
