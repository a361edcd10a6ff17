"""Small assembled circuits with their mathematics by brute force, and small runs of the circuit students.

Shapes: B images, P = 4 patches, D = 12 variables of a patch, K = 3 latent values.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

import lvd_lightning.circuits as pc
from datamodules.sampler import GlobalBatchSampler
from lvd_lightning.color import patchify
from lvd_lightning.modules.assembled import AssembledCircuit
from lvd_lightning.modules.stage import DONE_MARKER, StageContext, StageModule

STATES, SIDE, PATCH, CATEGORIES = 3, 4, 2, 4
POSITIONS, DIMS = (SIDE // PATCH) ** 2, 3 * PATCH**2
#: Heads of the circuits of one set of conditionals, and whether positions share it.
KINDS = {"tied": ([1, 1, 1], True), "untied": ([1, 1, 1], False), "heads": ([2, 1], True), "both": ([1, 2], False)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@dataclass
class Assembly:
    """An assembled circuit, and the same as single graphs."""

    circuit: AssembledCircuit
    graphs: list[pc.CircuitGraph]

    def given(self, images: Tensor, observed: Tensor | None = None) -> Tensor:
        """log p(observed part of x_i | z_i = k) one circuit at a time, (B, P, K)."""
        patches_BPD = patchify(images, PATCH)
        mask_BPD = None if observed is None else patchify(observed, PATCH)
        out_BPK = torch.zeros(len(images), POSITIONS, STATES)
        for p in range(POSITIONS):
            mask = None if mask_BPD is None else mask_BPD[:, p]
            found = [pc.Circuit(graph).log_prob(patches_BPD[:, p], observed=mask) for graph in self.graphs]
            heads = torch.cat(found, 1).detach()
            out_BPK[:, p] = heads if self.circuit.tied else heads[:, STATES * p : STATES * (p + 1)]
        return out_BPK

    def log_joint(self, images: Tensor, observed: Tensor | None = None) -> Tensor:
        """log p(x, z) of every z, (B, K ** P)."""
        given_BPK = self.given(images, observed)
        z_TP = torch.tensor(list(itertools.product(range(STATES), repeat=POSITIONS)))
        certain = torch.full((len(z_TP), POSITIONS, STATES), -torch.inf).scatter_(2, z_TP[..., None], 0.0)
        log_z_T = pc.Circuit(self.circuit.prior.to_graph()).log_prob(certain)[:, 0].detach()
        return log_z_T + sum(given_BPK[:, p, z_TP[:, p]] for p in range(POSITIONS))


def assembly(kind: str, num_latents: int | None = None, seed: int = 0) -> Assembly:
    """Random circuits over 4 x 4 images of values below `CATEGORIES`."""
    generator = torch.Generator().manual_seed(seed)
    heads, tied = KINDS[kind]
    parents = torch.tensor([-1, 0, 0, 2])
    # Uneven ones: random parameters make every latent value as good as any other.
    prior = sharpened(pc.hclt(parents, num_latents or STATES, pc.SoftEvidence(STATES), generator=generator))
    graphs = []
    for number, count in enumerate(heads * (1 if tied else POSITIONS)):
        tree = torch.arange(-1, DIMS - 1) if number % 2 else torch.tensor([-1, *[0] * (DIMS - 1)])
        leaf = pc.Categorical(CATEGORIES)
        graphs.append(sharpened(pc.hclt(tree, 2 + number % 2, leaf, num_heads=count, generator=generator)))
    return Assembly(AssembledCircuit(pc.Circuit(prior), pc.Circuit(graphs), PATCH, (3, SIDE, SIDE)), graphs)


def sharpened(graph: pc.CircuitGraph) -> pc.CircuitGraph:
    """Further from uniform; several heads prefer different states of the root's latent."""
    for node in graph.nodes:
        if node.weight is not None:
            node.weight = node.weight**2 / (node.weight**2).sum(1, keepdim=True)
        if node.params is not None:
            node.params = node.params**3 / (node.params**3).sum(1, keepdim=True)
    root = graph.nodes[graph.root]
    assert root.weight is not None
    if graph.num_heads > 1:
        root.weight = 0.05 / root.weight.shape[1] + 0.95 * torch.eye(*root.weight.shape)
    return graph


@pytest.fixture
def make_assembly() -> Callable[..., Assembly]:
    """`make_assembly(kind, num_latents, seed)`; kind: one of tied, untied, heads, both."""
    return assembly


@pytest.fixture(params=KINDS)
def assembled(request: pytest.FixtureRequest, double_precision: None) -> Assembly:
    """Every kind of conditional, in float64."""
    return assembly(request.param)


