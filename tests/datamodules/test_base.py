"""What every data module does: encode once, count, read batches, make loaders, resume in the same order."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

import datamodules
from datamodules import RGBDataModule
from datamodules.images import ImageRows
from datamodules.splits import Split
from lvd_lightning.color import encode_color

COUNTS: dict[Split, int] = {"train": 21, "val": 9, "test": 5}


def pixels(split: Split) -> np.ndarray:
    generator = np.random.RandomState(COUNTS[split])
    return generator.randint(256, size=(COUNTS[split], 3, 4, 4)).astype(np.uint8)


class Random(RGBDataModule):
    """Random images of 4 x 4."""

    def __init__(self, **common: Any) -> None:
        super().__init__(**{"image_size": 4, "patch_size": 2, **common})

    @override
    def load(self) -> Mapping[Split, Tensor]:
        return {split: self.encode(pixels(split)[self.limit(count)]) for split, count in COUNTS.items()}


def test_images_are_encoded_and_cropped() -> None:
    data = Random(region="quadrant", color="ycocg_r")
    data.setup()
    raw = torch.from_numpy(pixels("val"))
    expected = encode_color(raw, "ycocg_r")[..., :2, :2]
    assert data.image_shape == (3, 2, 2)
    assert torch.equal(data.batch("val", torch.tensor([4, 0, 4])), expected[[4, 0, 4]])
    assert (data.facts, data.protocol) == ({"color": "ycocg_r", "region": "quadrant", "lossy": False}, "quadrant")
    assert Random(color="ycbcr_lossy", region="quadrant").protocol == "lossy, quadrant"


def test_loaders_give_every_image_with_its_number() -> None:
    data = Random(batch_size=8, val_batch_size=4)
    data.setup()
    for split, loader, size in (
        ("train", data.train_dataloader(), 8),
        ("val", data.val_dataloader(), 4),
        ("test", data.test_dataloader(), 4),
    ):
        batches = list(loader)
        assert len(batches) == len(loader)
        assert max(len(index) for _, index in batches) == size
        seen = torch.cat([index for _, index in batches])
        assert seen.sort().values.tolist() == list(range(data.num_examples(split)))
        for x, index in batches:
            assert x.dtype == torch.int16
            assert torch.equal(x, data.batch(split, index))
    assert next(iter(data.val_dataloader()))[1].tolist() == [0, 1, 2, 3]


def test_worker_processes_read_the_same() -> None:
    alone, helped = Random(batch_size=8), Random(batch_size=8, num_workers=1)
    alone.setup()
    helped.setup()
    for (x, index), (y, other) in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        assert torch.equal(index, other)
        assert torch.equal(x, y)


def test_ranks_share_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Random(batch_size=8)
    data.setup()
    whole = [sorted(index.tolist()) for _, index in data.train_dataloader()]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        shares.append([index.tolist() for _, index in data.train_dataloader()])
    assert [sorted(one + two) for one, two in zip(*shares, strict=True)] == whole


def test_max_examples_limits_every_split() -> None:
    data = Random(max_examples=6)
    data.setup()
    assert [data.num_examples(split) for split in COUNTS] == [6, 6, 5]
    full = Random()
    full.setup()
    kept = {tuple(image.flatten().tolist()) for image in full.images("train")}
    assert all(tuple(image.flatten().tolist()) in kept for image in data.images("train"))


def test_which_examples_there_are_does_not_depend_on_the_seed() -> None:
    one, two = Random(max_examples=6, seed=1), Random(max_examples=6, seed=2)
    one.setup()
    two.setup()
    assert torch.equal(torch.as_tensor(one.images("train")), torch.as_tensor(two.images("train")))
    assert [i.tolist() for _, i in one.train_dataloader()] != [i.tolist() for _, i in two.train_dataloader()]


def test_rows_over_several_parts_read_like_one_tensor() -> None:
    whole = torch.from_numpy(pixels("train"))
    rows = np.random.RandomState(0).permutation(21)[:15]
    images = ImageRows([whole[:5], whole[5:6], whole[6:]], rows)
    expected = whole[torch.from_numpy(rows)]
    assert images.shape == expected.shape
    assert torch.equal(images[torch.arange(15)], expected)
    assert torch.equal(images[3:9], expected[3:9])
    assert torch.equal(images[-1], expected[-1])
    assert torch.equal(ImageRows([whole[:5], whole[5:]])[torch.tensor([20, 4, 5])], whole[[20, 4, 5]])


class Recorder(LightningModule):
    """Trains one number and writes down which examples it saw in which epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[int, list[int]] = {}

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen.setdefault(self.current_epoch, []).extend(batch[1].tolist())
        return self.weight**2

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, epochs: int, num_workers: int, resume: bool = False) -> dict[int, list[int]]:
    module, checkpoint = Recorder(), folder / "last.ckpt"
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    data = Random(batch_size=8, num_workers=num_workers, seed=5)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint if resume else None)
    trainer.save_checkpoint(checkpoint)
    return module.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resumed_run_sees_the_order_of_an_uninterrupted_one(tmp_path: Path, num_workers: int) -> None:
    whole = fit(tmp_path / "whole", 3, num_workers)
    assert len({tuple(order) for order in whole.values()}) == 3
    begun = fit(tmp_path / "halves", 1, num_workers)
    resumed = fit(tmp_path / "halves", 3, num_workers, resume=True)
    assert {**begun, **resumed} == whole
    assert sorted(resumed) == [1, 2]


def test_settings_are_checked() -> None:
    for settings, name in (
        ({"color": "yuv"}, "color: got 'yuv'"),
        ({"region": "half"}, "region"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": 5, "region": "quadrant"}, "image_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"val_batch_size": 0}, "val_batch_size"),
        ({"max_examples": 0}, "max_examples"),
        ({"num_workers": -1}, "num_workers"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(ValueError, match=name):
            Random(**settings)
    with pytest.raises(RuntimeError, match="setup"):
        Random().images("train")
    data = Random()
    data.setup()
    with pytest.raises(ValueError, match="split: got 'validation'"):
        data.images("validation")


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("Photos", {"reduce": 3}),
        ("Folder", {"path": "somewhere"}),
        ("CIFAR10", {"path": "somewhere", "num_val": 10}),
        ("DownsampledImageNet", {"path": "somewhere"}),
        ("Arrays", {"train": "a.npy", "val": "b.npy", "test": "c.npy"}),
    ],
)
def test_the_command_line_knows_own_and_common_settings(name: str, own: dict[str, Any]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    common = {"color": "rgb", "batch_size": 17, "max_examples": 3, "flip": True}
    config = parser.parse_object({"data": {"class_path": f"datamodules.{name}", "init_args": {**own, **common}}})
    data = parser.instantiate(config).data
    assert type(data) is getattr(datamodules, name)
    assert (data.color, data.batch_size, data.max_examples, data.flip) == ("rgb", 17, 3, True)
