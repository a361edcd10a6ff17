"""A teacher that explodes stops at once, before the step that would spoil its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lvd_lightning.faults import first_fault

__all__ = ["check_losses"]


def check_losses(
    module: LightningModule,
    stage: str,
    network: nn.Module,
    losses: Mapping[str, Tensor],
    index_B: Tensor,
    run: Callable[[], object],
) -> None:
    """Raise a ValueError if the loss of an example is NaN or infinite.

    It says which loss, of which training example, and which layer gave the first number that is not finite. What was
    saved before stays.

    Args:
        module: what is trained; it knows the epoch and the step.
        stage: its name.
        network: in which the layer is looked for.
        losses: by name, of every example, with shape (B,).
        index_B: the numbers of the examples.
        run: runs the network again on this batch.
    """
    with torch.no_grad():
        is_bad = torch.stack([~loss_B.detach().isfinite() for loss_B in losses.values()])
        if not bool(is_bad.any()):
            return
        which, row = is_bad.nonzero()[0].tolist()
        name = list(losses)[which]
        value = float(losses[name][row])
        fault = first_fault(network, run)
    where = f"step {module.global_step} (epoch {module.current_epoch + 1})"
    raise ValueError(
        f"stage {stage}: loss {name!r} is {value} in {where}, first for training example {int(index_B[row])} "
        f"({fault}): train with a lower lr, a longer warmup or gradient_clip_val; checkpoints from before stay"
    )
