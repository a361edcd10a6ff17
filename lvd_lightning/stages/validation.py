"""What a model reaches on validation examples, outside of a Trainer."""

from __future__ import annotations

from typing import Any

import torch

from lvd_lightning.context import Data
from lvd_lightning.metrics import MeanLikelihood

__all__ = ["validation_likelihood"]


@torch.no_grad()
def validation_likelihood(model: Any, data: Data, count: int | None, device: torch.device) -> float:
    """The likelihood of the first `count` validation examples (None: all), in the data's unit; by this rank alone.

    model: something with `log_prob`, on the device.
    """
    metric = MeanLikelihood(data.unit, data.num_dims, sync_on_compute=False).to(device)
    total = data.num_examples("val")
    for index in torch.arange(min(count or total, total)).split(64):
        metric.update(model.log_prob(data.batch("val", index).to(device)))
    return float(metric.compute())
