"""The baseline: equal size, a plan that is made once, batches by (seed, epoch), the best epoch of each rule."""

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import lvd_lightning.circuits as pc
from lvd_lightning.stages import CircuitBaseline

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on small loaders

PLAN = {"parents": list(range(-1, 47)), "num_units": 2, "seconds": 1.0, "steps": {"em": 6, "anemone": 4}}


def planned(run: Any, **settings: Any) -> CircuitBaseline:
    """A baseline whose plan was made before."""
    folder = run.folder / "baseline"
    folder.mkdir(exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(PLAN))
    return run.begin("baseline", CircuitBaseline(**settings))


def bpd(circuit: pc.Circuit, images: Tensor) -> float:
    return -circuit.log_prob(images.flatten(1)).mean().item() / 48 / math.log(2)


@pytest.mark.parametrize(("wanted", "excess"), [(60_000, 0.1), (400_000, 0.03)])
def test_as_many_parameters_as_the_distilled_circuit(run: Any, wanted: int, excess: float) -> None:
    for stage, count in (("prior", 7), ("finetune", wanted)):
        (run.folder / stage).mkdir()
        run.finish(stage, {"num_parameters": count})
    module = run.begin("baseline", CircuitBaseline(seconds=0))
    sizes = {module.circuit(rule).num_parameters for rule in ("em", "anemone")}
    assert len(sizes) == 1
    assert 0.98 * wanted <= sizes.pop() <= (1 + excess) * wanted
    states = module._num_units(run.context("baseline"))
    fewer = pc.Circuit(pc.hclt(torch.arange(-1, 47), states - 1, pc.Categorical(256)))
    assert fewer.num_parameters < 0.98 * wanted


