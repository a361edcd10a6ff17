"""Where data come from: Lightning data modules, named in configs as `class_path: datamodules.Photos`."""

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
    "GreyPatches": "grey_patches",
    "ImageDataModule": "base",
    "LanguageDataModule": "language",
    "Photos": "photos",
    "RGBDataModule": "rgb",
    "SklearnTable": "sklearn_tables",
    "Synthesized": "synthesized",
    "TableDataModule": "tables",
    "Text": "text",
    "UCITable": "uci_tables",
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
    "GreyPatches",
    "ImageDataModule",
    "LanguageDataModule",
    "Photos",
    "RGBDataModule",
    "SklearnTable",
    "Synthesized",
    "TableDataModule",
    "Text",
    "UCITable",
    "WikiText",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
