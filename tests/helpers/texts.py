"""Texts in memory, drawn from a hidden Markov model, and runs of stages over them.

Shapes: N windows, T positions.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.sampler import GlobalBatchSampler
from lvd_lightning.latents.assignments import write_assignments
from lvd_lightning.models.hmm_graph import HMMTables
from lvd_lightning.models.language import HiddenMarkovModel
from lvd_lightning.parts import Tokens
from lvd_lightning.ranks import Ranks, rank_and_size
from lvd_lightning.runs.experiment import Experiment, PlannedStage
from lvd_lightning.runs.pipeline import Pipeline
from lvd_lightning.runs.run import Run
from lvd_lightning.stages.stage import PlainStage, Stage
from lvd_lightning.units import Perplexity

__all__ = ["LENGTH", "STATES", "WORDS", "GivenStates", "Texts", "run_stages", "source"]

WORDS, LENGTH, STATES = 7, 5, 3


def source() -> HMMTables:
    """A homogeneous model whose states go round and have words of their own, mostly."""
    initial = torch.tensor([0.6, 0.3, 0.1])
    transition = torch.tensor([[0.1, 0.8, 0.1], [0.1, 0.1, 0.8], [0.8, 0.1, 0.1]])
    emission = torch.full((STATES, WORDS), 0.02)
    for state in range(STATES):
        emission[state, 2 * state : 2 * state + 2] = 0.45
    return HMMTables(initial, transition[None], (emission / emission.sum(1, keepdim=True))[None])


class Texts(LightningDataModule):
    """Windows of a hidden Markov model, one after the other, with the states that made them."""

    parts, unit, protocol, facts, num_dims = Tokens(LENGTH, WORDS), Perplexity(WORDS), "", {"windows": LENGTH}, LENGTH

    def __init__(self, num_train: int = 200, num_val: int = 60, batch_size: int = 50) -> None:
        super().__init__()
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(0)
        tables = source()
        self.splits: dict[str, Tensor] = {}
        self.z: dict[str, Tensor] = {}
        for split, count in (("train", num_train), ("val", num_val), ("test", num_val)):
            z, steps = [], []
            state_N = torch.multinomial(tables.initial_K, count, replacement=True, generator=generator)
            for _ in range(LENGTH):
                z.append(state_N)
                steps.append(torch.multinomial(tables.emission_SKV[0][state_N], 1, generator=generator)[:, 0])
                state_N = torch.multinomial(tables.transition_SKK[0][state_N], 1, generator=generator)[:, 0]
            self.z[split], self.splits[split] = torch.stack(z, 1), torch.stack(steps, 1)

    def setup(self, stage: str | None = None) -> None:
        """Everything is there."""

    def num_examples(self, split: str) -> int:
        return len(self.splits[split])

    def batch(self, split: str, indices: Tensor) -> Tensor:
        return self.splits[split][indices]

    def stream(self, split: str) -> np.ndarray:
        return self.splits[split].flatten().numpy().astype(np.int32)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val", False)

    def _loader(self, split: str, shuffle: bool) -> DataLoader[Any]:
        rank, size = rank_and_size()
        sampler = GlobalBatchSampler(self.num_examples(split), self.batch_size, 0, shuffle, rank, size)
        if self.trainer is not None:
            sampler.set_epoch(self.trainer.current_epoch)
        items = [(x, number) for number, x in enumerate(self.splits[split])]
        return DataLoader(items, batch_sampler=sampler)  # type: ignore[arg-type]


class GivenStates(PlainStage):
    """Leaves the states that made the text as its clusters."""

    leaves = ("latents",)

    def run(self, context: Any) -> dict[str, float]:
        context.dir.mkdir(parents=True, exist_ok=True)
        write_assignments(context.dir, context.data.z, STATES)
        return {}


def run_stages(
    folder: Path, stages: dict[str, Callable[[], Any]], data: Any = None, epochs: int = 2, **trainer: Any
) -> Run:
    """A run of `GivenStates` and these stages, to its end."""
    data = Texts() if data is None else data
    made: dict[str, Callable[[], Any]] = {"latents": GivenStates, **stages}
    settings = {"max_epochs": epochs, "enable_progress_bar": False, **trainer}
    planned = tuple(
        PlannedStage(name, kind_of(make), {}, lambda: data, make, trainer=lambda _: dict(settings))
        for name, make in made.items()
    )
    devices = {"accelerator": "cpu", "devices": 1}
    experiment = Experiment("text", folder / "text", 0, lambda: data, planned, devices=devices)
    Pipeline(experiment, Ranks(devices)).run()
    return Run(experiment)


def kind_of(make: Callable[[], Any]) -> type[Stage]:
    found: type[Stage] = make if isinstance(make, type) else type(make())
    return found


def source_model() -> HiddenMarkovModel:
    return HiddenMarkovModel.from_tables(source(), LENGTH)
