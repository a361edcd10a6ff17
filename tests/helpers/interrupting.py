"""What stands for Ctrl-C, for a machine that goes down, and for one that asks a process to end."""

import os
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["Interrupt", "KillInSecondEpoch", "SignalInSecondEpoch", "kill_once", "signal_once"]


class Interrupt(Callback):
    """Interrupts training as soon as it begins."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise KeyboardInterrupt


def kill_once(run_dir: Path, place: str) -> None:
    """Kill this process, unless that was done in this place before."""
    marker = run_dir.parent / f"killed-{run_dir.name}-{place}"
    if run_dir.name == "killed" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


class KillInSecondEpoch(Callback):
    """Kills the process within the second epoch of a stage."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        if trainer.current_epoch == 1 and rest[-1] == 1:
            stage = Path(trainer.default_root_dir)
            kill_once(stage.parent, stage.name)


def signal_once(run_dir: Path, place: str, number: int) -> None:
    """Send this process a signal, unless that was done in this place before."""
    marker = run_dir.parent / f"signal-{run_dir.name}-{place}"
    if run_dir.name.startswith("stopped") and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), number)


class SignalInSecondEpoch(Callback):
    """Sends a signal within the second epoch of a stage: SIGTERM and SIGUSR1 in turn; of several ranks to the last."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        if trainer.current_epoch == 1 and rest[-1] == 1 and trainer.global_rank == trainer.world_size - 1:
            stage = Path(trainer.default_root_dir)
            signal_once(stage.parent, stage.name, (signal.SIGTERM, signal.SIGUSR1)[len(stage.name) % 2])
