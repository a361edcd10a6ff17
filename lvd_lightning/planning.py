"""What a stage will take, told before it runs: numbers of parameters, memory, messages, files, work.

Nothing here knows a formula of its own: stages tell it in `Stage.plan`, from the classes that they train.

Shapes: n examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lvd_lightning.circuits.distributions import Distribution
from lvd_lightning.context import StageContext
from lvd_lightning.parts import Columns, Parts

__all__ = ["ESTIMATE", "PlanRequest", "StagePlan", "StandInData"]

#: In the name of what is no sum of tensors that will be allocated, but a guess at most of them.
ESTIMATE = "estimated"


@dataclass(frozen=True)
class StagePlan:
    """What one stage will take.

    parameters: numbers that are learnt, as the stage's figures count them; None: unknown.
    memory: bytes of one rank, by what they are for. Activations are estimates, and called so.
    epochs, steps_per_epoch: of the Trainer; 0 for stages without one.
    sent_per_step: bytes that a rank gives to all-reduces in a step.
    files: bytes by name, in the stage's folder.
    work: operations of the whole stage on all ranks together, in a measure of the stage's class (`work_is`); None:
        unknown.
    leaves: what later stages have to know, by the kind of artefact.
    notes: what the figures take for granted.
    """

    parameters: int | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
    epochs: int = 0
    steps_per_epoch: int = 0
    sent_per_step: int = 0
    files: Mapping[str, int] = field(default_factory=dict)
    work: float | None = None
    work_is: str = ""
    leaves: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def total_memory(self) -> int:
        """Bytes of one rank."""
        return sum(self.memory.values())

    @property
    def sent(self) -> int:
        """Bytes that a rank gives to the all-reduces of all steps."""
        return self.epochs * self.steps_per_epoch * self.sent_per_step


@dataclass(frozen=True)
class PlanRequest:
    """What a stage is told to make its plan from.

    context: as the stage will get it, but with stand-in data and a folder that is thrown away.
    num_ranks: processes, all together.
    epochs: of its Trainer. batch_size: examples of a batch on all ranks. accumulate: batches of a step.
    bytes_per_number: 4, or 8 in double precision.
    callbacks: of its Trainer.
    left: what the stages before it leave, by kind.
    """

    context: StageContext
    num_ranks: int = 1
    epochs: int = 1
    batch_size: int = 256
    accumulate: int = 1
    bytes_per_number: int = 4
    callbacks: Sequence[Any] = ()
    left: Mapping[str, Any] = field(default_factory=dict)

    @property
    def data(self) -> StandInData:
        """The stand-in data."""
        found: StandInData = self.context.data
        return found

    def num_examples(self, *splits: str) -> int:
        """Examples of some splits together; of all by default."""
        return sum(self.data.num_examples(split) for split in splits or ("train", "val", "test"))

    @property
    def share(self) -> int:
        """Examples of a batch on the rank that has the most."""
        return math.ceil(min(self.batch_size, self.num_examples("train")) / self.num_ranks)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch."""
        return math.ceil(math.ceil(self.num_examples("train") / self.batch_size) / self.accumulate)

    def sent(self, num_bytes: int) -> int:
        """So many bytes if there is somebody to send them to."""
        return num_bytes if self.num_ranks > 1 else 0

    def known(self, kind: str) -> Any:
        """What the last stage before this one left of a kind.

        Raises:
            ValueError: nobody said what it will be.
        """
        if self.left.get(kind) is None:
            raise ValueError(f"it needs {kind}, of which no stage before it has said what they will be")
        return self.left[kind]


@dataclass(frozen=True)
class StandInData:
    """Data in shape alone: the numbers of examples that there will be, and random ones in place of them.

    real: the datamodule, of which unit and protocol are asked. parts, counts: how its examples fall into parts, and how
    many each split has, which may be known before anything is read.
    """

    real: Any
    parts: Parts
    counts: Mapping[str, int]

    @property
    def unit(self) -> Any:
        return self.real.unit

    @property
    def protocol(self) -> str:
        return str(self.real.protocol)

    @property
    def facts(self) -> Mapping[str, Any]:
        return dict(self.real.facts)

    @property
    def num_dims(self) -> int:
        return math.prod(self.parts.example_shape)

    @property
    def batch_size(self) -> int:
        return int(self.real.batch_size)

    def num_examples(self, split: str) -> int:
        return self.counts[split]

    def batch(self, split: str, indices: Tensor) -> Tensor:
        """Random values that the parts' variables can have, (n, ...)."""
        count, generator = len(indices), torch.Generator().manual_seed(0)
        if isinstance(self.parts, Columns):
            return torch.randn(count, *self.parts.example_shape, generator=generator)
        leaf = self.parts.leaf
        size = math.prod(self.parts.shape)
        leaves: Sequence[Distribution] = [leaf] * size if isinstance(leaf, Distribution) else leaf
        numbers_D = torch.tensor([one.num_outcomes or 2 for one in leaves])
        drawn_NPD = torch.rand(count, self.parts.num_parts, size, generator=generator) * numbers_D
        return self.parts.join(drawn_NPD.long())
