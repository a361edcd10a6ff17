"""Where images come from: Lightning data modules, named in configs as `class_path: datamodules.Photos`."""

from lvd_lightning.lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
