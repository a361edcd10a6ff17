"""Small runs of the circuit students: images of four patches, and a run directory in which stages can be run.

Shapes: N images, P = 4 patches, D = 12 variables of a patch, K latent values.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.sampler import GlobalBatchSampler
from helpers.pictures import Pictures
from lvd_lightning import stages
from lvd_lightning.context import DONE_MARKER, StageContext
from lvd_lightning.runs import run as runs
from lvd_lightning.runs.experiment import Experiment, PlannedStage
from lvd_lightning.stages.stage import Stage, StageModule

__all__ = ["DIMS", "PATCH", "POSITIONS", "SIDE", "STATES", "Run", "SmallImages"]

STATES, SIDE, PATCH = 3, 4, 2
# The stages of such a run, in order.
STAGES: dict[str, type[Stage]] = {
    "latents": stages.Latents,
    "conditional": stages.ConditionalStudent,
    "prior": stages.PriorStudent,
    "finetune": stages.FinetuneStudent,
}
POSITIONS, DIMS = (SIDE // PATCH) ** 2, 3 * PATCH**2


class SmallImages(Pictures, LightningDataModule):
    """4 x 4 images whose patches are noisy copies of a few prototypes; neighbours are alike."""

    image_shape, patch_size = (3, SIDE, SIDE), PATCH

    def __init__(self, num_train: int = 120, num_val: int = 24, batch_size: int = 40, num_states: int = STATES) -> None:
        super().__init__()
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(0)
        prototypes_KD = torch.randint(256, (num_states, DIMS), generator=generator)
        self.z: dict[str, Tensor] = {}
        self.splits: dict[str, Tensor] = {}
        for split, count in (("train", num_train), ("val", num_val), ("test", num_val)):
            first_N1 = torch.randint(num_states, (count, 1), generator=generator) ** 2 // max(1, num_states - 1)
            other_NP = torch.randint(num_states, (count, POSITIONS), generator=generator)
            stay_NP = torch.rand(count, POSITIONS, generator=generator) < 0.7
            self.z[split] = torch.where(stay_NP, first_N1, other_NP)
            noise = torch.randint(-20, 21, (count, POSITIONS, 1), generator=generator)
            noise = noise + torch.randint(-4, 5, (count, POSITIONS, DIMS), generator=generator)
            self.splits[split] = unpatched((prototypes_KD[self.z[split]] + noise).clamp(0, 255).to(torch.uint8))

    def num_examples(self, split: str) -> int:
        return len(self.splits[split])

    def batch(self, split: str, indices: Tensor) -> Tensor:
        return self.splits[split][indices]

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val", False)

    def _loader(self, split: str, shuffle: bool) -> DataLoader[Any]:
        group = torch.distributed if torch.distributed.is_initialized() else None
        rank, size = (group.get_rank(), group.get_world_size()) if group else (0, 1)
        sampler = GlobalBatchSampler(self.num_examples(split), self.batch_size, 0, shuffle, rank, size)
        items = [(image, number) for number, image in enumerate(self.splits[split])]
        return DataLoader(items, batch_sampler=sampler)  # type: ignore[arg-type]


def unpatched(patches_NPD: Tensor) -> Tensor:
    rows = SIDE // PATCH
    cells = patches_NPD.view(-1, rows, rows, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(-1, 3, SIDE, SIDE).contiguous()


@dataclass
class Run:
    """A run directory with finished latents, in which stages can be run."""

    folder: Path
    data: SmallImages = field(default_factory=SmallImages)
    num_states: int = STATES
    seed: int = 0

    def __post_init__(self) -> None:
        folder = self.folder / "latents"
        if folder.is_dir():  # made by another process
            return
        folder.mkdir(parents=True)
        for split, z_NP in self.data.z.items():
            np.save(folder / f"assignments_{split}.npy", z_NP.numpy().astype(np.int32))
        counts = {split: len(z_NP) for split, z_NP in self.data.z.items()}
        info = {"num_clusters": self.num_states, "pooled": True, "num_patches": POSITIONS, "num_examples": counts}
        (folder / "latents.json").write_text(json.dumps(info))
        self.finish("latents", {})

    def context(self, stage: str) -> StageContext:
        finished = [name for name in STAGES if (self.folder / name / DONE_MARKER).is_file() and name != stage]
        earlier = {name: STAGES[name].leaves for name in finished}
        return StageContext(self.folder, stage, self.seed, self.data, {}, earlier)

    def opened(self) -> runs.Run:
        """The same as evaluation and report see it."""
        planned = [PlannedStage(name, kind, {}, lambda: self.data, kind) for name, kind in STAGES.items()]
        return runs.Run(Experiment("small", self.folder, self.seed, lambda: self.data, tuple(planned)))

    def finish(self, stage: str, results: dict[str, float], seconds: float = 1.0) -> None:
        (self.folder / stage / DONE_MARKER).write_text(json.dumps({"seconds": seconds, **results}))

    def begin(self, stage: str, module: StageModule) -> StageModule:
        module.begin_stage(self.context(stage))
        return module

    def trainer(self, stage: str, epochs: int = 1, **settings: Any) -> Trainer:
        plain = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        return Trainer(
            **{**plain, "logger": False, "accelerator": "cpu", "devices": 1, **settings},
            default_root_dir=self.folder / stage,
            max_epochs=epochs,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
        )

    def train(self, stage: str, module: StageModule, epochs: int = 1, **settings: Any) -> Trainer:
        """Begin the stage and train; the Trainer, whose metrics say how it went."""
        self.begin(stage, module)
        trainer = self.trainer(stage, epochs, **settings)
        trainer.fit(module, datamodule=None if stage == "baseline" else self.data)
        return trainer

    def complete(self, stage: str, module: StageModule, epochs: int = 1) -> dict[str, float]:
        """Train a stage and hand on what it leaves."""
        self.train(stage, module, epochs)
        context = self.context(stage)
        context.dir.mkdir(parents=True, exist_ok=True)
        results = module.finish_stage(context)
        self.finish(stage, results)
        return results
