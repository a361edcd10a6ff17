"""Tests of evaluation and report on a run directory that holds small random circuits."""

import dataclasses
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from datamodules import Arrays
from lvd_lightning import circuits as pc
from lvd_lightning.context import StageContext
from lvd_lightning.latents import load_assignments
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.parts import ImagePatches
from lvd_lightning.ranks import Ranks
from lvd_lightning.runs.evaluation import evaluate_run, is_evaluated, mean_likelihood
from lvd_lightning.runs.experiment import Experiment, PlannedStage
from lvd_lightning.runs.pictures import grid, half_masks
from lvd_lightning.runs.pipeline import mark_done
from lvd_lightning.runs.report import is_written, summarize, table_rows, write_report
from lvd_lightning.runs.run import Run
from lvd_lightning.runs.sample_figures import sample_figures
from lvd_lightning.runs.settings import EVALUATE
from lvd_lightning.stages import CircuitBaseline, FinetuneStudent, Latents, PriorStudent, VQVAETeacher
from lvd_lightning.stages.stage import Stage
from lvd_lightning.teachers import VQVAE, save_teacher

# Names of the user's own: reports go by what stages leave.
STAGES: dict[str, type[Stage]] = {
    "clusters": Latents,
    "joint": PriorStudent,
    "tuned": FinetuneStudent,
    "plain_em": CircuitBaseline,
}
PATCH, CLUSTERS = 4, 3


def random_circuit(parts: ImagePatches, seed: int) -> AssembledCircuit:
    generator = torch.Generator().manual_seed(seed)
    chain = torch.arange(math.prod(parts.shape)) - 1
    heads = [pc.hclt(chain, 2, parts.leaf, generator=generator) for _ in range(CLUSTERS)]
    prior = pc.hclt(torch.arange(parts.num_parts) - 1, CLUSTERS, pc.SoftEvidence(CLUSTERS), generator=generator)
    return AssembledCircuit(pc.Circuit(prior), pc.Circuit(heads), parts)


@pytest.fixture
def ranks() -> Ranks:
    return Ranks({"accelerator": "cpu", "devices": 1})


def finished_run(folder: Path, **settings: Any) -> tuple[Run, Arrays]:
    """A run directory as the stages leave it, with random circuits."""
    images = np.random.default_rng(0).integers(0, 256, (60, 3, 8, 8), dtype=np.uint8)
    np.save(folder / "images.npy", images)
    data = Arrays(path=str(folder / "images.npy"), image_size=8, **settings)
    data.setup()
    run_dir = folder / "run"
    context = StageContext(run_dir, "clusters", 0, data)
    mark_done(context.dir, {"seconds": 1.0, **Latents(num_clusters=CLUSTERS).run(context)})
    for number, stage in enumerate(("joint", "tuned")):
        (run_dir / stage).mkdir()
        random_circuit(data.parts, number).save(run_dir / stage)
        mark_done(run_dir / stage, {"seconds": 10.0, "val_bpd": 8.5})
    (run_dir / "plain_em").mkdir()
    baseline = {"em": {"bpd": 7.5, "val_bpd": 7.4, "num_parameters": 12, "seconds": 3.0}}
    (run_dir / "plain_em" / "baseline.json").write_text(json.dumps(baseline))
    mark_done(run_dir / "plain_em", {"seconds": 4.0})
    (run_dir / "tuned" / "metrics.csv").write_text("epoch,step,seconds,val/bpd\n0,1,2.0,8.7\n1,2,4.0,8.5\n")
    return Run(Experiment("run", run_dir, 0, lambda: data, planned(data, STAGES))), data


def planned(data: Arrays, stages: dict[str, type[Stage]]) -> tuple[PlannedStage, ...]:
    return tuple(PlannedStage(name, kind, {}, lambda: data, kind) for name, kind in stages.items())


def test_evaluation_counts_every_dimension_of_every_image(tmp_path: Path, ranks: Ranks) -> None:
    run, data = finished_run(tmp_path)
    found = evaluate_run(run, data, ranks)
    assert list(found["circuits"]) == ["lvd_objective", "distilled", "finetuned"]
    images, dims = data.batch("test", torch.arange(data.num_examples("test"))), 3 * 8 * 8
    before, after = (AssembledCircuit.load(run.dir / stage) for stage in ("joint", "tuned"))
    expected = -after.log_prob(images).double().mean().item() / dims / math.log(2)
    assert found["circuits"]["finetuned"]["test_bpd"] == pytest.approx(expected, rel=1e-5)
    z = load_assignments(run.dir / "clusters", "test")
    joint = -before.lvd_objective(images, z).double().mean().item() / dims / math.log(2)
    assert found["circuits"]["lvd_objective"]["test_bpd"] == pytest.approx(joint, rel=1e-5)
    assert found["circuits"]["lvd_objective"]["test_bpd"] > found["circuits"]["distilled"]["test_bpd"]
    assert found["num_heads"] == CLUSTERS
    assert found["num_parameters"] == after.num_parameters


