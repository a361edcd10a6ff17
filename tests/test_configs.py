"""Every config that ships is parsed and instantiated, and runs one small step per stage on data in the real format."""

import json
import math
import pickle
import struct
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.encoders import write_bert
from PIL import Image
from torch import Tensor

from lvd_lightning import stages as kinds
from lvd_lightning.cli import CONFIG_FOLDER, main, parse
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.runs import perception
from lvd_lightning.runs.configuration import experiment_from
from lvd_lightning.stages import PlainStage
from lvd_lightning.teachers import ImageFlow

CONFIGS = sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))
OVERLAYS = {
    **{"baseline": "folder", "pixels": "folder", "small": "folder_pg", "wandb": "photos"},
    **{"per_position": "lvd_imagenet32", "untied": "lvd_imagenet32"},
    **{"poon_domingos": "folder", "rat_spn": "folder_pg"},  # the latter also grows
    **dict.fromkeys(("mod256", "no_flips", "smoothed", "tables"), "folder_pg"),
    **dict.fromkeys(("codes", "convolutional", "mae", "paper_protocol"), "imagenet32"),
    "flow": "folder_pg",
    **dict.fromkeys(("no_growing", "patch2", "patch8"), "cifar10"),
    **dict.fromkeys(("emnist", "fashion_mnist"), "mnist"),
    **dict.fromkeys(("grey_patches", "uci_table"), "flow_tabular"),
    **{"mmd": "digits", "adversarial": "photos", "autoencode": "digits"},
}
# An overlay runs on the smallest experiment of its kind, with images of 8 x 8 or, where that were one patch, 16 x 16.
SMALLEST = {"per_position": "folder", "untied": "folder"}
SMALLEST |= dict.fromkeys(("flow", "mod256", "no_flips", "smoothed", "tables"), "photos_pg")
SMALLEST |= dict.fromkeys(
    ("codes", "convolutional", "mae", "no_growing", "paper_protocol", "patch2", "patch8"), "photos_pg"
)
LARGER = ("paper_protocol", "patch8", "per_position", "untied")
OF_WORDS = ("text", "wikitext2")
OF_TABLES = ("flow_tabular", "grey_patches", "uci_table")
OF_FLOWS = (*OF_TABLES, "flow_celeba64", "flow_cifar10", "flow_imagenet32", "flow_photos")
CIFAR10_FILES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
IMAGENET_FILES = [*(f"train_data_batch_{number}" for number in range(1, 11)), "val_data"]

SMALL_TEACHERS: dict[str, dict[str, Any]] = {
    "FlowTeacher": {"num_steps": 2, "hidden_size": 4, "num_pictures": 0, "bound_examples": 1},
    "MAETeacher": {
        **{"hidden_size": 8, "num_layers": 1, "num_heads": 1, "intermediate_size": 8, "num_pictures": 0},
        **{"decoder_hidden_size": 8, "decoder_num_layers": 1, "decoder_num_heads": 1},
    },
    "VQVAETeacher": {
        **{"channels": 8, "num_residual_blocks": 1, "num_features": 4, "codebook_size": 8, "num_components": 2},
        **{"prior_hidden_size": 8, "prior_num_layers": 1, "prior_num_heads": 1, "num_pictures": 0},
    },
}
SMALL = [
    "--shared.num_clusters=3",
    "--trainer={accelerator: cpu, devices: 1, limit_train_batches: 1, limit_val_batches: 1}",
    "--data.num_workers=0",
    "--data.batch_size=8",
]
SMALL_CONDITIONAL = ["--stages.conditional.model.num_units=2", "--stages.conditional.model.min_examples=2"]
SMALL_STUDENT = [
    *("--stages.student.model.num_steps=1", "--stages.student.model.hidden_size=4"),
    *(
        f"--stages.{name}.model.{key}=1"
        for name in ("student", "baseline")
        for key in ("num_pictures", "bound_examples")
    ),
]
TEXT = "the king said unto people of land , go ye and they went .\n"


