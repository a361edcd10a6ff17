"""Where images come from: Lightning data modules, named in configs as `class_path: datamodules.Photos`."""

from importlib import import_module
from typing import Any

_HOMES = {
    "CIFAR10": "cifar10",
    "EMNIST": "mnist",
    "MNIST": "mnist",
    "Arrays": "arrays",
    "Digits": "digits",
    "DownsampledImageNet": "downsampled_imagenet",
    "FashionMNIST": "mnist",
    "Folder": "folder",
    "GlobalBatchSampler": "sampler",
    "ImageDataModule": "base",
    "Photos": "photos",
    "RGBDataModule": "rgb",
}

__all__ = [
    "CIFAR10",
    "EMNIST",
    "MNIST",
    "Arrays",
    "Digits",
    "DownsampledImageNet",
    "FashionMNIST",
    "Folder",
    "GlobalBatchSampler",
    "ImageDataModule",
    "Photos",
    "RGBDataModule",
]


def __getattr__(name: str) -> Any:
    """A module's own libraries (scikit-learn, torchvision) are imported when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
