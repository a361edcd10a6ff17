"""Checkpoints within an epoch: every so many minutes, and when a signal asks the process to stop."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torchmetrics import Metric
from typing_extensions import override

from lvd_lightning.events import record
from lvd_lightning.ranks import highest, stop_together, summed
from lvd_lightning.runs.checkpoint import save_whole
from lvd_lightning.stopping import Stopped, requested

__all__ = ["STEP_CHECKPOINT", "WITHIN", "StepCheckpoint"]

STEP_CHECKPOINT = "step.ckpt"
#: The key of what a checkpoint within an epoch holds beside the others' content.
WITHIN = "within"


class StepCheckpoint(Checkpoint):
    """Writes `step.ckpt` in `folder` within an epoch, and removes it at the epoch's end, which has checkpoints itself.

    Whoever goes on from it trains on the next batch, and ends as if there had been no interruption: it holds what the
    metrics of the epoch have summed up so far, and the state of the global random numbers, which are the same on all
    ranks. Between batches whose flows or gradients are added up for one step nothing is saved.

    After every batch ranks ask each other whether a signal has come. Then they save, and raise `Stopped`; in the last
    batch, and in validation, at the end of the epoch.

    minutes: between two checkpoints; None for none but that of a signal.
    """

    def __init__(self, folder: Path, minutes: float | None) -> None:
        self.folder = folder
        self.minutes = minutes
        self._last = time.monotonic()
        self._loaded: dict[str, Any] | None = None

    @property
    def path(self) -> Path:
        return self.folder / STEP_CHECKPOINT

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        is_due = self.minutes is not None and time.monotonic() - self._last > 60 * self.minutes
        number, save = highest([requested() or 0, int(is_due)])
        if trainer.is_last_batch or not (number or save):
            return
        if not _is_between_steps(trainer, pl_module, batch_idx):
            self._save(trainer)
        elif not _never_steps(trainer, pl_module):
            return
        if number:
            raise Stopped(number)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the checkpoint of the epoch."""
        if trainer.is_global_zero:
            self.path.unlink(missing_ok=True)
        self._last = time.monotonic()
        number = stop_together()
        if number is not None:
            raise Stopped(number)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._is_saving:
            return
        states = {}
        for name, module in pl_module.named_modules():
            if isinstance(module, Metric):
                # Sums: the first rank goes on with those of all, the others with none.
                states[name] = {key: summed(getattr(module, key)) for key in module._defaults}
        devices = [trainer.strategy.root_device] if trainer.strategy.root_device.type == "cuda" else []
        checkpoint[WITHIN] = {
            "metrics": states,
            "torch": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state(device) for device in devices],
            "numpy": _plain(np.random.get_state(legacy=True)),
            "python": _plain(random.getstate()),
        }

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint.get(WITHIN)
        self._is_resumed = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to read where training goes on.

        A module that asks how many steps there will be has its loaders made before the Trainer knows of a checkpoint:
        they would begin with the first batch, and with workers in the first epoch's order.
        """
        loop = trainer.fit_loop
        if not self._is_resumed or loop._combined_loader is None:
            return
        for loader in loop._combined_loader.flattened:
            _set_sampler_epoch(loader, trainer.current_epoch)
        loop._load_combined_loader_states()
        assert loop._data_fetcher is not None
        iter(loop._data_fetcher)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """At the first batch after a checkpoint within the epoch: everything is made that has a state."""
        found, self._loaded = self._loaded, None
        if found is None:
            return
        for name, module in pl_module.named_modules():
            if isinstance(module, Metric) and name in found["metrics"] and trainer.is_global_zero:
                for key, value in found["metrics"][name].items():
                    setattr(module, key, value.to(module.device))
                module._update_count = 1
        torch.set_rng_state(found["torch"].cpu())
        for state in found["cuda"]:
            torch.cuda.set_rng_state(state.cpu(), trainer.strategy.root_device)
        name, keys, *rest = found["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        version, numbers, last = found["python"]
        random.setstate((version, tuple(numbers), last))

    _is_saving = False
    _is_resumed = False

    def _save(self, trainer: Trainer) -> None:
        self._is_saving = True
        try:
            save_whole(trainer, self.path)
        finally:
            self._is_saving = False
        trainer.strategy.barrier()
        facts = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        record("checkpoint", stage=self.folder.name, file=STEP_CHECKPOINT, **facts)
        self._last = time.monotonic()


def _is_between_steps(trainer: Trainer, module: LightningModule, batch_idx: int) -> bool:
    """Whether flows or gradients wait for more batches."""
    return bool(getattr(module, "num_added", 0)) or (batch_idx + 1) % trainer.accumulate_grad_batches != 0


def _never_steps(trainer: Trainer, module: LightningModule) -> bool:
    """Whether a step takes all batches of an epoch: to wait for it would be to wait for the epoch."""
    return bool(getattr(module, "batches_per_step", 1) >= trainer.num_training_batches)


def _plain(state: Any) -> list[Any]:
    """Lists and numbers, which checkpoints may hold."""
    return [
        value.tolist() if isinstance(value, np.ndarray) else list(value) if isinstance(value, tuple) else value
        for value in state
    ]