def test_samples_of_the_last_model_are_looked_at_once(tmp_path: Path, ranks: Ranks) -> None:
    run, data = finished_run(tmp_path)
    found = evaluate_run(run, data, ranks)
    last = AssembledCircuit.load(run.dir / "tuned")
    expected = sample_figures(last, data, ranks, seed=0)
    assert {key: found[key] for key in expected} == expected
    assert found["samples"]["isolated_pixels_test"] > 0.1  # the images are noise
    first = AssembledCircuit.load(run.dir / "joint")
    assert sample_figures(first, data, ranks, seed=0)["samples"] != found["samples"]
    assert sample_figures(last, data, ranks, seed=1)["samples"] != found["samples"]


def test_gap_compares_teacher_objective_and_student(tmp_path: Path, ranks: Ranks) -> None:
    run, data = finished_run(tmp_path)
    sizes = {"channels": 4, "num_features": 4, "codebook_size": 4, "prior_hidden_size": 8, "prior_num_heads": 1}
    teacher = VQVAE(8, PATCH, **sizes, num_categories=data.num_categories)
    save_teacher(teacher, run.dir / "vqvae")
    mark_done(run.dir / "vqvae", {"seconds": 5.0})
    stages = planned(data, {"vqvae": VQVAETeacher, **STAGES})
    run = Run(dataclasses.replace(run.experiment, stages=stages))
    found = evaluate_run(run, data, ranks)
    images = data.batch("test", torch.arange(data.num_examples("test")))
    expected = teacher.eval().elbo(images).double().mean().item()
    assert found["gap"]["distilled"]["teacher_elbo"]["nats"] == pytest.approx(expected, rel=1e-5)
    for name, gap in found["gap"].items():
        assert gap["log_prob"]["bpd"] == found["circuits"][name]["test_bpd"]
        assert gap["lvd_objective"]["nats"] < gap["log_prob"]["nats"]
    assert "teacher_elbo" not in found["gap"]["finetuned"]  # it is the same
    mark_done(run.dir / EVALUATE, {"seconds": 1.0, **found})
    write_report(run, data, torch.device("cpu"))
    folder = run.dir / "report"
    elbo_bpd = json.loads((folder / "summary.json").read_text())["test"]["teacher_elbo_bpd"]
    assert elbo_bpd == found["circuits"]["teacher_elbo"]["test_bpd"]
    text = (folder / "summary.md").read_text()
    assert f"| teacher, ELBO | the teacher's codes | {expected:,.1f} | {elbo_bpd:.4f} |" in text
    assert imread(folder / "gap.png").std() > 0


def test_figures_do_not_depend_on_the_number_of_ranks(tmp_path: Path, ranks: Ranks) -> None:
    _, data = finished_run(tmp_path)
    circuit = random_circuit(data.parts, 0)
    whole = mean_likelihood(circuit, data, "test", ranks)
    parts = [ranks.share(torch.arange(7)) for ranks.rank, ranks.world_size in ((0, 3), (1, 3), (2, 3))]
    assert sorted(torch.cat(parts).tolist()) == list(range(7))
    ranks.rank, ranks.world_size = 0, 1
    assert mean_likelihood(circuit, data, "test", ranks) == whole


def test_report_has_pictures_and_the_keys_scripts_read(
    tmp_path: Path, ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = finished_run(tmp_path)
    mark_done(run.dir / EVALUATE, {"seconds": 1.0, **evaluate_run(run, data, ranks)})
    write_report(run, data, torch.device("cpu"))
    folder = run.dir / "report"
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary) == ["stages", "test", "baseline", "samples", "redrawn", "completions", "protocol"]
    assert list(summary["stages"]) == list(STAGES)
    assert set(summary["test"]) == {"bpd", "distilled_bpd", "lvd_objective_bpd", "num_parameters", "num_heads"}
    assert summary["test"]["bpd"] != summary["test"]["distilled_bpd"]
    assert summary["baseline"] == {"em": {"bpd": 7.5, "num_parameters": 12, "seconds": 3.0}}
    figures = {f"{name}{of}" for name in ("isolated_pixels", "border_step", "inside_step") for of in ("", "_test")}
    text = (folder / "summary.md").read_text()
    for name, title in (("samples", "samples"), ("completions", "completions")):
        assert set(summary[name]) == {*figures, "no_color"}
        assert f"| {title} | {100 * summary[name]['isolated_pixels']:.2f} % | " in text
        assert f" | {100 * summary[name]['no_color']:.2f} % |" in text
    assert set(summary["redrawn"]) == {"isolated_pixels", "border_step", "inside_step", "no_color"}
    assert f"| test images, drawn anew | {100 * summary['redrawn']['isolated_pixels']:.2f} % | " in text
    assert "Of 500 samples, and of 6 test images" in text
    for name in ("samples", "inpainting", "clusters", "training"):
        assert f"({name}.png)" in text
        assert imread(folder / f"{name}.png").std() > 0
    assert "lossy" not in text
    assert "finetuned circuit" in capsys.readouterr().out

    (folder / "samples.png").unlink()
    write_report(run, data, torch.device("cpu"))
    assert not (folder / "samples.png").exists()  # what is finished is not made again


