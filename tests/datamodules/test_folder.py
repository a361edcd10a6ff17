"""Folders and archives of images."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import Folder
from datamodules.folder import decode_image
from datamodules.splits import SPLITS


def picture(number: int, width: int = 8, height: int = 8) -> Image.Image:
    values = np.random.RandomState(number).randint(256, size=(height, width, 3)).astype(np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 images of 8 x 8 in two folders, and files that are none of its business."""
    root = tmp_path / "images"
    for name in ("cats", "dogs/small"):
        (root / name).mkdir(parents=True)
        for number in range(30):
            (root / name / f"{number}.png").write_bytes(encoded(picture(number)))
    (root / "notes.txt").write_text("no image")
    (root / "cats" / ".thumbnail.png").write_text("no image")
    return root


def archive_of(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(folder))
    return path


def test_a_folder_and_its_archive_are_the_same_data(folder: Path) -> None:
    plain, packed = (Folder(str(path), image_size=8, color="rgb") for path in (folder, archive_of(folder)))
    plain.setup()
    packed.setup()
    assert sum(plain.num_examples(split) for split in SPLITS) == 60
    for split in SPLITS:
        assert torch.equal(torch.as_tensor(plain.images(split)), torch.as_tensor(packed.images(split)))
    # Every image is one of those written, unchanged.
    written = {np.asarray(picture(number)).transpose(2, 0, 1).tobytes() for number in range(30)}
    assert {image.numpy().tobytes() for split in SPLITS for image in plain.images(split)} == written


def test_an_image_keeps_its_split_when_others_come(folder: Path) -> None:
    before = Folder(str(folder), image_size=8)
    before.setup()
    for number in range(100, 110):
        (folder / f"{number}.png").write_bytes(encoded(picture(number)))
    after = Folder(str(folder), image_size=8)
    after.setup()
    for split in SPLITS:
        kept = {image.numpy().tobytes() for image in after.images(split)}
        assert all(image.numpy().tobytes() in kept for image in before.images(split))


def images_of(path: Path) -> list[list[bytes]]:
    """The images of each split, in order."""
    data = Folder(str(path), image_size=8, color="rgb")
    data.setup()
    return [[image.numpy().tobytes() for image in data.images(split)] for split in SPLITS]


