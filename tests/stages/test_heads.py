"""Circuits with several heads: trained on (patch, head), edited while they are trained, handed on, resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

import lvd_lightning.circuits as pc
from lvd_lightning.color import patchify
from lvd_lightning.latents import load_assignments
from lvd_lightning.metrics import BitsPerDim
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.ranks import Ranks
from lvd_lightning.runs.checkpoint import EpochCheckpoint
from lvd_lightning.runs.evaluation import evaluate_run
from lvd_lightning.runs.pipeline import load_best
from lvd_lightning.stages import ConditionalStudent, FinetuneStudent, PriorStudent

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on small loaders


@pytest.fixture
def coarse(make_run: Any, small_images: Any, tmp_path: Path) -> Any:
    """A run whose patches are of five kinds, in two clusters: 0 and 1, and 2, 3 and 4."""
    data = small_images(160, num_states=5)
    kinds = data.z
    data.z = {split: (z >= 2).long() for split, z in kinds.items()}
    run = make_run(tmp_path / "run", data, 2)
    run.kinds = kinds
    return run


def several(**settings: Any) -> ConditionalStudent:
    return ConditionalStudent(**{"num_units": 3, "num_heads": 3, "min_examples": 1, **settings})


class AddHead(Callback):
    """Gives circuit 0 one more head, and every third of its patches, at the start of some epochs."""

    def __init__(self, *epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch in self.epochs:
            assert isinstance(pl_module, ConditionalStudent)
            graphs = pl_module.assembled.conditional.to_graph()
            root = graphs[0].nodes[graphs[0].root]
            root.weight, root.num_units = torch.cat([root.weight, root.weight[:1].flip(1)]), root.num_units + 1
            heads_NP = pl_module.heads_NP.clone()
            heads_NP[::3][pl_module.clusters_NP["train"][::3] == 0] = root.num_units - 1
            pl_module.round += 1
            pl_module.replace_circuits(graphs, heads_NP)


def tables(module: ConditionalStudent) -> Tensor:
    return torch.cat([table.detach().flatten() for table in module.assembled.conditional.tables])


def test_heads_are_clusters_inside_circuits(coarse: Any) -> None:
    module = coarse.begin("conditional", several())
    assert module.heads_per_circuit == [3, 3]  # three were asked for; there are two kinds in the first cluster
    kind, z = coarse.kinds["train"], module.heads_NP + 3 * coarse.data.z["train"]
    pairs = torch.stack([kind[kind >= 2], z[kind >= 2]]).unique(dim=1)
    assert pairs.shape == (2, 3)
    assert module.assembled.num_states == 6
    few = coarse.begin("conditional", several(min_examples=int((kind < 2).sum()) // 2))
    assert few.heads_per_circuit[0] == 2


def test_circuits_without_patches_have_one_head(coarse: Any, make_run: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "other", coarse.data, 4)
    module = run.begin("conditional", several())
    assert module.heads_per_circuit == [3, 3, 1, 1]
    run.trainer("conditional", 2).fit(module, datamodule=run.data)
    assert all(bool(torch.isfinite(table).all()) for table in module.assembled.conditional.tables)


@pytest.mark.parametrize("init", ["quantiles", "random"])
def test_a_step_is_an_em_step_on_every_patch_under_its_head(coarse: Any, init: str) -> None:
    module = coarse.begin("conditional", several(optimizer="em", lr=0.4, slots=4.0, init=init))
    graphs, heads = module.assembled.conditional.to_graph(), module.heads_NP.flatten().long()
    coarse.data.batch_size = 160
    coarse.trainer("conditional", 1).fit(module, datamodule=coarse.data)
    patches, cluster = patchify(coarse.data.splits["train"], 2).flatten(0, 1), coarse.data.z["train"].flatten()
    for g, graph in enumerate(graphs):
        circuit = pc.Circuit(graph)
        optimizer = pc.CircuitEM(circuit, lr=0.4, pseudocount=1e-3)
        (-circuit.log_prob(patches[cluster == g], head=heads[cluster == g]).sum()).backward()
        optimizer.step()
        trained = pc.Circuit(module.assembled.conditional.to_graph()[g])
        torch.testing.assert_close(trained.log_prob(patches[:50]), circuit.log_prob(patches[:50]))


def test_metrics_are_those_of_the_assembled_circuit_and_the_likeliest_heads(coarse: Any) -> None:
    module = several(val_images=16)
    metrics = coarse.train("conditional", module, 2).callback_metrics
    images, cluster = coarse.data.splits["val"][:16], coarse.data.z["val"][:16]
    bpd = BitsPerDim(48)
    bpd.update(module.assembled.log_prob(images))
    assert float(metrics["val/bpd"]) == pytest.approx(float(bpd.compute()), rel=1e-5)
    evidence = module.assembled.evidence(images).detach()
    best = torch.stack([evidence[..., :3].argmax(-1), 3 + evidence[..., 3:].argmax(-1)], -1)
    z = best.gather(2, cluster[..., None])[..., 0]
    bpd.reset()
    bpd.update(module.assembled.lvd_objective(images, z))
    assert float(metrics["val/lvd_objective_bpd"]) == pytest.approx(float(bpd.compute()), rel=1e-5)


def test_the_objective_falls(coarse: Any) -> None:
    found = [
        float(coarse.train("conditional", several(), epochs).callback_metrics["val/lvd_objective_bpd"])
        for epochs in (1, 8)
    ]
    assert found[1] < found[0] - 0.05


def test_edits_while_training(coarse: Any) -> None:
    """Heads appear, the schedule goes on, and the prior has the counts of the new latent values."""
    module, seen = several(num_heads=1, lr=0.5, final_lr=0.1), []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *rest: Any) -> None:
            assert trainer.optimizers[0].circuits[0] is pl_module.assembled.conditional
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer = coarse.train("conditional", module, 4, callbacks=[AddHead(1, 3), Look()])
    assert module.heads_per_circuit == [3, 1]
    assert seen == pytest.approx(torch.linspace(0.5, 0.1, 16).tolist())
    assert trainer.global_step == 16
    z = torch.tensor([0, 3])[coarse.data.z["train"]] + module.heads_NP
    everything = torch.zeros(1, 4, 4)
    marginals = []
    for k in range(4):
        evidence = everything.clone()
        evidence[:, 0] = torch.full((4,), -torch.inf).index_fill(0, torch.tensor(k), 0.0)
        marginals.append(module.assembled.prior.log_prob(evidence)[0, 0].exp())
    first = torch.bincount(z[:, 0], minlength=4) / len(z)
    torch.testing.assert_close(torch.stack(marginals), first, atol=0.02, rtol=0.02)


class Stop(Exception):
    """What interrupts a run."""


class StopOnce(Callback):
    """Raises in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        if trainer.current_epoch == self.epoch and rest[-1] == 1:
            raise Stop


