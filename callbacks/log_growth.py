"""Pictures of growth: patches of the clusters, and how heads, parameters and bits per dimension went."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from lvd_lightning.modules.conditional import ConditionalStudent
from lvd_lightning.modules.stage import derive_seed
from lvd_lightning.pictures import growth_picture, patches_picture

__all__ = ["LogGrowth"]


class LogGrowth(Callback):
    """Draws what a `ConditionalStudent` has grown to at the end of every n-th epoch; other modules are left alone.

    Writes `pictures/clusters_epoch_<epoch>.png` (training patches of the heads of four circuits, a head per row) and
    `pictures/growth.png` (from the stage's metrics.csv) into the Trainer's default_root_dir, the stage's folder, and
    logs both as "clusters" and "growth" if there is a WandbLogger. Override `should_draw` to draw at other epochs.

    Args:
        every_n_epochs: draw at the epochs n - 1, 2 n - 1, ... (counted from 0); the student's `round_epochs` draws what
            each round has led to.
        seed: of the choice of patches.
    """

    def __init__(self, every_n_epochs: int = 5, seed: int = 0) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs: got {every_n_epochs}, expected at least 1")
        self.every_n_epochs = every_n_epochs
        self.seed = seed

    def should_draw(self, epoch: int) -> bool:
        """Whether to draw at the end of this epoch (counted from 0)."""
        return (epoch + 1) % self.every_n_epochs == 0

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        if not (isinstance(pl_module, ConditionalStudent) and trainer.is_global_zero and self.should_draw(epoch)):
            return
        stage = Path(trainer.default_root_dir)
        (stage / "pictures").mkdir(parents=True, exist_ok=True)
        clusters, growth = stage / "pictures" / f"clusters_epoch_{epoch:03d}.png", stage / "pictures" / "growth.png"
        self.draw_clusters(clusters, pl_module)
        drawn = {"clusters": clusters}
        if growth_picture(growth, stage / "metrics.csv", pl_module.context.data):
            drawn["growth"] = growth
        for logger in trainer.loggers:
            for name, path in drawn.items():
                if isinstance(logger, WandbLogger):
                    logger.log_image(key=name, images=[str(path)])

    def draw_clusters(self, path: Path, student: ConditionalStudent, num_circuits: int = 4) -> None:
        """Write patches of all heads of the circuits with the most patches."""
        clusters_NP, first = student.clusters_NP["train"], 0
        busiest = clusters_NP.flatten().bincount().argsort(descending=True, stable=True)[:num_circuits]
        heads, z_NP = [], torch.full(clusters_NP.shape, -1)
        for g in busiest.tolist():
            chosen = clusters_NP == g
            z_NP[chosen] = first + student.heads_NP[chosen].long()
            heads += list(range(first, first + student.heads_per_circuit[g]))
            first = heads[-1] + 1
        context = student.context
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "clusters"))
        patches_picture(path, z_NP, heads, context.data, int(context.shared["patch_size"]), generator)