@pytest.mark.parametrize("prefix", ["", "pics/", "data/pics/", "./", "/home/someone/", "C:\\pics\\", "../", "pics\\"])
def test_the_split_follows_from_the_name_below_the_common_folder(folder: Path, prefix: str) -> None:
    """Whatever the archiver wrote before the names, and whichever folder around the images is given."""
    path = folder.with_name("other.zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            name = prefix + str(file.relative_to(folder))
            archive.writestr(zipfile.ZipInfo(name.replace("/", "\\") if "\\" in prefix else name), file.read_bytes())
    assert images_of(path) == images_of(folder) == images_of(folder.parent)


def test_linked_folders_are_followed_and_a_circle_ends(folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "cats").symlink_to(folder / "cats")
    (linked / "dogs").symlink_to(folder / "dogs", target_is_directory=True)
    (linked / "around").symlink_to(linked)
    (folder / "cats" / "back").symlink_to(linked)
    (linked / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (linked / "itself.png").symlink_to(linked / "itself.png")
    (folder / "dogs" / "small" / "again").symlink_to(folder / "cats")
    data = Folder(str(linked), image_size=8, color="rgb")
    data.setup()
    assert [[image.numpy().tobytes() for image in data.images(split)] for split in SPLITS] == images_of(folder)
    assert data.left_out == {"broken links": 2, "hidden": 1, "links to folders that are read already": 3}


def test_what_is_left_out_is_counted_by_reason_and_said_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "0.jfif").write_bytes(encoded(picture(0), "JPEG"))
    for name in ("1.avif", "2.AVIF", "README", "__MACOSX/3.png", ".git/4.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("no image")
    counts = {".avif files": 2, ".txt files": 1, "files without an extension": 1, "hidden": 3}
    said = ": 61 images are used; left out: 2 .avif files, 1 .txt files, 1 files without an extension, 3 hidden"
    for path in (folder, archive_of(folder)):
        data = Folder(str(path), image_size=8)
        with pytest.warns(UserWarning, match=f"^{path}{said}$") as warned:
            data.setup()
        data.setup()
        assert len(warned) == 1
        assert data.left_out == counts
        assert sum(data.num_examples(split) for split in SPLITS) == 61

    os.mkfifo(folder / "pipe.png")
    scan = os.scandir

    def refusing(path: Path) -> object:
        if str(path).endswith("dogs"):
            raise PermissionError(path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    data = Folder(str(folder), image_size=8)
    data.setup()
    assert data.left_out == {**counts, "folders that cannot be read": 1, "neither files nor folders": 1}
    assert sum(data.num_examples(split) for split in SPLITS) == 31


def test_of_two_members_with_one_name_the_last_counts(folder: Path) -> None:
    path = archive_of(folder)
    expected = images_of(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("./cats/3.png", encoded(picture(999)))
        for name, contents in members.items():
            archive.writestr(name, contents)
        link = zipfile.ZipInfo("cats/link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "3.png")
    assert images_of(path) == expected
    data = Folder(str(path), image_size=8)
    data.setup()
    assert data.left_out["names that come again"] == 1
    assert data.left_out["links without what they lead to"] == 1


def with_members(path: Path, compress_type: int | None = None, flag: int = 0) -> Path:
    """The archive with another kind of compression or flag written beside all its images, as if packed so."""
    contents = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        starts = [info.header_offset for info in archive.infolist() if info.filename.endswith(".png")]
        central = archive.start_dir
        for info in archive.infolist():
            if info.filename.endswith(".png"):
                entry = contents.index(b"PK\x01\x02", central)
                while contents[entry + 46 : entry + 46 + len(info.filename)] != info.filename.encode():
                    entry = contents.index(b"PK\x01\x02", entry + 4)
                starts.append(entry)
    for start in starts:
        at = start + (6 if contents[start : start + 4] == b"PK\x03\x04" else 8)
        contents[at] |= flag
        if compress_type is not None:
            contents[at + 2 : at + 4] = compress_type.to_bytes(2, "little")
    path.write_bytes(contents)
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ({"flag": 0x1}, "60 of its images are encrypted"),
        ({"flag": 0x41}, "60 of its images are encrypted"),
        ({"compress_type": 9}, "60 of its images are compressed with Deflate64"),
        ({"compress_type": 98}, "60 of its images are compressed with PPMd"),
        ({"compress_type": 77}, "60 of its images are compressed with method 77"),
        ({"flag": 0x20}, "patched"),
    ],
)
def test_archives_that_cannot_be_read_say_why_and_what_to_do(folder: Path, kind: dict[str, int], reason: str) -> None:
    (folder / "cats" / ".thumbnail.png").unlink()
    path = with_members(archive_of(folder), **kind)
    with pytest.raises(
        ValueError, match=rf"^{path}: .*{reason}.*: unpack it and give the folder, or pack it"
    ) as caught:
        Folder(str(path), image_size=8).setup()
    assert "\n" not in str(caught.value)


def test_archives_need_modules_that_python_may_lack(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        for file in folder.rglob("*.png"):
            archive.write(file, file.relative_to(folder))
    assert images_of(path) == images_of(folder)
    monkeypatch.setattr(zipfile, "bz2", None)
    with pytest.raises(ValueError, match=rf"^{path}: .*compressed with bzip2.*bz2 module.*: unpack it"):
        Folder(str(path), image_size=8).setup()


def test_archives_of_several_disks_are_named(folder: Path) -> None:
    path = archive_of(folder)
    contents = bytearray(path.read_bytes())
    contents[-22 + 4] = contents[-22 + 6] = 1  # the numbers of this disk and of the disk with the directory
    locator = b"PK\x06\x07" + (1).to_bytes(4, "little") + bytes(8) + (2).to_bytes(4, "little")
    path.write_bytes(bytes(contents[:-22]) + locator + bytes(contents[-22:]))
    with pytest.raises(ValueError, match=rf"^{path}: .*multiple disks.*: unpack it"):
        Folder(str(path), image_size=8).setup()


def test_max_examples_decodes_no_more_than_it_needs(folder: Path) -> None:
    (folder / "broken.png").write_text("no image")
    data = Folder(str(folder), image_size=8, max_examples=1)
    data.setup()
    assert [data.num_examples(split) for split in SPLITS] == [1, 1, 1]


def test_relative_paths_and_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for path in ("images", "./images", "~/images"):
        data = Folder(path, image_size=8)
        data.setup()
        assert data.num_examples("train") > 30


def test_decoding_crops_the_central_square_and_reduces_it() -> None:
    wide = np.zeros((40, 100, 3), dtype=np.uint8)
    wide[:, 30:70] = (10, 200, 30)
    for image in (Image.fromarray(wide), Image.fromarray(wide.transpose(1, 0, 2))):
        small = decode_image(encoded(image), 16)
        assert small.shape == (3, 16, 16)
        assert np.array_equal(small, np.broadcast_to(np.array([10, 200, 30])[:, None, None], small.shape))


def test_decoding_does_not_alias() -> None:
    # One-pixel stripes reduced by four are grey, not a pattern.
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    small = decode_image(encoded(Image.fromarray(stripes)), 16).astype(int)
    assert abs(small - 127).max() <= 12


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_8_bit_mode_becomes_rgb(mode: str) -> None:
    image = picture(0, 9, 12).convert("L").convert(mode) if mode == "LA" else picture(0, 9, 12).convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert decode_image(encoded(image, kind), 8).shape == (3, 8, 8)


def test_the_camera_s_orientation_is_applied() -> None:
    image = picture(0)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    assert np.array_equal(decode_image(buffer.getvalue(), 8), np.asarray(image.rotate(180)).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (b"no image at all", "its contents are no image"),
        (b"", "its contents are no image"),
        (encoded(picture(0, 32, 32))[:-1500], "trunca|broken"),
        (encoded(picture(0, 64, 64), "JPEG")[:1500], "truncated"),
        (encoded(picture(0, 7, 20)), "7 x 20 pixels, smaller than image_size 8"),
        (encoded(Image.fromarray(np.zeros((9, 9), dtype=np.uint16))), "8 bits per channel"),
        (b"P6 4294967296 4294967296 255\n", "pixels|size"),
    ],
)
def test_a_bad_image_is_named(folder: Path, contents: bytes, reason: str) -> None:
    (folder / "cats" / "bad.jpg").write_bytes(contents)
    remedy = "remove this file or replace it by an intact one$"
    with pytest.raises(ValueError, match=rf"^{folder}/cats/bad\.jpg: .*({reason}).*{remedy}"):
        Folder(str(folder), image_size=8).setup()
    with pytest.raises(ValueError, match=rf"cats/bad\.jpg: .*({reason})"):
        Folder(str(archive_of(folder)), image_size=8).setup()


def test_all_bad_images_are_counted(folder: Path) -> None:
    """They may be in any split; one start of the run names them all."""
    for number in range(9):
        file = folder / "dogs" / "small" / f"{number}.png"
        file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(
        ValueError, match=r"dogs/small/0\.png: .*; 9 of 60 images cannot be used .*remove these"
    ) as caught:
        Folder(str(folder), image_size=8).setup()
    also = "(also dogs/small/1.png, dogs/small/2.png, dogs/small/3.png, dogs/small/4.png, dogs/small/5.png ...)"
    assert also in str(caught.value)


def test_damaged_archives_are_named(folder: Path) -> None:
    path = archive_of(folder)
    contents = bytearray(path.read_bytes())
    path.write_bytes(contents[: len(contents) // 2])
    with pytest.raises(ValueError, match=r"images\.zip"):
        Folder(str(path), image_size=8).setup()
    start = contents.index(b"IDAT") + 20
    contents[start : start + 30] = bytes(30)
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=r"images\.zip/.*\.png: .*CRC"):
        Folder(str(path), image_size=8).setup()


def test_nothing_there_and_nothing_in_it(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.*a folder or a \.zip"):
        Folder(str(tmp_path / "nowhere")).setup()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: holds no images; expected .*\.png"):
        Folder(str(tmp_path / "empty")).setup()
    with pytest.raises(ValueError, match=r"notes\.txt: expected a folder or an intact \.zip"):
        Folder(str(folder / "notes.txt")).setup()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "0.png").write_bytes(encoded(picture(0)))
    with pytest.raises(ValueError, match="Folder: there are 1 images, .*each needs at least 1: give more images"):
        Folder(str(tmp_path / "one"), image_size=8).setup()


def test_a_second_place_gives_training_images_alone(folder: Path, tmp_path: Path) -> None:
    more = tmp_path / "more"
    more.mkdir()
    for number in range(100, 120):
        (more / f"{number}.png").write_bytes(encoded(picture(number)))
    (more / "notes.txt").write_text("no image")
    one = Folder(str(folder), image_size=8)
    one.setup()
    found = []
    for place in (more, archive_of(more)):
        both = Folder(str(folder), train_path=str(place), image_size=8)
        both.setup()
        found.append(both)
        for split in ("val", "test"):
            assert torch.equal(torch.as_tensor(both.images(split)), torch.as_tensor(one.images(split)))
            assert both.identity[split] == one.identity[split]
        assert both.num_examples("train") == one.num_examples("train") + 20
        train = {image.numpy().tobytes() for image in both.images("train")}
        assert {image.numpy().tobytes() for image in one.images("train")} < train
        assert both.identity["train"] != one.identity["train"]
        assert sum(both.left_out.values()) == sum(one.left_out.values()) + 1
    assert found[0].identity == found[1].identity
    with pytest.raises(FileNotFoundError, match="train_path: there is no"):
        Folder(str(folder), train_path=str(tmp_path / "nowhere"), image_size=8).setup()
    few = Folder(str(folder), train_path=str(more), image_size=8, max_examples=10)
    few.setup()
    assert few.num_examples("train") == 10
