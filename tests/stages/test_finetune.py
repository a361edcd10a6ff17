"""Finetuning: its steps are those of one joint computation, exactly or nearly, and the likelihood rises."""

import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import lvd_lightning.circuits as pc
from lvd_lightning.metrics import BitsPerDim
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.stages import ConditionalStudent, FinetuneStudent, PriorStudent

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on small loaders


def joint_gradients(circuit: AssembledCircuit, images: Tensor) -> list[Tensor]:
    """Gradients of the prior's and conditionals' tables from one graph: evidence with gradients, then the prior."""
    circuit.zero_grad()
    heads = [(g, h) for g, structure in enumerate(circuit.conditional.structures) for h in range(structure.num_heads)]
    patches_BPD = circuit.split(images)
    columns = []
    for p in range(circuit.num_positions):
        log_GBH = circuit.conditional.log_prob(patches_BPD[:, p])
        mine = heads if circuit.head_index.tied else heads[p * circuit.num_states : (p + 1) * circuit.num_states]
        columns.append(torch.stack([log_GBH[g, :, h] for g, h in mine], 1))
    (-circuit.prior.log_prob(torch.stack(columns, 1)).sum()).backward()
    found = [table.grad.clone() for part in (circuit.prior, circuit.conditional) for table in part.tables]
    circuit.zero_grad()
    return found


def step_gradients(module: FinetuneStudent, images: Tensor, index: Tensor) -> list[Tensor]:
    """Gradients of the same tables from a training step that does not change them."""
    module.manual_backward = lambda loss: loss.backward()  # type: ignore[assignment, misc]
    module.em_step = lambda *losses: [loss.backward() for loss in losses]  # type: ignore[assignment, method-assign]
    module.log = lambda *arguments, **settings: None  # type: ignore[method-assign]
    module.trainer = SimpleNamespace(current_epoch=0, global_rank=0, strategy=SimpleNamespace(global_rank=0))  # type: ignore
    module.assembled.zero_grad()
    module.training_step((images, index), 0)
    parts = (module.assembled.prior, module.assembled.conditional)
    return [table.grad.clone() for part in parts for table in part.tables]


def flows(circuit: AssembledCircuit, gradients: list[Tensor]) -> Tensor:
    tables = [*circuit.prior.tables, *circuit.conditional.tables]
    return torch.cat([-(table * grad).detach().flatten() for table, grad in zip(tables, gradients, strict=True)])


@pytest.fixture
def prepared(run: Any) -> Any:
    """A run with a finished prior, whose latents are uncertain."""
    run.complete("conditional", ConditionalStudent(2, lr=0.03, init="random"), 2)
    run.complete("prior", PriorStudent(candidates=None), 1)
    return run


@pytest.fixture
def exact(run: Any, assembled: Any, images: Tensor) -> FinetuneStudent:
    """Every kind of circuit, in float64, in a stage that leaves nothing out."""
    assembled.circuit.save(run.folder / "prior")
    run.finish("prior", {})
    run.data.splits = dict.fromkeys(("train", "val", "test"), images)
    return run.begin("finetune", FinetuneStudent(margin=None, posterior_floor=0.0, slots=20.0))


def test_an_exact_step_has_the_gradients_of_the_whole(exact: FinetuneStudent, images: Tensor) -> None:
    expected = joint_gradients(exact.assembled, images)
    found = step_gradients(exact, images, torch.arange(len(images)))
    assert len(found) == len(expected) > 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_smooth_leaves_last_from_the_config_to_the_finetuned_circuit(run: Any) -> None:
    """Through a checkpoint, files and the stages between; finetuning is not told of them."""
    leaf = {"class_path": "lvd_lightning.circuits.OrderedCategorical", "init_args": {"share": 0.1, "width": 2.0}}
    path = run.folder / "some.ckpt"
    run.train("conditional", ConditionalStudent(2, leaf=leaf), 1).save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    resumed = run.begin("conditional", ConditionalStudent(2, leaf=leaf))
    resumed.on_load_checkpoint(checkpoint)
    resumed.load_state_dict(checkpoint["state_dict"])
    run.finish("conditional", resumed.finish_stage(run.context("conditional")))
    run.complete("prior", PriorStudent(candidates=None), 1)
    run.complete("finetune", FinetuneStudent(), 1)
    for circuit in (resumed.assembled.conditional, pc.load(run.folder / "finetune" / "conditional")):
        assert {plan.distribution for plan in circuit.plan.inputs} == {pc.OrderedCategorical(256, share=0.1, width=2.0)}