@pytest.fixture
def images() -> Tensor:
    """Images whose values the small circuits know."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(CATEGORIES, (9, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


class SmallImages(LightningDataModule):
    """4 x 4 images whose patches are noisy copies of a few prototypes; neighbours are alike."""

    color, region, lossy, image_shape = "rgb", "whole", False, (3, SIDE, SIDE)

    def __init__(self, num_train: int = 120, num_val: int = 24, batch_size: int = 40, num_states: int = STATES) -> None:
        super().__init__()
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(0)
        prototypes_KD = torch.randint(256, (num_states, DIMS), generator=generator)
        self.z: dict[str, Tensor] = {}
        self.splits: dict[str, Tensor] = {}
        for split, count in (("train", num_train), ("val", num_val), ("test", num_val)):
            first_N1 = torch.randint(num_states, (count, 1), generator=generator) ** 2 // max(1, num_states - 1)
            other_NP = torch.randint(num_states, (count, POSITIONS), generator=generator)
            stay_NP = torch.rand(count, POSITIONS, generator=generator) < 0.7
            self.z[split] = torch.where(stay_NP, first_N1, other_NP)
            noise = torch.randint(-20, 21, (count, POSITIONS, 1), generator=generator)
            noise = noise + torch.randint(-4, 5, (count, POSITIONS, DIMS), generator=generator)
            self.splits[split] = unpatched((prototypes_KD[self.z[split]] + noise).clamp(0, 255).to(torch.uint8))

    def num_examples(self, split: str) -> int:
        return len(self.splits[split])

    def batch(self, split: str, indices: Tensor) -> Tensor:
        return self.splits[split][indices]

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val", False)

    def _loader(self, split: str, shuffle: bool) -> DataLoader[Any]:
        group = torch.distributed if torch.distributed.is_initialized() else None
        rank, size = (group.get_rank(), group.get_world_size()) if group else (0, 1)
        sampler = GlobalBatchSampler(self.num_examples(split), self.batch_size, 0, shuffle, rank, size)
        items = [(image, number) for number, image in enumerate(self.splits[split])]
        return DataLoader(items, batch_sampler=sampler)  # type: ignore[arg-type]


def unpatched(patches_NPD: Tensor) -> Tensor:
    rows = SIDE // PATCH
    cells = patches_NPD.view(-1, rows, rows, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(-1, 3, SIDE, SIDE).contiguous()


@dataclass
class Run:
    """A run directory with finished latents, in which stages can be run."""

    folder: Path
    data: SmallImages = field(default_factory=SmallImages)
    num_states: int = STATES
    seed: int = 0

    def __post_init__(self) -> None:
        folder = self.folder / "latents"
        if folder.is_dir():  # made by another process
            return
        folder.mkdir(parents=True)
        for split, z_NP in self.data.z.items():
            np.save(folder / f"assignments_{split}.npy", z_NP.numpy().astype(np.int32))
        counts = {split: len(z_NP) for split, z_NP in self.data.z.items()}
        info = {"num_clusters": self.num_states, "pooled": True, "num_patches": POSITIONS, "num_examples": counts}
        (folder / "latents.json").write_text(json.dumps(info))
        self.finish("latents", {})

    def context(self, stage: str) -> StageContext:
        return StageContext(self.folder, stage, self.seed, self.data, {"patch_size": PATCH})

    def finish(self, stage: str, results: dict[str, float], seconds: float = 1.0) -> None:
        (self.folder / stage / DONE_MARKER).write_text(json.dumps({"seconds": seconds, **results}))

    def begin(self, stage: str, module: StageModule) -> StageModule:
        module.begin_stage(self.context(stage))
        return module

    def trainer(self, stage: str, epochs: int = 1, **settings: Any) -> Trainer:
        plain = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        return Trainer(
            **{**plain, "logger": False, "accelerator": "cpu", "devices": 1, **settings},
            default_root_dir=self.folder / stage,
            max_epochs=epochs,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
        )

    def train(self, stage: str, module: StageModule, epochs: int = 1, **settings: Any) -> Trainer:
        """Begin the stage and train; the Trainer, whose metrics say how it went."""
        self.begin(stage, module)
        trainer = self.trainer(stage, epochs, **settings)
        trainer.fit(module, datamodule=None if stage == "baseline" else self.data)
        return trainer

    def complete(self, stage: str, module: StageModule, epochs: int = 1) -> dict[str, float]:
        """Train a stage and hand on what it leaves."""
        self.train(stage, module, epochs)
        context = self.context(stage)
        context.dir.mkdir(parents=True, exist_ok=True)
        results = module.finish_stage(context)
        self.finish(stage, results)
        return results


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run on small images."""
    return Run(tmp_path / "run")


@pytest.fixture
def make_run() -> type[Run]:
    """`Run(folder, data, num_states, seed)` for tests that choose."""
    return Run


@pytest.fixture
def small_images() -> type[SmallImages]:
    """`SmallImages(num_train, num_val, batch_size, num_states)`."""
    return SmallImages
