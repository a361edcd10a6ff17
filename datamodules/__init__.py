"""Where images and texts come from: Lightning data modules, named in configs as `class_path: datamodules.Photos`."""

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
    "LanguageDataModule": "language",
    "Photos": "photos",
    "RGBDataModule": "rgb",
    "Text": "text",
    "WikiText": "wikitext",
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
    "LanguageDataModule",
    "Photos",
    "RGBDataModule",
    "Text",
    "WikiText",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