def write_pickles(folder: Path, names: list[str], side: int, rows: int, numpy_keys: bool) -> None:
    """Image batches as they are distributed: CIFAR-10 with keys of bytes, downsampled ImageNet with strings."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in names:
        data = random.integers(0, 256, (rows, 3 * side * side), dtype=np.uint8)
        batch: dict[Any, Any] = (
            {"data": data, "labels": [0] * rows} if numpy_keys else {b"data": data, b"labels": [0] * rows}
        )
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


def write_folder(folder: Path) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{number}.png")


def write_idx(folder: Path, names: list[str]) -> None:
    """Greyscale images of 28 x 28 as MNIST and its like are distributed."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in names:
        images = random.integers(0, 256, (24, 28, 28), dtype=np.uint8)
        (folder / name).write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, *images.shape) + images.tobytes())


def data_arguments(data: dict[str, Any], folder: Path) -> list[str]:
    """Small data for a config's datamodule, and the arguments that make it read them."""
    kind = data["class_path"].split(".")[-1]
    if kind == "Photos":
        return ["--data.image_size=8", "--data.num_train=32", "--data.num_val=8", "--data.num_test=8"]
    if kind == "Folder":
        write_folder(folder)
        return [f"--data.path={folder}", "--data.image_size=8"]
    if kind in ("Text", "WikiText"):
        folder.mkdir(parents=True)
        for name in ("train", "valid", "test"):
            (folder / f"wiki.{name}.tokens").write_text(TEXT * 30)
        path = [f"--data.path={folder}"] if kind == "WikiText" else []
        return [*path, f"--data.cache={folder}", "--data.max_examples=40", "--shared.length=6"]
    if kind == "SklearnTable":
        return ["--data.max_examples=40"]
    if kind == "GreyPatches":
        return ["--data.max_images=8"]
    if kind == "UCITable":
        (folder / "power").mkdir(parents=True)
        np.save(folder / "power" / "data.npy", np.random.default_rng(0).random((40, 8)))
        return [f"--data.path={folder}"]
    if kind == "Digits":
        return ["--data.max_examples=40"]
    if kind in ("MNIST", "FashionMNIST", "EMNIST"):
        names = [f"emnist-letters-{split}" for split in ("train", "test")] if kind == "EMNIST" else ["train", "t10k"]
        write_idx(folder, [f"{name}-images-idx3-ubyte" for name in names])
        return [f"--data.path={folder}", "--data.num_val=8", "--shared.patch_size=14"]
    if kind == "CIFAR10":
        write_pickles(folder / "cifar-10-batches-py", CIFAR10_FILES, 32, 8, numpy_keys=False)
        return [f"--data.path={folder}", "--data.num_val=8"]
    write_pickles(folder, IMAGENET_FILES, data["init_args"]["image_size"], 4, numpy_keys=True)
    return [f"--data.path={folder}", "--data.num_val=10"]


