"""The stage of the conditionals: it learns, at a cost that does not depend on K, and hands on what it learned."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lvd_lightning.circuits as pc
from lvd_lightning.color import patchify
from lvd_lightning.metrics import BitsPerDim
from lvd_lightning.stages import CircuitBaseline, ConditionalStudent

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on small loaders


def objective(module: ConditionalStudent, run: Any, split: str = "train") -> float:
    """Bits per dimension of log p(x, z)."""
    metric = BitsPerDim(48)
    metric.update(module.assembled.lvd_objective(run.data.splits[split], run.data.z[split]))
    return float(metric.compute())


def tables(module: ConditionalStudent) -> list[Tensor]:
    return [table.detach().clone() for table in module.assembled.conditional.tables]


@pytest.mark.parametrize("optimizer", ["anemone", "em"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("init", ["quantiles", "random"])
def test_the_objective_falls(run: Any, optimizer: str, tied: bool, init: str) -> None:
    module = run.begin("conditional", ConditionalStudent(3, tied=tied, optimizer=optimizer, init=init))
    before, weights = objective(module, run), tables(module)
    trainer = run.trainer("conditional", 6)
    trainer.fit(module, datamodule=run.data)
    assert objective(module, run) < before - 0.2
    assert not torch.equal(weights[0], tables(module)[0])
    assert float(trainer.callback_metrics["train/lvd_objective_bpd"]) < before


def test_clusters_of_single_positions_are_not_tied(run: Any) -> None:
    path = run.folder / "latents" / "latents.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pooled": False}))
    with pytest.raises(ValueError, match="tied: is true, but every position has clusters of its own"):
        run.begin("conditional", ConditionalStudent(2))
    run.begin("conditional", ConditionalStudent(2, tied=False))


def test_metrics_are_those_of_the_assembled_circuit(run: Any) -> None:
    module = ConditionalStudent(2, slots=3.0, val_images=16)
    metrics = run.train("conditional", module, 1).callback_metrics
    bpd = BitsPerDim(48)
    bpd.update(module.assembled.log_prob(run.data.splits["val"][:16]))
    assert float(metrics["val/bpd"]) == pytest.approx(float(bpd.compute()), rel=1e-5)
    bpd.reset()
    bpd.update(module.assembled.lvd_objective(run.data.splits["val"][:16], run.data.z["val"][:16]))
    assert float(metrics["val/lvd_objective_bpd"]) == pytest.approx(float(bpd.compute()), rel=1e-5)
    assert float(metrics["val/bpd"]) < float(metrics["val/lvd_objective_bpd"])


def test_a_step_is_an_em_step_on_every_patch_under_its_circuit(run: Any) -> None:
    """With slots for all, one step of the stage is one step of EM on each circuit alone, as one Circuit object."""
    module = run.begin("conditional", ConditionalStudent(2, optimizer="em", lr=0.4, slots=3.0))
    graphs = module.assembled.conditional.to_graph()
    run.data.batch_size = 120
    run.trainer("conditional", 1).fit(module, datamodule=run.data)
    patches, z = patchify(run.data.splits["train"], 2).flatten(0, 1), run.data.z["train"].flatten()
    for k, graph in enumerate(graphs):
        circuit = pc.Circuit(graph)
        optimizer = pc.CircuitEM(circuit, lr=0.4, pseudocount=1e-3)
        (-circuit.log_prob(patches[z == k]).sum()).backward()
        optimizer.step()
        trained = pc.Circuit(module.assembled.conditional.to_graph()[k])
        torch.testing.assert_close(trained.log_prob(patches[:50]), circuit.log_prob(patches[:50]))


def test_the_cost_of_a_step_does_not_depend_on_the_number_of_values(
    make_run: Any, small_images: Any, tmp_path: Path
) -> None:
    costs = []
    for states in (4, 16):
        run = make_run(tmp_path / str(states), small_images(40, num_states=states), states)
        module = run.begin("conditional", ConditionalStudent(2, slots=2.0))
        conditional, seen = module.assembled.conditional, []
        log_prob = conditional.log_prob

        def counted(x: Tensor, *rest: Any, seen: list[int] = seen, log_prob: Any = log_prob, **more: Any) -> Tensor:
            seen.append(x.shape[0] * x.shape[1])
            return log_prob(x, *rest, **more)

        conditional.log_prob = counted
        run.trainer("conditional", 1, limit_val_batches=0).fit(module, datamodule=run.data)
        assert len(seen) == 1
        costs += seen
    # 160 patches, twice as many slots.
    assert costs == [320, 320]


@pytest.mark.parametrize("tied", [True, False])
def test_clusters_may_be_large_small_and_empty(make_run: Any, small_images: Any, tmp_path: Path, tied: bool) -> None:
    """One value has nearly all patches, one has a single one, one has none: all stay valid, the large one learns."""
    data = small_images(60)
    for z in data.z.values():
        z[:] = 0
    data.z["train"][0, 0] = 1
    run = make_run(tmp_path, data, 3)
    module = run.begin("conditional", ConditionalStudent(2, tied=tied))
    before = objective(module, run)
    run.trainer("conditional", 4).fit(module, datamodule=run.data)
    assert objective(module, run) < before
    for table in tables(module):
        assert torch.isfinite(table).all()
        torch.testing.assert_close(table.sum(-1), torch.ones(table.shape[:-1]))
    assert torch.isfinite(module.assembled.log_prob(data.splits["val"])).all()


def test_more_patches_than_slots_are_stood_for(run: Any) -> None:
    """Few slots give a noisier, not another, result."""
    found = []
    for slots in (3.0, 0.5):
        module = ConditionalStudent(2, slots=slots, lr=0.2)
        run.train("conditional", module, 6)
        found.append(objective(module, run))
    assert found[1] == pytest.approx(found[0], abs=0.15)


def test_the_seed_decides(run: Any) -> None:
    found = []
    for seed in (0, 0, 1):
        run.seed = seed
        torch.manual_seed(len(found))
        module = ConditionalStudent(2, init="random", slots=0.7)
        run.train("conditional", module)
        found.append(tables(module)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_trees_are_learnt_from_the_own_patches(make_run: Any, small_images: Any, tmp_path: Path) -> None:
    """Each value's patches are pairs of equal pixels, other pairs for each value: the trees know them."""
    data = small_images(300)
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        z = data.z[split] % 2
        data.z[split][:] = z
        half = torch.randint(256, (*z.shape, 6), generator=generator)
        neighbours = half.repeat_interleave(2, -1)
        distant = torch.cat([half, half], -1)
        patches = torch.where(z[..., None] == 0, neighbours, distant).to(torch.uint8)
        data.splits[split] = patches.view(-1, 2, 2, 3, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, 4, 4)
    module = make_run(tmp_path, data, 2).begin("conditional", ConditionalStudent(2))
    for graph, step in zip(module.assembled.conditional.to_graph(), (1, 6), strict=True):
        scopes = graph.scopes()
        edges = {frozenset((v, u)) for v in range(12) for u in children(graph, v)}
        pairs = {frozenset((v, v + step)) for v in (range(0, 12, 2) if step == 1 else range(6))}
        assert pairs <= edges
        assert scopes[graph.root] == set(range(12))