@pytest.mark.parametrize("interrupted", [1, 2, 3])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(coarse: Any, tmp_path: Path, interrupted: int) -> None:
    """Interrupted in an epoch that begins with an edit, in the one after it, and in the second such epoch."""
    checkpoints = EpochCheckpoint(tmp_path, "val/bpd")
    whole = several(num_heads=2, slots=0.7)
    coarse.train("conditional", whole, 5, callbacks=[AddHead(1, 3)])
    with pytest.raises(Stop):
        coarse.train(
            "conditional",
            several(num_heads=2, slots=0.7),
            5,
            callbacks=[AddHead(1, 3), StopOnce(interrupted), checkpoints],
            enable_checkpointing=True,
        )
    again = coarse.begin("conditional", several(num_heads=2, slots=0.7))
    trainer = coarse.trainer("conditional", 5, callbacks=[AddHead(1, 3)])
    trainer.fit(again, datamodule=coarse.data, ckpt_path=checkpoints.last_path, weights_only=True)
    assert again.heads_per_circuit == whole.heads_per_circuit == [4, 2]
    assert again.round == whole.round == 2
    assert again.ancestry is whole.ancestry is None  # what added heads did not say of what they are copies
    assert torch.equal(again.heads_NP, whole.heads_NP)
    assert torch.equal(tables(again), tables(whole))
    assert torch.equal(again.assembled.prior.tables[0], whole.assembled.prior.tables[0])


