"""The stage of the prior: evidence computed once, a likelihood that rises, and the whole circuit handed on."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lvd_lightning.metrics import BitsPerDim
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.models.evidence import EvidenceCache, candidate_table
from lvd_lightning.stages import ConditionalStudent, PriorStudent, prior

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on small loaders


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Where a finished stage of conditionals is kept, once there is one."""
    return [tmp_path_factory.mktemp("stages") / "conditional"]


@pytest.fixture
def conditional(run: Any, finished: list[Path]) -> Any:
    """A run with finished conditionals, not trained much, so that latents are uncertain."""
    if not finished[0].is_dir():
        run.complete("conditional", ConditionalStudent(2, lr=0.03, init="random"), 2)
        shutil.copytree(run.folder / "conditional", finished[0])
    else:
        shutil.copytree(finished[0], run.folder / "conditional")
    return run


def bpd(module: PriorStudent, run: Any, split: str, count: int = 1000) -> float:
    metric = BitsPerDim(48)
    metric.update(module.assembled.log_prob(run.data.splits[split][:count]))
    return float(metric.compute())


@pytest.mark.parametrize(
    "settings",
    [
        {"candidates": None, "counts_pseudocount": 300.0},  # a tree that counts for little, for EM to mend
        {"candidates": 2, "counts_pseudocount": 300.0},
        {"candidates": None, "counts_pseudocount": 300.0, "optimizer": "em"},
        {"candidates": 2, "num_units": 2, "hard_epochs": 2, "counts_pseudocount": 300.0},
        {"candidates": None, "num_units": 2, "hard_epochs": 1, "optimizer": "em"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_the_likelihood_rises(conditional: Any, settings: dict[str, Any]) -> None:
    module = conditional.begin("prior", PriorStudent(**settings))
    before = bpd(module, conditional, "train")
    given = [table.detach().clone() for table in module.assembled.conditional.tables]
    trainer = conditional.trainer("prior", 6)
    trainer.fit(module, datamodule=conditional.data)
    assert bpd(module, conditional, "train") < before - 1e-3
    for table, old in zip(module.assembled.conditional.tables, given, strict=True):
        assert torch.equal(table, old)
    assert ("train/log_p_z_bpd" in trainer.callback_metrics) == ("hard_epochs" in settings)


def test_hard_epochs_fit_the_assignments(conditional: Any) -> None:
    module = conditional.begin("prior", PriorStudent(num_units=2, hard_epochs=4, counts_pseudocount=300.0))
    z = conditional.data.z["train"]
    before = module.assembled.prior_log_prob(z).mean()
    conditional.trainer("prior", 4).fit(module, datamodule=conditional.data)
    assert module.assembled.prior_log_prob(z).mean() > before + 0.1


def test_metrics_are_those_of_the_whole_circuit(conditional: Any) -> None:
    module = PriorStudent(val_images=10, lr=1e-6, final_lr=1e-6, candidates=2)
    metrics = conditional.train("prior", module).callback_metrics
    assert float(metrics["val/bpd"]) == pytest.approx(bpd(module, conditional, "val", 10), rel=1e-4)
    # Candidates that are left out count as impossible.
    assert float(metrics["train/bpd"]) > bpd(module, conditional, "train")
    module = PriorStudent(lr=1e-6, final_lr=1e-6, candidates=None)
    metrics = conditional.train("prior", module).callback_metrics
    assert float(metrics["train/bpd"]) == pytest.approx(bpd(module, conditional, "train"), rel=1e-4)


@pytest.mark.parametrize("candidates", [None, 2, 3, 99])
def test_evidence_is_that_of_the_conditionals(conditional: Any, candidates: int | None) -> None:
    module = conditional.begin("prior", PriorStudent(candidates=candidates))
    index = torch.tensor([3, 100, 7])
    expected = module.assembled.evidence(conditional.data.splits["train"][index])
    found = module.train_evidence.cache.evidence(index, "cpu")
    kept = found > -torch.inf
    assert (kept.sum(-1) == min(candidates or 3, 3)).all()
    assert kept.gather(2, conditional.data.z["train"][index][..., None]).all()
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-3, atol=1e-3)
    assert (module.val_cache.evidence(index[:1], "cpu") > -torch.inf).all()


def test_evidence_is_computed_once(conditional: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[str] = []
    fill = EvidenceCache.fill

    def counted(folder: Path, *arguments: Any, **settings: Any) -> None:
        filled.append(folder.name)
        fill(folder, *arguments, **settings)

    monkeypatch.setattr(EvidenceCache, "fill", counted)
    first = conditional.begin("prior", PriorStudent(candidates=2))
    assert filled == ["train", "val"]
    second = conditional.begin("prior", PriorStudent(candidates=2))
    assert filled == ["train", "val"]
    index = torch.arange(20)
    for one, other in ((first.train_evidence.cache, second.train_evidence.cache), (first.val_cache, second.val_cache)):
        assert torch.equal(one.evidence(index, "cpu"), other.evidence(index, "cpu"))
    # An interruption while the second was written, and settings that need other numbers.
    (conditional.folder / "prior" / "evidence" / "val" / "evidence.json").unlink()
    conditional.begin("prior", PriorStudent(candidates=2))
    assert filled == ["train", "val", "val"]
    conditional.begin("prior", PriorStudent(candidates=2, val_images=5))
    conditional.begin("prior", PriorStudent(candidates=None, val_images=5))
    assert filled == ["train", "val", "val", "val", "train"]


def test_candidates_of_a_killed_stage_are_taken(conditional: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding them takes minutes where there are many values; those of another number are found anew."""
    first = conditional.begin("prior", PriorStudent(candidates=2))
    evidence = conditional.folder / "prior" / "evidence"
    (evidence / "train" / "evidence.json").unlink()  # as if it had been killed while it computed the evidence
    found: list[int] = []

    def counted(*arguments: Any) -> torch.Tensor:
        found.append(arguments[-1])
        return candidate_table(*arguments)

    monkeypatch.setattr(prior, "candidate_table", counted)
    second = conditional.begin("prior", PriorStudent(candidates=2))
    assert found == []
    assert torch.equal(first.train_evidence.candidates.table, second.train_evidence.candidates.table)
    (evidence / "train" / "evidence.json").unlink()
    conditional.begin("prior", PriorStudent(candidates=1))
    assert found == [1]


@pytest.mark.parametrize("candidates", [None, 2])
@pytest.mark.parametrize("images", [0, 6])
def test_what_does_not_fit_on_disk_is_computed_again(conditional: Any, candidates: int | None, images: int) -> None:
    whole = conditional.begin("prior", PriorStudent(candidates=candidates))
    index = torch.tensor([3, 100, 5, 6])
    x = conditional.data.splits["train"][index]
    expected = whole.train_evidence.evidence(x, index)
    bytes_per_image = whole.assembled.num_positions * (3 * 2 + 4 if candidates is None else 2 * 4 + 4)
    budget = (images + 0.5) * bytes_per_image / 1e9
    part = conditional.begin("prior", PriorStudent(candidates=candidates, max_cache_gb=budget))
    assert part.train_evidence.num_kept == images
    torch.testing.assert_close(part.train_evidence.evidence(x, index), expected, rtol=1e-3, atol=1e-3)
    again = conditional.begin("prior", PriorStudent(candidates=candidates, max_cache_gb=budget))
    assert torch.equal(again.train_evidence.evidence(x, index), part.train_evidence.evidence(x, index))


@pytest.mark.parametrize("candidates", [None, 2])
def test_a_pruned_prior_is_trained_and_handed_on(conditional: Any, candidates: int | None) -> None:
    dense = conditional.complete("prior", PriorStudent(candidates=candidates), 3)
    shutil.rmtree(conditional.folder / "prior")
    module = PriorStudent(candidates=candidates, prune_threshold=0.05)
    results = conditional.complete("prior", module, 3)
    assert results["num_parameters"] < dense["num_parameters"]
    loaded = AssembledCircuit.load(conditional.folder / "prior")
    images = conditional.data.splits["val"]
    assert torch.equal(loaded.log_prob(images), module.assembled.log_prob(images))
    assert module.assembled.log_prob(images).isfinite().all()
    assert any(node.mask is not None and not node.mask.all() for node in loaded.prior.to_graph().nodes)


def test_flows_of_the_prior_are_those_of_all_images(conditional: Any) -> None:
    module = conditional.begin("prior", PriorStudent(candidates=None))
    conditional.trainer("prior", 1).fit(module, datamodule=conditional.data)
    flows = module.flows()
    assert flows.num_examples.tolist() == [len(conditional.data.splits["train"])]
    module.assembled.prior.zero_grad()
    index = torch.arange(len(conditional.data.splits["train"]))
    evidence = module.train_evidence.evidence(conditional.data.splits["train"], index)
    (-module.assembled.prior.log_prob(evidence).sum()).backward()
    for table, found in zip(module.assembled.prior.tables, flows.tables, strict=True):
        torch.testing.assert_close((-table * table.grad).double(), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threshold", [-0.1, 1.0])
def test_thresholds_are_shares(threshold: float) -> None:
    with pytest.raises(ValueError, match=f"prune_threshold: got {threshold}"):
        PriorStudent(prune_threshold=threshold)


def test_global_random_numbers_play_no_part(conditional: Any) -> None:
    weights = []
    for count in range(2):
        torch.manual_seed(count)
        module = PriorStudent(num_units=2, hard_epochs=1)
        conditional.train("prior", module, 2)
        weights.append(torch.cat([table.detach().flatten() for table in module.assembled.prior.tables]))
    assert torch.equal(weights[0], weights[1])


def test_the_whole_circuit_is_handed_on(conditional: Any) -> None:
    module = PriorStudent(candidates=2, val_images=12)
    results = conditional.complete("prior", module, 2)
    images = conditional.data.splits["val"]
    loaded = AssembledCircuit.load(conditional.folder / "prior")
    assert torch.equal(loaded.log_prob(images), module.assembled.log_prob(images))
    assert results["val_images"] == 12
    assert results["val_bpd"] == pytest.approx(bpd(module, conditional, "val", 12), rel=1e-4)
    assert results["num_parameters"] == loaded.num_parameters


def test_the_counted_prior_is_kept_if_training_spoils_it(conditional: Any) -> None:
    module = conditional.begin("prior", PriorStudent())
    counted = [table.detach().clone() for table in module.assembled.prior.tables]
    expected = bpd(module, conditional, "val")
    module.assembled.prior.tables[0].data.copy_(module.assembled.prior.tables[0].data.roll(1, 2))
    results = module.finish_stage(conditional.context("prior"))
    kept = AssembledCircuit.load(conditional.folder / "prior").prior
    assert all(torch.equal(one, two) for one, two in zip(kept.tables, counted, strict=True))
    assert (results["improved"], results["val_bpd"]) == (0.0, pytest.approx(expected, rel=1e-4))


def test_checkpoints_hold_plain_types(conditional: Any) -> None:
    trainer = conditional.train("prior", PriorStudent(num_units=2, hard_epochs=1), 1)
    trainer.save_checkpoint(conditional.folder / "some.ckpt")
    state = torch.load(conditional.folder / "some.ckpt", weights_only=True)["state_dict"]
    again = conditional.begin("prior", PriorStudent(num_units=2, hard_epochs=1))
    again.load_state_dict(state)
    trainer = conditional.trainer("prior", 2)
    trainer.fit(again, datamodule=conditional.data, ckpt_path=conditional.folder / "some.ckpt", weights_only=True)
    assert "train/bpd" in trainer.callback_metrics
