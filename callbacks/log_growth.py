"""Pictures of growth: patches of the clusters, and how heads, parameters and bits per dimension went."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from callbacks.pictures import PictureCallback
from lvd_lightning.runs.pictures import growth_picture, patches_picture
from lvd_lightning.seeds import generator_for
from lvd_lightning.stages.conditional import ConditionalStudent

__all__ = ["LogGrowth"]


class LogGrowth(PictureCallback):
    """Draws what a `ConditionalStudent` has grown to at the end of every n-th epoch; other modules are left alone.

    Writes `pictures/clusters_epoch_<epoch>.png` (training patches of the heads of four circuits, a head per row) and
    `pictures/growth.png` (from the stage's metrics.csv) into the Trainer's default_root_dir, the stage's folder, and
    logs both as "clusters" and "growth" if there is a WandbLogger. Override `should_draw` to draw at other epochs.

    Args:
        every_n_epochs: draw at the epochs n - 1, 2 n - 1, ... (counted from 0); the student's `round_epochs` draws what
            each round has led to.
        seed: of the choice of patches.

    Example:
        >>> from callbacks import LogGrowth
        >>> draw = LogGrowth(every_n_epochs=3)
        >>> [epoch for epoch in range(10) if draw.should_draw(epoch)]
        [2, 5, 8]
    """

    def __init__(self, every_n_epochs: int = 5, seed: int = 0) -> None:
        super().__init__(every_n_epochs, seed)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        if not (isinstance(pl_module, ConditionalStudent) and trainer.is_global_zero and self.should_draw(epoch)):
            return
        folder = self.folder(trainer)
        clusters, growth = folder / f"clusters_epoch_{epoch:03d}.png", folder / "growth.png"
        self.draw_clusters(clusters, pl_module)
        drawn = {"clusters": clusters}
        if growth_picture(growth, folder.parent / "metrics.csv", pl_module.context.data):
            drawn["growth"] = growth
        self.log_pictures(trainer, drawn)

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
        generator = generator_for(self.seed, "clusters")
        patches_picture(path, z_NP, heads, context.data, generator)