def test_the_best_epoch_comes_back_with_its_structure(coarse: Any, tmp_path: Path) -> None:
    """The best checkpoint is of another structure than the last epoch."""
    checkpoint = EpochCheckpoint(tmp_path, "val/bpd")
    module = several(num_heads=1)
    trainer = coarse.train("conditional", module, 3, callbacks=[AddHead(1, 2)])
    bpd = float(trainer.callback_metrics["val/bpd"])
    trainer.save_checkpoint(checkpoint.best_path)
    expected, heads = module.assembled.log_prob(coarse.data.splits["val"]), module.heads_NP
    assert torch.load(checkpoint.best_path, weights_only=True)["growing"]["round"] == 2
    for other in (several(num_heads=1), several(num_heads=3)):
        coarse.train("conditional", other, 1)
        load_best(other, checkpoint)
        assert other.heads_per_circuit == [3, 1]
        assert torch.equal(other.assembled.log_prob(coarse.data.splits["val"]), expected)
        assert torch.equal(other.heads_NP, heads)
        assert other.validate(other.assembled, coarse.context("conditional")) == pytest.approx(bpd, rel=1e-5)


def test_later_stages_go_by_the_heads(coarse: Any) -> None:
    """Assignments are handed on, the prior and finetuning take them, and the report's objective is theirs."""
    results = coarse.complete("conditional", several(), 3)
    assert results["num_heads"] == 6
    conditional = pc.load(coarse.folder / "conditional" / "conditional")
    of = torch.arange(2).repeat_interleave(3)
    for split in ("train", "val", "test"):
        z = load_assignments(coarse.folder / "conditional", split)
        assert torch.equal(of[z], coarse.data.z[split])
        if split != "train":
            patches = patchify(coarse.data.splits[split], 2)
            log_GNH = conditional.log_prob(patches.flatten(0, 1))
            flat = coarse.data.z[split].flatten()
            assert torch.equal(z.flatten() - 3 * flat, log_GNH[flat, torch.arange(len(flat))].argmax(-1))
    prior = coarse.complete("prior", PriorStudent(candidates=4), 2)
    joint = coarse.complete("finetune", FinetuneStudent(lr=0.1), 2)
    assert joint["val_bpd"] < prior["val_bpd"] < results["val_bpd"] + 0.01
    found = evaluate_run(coarse.opened(), coarse.data, Ranks({"accelerator": "cpu", "devices": 1}))
    assert found["num_heads"] == 6
    circuit = AssembledCircuit.load(coarse.folder / "prior")
    bpd = BitsPerDim(48)
    bpd.update(
        circuit.lvd_objective(coarse.data.splits["test"], load_assignments(coarse.folder / "conditional", "test"))
    )
    assert found["circuits"]["lvd_objective"]["test_bpd"] == pytest.approx(float(bpd.compute()), rel=1e-5)


def test_single_heads_leave_the_clusters_as_they_are(coarse: Any) -> None:
    coarse.complete("conditional", several(num_heads=1))
    assert not list((coarse.folder / "conditional").glob("assignments*"))


def test_settings_that_do_not_go_together_are_named() -> None:
    with pytest.raises(ValueError, match="num_heads: got 2, but circuits of their own per position"):
        ConditionalStudent(num_heads=2, tied=False)
    with pytest.raises(ValueError, match="num_heads: got 0"):
        ConditionalStudent(num_heads=0)
    with pytest.raises(ValueError, match="round_epochs: got 0"):
        ConditionalStudent(round_epochs=0)


def test_circuits_per_position_are_not_edited(coarse: Any) -> None:
    module = coarse.begin("conditional", several(num_heads=1, tied=False))
    with pytest.raises(ValueError, match="tied: is false"):
        module.examples()
