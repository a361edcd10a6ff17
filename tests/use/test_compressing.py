"""Pictures come back bit by bit, at the size that the circuit promises; what would not come back is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers.trained_runs import picture_folder, random_pictures, trained_run
from PIL import Image

from lvd_lightning.use.compressing import compress
from lvd_lightning.use.decompressing import decompress
from lvd_lightning.use.pictures import PictureSet
from lvd_lightning.use.sampling import write_png
from lvd_lightning.use.trained import Trained, open_trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained_run(tmp_path_factory.mktemp("compress") / "run", side=4, patch=2)


def there_and_back(trained: Trained, folder: Path, fit: str | None = None, batch: int = 3) -> tuple[float, float]:
    """Bits of the coder and of the circuit, once the pictures of `folder/in` have come back as they were."""
    with PictureSet([folder / "in"]) as pictures:
        found = compress(trained, pictures, folder / "a.lvd", fit=fit)
        assert found.num_bytes == (folder / "a.lvd").stat().st_size
        decompress(trained, folder / "a.lvd", folder / "back", batch=batch)
        with PictureSet([folder / "back"]) as back:
            assert back.names == [str(Path(name).with_suffix(".png")) for name in pictures.names]
            for before, after in zip(pictures, back, strict=True):
                assert torch.equal(before.pixels, after.pixels)
                assert before.is_grey == after.is_grey
    return 8 * (found.num_bytes - found.header_bytes), found.model_bits


@pytest.mark.parametrize("color", ["ycocg_r", "rgb", "grey"])
def test_samples_take_the_bits_that_the_circuit_promises(tmp_path: Path, color: str) -> None:
    trained = trained_run(tmp_path / "run", color, side=8 if color == "grey" else 4, patch=2)
    codes = trained.circuit.sample(16, generator=torch.Generator().manual_seed(0))
    pixels = trained.codes.to_rgb(codes)
    picture_folder(tmp_path / "in", pixels)
    bits, model_bits = there_and_back(trained, tmp_path)
    assert bits <= 1.002 * model_bits + 64
    assert bits >= 0.998 * model_bits - 32


def test_unusual_pictures_cost_more_and_come_back(trained: Trained, tmp_path: Path) -> None:
    noise = torch.randint(256, (3, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    noise[2] = 255 * (noise[2] > 127)
    picture_folder(tmp_path / "in", noise)
    bits, model_bits = there_and_back(trained, tmp_path)
    assert bits <= 1.01 * model_bits + 64


def test_pictures_of_any_size_in_tiles(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for side in (3, 4, 10):
        write_png(tmp_path / "in" / f"{side}.png", random_pictures(1, side=12)[:, :, :side, :side][0])
    there_and_back(trained, tmp_path, fit="tile")


def test_grey_files_come_back_grey_and_endings_become_png(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("L", (4, 4), 200).save(tmp_path / "in" / "a.bmp")
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "in" / "b.webp", lossless=True)
    there_and_back(trained, tmp_path)


def test_two_files_of_one_stem_keep_their_endings(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.bmp", "a.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / "in" / name)
    with PictureSet([tmp_path / "in"]) as pictures:
        compress(trained, pictures, tmp_path / "a.lvd")
    written = decompress(trained, tmp_path / "a.lvd", tmp_path / "back")
    assert [path.name for path in written] == ["a.bmp.png", "a.png.png"]


def test_the_file_does_not_depend_on_batch_or_threads(trained: Trained, tmp_path: Path) -> None:
    picture_folder(tmp_path / "in", random_pictures(7, side=4))
    contents = set()
    for batch, threads in ((7, 1), (1, 1), (4, 2)):
        torch.set_num_threads(threads)
        with PictureSet([tmp_path / "in"]) as pictures:
            compress(trained, pictures, tmp_path / "a.lvd", batch=batch)
        contents.add((tmp_path / "a.lvd").read_bytes())
    torch.set_num_threads(1)
    assert len(contents) == 1


def test_a_moved_run_decompresses_and_another_circuit_does_not(trained: Trained, tmp_path: Path) -> None:
    picture_folder(tmp_path / "in", random_pictures(2, side=4))
    with PictureSet([tmp_path / "in"]) as pictures:
        compress(trained, pictures, tmp_path / "a.lvd")
    shutil.copytree(trained.folder, tmp_path / "moved")
    moved = open_trained(tmp_path / "moved")
    assert len(decompress(moved, tmp_path / "a.lvd", tmp_path / "back")) == 2
    other = trained_run(tmp_path / "other", seed=1, side=4, patch=2)
    with pytest.raises(ValueError, match="a.lvd: was compressed with another circuit than that of .*other"):
        decompress(other, tmp_path / "a.lvd", tmp_path / "again")
    assert not (tmp_path / "again").exists()
    with pytest.raises(ValueError, match="back: is there and holds something"):
        decompress(trained, tmp_path / "a.lvd", tmp_path / "back")


def test_what_would_not_come_back_is_refused(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGBA", (4, 4), (9, 9, 9, 100)).save(tmp_path / "in" / "glass.png")
    with PictureSet([tmp_path / "in"]) as pictures:
        with pytest.raises(ValueError, match="glass.png: has transparent pixels"):
            compress(trained, pictures, tmp_path / "a.lvd")
        with pytest.raises(ValueError, match="models whole pictures in ycbcr_lossy, which cannot be compressed"):
            compress(trained_run(tmp_path / "lossy", "ycbcr_lossy", side=4, patch=2), pictures, tmp_path / "a.lvd")
    picture_folder(tmp_path / "colours", random_pictures(1))
    with (
        PictureSet([tmp_path / "colours"]) as pictures,
        pytest.raises(ValueError, match="none of the circuit's 17 levels"),
    ):
        compress(trained_run(tmp_path / "grey", "grey"), pictures, tmp_path / "a.lvd")
    assert not (tmp_path / "a.lvd").exists()
