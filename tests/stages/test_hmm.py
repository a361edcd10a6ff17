"""Words: a hidden Markov model from counts, then EM; the same from random parameters; n-grams beside them."""

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.texts import LENGTH, STATES, WORDS, Texts, run_stages, source
from lightning.pytorch import Callback, LightningModule, Trainer

import lvd_lightning.circuits as pc
from lvd_lightning.models.carried import carried_log_prob
from lvd_lightning.models.hmm_counts import HMMCounts
from lvd_lightning.models.hmm_graph import hmm_from_tables
from lvd_lightning.models.kneser_ney import KneserNey
from lvd_lightning.models.language import HiddenMarkovModel
from lvd_lightning.parts import Tokens
from lvd_lightning.stages import HMMBaseline, HMMStudent, NGramReference
from lvd_lightning.stages.hmm_settings import two_phases

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on small loaders


class InterruptIn(Callback):
    """Ctrl-C in the second batch of an epoch, once."""

    def __init__(self, epoch: int) -> None:
        self.epoch, self.done = epoch, False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        if not self.done and trainer.current_epoch == self.epoch and rest[-1] == 1:
            self.done = True
            raise KeyboardInterrupt


class StepSizes(Callback):
    """What the optimizer is given in every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def counted(data: Texts, homogeneous: bool, pseudocount: float = 0.1) -> HiddenMarkovModel:
    counts = HMMCounts(LENGTH, STATES, WORDS, homogeneous)
    counts.add(data.z["train"], data.splits["train"])
    return HiddenMarkovModel.from_tables(counts.tables(pseudocount), LENGTH)


def perplexity(model: HiddenMarkovModel, x: torch.Tensor) -> float:
    return math.exp(-float(model.log_prob(x).detach().double().mean()) / LENGTH)


@pytest.mark.parametrize("homogeneous", [False, True])
def test_a_run_from_counts_to_the_report(tmp_path: Path, homogeneous: bool) -> None:
    data = Texts()
    made = {
        "hmm": lambda: HMMStudent(homogeneous),
        "ngrams": lambda: NGramReference(orders=[2, 3]),
        "baseline": HMMBaseline,
    }
    run = run_stages(tmp_path, made, data)
    summary = json.loads((run.dir / "report" / "summary.json").read_text())
    start = perplexity(counted(data, homogeneous), data.splits["val"])
    assert summary["stages"]["hmm"]["counts_ppl"] == pytest.approx(start, rel=1e-5)
    assert summary["stages"]["hmm"]["val_ppl"] <= start + 1e-6
    assert summary["stages"]["hmm"]["em_tokens_per_second"] > 100
    assert 0 < summary["stages"]["hmm"]["counts_seconds"] < 10
    model: Any = run.model()
    assert isinstance(model, HiddenMarkovModel)
    assert model.homogeneous == homogeneous
    assert summary["test"]["ppl"] == pytest.approx(perplexity(model, data.splits["test"]), rel=1e-5)
    assert summary["test"]["num_parameters"] == model.num_parameters
    assert ("ppl_carried" in summary["test"]) == homogeneous
    if homogeneous:
        text = data.splits["test"].flatten()
        carried = math.exp(-carried_log_prob(model.tables(), text) / len(text))
        assert summary["test"]["ppl_carried"] == pytest.approx(carried, rel=1e-6)
        assert "another protocol" in (run.dir / "report" / "summary.md").read_text()
    ngrams = KneserNey(torch.from_numpy(data.stream("train")).long()[None], WORDS, 3)
    wanted = math.exp(-float(ngrams.log_prob(data.splits["test"]).mean()) / LENGTH)
    assert summary["reference"]["kneser_ney_3"]["ppl"] == pytest.approx(wanted)
    assert summary["reference"]["kneser_ney"] in [summary["reference"][f"kneser_ney_{order}"] for order in (2, 3)]
    for file in ("hmm/hmm.safetensors", "hmm/language.json", "ngrams/reference.json", "baseline/baseline.json"):
        assert (run.dir / file).is_file()  # docs/stages.md tells of them
    assert set(summary["baseline"]) == {"random_em", "random_anemone"}
    for figures in summary["baseline"].values():
        assert figures["num_parameters"] == model.num_parameters
        assert 1 < figures["ppl"] < WORDS
    assert f"{summary['test']['ppl']:.4f}" in (run.dir / "report" / "summary.md").read_text()


def test_full_batch_em_is_em_on_all_windows(tmp_path: Path) -> None:
    data, steps = Texts(), StepSizes()
    student = lambda: HMMStudent(optimizer="full", lr=1.0, final_lr=1.0, pseudocount=0.0)  # noqa: E731
    run = run_stages(tmp_path, {"hmm": student}, data, epochs=3, callbacks=[steps])
    model = counted(data, False)
    optimizer = pc.CircuitEM(model, lr=1.0, pseudocount=0.0)
    reached = []
    for _ in range(3):
        optimizer.zero_grad()
        (-model.log_prob(data.splits["train"]).sum()).backward()
        optimizer.step()
        reached.append(perplexity(model, data.splits["val"]))
    with (run.dir / "hmm" / "metrics.csv").open() as file:
        logged = [float(row["val/ppl"]) for row in csv.DictReader(file) if row["val/ppl"]]
    assert logged == pytest.approx(reached, rel=1e-4)
    assert set(steps.seen) == {1.0}


def test_the_last_epochs_have_a_step_size_of_their_own(tmp_path: Path) -> None:
    steps = StepSizes()
    student = lambda: HMMStudent(lr=0.5, final_lr=0.1, last_epochs=1, last_lr=0.02)  # noqa: E731
    run_stages(tmp_path, {"hmm": student}, epochs=3, callbacks=[steps])
    assert steps.seen == pytest.approx([*torch.linspace(0.5, 0.1, 8).tolist(), *[0.02] * 4])


def test_epochs_of_one_phase_alone() -> None:
    settings = {"lr": 0.5, "final_lr": 0.1, "last_epochs": 0, "last_lr": 0.05}
    assert two_phases(9, 10, 2, settings) == pytest.approx(0.2)
    assert two_phases(0, 10, 2, {**settings, "last_epochs": 5}) == pytest.approx(0.1)


@pytest.mark.parametrize("stage", ["hmm", "baseline"])
def test_interrupted_and_started_again(tmp_path: Path, stage: str) -> None:
    def made() -> dict[str, Any]:
        if stage == "baseline":
            return {"baseline": lambda: HMMBaseline(num_states=2, homogeneous=True, token_dropout=0.1)}
        return {"hmm": lambda: HMMStudent(token_dropout=0.1, last_epochs=1)}

    whole = run_stages(tmp_path / "whole", made(), epochs=3)
    interrupt = InterruptIn(1)
    with pytest.raises(KeyboardInterrupt):
        run_stages(tmp_path / "again", made(), epochs=3, callbacks=[interrupt])
    again = run_stages(tmp_path / "again", made(), epochs=3, callbacks=[interrupt])
    assert interrupt.done
    for name in ["hmm"] if stage == "hmm" else ["em/hmm", "anemone/hmm"]:
        one, other = (pc.load(run.dir / stage / name) for run in (whole, again))
        for table, twin in zip(one.tables, other.tables, strict=True):
            assert torch.equal(table, twin)
    figures = [run.stage_figures()[stage]["val_ppl"] for run in (whole, again)]
    assert figures[0] == figures[1]


def test_dropped_tokens_are_missing(tmp_path: Path) -> None:
    """The first step is one of EM on windows with the same tokens marked as missing."""
    data = Texts(num_train=50)
    module = HMMStudent(token_dropout=0.3, optimizer="em", lr=1.0, final_lr=1.0)
    seen: list[Any] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
            seen.append((batch[0], pl_module.kept_tokens(batch[0], index), pl_module.model.tables().emission_SKV))

    run_stages(tmp_path, {"hmm": lambda: module}, data, epochs=1, callbacks=[Watch()])
    x_BT, kept_BT, emission_SKV = seen[0]
    assert 0.5 < float(kept_BT.float().mean()) < 0.9
    model = counted(data, False)
    (-model.log_prob(x_BT, kept_BT).sum()).backward()
    pc.CircuitEM(model, lr=1.0, pseudocount=1e-3).step()
    torch.testing.assert_close(model.tables().emission_SKV, emission_SKV)


def test_from_counts_is_better_than_from_nothing(tmp_path: Path) -> None:
    """With few epochs, on the text of a model that has three states."""
    made = {"hmm": lambda: HMMStudent(True), "baseline": HMMBaseline}
    figures = run_stages(tmp_path, made, Texts(400), epochs=2).figures()
    best = perplexity(HiddenMarkovModel(pc.Circuit(hmm_from_tables(source(), LENGTH))), Texts(400).splits["test"])
    assert figures["test"]["ppl"] < best * 1.05
    assert all(found["ppl"] > figures["test"]["ppl"] for found in figures["baseline"].values())


def test_an_em_that_makes_it_worse_is_not_kept(tmp_path: Path) -> None:
    data = Texts(num_train=100)
    student = lambda: HMMStudent(optimizer="em", lr=1.0, final_lr=1.0, pseudocount=1e6)  # noqa: E731
    run = run_stages(tmp_path, {"hmm": student}, data, epochs=1)
    figures = run.stage_figures()["hmm"]
    assert figures["val_ppl"] == figures["counts_ppl"]
    model: Any = run.model()
    assert perplexity(model, data.splits["val"]) == pytest.approx(figures["counts_ppl"], rel=1e-6)


def test_a_random_beginning_needs_no_clusters(tmp_path: Path) -> None:
    assert HMMStudent(init="random", num_states=4).needs == ()
    run = run_stages(tmp_path, {"hmm": lambda: HMMStudent(init="random", num_states=4)}, epochs=1)
    assert run.figures()["test"]["num_heads"] == 4
    assert "counts_ppl" not in run.stage_figures()["hmm"]


class Vocabulary:
    words = tuple(f"w{number}" for number in range(WORDS))

    def encode(self, words: list[str]) -> list[int]:
        return [self.words.index(word) for word in words]


def test_a_reserved_token_has_a_state_of_its_own(tmp_path: Path) -> None:
    data = Texts()
    data.vocabulary = Vocabulary()  # type: ignore[attr-defined]
    run = run_stages(tmp_path, {"hmm": lambda: HMMStudent(reserved_token="w6", counts_pseudocount=0.0)}, data, epochs=1)
    model: Any = run.model()
    assert (model.num_states, model.reserved) == (STATES + 1, 6)
    assert "lvd_objective_ppl" in run.figures()["test"]
    with pytest.raises(ValueError, match="reserved_token: got 'w6', but the data have no vocabulary"):
        run_stages(tmp_path / "none", {"hmm": lambda: HMMStudent(reserved_token="w6")}, Texts(), epochs=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adam"}, "optimizer: got 'adam', expected one of anemone, em, full"),
        ({"init": "zeros"}, "init: got 'zeros', expected one of counts, random"),
        ({"token_dropout": 1.0}, "token_dropout: got 1.0, expected at least 0 and less than 1"),
        ({"last_lr": 0.9}, "last_lr: got 0.9, expected a step size above 0 and at most lr, which is 0.4"),
        ({"last_epochs": -1}, "last_epochs: got -1, expected a whole number"),
        ({"counts_pseudocount": -1}, "counts_pseudocount: got -1, expected at least 0"),
        ({"num_states": 3}, "num_states: got 3, but from counts there are as many states as clusters"),
        ({"val_windows": 0}, "val_windows: got 0, expected a whole number"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HMMStudent(**settings)


def test_half_a_size_of_a_baseline_is_refused() -> None:
    with pytest.raises(ValueError, match="num_states, homogeneous: got 3 and None, expected both"):
        HMMBaseline(num_states=3)


def test_memory_is_planned_before_anything_is_allocated(tmp_path: Path) -> None:
    """A vocabulary of ten million words would not fit: the error comes at once, and has the figure."""
    data = Texts()
    data.parts = Tokens(LENGTH, 10_000_000)  # type: ignore[misc]
    for stage in (
        lambda: HMMStudent(init="random", num_states=1000, max_memory_gb=5.0),
        lambda: HMMBaseline(num_states=1000, homogeneous=False, max_memory_gb=5.0),
    ):
        with pytest.raises(ValueError, match=r"training 5.*,\d{3} parameters needs .* GB .* but 5 GB are there: take"):
            run_stages(tmp_path, {"hmm": stage}, data, epochs=1)
        shutil.rmtree(tmp_path / "text")


def test_images_are_refused() -> None:
    from datamodules import Photos

    for stage in (HMMStudent(), HMMBaseline(), NGramReference()):
        with pytest.raises(ValueError, match=f"{type(stage).__name__} learns words of texts, but the data's parts are"):
            stage.check_data(Photos(image_size=8))