def test_limits_on_gradients_change_little(prepared: Any) -> None:
    images, index = prepared.data.splits["train"][:40], torch.arange(40)
    module = prepared.begin("finetune", FinetuneStudent())
    expected = flows(module.assembled, joint_gradients(module.assembled, images))
    found = flows(module.assembled, step_gradients(module, images, index))
    assert (found - expected).abs().sum() < 0.02 * expected.sum()
    strict = prepared.begin("finetune", FinetuneStudent(posterior_floor=0.4, margin=1.0, slots=0.5))
    rough = flows(strict.assembled, step_gradients(strict, images, index))
    assert (rough - expected).abs().sum() > 0.05 * expected.sum()


def test_evidence_within_the_margin_follows_the_parameters(prepared: Any) -> None:
    """Steps stay exact when the conditionals have moved away from those of the kept evidence."""
    images, index = prepared.data.splits["train"][:40], torch.arange(40)
    module = prepared.begin("finetune", FinetuneStudent(margin=1e4, posterior_floor=0.0, slots=20.0))
    optimizer = pc.CircuitEM(module.assembled.conditional, lr=0.5)
    (-module.assembled.conditional.log_prob(module.assembled.split(images)[:, 0]).sum()).backward()
    optimizer.step()
    expected = flows(module.assembled, joint_gradients(module.assembled, images))
    found = flows(module.assembled, step_gradients(module, images, index))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"margin": None, "posterior_floor": 0.0}, {"optimizer": "em"}], ids=str)
def test_the_likelihood_rises(prepared: Any, settings: dict[str, Any]) -> None:
    module = prepared.begin("finetune", FinetuneStudent(**settings))
    train = prepared.data.splits["train"]
    before = module.assembled.log_prob(train).mean()
    tables = [table.detach().clone() for table in module.assembled.prior.tables]
    metrics = prepared.trainer("finetune", 3)
    metrics.fit(module, datamodule=prepared.data)
    assert module.assembled.log_prob(train).mean() > before + 3.0
    assert not torch.equal(module.assembled.prior.tables[0], tables[0])
    bpd = BitsPerDim(48)
    bpd.update(module.assembled.log_prob(prepared.data.splits["val"]))
    assert float(metrics.callback_metrics["val/bpd"]) == pytest.approx(float(bpd.compute()), rel=1e-5)
    assert float(metrics.callback_metrics["train/bpd"]) < 8


def test_training_bpd_is_that_of_the_circuit(prepared: Any) -> None:
    module = FinetuneStudent(margin=None, lr=1e-6, final_lr=1e-6)
    metrics = prepared.train("finetune", module).callback_metrics
    bpd = BitsPerDim(48)
    bpd.update(module.assembled.log_prob(prepared.data.splits["train"]))
    assert float(metrics["train/bpd"]) == pytest.approx(float(bpd.compute()), rel=1e-4)


