"""What a teacher makes of images, layer by layer, with gradients for the images; and distances in it.

Shapes: B images, L places in a layer's map, E features of a place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["activation_distance", "last_features", "pooled_features", "seeing"]


def seeing(teacher: nn.Module, where: str) -> Any:
    """The teacher, if gradients can flow through it to the images; its own parameters stay as they are.

    where: who asks, for the message.

    Raises:
        ValueError: the teacher has no `activations`.
    """
    if not hasattr(teacher, "activations"):
        raise ValueError(
            f"{where}: a {type(teacher).__name__} has no activations(images) (see lvd_lightning.teachers): take a "
            "MAETeacher, a VQVAETeacher or a FlowTeacher of images, or a weight of 0 for losses on features"
        )
    return teacher.requires_grad_(False).eval()


def last_features(teacher: Any, images: Tensor) -> Tensor:
    """The features of every patch in sight of all others, (B, P, E); images (B, C, H, W) in -1..1."""
    found: Tensor = teacher.activations(images)[-1]
    return found


def pooled_features(teacher: Any, images: Tensor) -> Tensor:
    """The mean feature over the patches of an image, (B, E): what `frechet` compares."""
    return last_features(teacher, images).mean(1)


def activation_distance(teacher: Any, images: Tensor, others: Tensor) -> Tensor:
    """How differently a teacher sees two images, pair by pair, (B,).

    Of every layer the features of a place are scaled to length one, and their squared distances averaged over places;
    then over layers. That is LPIPS, but without its weights of channels, which were fitted to what people say.

    References:
        Zhang, Isola, Efros, Shechtman, Wang, The Unreasonable Effectiveness of Deep Features as a Perceptual Metric,
        CVPR 2018, equation 1.
    """
    found = [
        (_unit(one_BLE) - _unit(other_BLE)).square().sum(2).mean(1)
        for one_BLE, other_BLE in zip(teacher.activations(images), teacher.activations(others), strict=True)
    ]
    return torch.stack(found).mean(0)


def _unit(x_BLE: Tensor) -> Tensor:
    return x_BLE / (x_BLE.square().sum(2, keepdim=True) + 1e-10).sqrt()
