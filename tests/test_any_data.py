"""Data that are no square RGB images of bytes go through all stages: tokens, other shapes, other numbers of values."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pictures import Pictures
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

import lvd_lightning.circuits as pc
from datamodules.sampler import GlobalBatchSampler
from lvd_lightning.parts import ImagePatches, register_parts
from lvd_lightning.ranks import Ranks
from lvd_lightning.runs.experiment import Experiment, PlannedStage
from lvd_lightning.runs.pipeline import Pipeline
from lvd_lightning.runs.run import Run
from lvd_lightning.stages import (
    CircuitBaseline,
    ConditionalStudent,
    FinetuneStudent,
    Latents,
    MAETeacher,
    PriorStudent,
    VQVAETeacher,
)
from lvd_lightning.stages.stage import Stage
from lvd_lightning.units import BitsPerDimension, Perplexity, Unit

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on small loaders; models this small are bad

SIZES = {"train": 60, "val": 12, "test": 12}
WORDS, LENGTH = 7, 5


class Items(LightningDataModule):
    """Examples in memory."""

    splits: dict[str, Tensor]

    def num_examples(self, split: str) -> int:
        return len(self.splits[split])

    def batch(self, split: str, indices: Tensor) -> Tensor:
        return self.splits[split][indices]

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val", False)

    def _loader(self, split: str, shuffle: bool) -> DataLoader[Any]:
        sampler = GlobalBatchSampler(self.num_examples(split), 20, 0, shuffle, 0, 1)
        items = [(x, number) for number, x in enumerate(self.splits[split])]
        return DataLoader(items, batch_sampler=sampler)  # type: ignore[arg-type]


@register_parts
class Words:
    """A text's tokens, one a part."""

    def __init__(self, length: int, vocabulary: int) -> None:
        self.num_parts, self.vocabulary = length, vocabulary
        self.shape: tuple[int, ...] = (1,)
        self.example_shape: tuple[int, ...] = (length,)
        self.leaf = pc.Categorical(vocabulary)
        self.arguments = {"length": length, "vocabulary": vocabulary}

    def split(self, x: Tensor) -> Tensor:
        return x[..., None]

    def join(self, parts: Tensor) -> Tensor:
        return parts[..., 0]


class Texts(Items):
    """Walks over words, each near the one before it."""

    parts, unit, protocol, facts, num_dims = Words(LENGTH, WORDS), Perplexity(WORDS), "", {"windows": LENGTH}, LENGTH

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        steps = {split: torch.randint(3, (count, LENGTH), generator=generator) - 1 for split, count in SIZES.items()}
        self.splits = {split: (3 + found.cumsum(1)) % WORDS for split, found in steps.items()}


class OtherImages(Pictures, Items):
    """Images of one of four levels and a little noise, of any shape and numbers of values."""

    def __init__(self, shape: tuple[int, int, int], num_categories: Sequence[int]) -> None:
        super().__init__()
        self.image_shape, self.num_categories = shape, tuple(num_categories)
        self.unit = BitsPerDimension(sum(map(math.log2, num_categories)) / len(num_categories))
        generator = torch.Generator().manual_seed(0)
        highest = torch.tensor(num_categories)[:, None, None] - 1
        self.splits = {}
        for split, count in SIZES.items():
            level = torch.randint(4, (count, 1, 1, 1), generator=generator) / 4
            noise = torch.randint(2, (count, *shape), generator=generator)
            dtype = torch.uint8 if max(num_categories) <= 256 else torch.int16
            self.splits[split] = ((level * highest).round() + noise).to(dtype)

    @property
    def parts(self) -> ImagePatches:
        return ImagePatches(self.image_shape, self.patch_size, self.num_categories)

    def to_rgb(self, images: Tensor) -> Tensor:
        highest = torch.tensor(self.num_categories)[:, None, None] - 1
        levels = (images.double() * 255 / highest).round().clamp(0, 255).to(torch.uint8)
        return levels[..., :1, :, :].expand(*levels.shape[:-3], 3, *levels.shape[-2:])