def children(graph: pc.CircuitGraph, v: int) -> list[int]:
    """Variables whose latents hang on that of v."""
    variable = {node: u for u, node in graph.latents.items()}
    below = graph.nodes[graph.latents[v]].children
    return [variable[graph.nodes[child].children[0]] for child in below if graph.nodes[child].kind == "sum"]


def test_files_and_figures(run: Any) -> None:
    results = run.complete("conditional", ConditionalStudent(2, val_images=10))
    loaded = pc.load(run.folder / "conditional" / "conditional")
    assert loaded.num_circuits == 3
    assert results["num_parameters"] == loaded.num_parameters
    assert results["val_images"] == 10
    assert 0 < results["val_bpd"] < 8


def test_checkpoints_hold_plain_types_and_continue(run: Any) -> None:
    module = ConditionalStudent(2)
    trainer = run.train("conditional", module, 1)
    path = run.folder / "conditional" / "some.ckpt"
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    again = run.begin("conditional", ConditionalStudent(2))
    again.on_load_checkpoint(checkpoint)
    again.load_state_dict(checkpoint["state_dict"])
    assert objective(again, run) == objective(module, run)
    other = run.begin("conditional", ConditionalStudent(2))
    trainer = run.trainer("conditional", 2)
    trainer.fit(other, datamodule=run.data, ckpt_path=path, weights_only=True)
    assert trainer.current_epoch == 2
    assert objective(other, run) < objective(module, run)


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoints_leave_out_the_prior_which_counts_give(run: Any, tied: bool) -> None:
    """With K values a prior over P patches has P K^2 numbers, hundreds of megabytes where K is in the thousands."""
    module = ConditionalStudent(2, tied=tied)
    trainer = run.train("conditional", module, 1)
    path = run.folder / "epoch.ckpt"
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    assert not [name for name in content["state_dict"] if "prior" in name]
    again = run.begin("conditional", ConditionalStudent(2, tied=tied))
    again.on_load_checkpoint(content)
    again.load_state_dict(content["state_dict"])
    expected = module.state_dict()
    assert [name for name in expected if name.startswith("assembled.prior.")]
    for name, found in again.state_dict().items():
        assert torch.equal(found, expected[name]), name


def test_checkpoints_that_have_a_prior_still_load(run: Any) -> None:
    module = ConditionalStudent(2)
    trainer = run.train("conditional", module, 1)
    path = run.folder / "epoch.ckpt"
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    table = module.assembled.prior.tables[0].detach().roll(1, -1)
    older = {**module.state_dict(), "assembled.prior.tables.0": table}
    again = run.begin("conditional", ConditionalStudent(2))
    content["state_dict"] = older
    again.on_load_checkpoint(content)
    again.load_state_dict(content["state_dict"])
    assert torch.equal(again.assembled.prior.tables[0], table)


@pytest.mark.parametrize("leaf", ["Binomial", "DiscretizedLogistic", "Gaussian", "OrderedCategorical"])
def test_inputs_are_of_the_family_that_the_config_names(run: Any, leaf: str) -> None:
    module = ConditionalStudent(2, leaf=leaf, val_images=16)
    run.train("conditional", module, 1)
    families = {layer.distribution for layer in module.assembled.conditional.plan.inputs}
    assert families == {getattr(pc, leaf).for_values(256)}
    assert torch.isfinite(module.assembled.log_prob(run.data.splits["val"])).all()


def test_a_family_that_does_not_fit_is_refused_before_any_stage(run: Any) -> None:
    with pytest.raises(ValueError, match="leaf: Bernoulli.* has 2 values, but the data have 256"):
        ConditionalStudent(2, leaf="Bernoulli").check_data(run.data)
    with pytest.raises(ValueError, match="leaf: Bernoulli.* has 2 values, but the data have 256"):
        CircuitBaseline(leaf="Bernoulli").check_data(run.data)