def teacher_arguments(teacher: dict[str, Any] | None, folder: Path) -> list[str]:
    """A small teacher of the config's class; an encoder is written into a folder."""
    if teacher is None:
        return []
    kind = teacher["model"]["class_path"].split(".")[-1]
    if kind == "EncoderTeacher":
        return [f"--stages.teacher.model.encoder={write_bert(folder, TEXT.split())}"]
    small = SMALL_TEACHERS[kind]
    return [f"--stages.teacher.model.{name}={value}" for name, value in small.items()]


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four where a picture shows 64: large images are drawn as slowly as all stages together are trained."""
    sample, sample_flow = AssembledCircuit.sample, ImageFlow.sample

    def few(circuit: AssembledCircuit, num_samples: int, **settings: Any) -> Tensor:
        return sample(circuit, min(num_samples, 4), **settings)

    def few_of_a_flow(flow: ImageFlow, num_samples: int, *arguments: Any, **settings: Any) -> Tensor:
        return sample_flow(flow, min(num_samples, 4), *arguments, **settings)

    monkeypatch.setattr(AssembledCircuit, "sample", few)
    monkeypatch.setattr(ImageFlow, "sample", few_of_a_flow)
    monkeypatch.setattr(perception, "NUM_SAMPLES", 60)


def config_arguments(config: str, base: str | None = None) -> list[str]:
    base = base or OVERLAYS.get(config, config)
    return [f"--config={base}", *([] if config in CONFIGS else [f"--config=overlays/{config}"])]


@cache
def parsed(*arguments: str) -> dict[str, Any]:
    """The configuration that they give; not to be changed."""
    return parse(["fit", *arguments])[1]


def small_epochs(stages: dict[str, Any]) -> list[str]:
    """One epoch; of circuits that are edited, as many as lead to the first edits and one beyond."""
    classes = {name: getattr(kinds, stage["model"]["class_path"].split(".")[-1]) for name, stage in stages.items()}
    trained = [name for name, kind in classes.items() if not issubclass(kind, PlainStage)]
    rounds = {name: stages[name]["model"]["init_args"].get("round_epochs") for name in trained}
    return [f"--stages.{name}.trainer.max_epochs={1 + (epochs or 0)}" for name, epochs in rounds.items()]


def test_every_overlay_has_a_base() -> None:
    assert sorted(OVERLAYS) == sorted(path.stem for path in (CONFIG_FOLDER / "overlays").glob("*.yaml"))


@pytest.mark.parametrize("config", [*CONFIGS, *OVERLAYS])
def test_config_is_parsed_and_instantiated(config: str, tmp_path: Path) -> None:
    if config == "wandb":
        pytest.importorskip("wandb")
    experiment = experiment_from(parsed(*config_arguments(config)))
    assert experiment.name == (config if config in CONFIGS else OVERLAYS[config])
    for stage in experiment.stages:
        stage.data()
        assert isinstance(stage.model(), stage.kind)
        assert issubclass(stage.kind, PlainStage) or stage.trainer(tmp_path)["max_epochs"] > 0


@pytest.mark.parametrize("config", [*CONFIGS, *(name for name in OVERLAYS if name != "wandb")])
def test_config_runs_one_small_step_per_stage(config: str, tmp_path: Path) -> None:
    base = SMALLEST.get(config) or OVERLAYS.get(config, config)
    named = config_arguments(config, base)
    plain = parsed(*named)
    stages = {name: stage for name, stage in plain["stages"].items() if stage is not None}
    teacher = stages.get("teacher")
    small = [*SMALL[1:], *SMALL_STUDENT] if config in OF_FLOWS else SMALL
    small = [*small, *teacher_arguments(teacher, tmp_path / "bert"), *data_arguments(plain["data"], tmp_path / "data")]
    small += SMALL_CONDITIONAL if "conditional" in stages else []
    small += ["--data.image_size=16"] if config in LARGER else []
    arguments = [*named, *small, f"--run_dir={tmp_path}"]
    assert main(["fit", *arguments, *small_epochs(stages)]) == 0
    summary = json.loads((tmp_path / base / "report" / "summary.json").read_text())
    assert list(summary["stages"]) == list(stages)
    assert ("baseline" in summary) == ("baseline" in stages)
    if config in OF_FLOWS:
        unit = "nats" if config in OF_TABLES else "bpd"
        found = [summary["teacher"], summary["test"], summary["baseline"]["undistilled"]]
        assert all(math.isfinite(figures[unit]) for figures in found)
        assert found[0]["num_parameters"] > found[1]["num_parameters"] == found[2]["num_parameters"]
        assert ("num_draws" in summary["test"]) == (unit == "bpd")
        return
    if config in OF_WORDS:
        assert 1 < summary["test"]["ppl"] < 10 * summary["protocol"]["vocabulary"]
        return
    assert 0 < summary["test"]["bpd"] < 20
    assert ("perception" in summary) == ("perceptual" in stages)
    quadrant = config in ("paper_protocol", "per_position", "untied")
    protocol = summary.get("protocol", {"region": "whole", "lossy": False})  # greyscale images have nothing to say
    assert protocol["region"] == ("quadrant" if quadrant else "whole")
    assert protocol["lossy"] == (config == "paper_protocol")
    assert ("teacher_elbo_bpd" in summary["test"]) == (
        teacher is not None and any(kind in teacher["model"]["class_path"] for kind in ("VQVAE", "Flow"))
    )
    if config == "flow":
        (gap,) = (
            figures
            for figures in json.loads((tmp_path / base / "evaluate" / "done.json").read_text())["gap"].values()
            if "teacher_few_bound" in figures
        )
        assert gap["teacher_few_bound"]["nats"] < gap["teacher_few_importance"]["nats"]
        assert "| teacher, importance-weighted, " in (tmp_path / base / "report" / "summary.md").read_text()
