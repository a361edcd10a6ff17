"""Stage "perceptual": its gradients against central differences, what it leaves, and that it can be repeated.

Shapes: D dimensions of an example.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.estimates import seeded, slopes
from lightning.pytorch import Callback
from torch import Tensor, nn

import lvd_lightning.circuits as pc
from lvd_lightning.context import StageContext
from lvd_lightning.metrics import BitsPerDim
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.models.assembled_rsample import reconstruct, rsample
from lvd_lightning.models.reparameterized import as_assembled, reparameterized
from lvd_lightning.models.structures import PartStructure
from lvd_lightning.parts import ImagePatches, Tokens
from lvd_lightning.perceptual.discriminator import Discriminator
from lvd_lightning.perceptual.sample_losses import LossWeights, SampleLosses
from lvd_lightning.runs.trainer_settings import check_without_gradients
from lvd_lightning.stages import ConditionalStudent, PerceptualStudent, PriorStudent
from lvd_lightning.teachers import register_teacher, save_teacher

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on small loaders

PARTS = ImagePatches((3, 4, 4), 2, 4)


@register_teacher
class SmoothTeacher(nn.Module):
    """Two layers whose derivatives are smooth everywhere."""

    contextual, positional = False, False

    def __init__(self) -> None:
        super().__init__()
        self.init_args: dict[str, Any] = {}
        self.first, self.second = nn.Linear(12, 5), nn.Linear(5, 4)

    def activations(self, scaled: Tensor) -> list[Tensor]:
        first = ImagePatches((3, 4, 4), 2).split(scaled)
        hidden = self.first(first).tanh()
        return [hidden, self.second(hidden)]


@pytest.fixture
def prepared(run: Any) -> Any:
    """A run whose model is that of a finished prior, and which has a teacher."""
    run.complete("conditional", ConditionalStudent(2, lr=0.03, init="random"), 1)
    run.complete("prior", PriorStudent(candidates=None), 1)
    torch.manual_seed(0)
    save_teacher(SmoothTeacher(), run.folder / "teacher")
    run.finish("teacher", {})
    return run


def context_of(run: Any) -> StageContext:
    context = run.context("perceptual")
    return replace(context, earlier={"teacher": ("features",), **context.earlier})


def train(run: Any, module: PerceptualStudent, epochs: int = 1, **settings: Any) -> Any:
    module.begin_stage(context_of(run))
    trainer = run.trainer("perceptual", epochs, **settings)
    trainer.fit(module, datamodule=run.data)
    return trainer


def tables_of(module: PerceptualStudent) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


# Gradients.


def circuit_of(name: str, make_assembly: Callable[..., Any]) -> AssembledCircuit:
    """An assembled circuit of a kind, or one over whole images of a structure."""
    if name in ("tied", "untied", "heads", "both"):
        return reparameterized(make_assembly(name).circuit, "logits")
    structure, _, product = name.partition("-")
    settings = {"product": product} if product else {}
    made = PartStructure.of(structure, settings)
    tree = torch.arange(-1, 47) if made.needs_tree else None
    graph = made.graph((3, 4, 4), 2, leaf=PARTS.leaf, parents=tree, generator=seeded(0))
    return reparameterized(as_assembled(graph, PARTS), "logits")


STRUCTURES = ("tied", "untied", "heads", "both", "hclt", "rat_spn-kronecker", "poon_domingos-kronecker")


@pytest.mark.parametrize("name", STRUCTURES)
def test_gradients_of_all_losses(
    name: str, make_assembly: Callable[..., Any], images: Tensor, double_precision: None
) -> None:
    """With soft samples of fixed noise every loss is smooth in all parameters: central differences along directions."""
    circuit = circuit_of(name, make_assembly)
    torch.manual_seed(1)
    weights = LossWeights(0.0, 1.0, 0.7, 0.3, 0.5, 2.0)
    losses = SampleLosses(weights, PARTS, SmoothTeacher())
    discriminator = Discriminator((3, 4, 4), 2)
    for layer in discriminator.layers:
        if isinstance(layer, nn.LeakyReLU):
            layer.negative_slope = 1.0  # no kinks
    scaled = losses.spread(images[:3], circuit.prior.tables[0] if len(circuit.prior.tables) else torch.zeros(1))
    settings: dict[str, Any] = {"estimator": "gumbel", "temperature": 0.8}

    def all_losses() -> dict[str, Tensor]:
        drawn = rsample(circuit, 3, generator=seeded(1), **settings)
        again = reconstruct(circuit, images[:3], generator=seeded(2), **settings)
        found = losses.of_samples(losses.spread(drawn, scaled), scaled, discriminator)
        return found | losses.of_reconstructions(losses.spread(again, scaled), scaled)

    learnt = [table for table in circuit.parameters() if table.requires_grad]
    generator = seeded(3)
    directions = [[torch.randn(t.shape, generator=generator) for t in learnt] for _ in range(2)]
    found = torch.autograd.grad(losses.weighted(all_losses()), learnt)
    along = torch.stack([sum((g * d).sum() for g, d in zip(found, one, strict=True)) for one in directions])
    expected = slopes(lambda: losses.weighted(all_losses()), [t.data for t in learnt], directions)
    torch.testing.assert_close(along, expected, rtol=1e-5, atol=1e-8)
    assert along.abs().min() > 1e-5
    assert set(all_losses()) == {"mmd", "feature_mmd", "adversarial", "autoencode", "feature_distance"}


@pytest.mark.parametrize("kind", ["tied", "both"])
def test_gradients_of_the_likelihood(
    kind: str, make_assembly: Callable[..., Any], run: Any, images: Tensor, double_precision: None
) -> None:
    """Of a step that leaves nothing out: for prior and conditionals, central differences along directions."""
    make_assembly(kind).circuit.save(run.folder / "prior")
    run.finish("prior", {})
    module = PerceptualStudent(nll=3.0, posterior_floor=0.0, slots=20.0)
    module.begin_stage(run.context("perceptual"))
    module.manual_backward = lambda loss: loss.backward()  # type: ignore[assignment, misc]
    module.log = lambda *arguments, **settings: None  # type: ignore[method-assign]
    module.trainer = run.trainer("perceptual")
    module._learn_likelihood(images)
    learnt = [table for table in module.assembled.parameters() if table.requires_grad]
    generator = seeded(3)
    directions = [[torch.randn(t.shape, generator=generator) for t in learnt] for _ in range(3)]
    along = torch.stack([sum((t.grad * d).sum() for t, d in zip(learnt, one, strict=True)) for one in directions])
    expected = slopes(
        lambda: -3.0 * module.assembled.log_prob(images).mean() / 48, [t.data for t in learnt], directions
    )
    torch.testing.assert_close(along, expected, rtol=1e-5, atol=1e-8)


# Training.


def test_the_likelihood_alone_is_learnt_and_handed_on_as_probabilities(prepared: Any) -> None:
    before = AssembledCircuit.load(prepared.folder / "prior")
    module = PerceptualStudent(lr=0.03, final_lr=0.01)
    trainer = train(prepared, module, 3)
    images = prepared.data.splits["val"]
    results = module.finish_stage(context_of(prepared))
    after = AssembledCircuit.load(prepared.folder / "perceptual")
    assert after.conditional.parameterization == after.prior.parameterization == "probabilities"
    torch.testing.assert_close(after.log_prob(images), module.assembled.log_prob(images), rtol=1e-5, atol=1e-3)
    assert after.log_prob(images).mean() > before.log_prob(images).mean() + 1
    bpd = BitsPerDim(48)
    bpd.update(after.log_prob(images))
    assert results["val_bpd"] == pytest.approx(float(bpd.compute()), rel=1e-6)
    assert results["changed"] == 1.0
    assert results["val_bpd"] < results["val_bpd_before"]
    assert float(trainer.callback_metrics["val/bpd"]) == pytest.approx(results["val_bpd"], rel=1e-5)
    assert float(trainer.callback_metrics["val/score"]) == 3


ALL = {"nll": 0.5, "mmd": 1.0, "feature_mmd": 1.0, "adversarial": 0.1, "autoencode": 1.0, "feature_distance": 0.1}
NETWORKS = {"learned_encoder": True, "encoder_channels": 4, "discriminator_channels": 4, "num_samples": 16}


def test_samples_come_nearer_to_the_images(prepared: Any) -> None:
    """Of a circuit that was spoilt: without likelihood, by samples alone."""
    spoilt = AssembledCircuit.load(prepared.folder / "prior")
    for table in spoilt.conditional.tables:
        table.data.copy_(table.data.mean(0, keepdim=True).expand_as(table))
    spoilt.save(prepared.folder / "prior")
    module = PerceptualStudent(nll=0.0, mmd=1.0, lr=0.1, final_lr=0.05, num_samples=64)
    trainer = train(prepared, module, 1)
    first = float(trainer.callback_metrics["train/mmd"])
    trainer = train(prepared, PerceptualStudent(nll=0.0, mmd=1.0, lr=0.1, final_lr=0.05, num_samples=64), 8)
    assert float(trainer.callback_metrics["train/mmd"]) < 0.7 * first


class SaveFirst(Callback):
    """Keeps the checkpoint of the first epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def test_resumed_it_ends_the_same_and_the_seed_decides(prepared: Any) -> None:
    """With all losses, the adversary and the encoder; another seed ends elsewhere."""
    settings = {**ALL, **NETWORKS, "estimator": "straight_through", "final_temperature": 0.5}
    path, found = prepared.folder / "first.ckpt", []
    for seed in (0, 0, 1):
        prepared.seed = seed
        torch.manual_seed(len(found))
        module = PerceptualStudent(**settings)
        trainer = train(prepared, module, 2, callbacks=[SaveFirst(path)] if not found else [])
        found.append(tables_of(module))
        assert float(trainer.callback_metrics["train/temperature"]) < 0.75
        assert set(ALL) - {"nll"} | {"discriminator"} <= {name[6:] for name in trainer.callback_metrics}
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    prepared.seed = 0
    resumed = PerceptualStudent(**settings)
    resumed.begin_stage(context_of(prepared))
    trainer = prepared.trainer("perceptual", 2)
    trainer.fit(resumed, datamodule=prepared.data, ckpt_path=path, weights_only=True)
    assert torch.equal(tables_of(resumed), found[0])


