"""The teacher stage: it learns, resumes exactly, validates at fixed masks, and hands on what it learned."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pictures import Pictures
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lvd_lightning.color import encode_color, num_codes
from lvd_lightning.context import StageContext
from lvd_lightning.stages import MAETeacher
from lvd_lightning.stages.mae_teacher import reconstruction_rows
from lvd_lightning.teachers import MAE, load_teacher

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on small loaders

SMALL = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_hidden_size": 16,
    "decoder_num_layers": 1,
    "decoder_num_heads": 2,
    "lr": 5e-3,
    "num_pictures": 3,
}


class Indexed(Dataset[tuple[Tensor, int]]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], index


class Ramps(Pictures, LightningDataModule):
    """8 x 8 images that are smooth ramps, as a datamodule of this project gives them."""

    image_shape, patch_size = (3, 8, 8), 4

    def __init__(self, num_train: int = 48, num_val: int = 21) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.splits = {"train": self._draw(num_train, generator), "val": self._draw(num_val, generator)}

    @staticmethod
    def _draw(count: int, generator: torch.Generator) -> Tensor:
        slope = torch.rand(count, 3, 2, 1, generator=generator) * 16
        grid = torch.arange(8.0)
        return (slope[:, :, 0, :, None] * grid[:, None] + slope[:, :, 1, :, None] * grid).to(torch.uint8)

    def num_examples(self, split: str) -> int:
        return len(self.splits[split])

    def batch(self, split: str, indices: Tensor) -> Tensor:
        return self.splits[split][indices]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Indexed(self.splits["train"]), batch_size=16)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Indexed(self.splits["val"]), batch_size=8)


class Killed(Exception):
    """What stands for a lost machine."""


class KillAtEpoch(Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            raise Killed


def _context(run_dir: Path, seed: int = 0) -> StageContext:
    return StageContext(run_dir=run_dir, stage="teacher", seed=seed, data=Ramps())


def _trainer(folder: Path, epochs: int, *callbacks: Callback, logger: Any = False) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=logger,
        callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _fit(run_dir: Path, epochs: int = 2, seed: int = 0, **settings: Any) -> tuple[MAETeacher, Trainer]:
    context = _context(run_dir, seed)
    module = MAETeacher(**(SMALL | settings))
    module.begin_stage(context)
    trainer = _trainer(run_dir, epochs)
    trainer.fit(module, datamodule=context.data)
    return module, trainer


def test_the_validation_loss_falls(tmp_path: Path) -> None:
    context = _context(tmp_path)
    module = MAETeacher(**SMALL)
    module.begin_stage(context)
    before = module._validate(context)
    trainer = _trainer(tmp_path, 20)
    trainer.fit(module, datamodule=context.data)
    assert trainer.callback_metrics["val/loss"] < 0.3 * before


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, _ = _fit(tmp_path / "whole", epochs=3)
    context = _context(tmp_path / "parts")
    module = MAETeacher(**SMALL)
    module.begin_stage(context)
    with pytest.raises(Killed):
        _trainer(tmp_path / "parts", 3, KillAtEpoch(2)).fit(module, datamodule=context.data)
    torch.manual_seed(99)
    module = MAETeacher(**SMALL)
    module.begin_stage(context)
    checkpoint = tmp_path / "parts" / "epoch=1.ckpt"
    torch.load(checkpoint, weights_only=True)
    _trainer(tmp_path / "parts", 3).fit(module, datamodule=context.data, ckpt_path=checkpoint)
    for name, tensor in whole.teacher.state_dict().items():
        assert torch.equal(tensor, module.teacher.state_dict()[name]), name


def test_the_seed_decides(tmp_path: Path) -> None:
    modules = [_fit(tmp_path / str(n), epochs=1, seed=seed)[0] for n, seed in enumerate([0, 0, 1])]
    weights = [module.teacher.vit_mae.vit.embeddings.patch_embeddings.projection.weight for module in modules]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_stage_hands_on_the_teacher_and_its_loss(tmp_path: Path) -> None:
    module, trainer = _fit(tmp_path, epochs=1)
    context = _context(tmp_path)
    figures = module.finish_stage(context)
    # The loss is the logged one, whatever the batches were.
    assert figures["val_loss"] == pytest.approx(trainer.callback_metrics["val/loss"].item(), rel=1e-5)
    assert figures["num_parameters"] == sum(p.numel() for p in module.teacher.parameters() if p.requires_grad)
    loaded = load_teacher(context.dir)
    images = context.data.batch("val", torch.arange(4))
    assert torch.equal(loaded.features(images), module.teacher.features(images))


def test_pictures_are_written_every_epoch(tmp_path: Path) -> None:
    _fit(tmp_path, epochs=2)
    paths = sorted((tmp_path / "teacher" / "pictures").iterdir())
    assert [path.name for path in paths] == ["epoch_000.png", "epoch_001.png"]
    assert Image.open(paths[0]).size == (3 * 8, 3 * 8)


def test_one_that_explodes_says_which_loss_and_where(tmp_path: Path) -> None:
    class Explodes(MAETeacher):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                with torch.no_grad():
                    next(self.teacher.parameters()).fill_(torch.nan)

    context, module = _context(tmp_path), Explodes(**SMALL)
    module.begin_stage(context)
    expected = (
        r"^stage teacher: loss 'reconstruction' is nan in step 1 \(epoch 1\), first for training example 16 \(\w+"
    )
    with pytest.raises(ValueError, match=expected):
        _trainer(tmp_path, 1).fit(module, datamodule=context.data)


def test_pictures_go_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logged: list[str] = []
    monkeypatch.setattr(WandbLogger, "log_image", lambda self, key, images, **kwargs: logged.append(key))
    context = _context(tmp_path)
    module = MAETeacher(**SMALL)
    module.begin_stage(context)
    _trainer(tmp_path, 1, logger=WandbLogger(save_dir=tmp_path, mode="disabled")).fit(module, datamodule=context.data)
    assert logged == ["reconstructions"]


def test_reconstruction_rows_show_pixels_where_they_belong() -> None:
    rgb = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    teacher, data = MAE(8, 4, hidden_size=8, num_layers=1, num_heads=1, num_categories=num_codes("ycocg_r")), Ramps()
    data.color = "ycocg_r"
    images = encode_color(rgb, "ycocg_r")
    masked = torch.tensor([[True, False, False, False], [False, False, False, True]])
    perfect = teacher.scale.floats(images, torch.float32)
    rows = reconstruction_rows(images, perfect, masked, teacher, data).permute(2, 0, 1)
    for b in range(2):
        original, seen, predicted = (rows[:, 8 * r : 8 * r + 8, 8 * b : 8 * b + 8] for r in range(3))
        assert torch.equal(original, rgb[b])
        assert torch.equal(predicted, rgb[b])
        corner = slice(0, 4) if b == 0 else slice(4, 8)
        assert (seen[:, corner, corner] == 128).all()
        seen[:, corner, corner] = rgb[b, :, corner, corner]
        assert torch.equal(seen, rgb[b])


def test_an_endless_trainer_is_refused(tmp_path: Path) -> None:
    context = _context(tmp_path)
    module = MAETeacher(**SMALL)
    module.begin_stage(context)
    with pytest.raises(ValueError, match="set max_epochs"):
        _trainer(tmp_path, -1).fit(module, datamodule=context.data)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"mask_min: got 0\.9"):
        MAETeacher(mask_min=0.9, mask_max=0.1)
    with pytest.raises(ValueError, match=r"warmup: got 1\.0"):
        MAETeacher(warmup=1.0)
