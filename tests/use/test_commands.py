"""The commands as they are typed; a mistake is one line that says what to do."""

import json
import re
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch
from helpers.trained_runs import picture_folder, random_pictures, trained_run

from lvd_lightning.cli import main
from lvd_lightning.use.commands import COMMANDS


def bomb() -> bytes:
    """A PNG file of some hundred bytes that says it has 60,000 x 60,000 pixels."""
    chunks = [
        b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0),
        b"IDAT" + zlib.compress(bytes(9)),
        b"IEND",
    ]
    packed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run `run`, an unfinished one `begun`, pictures in `in` and larger ones in `large`."""
    folder = tmp_path_factory.mktemp("commands")
    trained_run(folder / "run")
    shutil.copytree(folder / "run", folder / "begun")
    (folder / "begun" / "finetune" / "done.json").unlink()
    (folder / "badly").mkdir()
    (folder / "badly" / "config.yaml").write_text("stages: [")
    (folder / "fake.png").write_text("a letter")
    (folder / "bomb.png").write_bytes(bomb())
    picture_folder(folder / "in", random_pictures(4))
    picture_folder(folder / "large", random_pictures(2, side=12))
    return folder


def test_score_of_two_folders(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(place / "in"), str(place / "large"), "--fit", "crop", "-o", str(tmp_path / "out")]
    assert main(["score", "--run", str(place / "run"), *words, "--shown", "0", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "set 1: 4 pictures" in printed
    assert "AUROC" in printed
    assert (tmp_path / "out" / "roc.png").is_file()


def test_sample_and_inpaint(place: Path, tmp_path: Path) -> None:
    run = ["--run", str(place / "run")]
    assert main(["sample", *run, "-n", "3", "--seed", "5"]) == 0
    drawn = place / "run" / "use" / "sample" / "samples"
    assert len(list(drawn.iterdir())) == 3
    assert main(["inpaint", *run, str(drawn / "0.png"), "--half", "left", "--samples", "2", "-o", str(tmp_path)]) == 0
    assert (tmp_path / "samples.gif").is_file()


def test_compress_and_decompress(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = ["--run", str(place / "run")], str(tmp_path / "a.lvd")
    assert main(["compress", *run, str(place / "in" / "00.png"), "-o", file]) == 0
    assert "bits per dimension, of which the circuit promises" in capsys.readouterr().out
    assert main(["decompress", *run, file, "-o", str(tmp_path / "back"), "--batch", "3"]) == 0
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["00.png"]


@pytest.mark.parametrize(
    "words",
    [
        "sample -n 3",
        "score IN --shown 1 --max-images 2",
        "inpaint IN/00.png --half left --samples 2",
        "explain --clusters 2",
        "export",
    ],
)
def test_a_seed_gives_the_same_files_twice(place: Path, tmp_path: Path, words: str) -> None:
    """With another number of threads, too; another seed gives other files."""
    name, *rest = words.replace("IN", str(place / "in")).split()
    written = []
    for number, (seed, threads) in enumerate(((5, 1), (5, 2), (7, 1))):
        torch.set_num_threads(threads)
        out = tmp_path / str(number)
        assert main([name, "--run", str(place / "run"), *rest, "--seed", str(seed), "-o", str(out)]) == 0
        written.append({path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()})
    torch.set_num_threads(1)
    assert written[0] == written[1]
    assert written[0] != written[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert f"python train.py {name} --run" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "score --run RUN LARGE",
            "12 x 12 pixels, the circuit's pictures have 8 x 8: say --fit tile (piece by piece), --fit",
        ),
        ("score --run RUN nowhere", "nowhere: there is no such file or folder"),
        ("score --run nowhere IN", "neither a run directory nor an exported folder"),
        ("score --run BEGUN IN", "holds no trained model: `train.py fit --run"),
        ("score IN", "arguments are required: --run; train.py score --help"),
        ("score --run RUN IN --device gpu", "--device: got 'gpu'"),
        ("sample --run RUN --given 3", "no classes to condition on; `train.py inpaint` draws"),
        ("sample --run RUN -n 0", "num_samples: got 0"),
        ("inpaint --run RUN IN/00.png", "one of the arguments --mask --box --half is required"),
        ("inpaint --run RUN IN/00.png --box 1,2,3", "expected x,y,w,h in pixels"),
        ("inpaint --run RUN IN/00.png --mask LARGE/00.png", "has 12 x 12 pixels, expected 8 x 8"),
        ("compress --run RUN LARGE -o a.lvd", "the circuit's pictures have 8 x 8: say --fit"),
        ("compress --run RUN IN", "arguments are required: -o/--out"),
        ("compress --run RUN IN -o IN", "in: is a folder; give the name of a file in it"),
        ("sample --run RUN -o IN/00.png", "00.png is a file, expected a folder; give another place"),
        ("score --run RUN IN -o IN/00.png/deep", "00.png is a file, expected a folder; give another place"),
        ("export --run RUN -o IN/00.png/deep", "00.png is a file, expected a folder; give another place"),
        (
            "score --run RUN FAKE",
            "fake.png: cannot be read as a picture (its contents are no image): remove or replace",
        ),
        ("inpaint --run RUN IN/00.png --mask FAKE", "fake.png cannot be read as a picture (its contents are no image)"),
        ("inpaint --run RUN IN/00.png --mask BOMB", "could be decompression bomb"),
        ("inpaint --run RUN IN/00.png --mask nowhere.png", "mask: nowhere.png: there is no such file"),
        ("score --run BADLY IN", "config.yaml: is no configuration"),
        ("decompress --run RUN IN/00.png -o new", "00.png: is no file of `train.py compress`"),
        ("decompress --run RUN nowhere.lvd -o new", "nowhere.lvd: there is no such file"),
        ("inpaint --run RUN IN --half top", "holds 4 pictures, expected one"),
    ],
)
def test_mistakes_are_one_line(place: Path, capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    files = {name.upper(): place / name for name in ("run", "begun", "badly", "in", "large")}
    files |= {"FAKE": place / "fake.png", "BOMB": place / "bomb.png"}
    for name, path in files.items():
        words = re.sub(rf"\b{name}\b", str(path), words)
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert message in error


def test_a_model_of_texts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained_run(tmp_path / "run")
    path = tmp_path / "run" / "finetune" / "assembled.json"
    parts = {"class": "Tokens", "arguments": {"length": 4, "vocabulary": 256}}
    path.write_text(json.dumps({"parts": parts}))
    assert main(["sample", "--run", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