class Spoil(Callback):
    """Makes what is likely unlikely after the last step of an epoch."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        if trainer.is_last_batch:
            for table in pl_module.assembled.conditional.tables:
                table.data.neg_()


def test_what_costs_too_much_is_not_kept(prepared: Any) -> None:
    module = PerceptualStudent(allowed_rise=0.05)
    trainer = train(prepared, module, callbacks=[Spoil()])
    assert float(trainer.callback_metrics["val/score"]) < 0
    with pytest.warns(UserWarning, match="no epoch keeps the validation bpd within 0.05 of .* prior stays as it was"):
        results = module.finish_stage(context_of(prepared))
    images = prepared.data.splits["val"]
    kept, before = (AssembledCircuit.load(prepared.folder / stage) for stage in ("perceptual", "prior"))
    assert torch.equal(kept.log_prob(images), before.log_prob(images))
    assert (results["changed"], results["val_bpd"]) == (0.0, results["val_bpd_before"])


def test_the_prior_may_stay_as_it_is(prepared: Any) -> None:
    module = PerceptualStudent(mmd=1.0, train_prior=False)
    train(prepared, module)
    before = reparameterized(AssembledCircuit.load(prepared.folder / "prior"), "logits")
    assert all(map(torch.equal, module.assembled.prior.tables, before.prior.tables))
    assert not all(map(torch.equal, module.assembled.conditional.tables, before.conditional.tables))


@pytest.mark.parametrize("structure", ["hclt", "rat_spn", "poon_domingos"])
def test_from_scratch(structure: str, make_run: Any, tmp_path: Path) -> None:
    """No stage before it: a circuit over whole images, which draws, is saved, and is found again."""
    run = make_run(tmp_path / structure)
    (run.folder / "latents" / "done.json").unlink()
    module = PerceptualStudent(mmd=1.0, autoencode=0.1, structure=structure, num_units=2, num_samples=8, lr=0.05)
    module.begin_stage(run.context("perceptual"))
    images = run.data.splits["val"]
    before = module.assembled.log_prob(images).mean()
    run.trainer("perceptual", 2).fit(module, datamodule=run.data)
    results = module.finish_stage(run.context("perceptual"))
    after = AssembledCircuit.load(run.folder / "perceptual")
    assert after.log_prob(images).mean() > before
    assert set(results) == {"val_bpd", "num_parameters"}
    assert after.sample(3).shape == (3, 3, 4, 4)
    assert after.inpaint(images[:2], torch.zeros(1, dtype=torch.bool)).shape == (2, 3, 4, 4)


# Errors.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nll": 0.0}, "weights: got .* one above 0 at least"),
        ({"mmd": -1.0}, "mmd: got -1.0, expected at least 0"),
        ({"estimator": "score"}, "estimator: got 'score', expected one of gumbel"),
        ({"temperature": 0.0}, "TemperatureSchedule: start"),
        ({"temperature_shape": "cosine"}, "shape: got 'cosine'"),
        ({"final_lr": 1.0}, "final_lr: got 1.0, expected more than 0 and at most lr"),
        ({"num_samples": 1}, "num_samples: got 1, expected 2 or more"),
        ({"allowed_rise": -0.1}, "allowed_rise: got -0.1"),
        ({"structure": "tree"}, "structure: got 'tree'"),
        ({"structure": "hclt", "allowed_rise": 0.1}, "allowed_rise: a circuit of a structure of its own"),
        ({"structure": "hclt", "learned_encoder": True}, "learned_encoder: a circuit of a structure of its own"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerceptualStudent(**settings)


def test_clipping_is_a_setting_of_its_own() -> None:
    with pytest.raises(ValueError, match="gradient_clip_val cannot be set: set its model's clip"):
        check_without_gradients("perceptual", PerceptualStudent, {"gradient_clip_val": 1.0})


def test_what_does_not_fit_is_named(prepared: Any) -> None:
    class Words:
        parts = Tokens(3, 10)

    with pytest.raises(ValueError, match="looks at pictures, but the data's parts are Tokens"):
        PerceptualStudent().check_data(Words())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a circuit from scratch knows no latent values"):
        PerceptualStudent(structure="hclt").begin_stage(context_of(prepared))
    save_teacher_without_layers(prepared.folder / "teacher")
    with pytest.raises(ValueError, match="feature_mmd, feature_distance: a Blind has no activations"):
        PerceptualStudent(feature_mmd=1.0).begin_stage(context_of(prepared))


@register_teacher
class Blind(nn.Module):
    """Shows none of its layers."""

    contextual, positional = False, False

    def __init__(self) -> None:
        super().__init__()
        self.init_args: dict[str, Any] = {}
        self.layer = nn.Linear(1, 1)


def save_teacher_without_layers(folder: Path) -> None:
    save_teacher(Blind(), folder)


def test_a_tree_of_whole_images_is_that_of_the_circuit_library(make_run: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run.folder / "latents" / "done.json").unlink()
    module = PerceptualStudent(structure="hclt", num_units=3, init="quantiles")
    module.begin_stage(run.context("perceptual"))
    assert isinstance(module.assembled.conditional, pc.Circuit)
    again = PerceptualStudent(structure="hclt", num_units=3, init="quantiles")
    again.begin_stage(run.context("perceptual"))
    assert torch.equal(tables_of(module), tables_of(again))