def test_the_seed_decides(prepared: Any) -> None:
    weights = []
    for seed in (0, 0, 1):
        prepared.seed = seed
        torch.manual_seed(len(weights))
        module = FinetuneStudent(slots=0.6)
        prepared.train("finetune", module)
        weights.append(torch.cat([table.detach().flatten() for table in module.assembled.conditional.tables]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_circuit_is_handed_on(prepared: Any) -> None:
    module = FinetuneStudent(val_images=9)
    results = prepared.complete("finetune", module)
    loaded = AssembledCircuit.load(prepared.folder / "finetune")
    images = prepared.data.splits["val"]
    assert torch.equal(loaded.log_prob(images), module.assembled.log_prob(images))
    bpd = BitsPerDim(48)
    bpd.update(loaded.log_prob(images[:9]))
    assert results == {
        "val_bpd": pytest.approx(float(bpd.compute()), rel=1e-6),
        "improved": 1.0,
        "val_images": 9,
        "num_parameters": loaded.num_parameters,
    }


@pytest.mark.filterwarnings("default:finetuning did not better")
def test_the_circuit_of_the_prior_is_kept_if_finetuning_spoils_it(prepared: Any) -> None:
    module = prepared.begin("finetune", FinetuneStudent())
    module.assembled.conditional.tables[0].data.copy_(module.assembled.conditional.tables[0].data.roll(1, 2))
    with pytest.warns(UserWarning, match="finetuning did not better the validation bpd .* is kept"):
        results = module.finish_stage(prepared.context("finetune"))
    images = prepared.data.splits["val"]
    kept, before = (AssembledCircuit.load(prepared.folder / stage) for stage in ("finetune", "prior"))
    assert torch.equal(kept.log_prob(images), before.log_prob(images))
    bpd = BitsPerDim(48)
    bpd.update(before.log_prob(images))
    assert (results["improved"], results["val_bpd"]) == (0.0, pytest.approx(float(bpd.compute()), rel=1e-6))


def test_the_prior_may_stay_as_it_is(prepared: Any) -> None:
    module = FinetuneStudent(train_prior=False)
    prepared.train("finetune", module)
    before = AssembledCircuit.load(prepared.folder / "prior")
    assert all(map(torch.equal, module.assembled.prior.tables, before.prior.tables))
    assert not all(map(torch.equal, module.assembled.conditional.tables, before.conditional.tables))
    images = prepared.data.splits["train"]
    assert module.assembled.log_prob(images).mean() > before.log_prob(images).mean()


def test_checkpoints_hold_plain_types(prepared: Any) -> None:
    trainer = prepared.train("finetune", FinetuneStudent())
    trainer.save_checkpoint(prepared.folder / "some.ckpt")
    state = torch.load(prepared.folder / "some.ckpt", weights_only=True)["state_dict"]
    module = prepared.begin("finetune", FinetuneStudent())
    assert not torch.equal(module.state_dict()["assembled.prior.tables.0"], state["assembled.prior.tables.0"])
    module.load_state_dict(state)
    for name, found in module.state_dict().items():
        assert torch.equal(found, state[name])


@pytest.mark.parametrize(("candidates", "fitting"), [(None, 12), (2, 10)])
def test_images_without_kept_evidence_are_finetuned_as_well(run: Any, candidates: int | None, fitting: int) -> None:
    run.complete("conditional", ConditionalStudent(2, lr=0.03, init="random"), 2)
    gradients = []
    for budget in (20.0, 5e-7):
        shutil.rmtree(run.folder / "prior", ignore_errors=True)
        run.complete("prior", PriorStudent(candidates=candidates, max_cache_gb=budget), 1)
        module = run.begin("finetune", FinetuneStudent(margin=1e4, posterior_floor=0.0, slots=20.0))
        index = torch.arange(40)
        assert module.source.num_kept == (len(run.data.splits["train"]) if budget > 1 else fitting)
        gradients.append(step_gradients(module, run.data.splits["train"][index], index))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("wide", ["prior", "conditional"])
@pytest.mark.parametrize("candidates", [None, 2])
def test_prior_and_conditionals_of_two_types(run: Any, candidates: int | None, wide: str) -> None:
    """What one hands to the other takes the other's type: kept evidence, fresh evidence, and copies of parameters."""
    run.complete("conditional", ConditionalStudent(2, lr=0.03, init="random"), 2)
    run.complete("prior", PriorStudent(candidates=candidates, max_cache_gb=5e-7), 1)
    module = run.begin("finetune", FinetuneStudent(margin=1e4, posterior_floor=0.0, slots=20.0))
    index = torch.arange(40)
    assert module.source is not None
    assert 0 < module.source.num_kept < len(index)
    images = run.data.splits["train"][index]
    expected = step_gradients(module, images, index)
    getattr(module.assembled, wide).double()
    for _ in range(2):
        found = step_gradients(module, images, index)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3, check_dtype=False)
        module.on_fit_start()  # until here the copies of the conditionals were of the old type
    few = index[-5:]
    assert module.source.evidence(images[-5:], few).dtype == module.assembled.prior.dtype
    module.assembled.zero_grad()
    assert module.assembled.log_prob(images).isfinite().all()
    observed = torch.rand(images.shape) < 0.5
    assert torch.equal(module.assembled.inpaint(images, observed)[observed], images[observed])
    assert module.assembled.expected(images, observed).isfinite().all()


def test_missing_evidence_is_named(prepared: Any) -> None:
    (prepared.folder / "prior" / "evidence" / "train" / "evidence.json").unlink()
    with pytest.raises(ValueError, match="evidence: is not complete; run stage prior again, or set margin: null"):
        prepared.begin("finetune", FinetuneStudent())
    prepared.begin("finetune", FinetuneStudent(margin=None))