def test_the_plan_is_made_once(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a measured rate and the time of all earlier stages; a second start reads it and measures nothing."""
    (run.folder / "prior").mkdir()
    run.finish("prior", {"num_parameters": 1000}, seconds=2.5)
    limits: list[float] = []

    def measure(self: CircuitBaseline, circuit: pc.Circuit, sample: Tensor, rule: str, seconds: float) -> int:
        limits.append(seconds)
        return {"em": 30, "anemone": 20}[rule]

    monkeypatch.setattr(CircuitBaseline, "_measure", measure)
    first = run.begin("baseline", CircuitBaseline())
    assert limits == [3.5, 3.5]  # with the second of the latents
    second = run.begin("baseline", CircuitBaseline())
    assert limits == [3.5, 3.5]
    assert first.steps == second.steps == {"em": 30, "anemone": 20}
    for name, tensor in first.circuits.state_dict().items():
        assert torch.equal(tensor, second.circuits.state_dict()[name])


def test_steps_fill_the_time(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that says a step takes half a second; timing leaves the circuit as it was."""
    module = planned(run)
    before = {name: tensor.clone() for name, tensor in module.circuit("em").state_dict().items()}
    ticks = iter(range(1000))
    monkeypatch.setattr(module, "_now", lambda: 0.5 * next(ticks))
    sample = run.data.splits["train"].flatten(1)
    assert module._measure(module.circuit("em"), sample, "em", 100.0) == 200
    assert module._measure(module.circuit("em"), sample, "em", 0.0) == 1
    for name, tensor in module.circuit("em").state_dict().items():
        assert torch.equal(tensor, before[name])


def test_leaves_of_the_config(run: Any) -> None:
    leaf = {"class_path": "lvd_lightning.circuits.OrderedCategorical", "init_args": {"width": 2.0}}
    for settings in ({}, {"structure": "rat_spn"}):
        module = planned(run, leaf=leaf, **settings)
        for rule in module.steps:
            families = {plan.distribution for plan in module.circuit(rule).plan.inputs}
            assert families == {pc.OrderedCategorical(256, width=2.0)}


def test_each_rule_takes_its_steps_and_learns(run: Any) -> None:
    module = planned(run, batch_size=40)
    before = bpd(module.circuit("em"), run.data.splits["train"])
    trainer = run.trainer("baseline", 2)
    trainer.fit(module)
    steps = [optimizer.state[optimizer.param_groups[0]["params"][0]].get("step") for optimizer in trainer.optimizers]
    assert steps == [None, 4]  # mini-batch EM keeps no state
    assert trainer.global_step == 10
    for rule in ("em", "anemone"):
        assert float(trainer.callback_metrics[f"train/{rule}_bpd"]) < before - 0.2
        assert bpd(module.circuit(rule), run.data.splits["train"]) < before - 0.2
        assert module.seconds[rule] > 0
        assert trainer.callback_metrics[f"val/{rule}_bpd"].item() == pytest.approx(
            bpd(module.circuit(rule), run.data.splits["val"]), rel=1e-5
        )
    lower = min(float(trainer.callback_metrics[f"val/{rule}_bpd"]) for rule in module.steps)
    assert float(trainer.callback_metrics["val/bpd"]) == pytest.approx(lower)
    assert json.loads((run.folder / "baseline" / "spent.json").read_text()) == module.seconds


def test_step_sizes_fall_to_a_tenth(run: Any) -> None:
    module = planned(run, em_lr=0.5)
    assert [module._step_size("em", step) for step in (0, 5)] == pytest.approx([0.5, 0.05])
    assert [module._step_size("anemone", step) for step in (0, 3)] == pytest.approx([0.4, 0.04])


def batches(module: CircuitBaseline, epoch: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        current_epoch=epoch,
        max_epochs=2,
        global_rank=rank,
        world_size=world_size,
        strategy=SimpleNamespace(global_rank=rank),
    )
    return [index.tolist() for index in module.train_dataloader().sampler]


def test_batches_are_a_function_of_seed_and_epoch(run: Any) -> None:
    module = planned(run, batch_size=50)
    first = batches(module, 0)
    assert [len(index) for index in first] == [50, 50, 50]
    assert sorted(first[0] + first[1] + first[2][:20]) == list(range(120))  # every image, then over again
    torch.manual_seed(1)
    assert batches(planned(run, batch_size=50), 0) == first
    assert batches(module, 1) != first
    run.seed = 1
    assert batches(planned(run, batch_size=50), 0) != first


def test_ranks_share_the_batches(run: Any) -> None:
    module = planned(run, batch_size=51)
    whole, shares = batches(module, 1), [batches(module, 1, rank, 2) for rank in range(2)]
    for number, batch in enumerate(whole):
        assert sorted(shares[0][number] + shares[1][number]) == sorted(batch)
        assert len(shares[0][number]) - len(shares[1][number]) in (0, 1)


def test_batches_are_no_larger_than_the_data(run: Any) -> None:
    assert [sorted(index) for index in batches(planned(run, batch_size=500), 0)] == [list(range(120))] * 3


def test_the_best_epoch_of_each_rule_is_evaluated(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of three epochs, a different best one for each rule."""
    module = planned(run)
    monkeypatch.setattr(module, "log", lambda *arguments, **settings: None)
    module.trainer = SimpleNamespace(sanity_checking=False, is_global_zero=True)  # type: ignore[assignment]
    states = []
    for scores in ({"em": 5.0, "anemone": 4.0}, {"em": 4.5, "anemone": math.nan}, {"em": 4.75, "anemone": 4.25}):
        for rule, score in scores.items():
            table = module.circuit(rule).tables[0].data
            table.copy_(table.roll(1, 2))  # other parameters in every epoch
            module._metric("val", rule).reset()
            module._metric("val", rule).update(torch.tensor([-score * 48 * math.log(2)]))
        module.on_validation_epoch_end()
        states.append({rule: module.circuit(rule).tables[0].detach().clone() for rule in scores})
    for rule, epoch in (("em", 1), ("anemone", 0)):
        assert torch.equal(pc.load(run.folder / "baseline" / rule).tables[0], states[epoch][rule])
    (run.folder / "baseline" / "spent.json").write_text(json.dumps({"em": 7.0, "anemone": 8.0}))
    results = module.finish_stage(run.context("baseline"))
    written = json.loads((run.folder / "baseline" / "baseline.json").read_text())
    assert set(written) == {"em", "anemone"}
    for rule, seconds in (("em", 7.0), ("anemone", 8.0)):
        best = pc.load(run.folder / "baseline" / rule)
        assert written[rule]["seconds"] == seconds
        assert written[rule]["num_parameters"] == best.num_parameters
        assert written[rule]["val_bpd"] == pytest.approx(bpd(best, run.data.splits["val"]), rel=1e-5)
        assert written[rule]["bpd"] == pytest.approx(bpd(best, run.data.splits["test"]), rel=1e-5)
    assert results["val_bpd"] == min(found["val_bpd"] for found in written.values())


def test_an_epoch_counts_even_if_none_is_finite(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = planned(run)
    monkeypatch.setattr(module, "log", lambda *arguments, **settings: None)
    module.trainer = SimpleNamespace(sanity_checking=False, is_global_zero=True)  # type: ignore[assignment]
    for rule in ("em", "anemone"):
        module._metric("val", rule).update(torch.tensor([-math.inf]))
    module.on_validation_epoch_end()
    assert (run.folder / "baseline" / "em.safetensors").is_file()


def test_first_parameters_from_quantiles(run: Any) -> None:
    images = run.data.splits["train"]
    quantiles, random = (planned(run, init=init).circuit("em") for init in ("quantiles", "random"))
    assert bpd(quantiles, images) < bpd(random, images) - 1.0


def test_unknown_size_and_time_are_named(run: Any) -> None:
    with pytest.raises(ValueError, match="stage 'baseline' needs model; no stage before it leaves it"):
        run.begin("baseline", CircuitBaseline())
    (run.folder / "latents" / "done.json").unlink()
    with pytest.raises(ValueError, match="stage baseline: no earlier stage says .* set seconds"):
        run.begin("baseline", CircuitBaseline(num_units=2))
    with pytest.raises(ValueError, match="stage baseline: set max_epochs"):
        run.trainer("baseline", -1).fit(planned(run))
