"""Samples are drawn after the epochs that were asked for, the same way every time, and training does not notice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pictures import Pictures
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

import lvd_lightning.circuits as pc
from callbacks import LogSamples
from lvd_lightning.cli import parse
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.parts import ImagePatches
from lvd_lightning.runs.configuration import experiment_from

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on small loaders


class Numbers(Pictures, LightningDataModule):
    """Loaders over numbers that nobody looks at, and what says what images are like."""

    color, image_shape = "ycocg_r", (3, 4, 4)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.arange(4))  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.arange(4))  # type: ignore[arg-type]


class Module(LightningModule):
    """Draws from the global generator in every step, as dropout does."""

    def __init__(self, assembled: Any) -> None:
        super().__init__()
        self.assembled = assembled
        self.automatic_optimization = False
        self.seen: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append(float(torch.rand(())))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> None:
        return None


def circuit() -> AssembledCircuit:
    generator = torch.Generator().manual_seed(0)
    prior = pc.Circuit(pc.hclt(torch.tensor([-1, 0, 0, 2]), 2, pc.SoftEvidence(2), generator=generator))
    graphs = [pc.hclt(torch.arange(-1, 11), 2, pc.Categorical(256), generator=generator) for _ in range(2)]
    return AssembledCircuit(prior, pc.Circuit(graphs), ImagePatches((3, 4, 4), 2))


def fit(folder: Path, module: Module, *callbacks: LogSamples, logger: Any = False) -> Path:
    torch.manual_seed(0)
    trainer = Trainer(
        default_root_dir=folder,
        max_epochs=4,
        accelerator="cpu",
        logger=logger,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=Numbers())
    return folder / "pictures"


def test_pictures_of_the_epochs_that_were_asked_for(tmp_path: Path) -> None:
    found = sorted(fit(tmp_path, Module(circuit()), LogSamples(every_n_epochs=2)).iterdir())
    assert [path.name for path in found] == ["samples_epoch_001.png", "samples_epoch_003.png"]
    first, second = (Image.open(path).tobytes() for path in found)
    assert first == second  # nothing was learned in between
    assert len(set(first)) > 100
    width, height = Image.open(found[0]).size
    assert width == height >= 8 * 4


def test_the_seed_decides(tmp_path: Path) -> None:
    pictures = [
        (fit(tmp_path / str(seed), Module(circuit()), LogSamples(4, seed)) / "samples_epoch_003.png").read_bytes()
        for seed in (0, 1)
    ]
    assert pictures[0] != pictures[1]


def test_training_does_not_notice(tmp_path: Path) -> None:
    with_pictures, without = Module(circuit()), Module(circuit())
    fit(tmp_path, with_pictures, LogSamples())
    fit(tmp_path, without)
    assert with_pictures.seen == without.seen


def test_other_modules_are_left_alone(tmp_path: Path) -> None:
    assert not fit(tmp_path, Module(torch.nn.Linear(1, 1)), LogSamples()).exists()


def test_pictures_go_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logged: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(WandbLogger, "log_image", lambda self, key, images, **settings: logged.append((key, images)))
    folder = fit(tmp_path, Module(circuit()), LogSamples(4), logger=WandbLogger(save_dir=tmp_path, mode="disabled"))
    assert logged == [("samples", [str(folder / "samples_epoch_003.png")])]


def test_a_config_can_name_it() -> None:
    callbacks = "[{class_path: callbacks.LogSamples, init_args: {every_n_epochs: 5}}]"
    _, values, _ = parse(["fit", "--config=photos", f"--stages.finetune.trainer.callbacks={callbacks}"])
    made = experiment_from(values).stage("finetune").trainer(Path())["callbacks"]
    assert isinstance(made[0], LogSamples)
    assert made[0].every_n_epochs == 5


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="every_n_epochs: got 0, expected a whole number of at least 1"):
        LogSamples(every_n_epochs=0)
