"""From a text to latents: the encoder is taken as the teacher, its features of words are clustered."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.encoders import write_bert, write_tokenizer
from helpers.pictures import Pictures

from datamodules import Text
from lvd_lightning.context import DONE_MARKER, StageContext
from lvd_lightning.latents import load_assignments, load_latents_info
from lvd_lightning.latents.features import FeatureStore
from lvd_lightning.stages import EncoderTeacher, Latents
from lvd_lightning.teachers import load_teacher

PIECES = ["king", "##s", "of", "the", "land", *"abcdefghij", *(f"##{letter}" for letter in "abcdefghij")]
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"), PIECES)


@pytest.fixture
def data(tmp_path: Path) -> Text:
    words = ["king", "kings", "of", "the", "land", "abc", "bad", "cab"]
    order = torch.randint(len(words), (120, 9), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "text.txt").write_text("\n".join(" ".join(words[number] for number in line) for line in order))
    settings: dict[str, Any] = {"length": 6, "block_lines": 4, "val_fraction": 0.1, "test_fraction": 0.1}
    found = Text(str(tmp_path / "text.txt"), cache=str(tmp_path / "cache"), **settings)
    found.setup()
    return found


def with_teacher(run_dir: Path, data: Text, teacher: EncoderTeacher) -> StageContext:
    """What the stage of latents is given when that of the teacher is done."""
    context = StageContext(run_dir, "teacher", 0, data)
    teacher.run(context)
    (context.dir / DONE_MARKER).write_text("{}")
    return replace(context, stage="latents", earlier={"teacher": ("features",)})


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("vector", ["window", "mean"])
def test_words_are_clustered_by_their_features(
    tmp_path: Path, data: Text, bert: Path, pooled: bool, vector: str
) -> None:
    context = with_teacher(tmp_path / "run", data, EncoderTeacher(str(bert), vector))
    figures = Latents(num_clusters=3, pooled=pooled).run(context)
    assert figures["words_per_second"] > 0
    assert {"encoding_seconds", "clustering_seconds", "mean_squared_distance"} <= set(figures)
    info = load_latents_info(context.dir)
    assert (info["num_patches"], info["num_features"], info["pooled"]) == (6, 12, pooled)
    assert (info["source"], info["center"]) == ("teacher", "position" if pooled else "none")
    teacher: Any = load_teacher(tmp_path / "run" / "teacher")
    centroids = torch.from_numpy(np.load(context.dir / "centroids.npy")).double()
    assert centroids.shape == ((3, 12) if pooled else (6, 3, 12))
    mean = FeatureStore(context.dir / "features_train.npy").read(0, 999).double().mean(0) if pooled else 0.0
    for split in SPLITS:
        windows = data.batch(split, torch.arange(data.num_examples(split)))
        stored = FeatureStore(context.dir / f"features_{split}.npy").read(0, 999)
        torch.testing.assert_close(stored, teacher.features(windows), atol=2e-3, rtol=2e-3)
        distance = (stored.double() - mean)[:, :, None] - centroids
        assert torch.equal(load_assignments(context.dir, split), distance.square().sum(3).argmin(2))


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("vector", ["window", "first"])
def test_features_that_take_too_much_room_are_computed_again(
    tmp_path: Path, data: Text, bert: Path, pooled: bool, vector: str, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = 2e-9 * 6 * 12 * sum(data.num_examples(split) for split in SPLITS)
    found = []
    for name, cache_gb in (("none", None), ("enough", 1.01 * needed), ("little", 0.99 * needed)):
        context = with_teacher(tmp_path / name, data, EncoderTeacher(str(bert), vector))
        figures = Latents(num_clusters=3, pooled=pooled, cache_gb=cache_gb).run(context)
        assert figures["words_per_second"] > 0
        assert (context.dir / "features_train.npy").exists() == (name != "little")
        found.append([load_assignments(context.dir, split) for split in SPLITS])
        assert ("computed whenever they are read" in capsys.readouterr().out) == (name == "little")
    for other in found[1:]:
        assert all((a == b).float().mean() > 0.99 for a, b in zip(found[0], other))


def test_the_progress_is_told_in_windows_and_words(
    tmp_path: Path, data: Text, bert: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lvd_lightning.latents.encode._SECONDS_BETWEEN_LINES", 0.0)
    context = with_teacher(tmp_path / "run", data, EncoderTeacher(str(bert)))
    Latents(num_clusters=3, batch_size=20).run(context)
    count = data.num_examples("train")
    lines = [line for line in capsys.readouterr().out.splitlines() if "features_train" in line]
    assert lines[0].startswith(f"latents: features_train 20/{count} windows")
    assert lines[-1].startswith(f"latents: features_train {count}/{count} windows")
    assert "words/s" in lines[-1]


def test_figures_and_files_of_the_teacher(tmp_path: Path, data: Text, bert: Path) -> None:
    context = StageContext(tmp_path / "run", "teacher", 0, data)
    figures = EncoderTeacher(str(bert)).run(context)
    assert {"teacher.json", "teacher.safetensors"} == {path.name for path in context.dir.iterdir()}
    assert figures["num_features"] == 12
    assert 1.2 < figures["pieces_per_word"] < 2.5


def test_pieces_are_those_of_the_data(tmp_path: Path, data: Text, bert: Path) -> None:
    pieces = Text(data.path, str(bert), **{"length": 6, "block_lines": 4, "cache": str(tmp_path / "cache")})
    context = StageContext(tmp_path / "run", "teacher", 0, pieces)
    assert EncoderTeacher(str(bert)).run(context)["pieces_per_word"] == 1.0
    write_tokenizer(tmp_path / "other", ["x", "kings", "of", "the", "land"])
    strange = Text(data.path, str(tmp_path / "other"), **{"length": 6, "block_lines": 4, "cache": str(tmp_path / "c")})
    with pytest.raises(ValueError, match="pieces of another tokenizer"):
        EncoderTeacher(str(bert)).run(StageContext(tmp_path / "run", "teacher", 0, strange))


class Squares(Pictures):
    image_shape = (3, 8, 8)


def test_data_without_words_are_refused(bert: Path) -> None:
    with pytest.raises(ValueError, match="EncoderTeacher encodes texts, but the data's parts are ImagePatches"):
        EncoderTeacher(str(bert)).check_data(Squares())  # type: ignore[arg-type]


def test_vectors_of_decoders_are_those_of_prefixes() -> None:
    with pytest.raises(ValueError, match="vector: got 'last' with causal"):
        EncoderTeacher(vector="last", causal=True)
    with pytest.raises(ValueError, match="vector: got 'cls', expected one of first, mean, last, window"):
        EncoderTeacher(vector="cls")
