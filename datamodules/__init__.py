"""Where images come from: Lightning data modules, named in configs as `class_path: datamodules.Photos`."""

from datamodules.arrays import Arrays
from datamodules.base import ImageDataModule
from datamodules.cifar10 import CIFAR10
from datamodules.downsampled_imagenet import DownsampledImageNet
from datamodules.folder import Folder
from datamodules.photos import Photos
from datamodules.sampler import GlobalBatchSampler

__all__ = ["CIFAR10", "Arrays", "DownsampledImageNet", "Folder", "GlobalBatchSampler", "ImageDataModule", "Photos"]