def test_report_before_the_baseline_is_completed_after_it(tmp_path: Path, ranks: Ranks) -> None:
    run, data = finished_run(tmp_path)
    (run.dir / "plain_em" / "done.json").rename(tmp_path / "done.json")
    mark_done(run.dir / EVALUATE, {"seconds": 1.0, **evaluate_run(run, data, ranks)})
    write_report(run, data, torch.device("cpu"))
    folder = run.dir / "report"
    assert is_written(run)
    assert "baseline" not in json.loads((folder / "summary.json").read_text())
    before = {name: (folder / name).stat().st_mtime_ns for name in ("samples.png", "training.png")}
    (tmp_path / "done.json").rename(run.dir / "plain_em" / "done.json")
    assert is_evaluated(run)
    assert not is_written(run)
    write_report(run, data, torch.device("cpu"))
    assert json.loads((folder / "summary.json").read_text())["baseline"]["em"]["bpd"] == 7.5
    assert "| baseline, EM |" in (folder / "summary.md").read_text()
    after = {name: (folder / name).stat().st_mtime_ns for name in before}
    assert after["samples.png"] == before["samples.png"]  # shows the model, which stays as it is
    assert after["training.png"] > before["training.png"]


def test_table_adds_up_seconds_and_leaves_absent_figures_empty(tmp_path: Path, ranks: Ranks) -> None:
    run, data = finished_run(tmp_path)
    mark_done(run.dir / EVALUATE, {"seconds": 1.0, **evaluate_run(run, data, ranks)})
    rows = {row["model"]: row for row in table_rows(run, data.unit)}
    assert rows["distilled circuit"]["seconds"] == 11.0
    assert rows["finetuned circuit"]["seconds"] == 21.0
    assert (rows["baseline, EM"]["test"], rows["baseline, EM"]["train"]) == (7.5, None)


def test_a_model_that_is_worse_than_uniform_is_one_line(tmp_path: Path) -> None:
    run, data = finished_run(tmp_path)
    good, bad = {"val_bpd": 8.0, "test_bpd": 8.0}, {"val_bpd": 8.5, "test_bpd": 8.5}
    circuits = {"lvd_objective": bad, "distilled": good, "finetuned": good}  # the first is a bound
    mark_done(run.dir / EVALUATE, {"seconds": 1.0, "circuits": circuits})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(run, data, torch.device("cpu"))
    shutil.rmtree(run.dir / "report")
    mark_done(run.dir / EVALUATE, {"seconds": 1.0, "circuits": {**circuits, "finetuned": bad}})
    with pytest.warns(UserWarning, match="validation bpd above 8, .*: finetuned circuit 8.5000; train") as caught:
        write_report(run, data, torch.device("cpu"))
    (line,) = {str(found.message) for found in caught if "bpd" in str(found.message)}
    assert "\n" not in line
    assert "**Validation bpd above 8" in (run.dir / "report" / "summary.md").read_text()


def test_what_a_run_has_not_is_absent(tmp_path: Path) -> None:
    run, data = finished_run(tmp_path)
    empty = Run(dataclasses.replace(run.experiment, run_dir=tmp_path / "empty"))
    assert summarize(empty, data) == {"protocol": {"color": "ycocg_r", "region": "whole", "lossy": False}}


def test_lossy_and_quadrant_stand_next_to_every_figure(
    tmp_path: Path, ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = finished_run(tmp_path, color="ycbcr_lossy", region="quadrant")
    mark_done(run.dir / EVALUATE, {"seconds": 1.0, **evaluate_run(run, data, ranks)})
    write_report(run, data, torch.device("cpu"))
    rows = [line for line in (run.dir / "report/summary.md").read_text().splitlines() if "circuit |" in line]
    assert len(rows) == 2
    assert all(line.count("(lossy, quadrant)") == 3 for line in rows)
    assert capsys.readouterr().out.count("lossy") >= 3


def test_half_masks_give_half() -> None:
    masks = half_masks(4, 6, 8)
    assert masks.float().mean((1, 2, 3)).tolist() == [0.5] * 4
    assert masks[0, 0, :, :4].all()
    assert masks[1, 0, :3].all()


def test_grid_places_images_row_by_row() -> None:
    images = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 2, 2)
    canvas = grid(images, columns=2)
    assert canvas.shape == (3, 5, 5)
    assert canvas[0, :2, 3:].eq(1).all()
    assert canvas[0, 3:, :2].eq(2).all()
    assert canvas[0, 2].eq(255).all()
