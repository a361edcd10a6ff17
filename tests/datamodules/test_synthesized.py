"""Samples of a flow as training images: how many, where, of which flow; what stays as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules import Photos, Synthesized
from lvd_lightning.cli import main

SIZES: dict[str, Any] = {"image_size": 8, "num_train": 30, "num_val": 8, "num_test": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished teacher and student on very few images."""
    folder = tmp_path_factory.mktemp("runs")
    arguments = [
        "fit",
        "--config=flow_photos",
        f"--run_dir={folder}",
        "--trainer.accelerator=cpu",
        "--stages.baseline=null",
    ]
    arguments += [f"--data.{name}={value}" for name, value in SIZES.items()]
    for name in ("teacher", "student"):
        arguments += [f"--stages.{name}.trainer.max_epochs=1", f"--stages.{name}.model.num_pictures=0"]
        arguments += [f"--stages.{name}.model.hidden_size=4", f"--stages.{name}.model.num_steps=1"]
        assert main([*arguments, f"--stage={name}"]) == 0
    return folder / "flow_photos"


def test_samples_follow_the_images_of_the_run(run: Path) -> None:
    original = Photos(color="ycocg_r", **SIZES)
    original.setup()
    data = Synthesized(str(run), share=0.4, image_size=8, color="ycocg_r")
    data.setup()
    assert data.num_examples("train") == 30 + 20
    for split in ("train", "val", "test"):
        rows = torch.arange(original.num_examples(split))
        assert torch.equal(data.batch(split, rows), original.batch(split, rows))
    assert data.facts["synthesized_share"] == 0.4
    drawn = data.batch("train", torch.arange(30, 50))
    assert len(drawn.flatten(1).unique(dim=0)) == 20


def test_samples_are_the_same_again_and_others_of_the_other_flow(run: Path) -> None:
    def identity(**settings: Any) -> str:
        data = Synthesized(str(run), image_size=8, **settings)
        data.setup()
        return data.identity["train"]

    first = identity(seed=0)
    assert first == identity(seed=1)
    assert len({first, identity(flow="student"), identity(temperature=0.5), identity(share=0.2)}) == 4


def test_a_run_without_such_a_flow_or_of_other_sizes_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its data are Photos, expected whole square RGB images of image_size 16"):
        Synthesized(str(run), image_size=16).setup()
    with pytest.raises(ValueError, match="is no run directory"):
        Synthesized(str(tmp_path), image_size=8).setup()
    with pytest.raises(ValueError, match="share: got 1.0, expected 0 to 0.99"):
        Synthesized(str(run), share=1.0)