STAGES: dict[str, Any] = {
    "latents": lambda: Latents(num_clusters=3),
    "conditional": lambda: ConditionalStudent(num_units=2, max_examples=50),
    "prior": lambda: PriorStudent(candidates=None),
    "finetune": lambda: FinetuneStudent(),
    "baseline": lambda: CircuitBaseline(num_units=2, seconds=0.01),
}
KINDS: dict[str, type[Stage]] = {
    **{"teacher": MAETeacher, "latents": Latents, "conditional": ConditionalStudent, "prior": PriorStudent},
    **{"finetune": FinetuneStudent, "baseline": CircuitBaseline},
}
SMALL_MAE = {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "decoder_hidden_size": 8, "decoder_num_layers": 1}
SMALL_VQVAE: dict[str, Any] = {
    **{"channels": 4, "num_residual_blocks": 1, "num_features": 4, "codebook_size": 5, "num_components": 2},
    **{"prior_hidden_size": 4, "prior_num_layers": 1, "prior_num_heads": 1},
}


def run_all(folder: Path, data: Any, teacher: Any = None, kind: type[Stage] = MAETeacher) -> Run:
    """One epoch of every stage, evaluation and report."""
    made = {**({"teacher": teacher} if teacher else {}), **STAGES}
    kinds = {**KINDS, "teacher": kind}
    trainer = {"max_epochs": 1, "enable_progress_bar": False}
    stages = tuple(
        PlannedStage(name, kinds[name], {}, make_data, make, trainer=lambda _: dict(trainer))
        for name, make in made.items()
        for make_data in [lambda: data]
    )
    devices = {"accelerator": "cpu", "devices": 1}
    experiment = Experiment("any", folder / "any", 0, stages[0].data, stages, devices=devices)
    Pipeline(experiment, Ranks(devices)).run()
    return Run(experiment)


def expect(run: Run, unit: Unit) -> dict[str, Any]:
    """The summary, whose figures are in the unit and better than knowing nothing."""
    summary: dict[str, Any] = json.loads((run.dir / "report" / "summary.json").read_text())
    assert unit.uniform is not None
    for figures in (summary["test"], summary["baseline"]["em"]):
        assert figures[unit.name] < unit.uniform
    assert f"val_{unit.name}" in summary["stages"]["finetune"]
    return summary


def test_tokens_go_through_all_stages(tmp_path: Path) -> None:
    data = Texts()
    data.setup = lambda stage=None: None  # type: ignore[method-assign]
    run = run_all(tmp_path, data)
    summary = expect(run, data.unit)
    assert summary["protocol"] == {"windows": LENGTH}
    assert "bpd" not in (run.dir / "report" / "summary.md").read_text()
    assert not (run.dir / "report" / "samples.png").exists()
    model: Any = run.model()
    assert model.sample(4).shape == (4, LENGTH)
    every = torch.cartesian_prod(*[torch.arange(WORDS)] * LENGTH)
    assert float(model.log_prob(every).double().logsumexp(0)) == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize(
    ("shape", "num_categories"), [((1, 4, 6), (17,)), ((3, 4, 8), (256, 511, 511))], ids=["grey", "wide"]
)
@pytest.mark.parametrize("teacher", ["none", "mae", "vqvae"])
def test_images_of_other_kinds_go_through_all_stages(
    tmp_path: Path, shape: tuple[int, int, int], num_categories: tuple[int, ...], teacher: str
) -> None:
    data = OtherImages(shape, num_categories)
    data.setup = lambda stage=None: None  # type: ignore[method-assign]
    makes = {"none": None, "mae": lambda: MAETeacher(**SMALL_MAE), "vqvae": lambda: VQVAETeacher(**SMALL_VQVAE)}
    run = run_all(tmp_path, data, makes[teacher], VQVAETeacher if teacher == "vqvae" else MAETeacher)
    expect(run, data.unit)
    assert (run.dir / "report" / "samples.png").is_file()
    model: Any = run.model()
    drawn = model.sample(5)
    assert (drawn.shape, drawn.dtype) == ((5, *shape), data.splits["train"].dtype)
    model.log_prob(drawn)
