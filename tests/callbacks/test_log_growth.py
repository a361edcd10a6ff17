"""Pictures of growth after the epochs that were asked for: the patches of heads, and a curve from metrics.csv."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from callbacks import LogGrowth, ReassignClusters
from lvd_lightning.runs.metrics_file import MetricsFile
from lvd_lightning.runs.pictures import growth_series
from lvd_lightning.stages import ConditionalStudent, PriorStudent
from lvd_lightning.units import BitsPerDimension

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on small loaders


class Figures(Callback):
    """Logs what an edit logs."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            figures = {"heads_before": 4.0, "heads_after": 6.0, "parameters_before": 100.0, "parameters_after": 150.0}
            for logger in trainer.loggers:
                logger.log_metrics({"epoch": 1, **{f"Grow/{name}": value for name, value in figures.items()}})


def fit(run: Any, *callbacks: Callback, logger: Any = None, epochs: int = 4) -> Path:
    folder = run.folder / "conditional"
    folder.mkdir(exist_ok=True)
    loggers = [MetricsFile(folder / "metrics.csv", lambda: 0.0), *([logger] if logger else [])]
    module = ConditionalStudent(2, num_heads=2, min_examples=1)
    run.train("conditional", module, epochs, callbacks=list(callbacks), logger=loggers)
    return folder / "pictures"


def test_pictures_of_the_epochs_that_were_asked_for(coarse: Any) -> None:
    found = fit(coarse, Figures(), LogGrowth(every_n_epochs=2))
    assert sorted(path.name for path in found.iterdir()) == [
        "clusters_epoch_001.png",
        "clusters_epoch_003.png",
        "growth.png",
    ]
    pixels = np.asarray(Image.open(found / "clusters_epoch_003.png"))[..., :3]
    # Two circuits of two heads: four rows of sixteen patches of 2 x 2 pixels, with gaps of one, eight times enlarged.
    assert pixels.shape[:2] == (8 * (4 * 3 - 1), 8 * (16 * 3 - 1))
    assert len(np.unique(pixels[:, :16].reshape(-1, 3), axis=0)) > 4


def test_without_edits_there_is_no_curve(coarse: Any) -> None:
    found = fit(coarse, LogGrowth(every_n_epochs=4))
    assert [path.name for path in found.iterdir()] == ["clusters_epoch_003.png"]


def test_sizes_and_bpd_by_epoch() -> None:
    rows = [
        {"epoch": "0", "val/bpd": "5.0", "Prune/heads_before": ""},
        {"epoch": "1", "Prune/heads_before": "4", "Prune/heads_after": "4", "Prune/parameters_before": "90"},
        {"epoch": "1", "Prune/parameters_after": "80"},
        {"epoch": "1", "Grow/heads_before": "4", "Grow/heads_after": "6", "Grow/parameters_after": "120"},
        {"epoch": "1", "train/bpd": "4.9"},
        {"epoch": "1", "val/bpd": "4.5"},
    ]
    assert growth_series(rows, BitsPerDimension()) == [(0, 4.0, 90.0, 5.0), (1, 6.0, 120.0, 4.5)]
    assert growth_series(rows[:1], BitsPerDimension()) == []


def test_pictures_go_to_wandb(coarse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logged: list[tuple[str, list[str]]] = []
    numbers: dict[str, float] = {}
    monkeypatch.setattr(WandbLogger, "log_image", lambda self, key, images, **settings: logged.append((key, images)))
    monkeypatch.setattr(WandbLogger, "log_metrics", lambda self, metrics, step=None: numbers.update(metrics))
    logger = WandbLogger(save_dir=coarse.folder, mode="disabled")
    found = fit(coarse, ReassignClusters(every_n_epochs=2), Figures(), LogGrowth(3), logger=logger)
    assert logged == [
        ("clusters", [str(found / "clusters_epoch_002.png")]),
        ("growth", [str(found / "growth.png")]),
    ]
    assert 0 <= numbers["ReassignClusters/share_moved"] <= 1
    assert numbers["ReassignClusters/log_p_patch_given_head_nats"] < 0


def test_training_does_not_notice(coarse: Any) -> None:
    tables = []
    for callbacks in ([], [LogGrowth(1)]):
        module = ConditionalStudent(2, num_heads=2, min_examples=1, slots=0.7)
        coarse.train("conditional", module, 2, callbacks=callbacks)
        tables.append(module.assembled.conditional.tables[0].detach())
    assert torch.equal(tables[0], tables[1])


def test_other_modules_are_left_alone(coarse: Any) -> None:
    coarse.complete("conditional", ConditionalStudent(2))
    coarse.train("prior", PriorStudent(), callbacks=[LogGrowth(1)])
    assert not (coarse.folder / "prior" / "pictures").exists()


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="every_n_epochs: got 0, expected a whole number of at least 1"):
        LogGrowth(every_n_epochs=0)
