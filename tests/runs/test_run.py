"""A finished run, opened by its directory: what it was told, its data, its model, its figures."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lvd_lightning import Run
from lvd_lightning.cli import main
from lvd_lightning.models.assembled import AssembledCircuit

# Names of the user's own, and stages of no importance but that they leave a model and what comes before it.
CONFIG = """
name: own
shared: {patch_size: 4, num_clusters: 2}
data:
  class_path: datamodules.Photos
  init_args: {image_size: 8, num_train: 24, num_val: 8, num_test: 8, batch_size: 12}
trainer: {accelerator: cpu, devices: 1, max_epochs: 1, enable_progress_bar: false}
stages:
  clusters: {model: {class_path: lvd_lightning.stages.Latents, init_args: {num_clusters: "${shared.num_clusters}"}}}
  patches: {model: {class_path: lvd_lightning.stages.ConditionalStudent, init_args: {num_units: 2}}}
  joint: {model: {class_path: lvd_lightning.stages.PriorStudent, init_args: {candidates: 2}}}
  plain_em: {model: {class_path: lvd_lightning.stages.CircuitBaseline, init_args: {num_units: 1, seconds: 0.01}}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of a finished run, moved after it was made."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    (folder / "own.yaml").write_text(CONFIG)
    assert main(["fit", "--config", str(folder / "own.yaml"), f"--run_dir={folder}"]) == 0
    (folder / "elsewhere").mkdir()
    (folder / "own").rename(folder / "elsewhere" / "moved")
    yield folder / "elsewhere" / "moved"
    torch.set_num_threads(threads)


def test_an_opened_run_has_what_its_stages_left(finished: Path) -> None:
    run = Run.open(finished)
    assert run.dir == finished
    assert run.config.shared == {"patch_size": 4, "num_clusters": 2}
    assert run.config.stages["patches"].model.init_args["num_units"] == 2
    data = run.data()
    images = data.batch("test", torch.arange(8))
    model = run.model()
    assert isinstance(model, AssembledCircuit)
    assert torch.equal(model.log_prob(images), run.stage("joint").model().log_prob(images))
    bpd = -model.log_prob(images).double().mean().item() / (192 * 0.6931471805599453)
    assert run.figures()["test"]["bpd"] == pytest.approx(bpd, rel=1e-5)
    assert list(run.figures()["stages"]) == ["clusters", "patches", "joint", "plain_em"]
    assert set(run.figures()["baseline"]) == {"em", "anemone"}
    assert run.stage("clusters").figures()["num_clusters"] == 2
    assert run.artefact("latents") == finished / "clusters"
    assert run.artefact("features") is None


def test_what_a_run_has_not_is_said(finished: Path, tmp_path: Path) -> None:
    run = Run.open(finished)
    with pytest.raises(ValueError, match="has no stage 'prior'; its stages are clusters, patches, joint, plain_em"):
        run.stage("prior")
    with pytest.raises(ValueError, match="stage 'plain_em': a CircuitBaseline leaves no model"):
        run.stage("plain_em").model()
    with pytest.raises(ValueError, match="is no run directory: it holds no config.yaml"):
        Run.open(tmp_path)
    shutil.copytree(finished, tmp_path / "begun")
    (tmp_path / "begun" / "joint" / "done.json").unlink()
    shutil.rmtree(tmp_path / "begun" / "report")
    begun = Run.open(tmp_path / "begun")
    with pytest.raises(ValueError, match="holds no trained model"):
        begun.model()
    with pytest.raises(ValueError, match="stage 'joint': .* is not finished"):
        begun.stage("joint").model()
    assert list(begun.figures()["stages"]) == ["clusters", "patches", "plain_em"]


@pytest.mark.parametrize(("command", "key"), [("validate", "val_bpd"), ("test", "test_bpd")])
def test_a_run_is_used_without_its_config(
    finished: Path, capsys: pytest.CaptureFixture[str], command: str, key: str
) -> None:
    expected = json.loads((finished / "evaluate" / "done.json").read_text())["circuits"]["distilled"][key]
    assert main([command, f"--run={finished}"]) == 0
    printed = capsys.readouterr().out
    assert f"/bpd {expected:.4f}  ({finished / 'joint'}, 8 examples" in printed


def test_a_run_is_used_on_other_data_only_if_it_was_trained_on_them(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["test", "--run", str(finished), "--data.num_test=4"]) == 2
    assert "was trained with other settings (data.init_args.num_test 8 -> 4)" in capsys.readouterr().err


def test_what_trainers_are_told_of_gradients_reaches_stages_that_have_some(finished: Path, tmp_path: Path) -> None:
    words = ["fit", f"--config={finished / 'config.yaml'}", f"--run_dir={tmp_path}", "--data.batch_size=6"]
    every = ["--trainer.gradient_clip_val=1", "--trainer.accumulate_grad_batches=2"]
    with pytest.warns(UserWarning, match="gradient_clip_val does not apply to patches, joint, plain_em"):
        assert main([*words, *every, "--name=halved"]) == 0
    checkpoint = torch.load(tmp_path / "halved" / "patches" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2  # of four batches


def test_the_report_does_not_wait_for_stages_that_leave_nothing(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interrupted baseline keeps the table and the pictures of the circuit; its end completes them."""
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)
    for name in ("evaluate", "report", "plain_em"):
        shutil.rmtree(folder / name)
    words = ["fit", f"--config={finished / 'config.yaml'}", f"--run_dir={tmp_path}", "--name=again"]
    assert main([*words, "--stages.plain_em.model.batch_size=0"]) == 2  # nothing is begun with a mistake
    assert not (folder / "report").exists()
    assert main([*words, "--stages.plain_em.trainer.callbacks=[{class_path: helpers.interrupting.Interrupt}]"]) == 130
    printed = capsys.readouterr().out
    assert printed.index("report: ") < printed.index("plain_em: starts")
    summary = json.loads((folder / "report" / "summary.json").read_text())
    assert 0 < summary["test"]["bpd"] < 20
    assert "baseline" not in summary
    samples = (folder / "report" / "samples.png").stat().st_mtime_ns
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "evaluate:" not in printed
    assert printed.count("report: ") == 1
    assert set(json.loads((folder / "report" / "summary.json").read_text())["baseline"]) == {"em", "anemone"}
    assert (folder / "report" / "samples.png").stat().st_mtime_ns == samples
    assert main(["fit", f"--run={folder}"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("finished before, skipped") == 4
    assert "report: " in printed
