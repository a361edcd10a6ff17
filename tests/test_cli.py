"""Tests of the command line: configs, references, overlays, overrides, errors, and a small run."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import lvd_lightning.circuits as pc
from lvd_lightning import Run
from lvd_lightning.cli import CONFIG_FOLDER, find_config, main, one_line, parse
from lvd_lightning.runs.configuration import experiment_from
from lvd_lightning.runs.lock import locked
from lvd_lightning.runs.objects import merge
from lvd_lightning.runs.shared_values import check_shared, references

BASE = """
name: base
shared: {patch_size: 4, num_clusters: 5, color: ycocg_r, region: whole}
data:
  class_path: datamodules.Arrays
  init_args:
    {path: images.npy, image_size: 8, color: "${shared.color}", seed: "${seed}", batch_size: 16,
     patch_size: "${shared.patch_size}"}
trainer: {accelerator: cpu, max_epochs: 7, limit_val_batches: 3}
stages:
  teacher:
    model:
      class_path: lvd_lightning.stages.MAETeacher
      init_args: {hidden_size: 16, num_layers: 1, num_heads: 2, decoder_hidden_size: 16, decoder_num_layers: 1,
                  decoder_num_heads: 2, num_pictures: 0}
    trainer: {max_epochs: 1}
  latents:
    model: {class_path: lvd_lightning.stages.Latents, init_args: {num_clusters: "${shared.num_clusters}", pooled: true}}
"""


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A working directory with a config of two stages and data for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    np.save("images.npy", np.random.default_rng(0).integers(0, 256, (60, 3, 8, 8), dtype=np.uint8))
    yield "base.yaml"
    torch.set_num_threads(threads)


def resolved(*arguments: str) -> dict[str, Any]:
    return parse(["fit", *arguments])[1]


class TestConfig:
    def test_bare_name_is_found_from_any_directory(self, base: str) -> None:
        assert find_config("photos") == find_config("photos.yaml") == CONFIG_FOLDER / "photos.yaml"
        assert find_config("overlays/untied") == CONFIG_FOLDER / "overlays" / "untied.yaml"
        assert find_config(base) == Path(base)

    def test_unknown_name_lists_the_known_ones(self, base: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["fit", "--config", "imagenet33"]) == 2
        error = capsys.readouterr().err
        assert "there is no config 'imagenet33'; configs/ has cifar10, digits, " in error
        assert all(f"{path.stem}, " in error for path in CONFIG_FOLDER.glob("*.yaml") if path.stem != "wikitext2")

    def test_override_flows_through_references(self, base: str) -> None:
        config = resolved("--config", base, "--shared.num_clusters=32", "--seed", "9", "--shared.color", "rgb")
        assert config["stages"]["latents"]["model"]["init_args"]["num_clusters"] == 32
        assert config["data"]["init_args"]["color"] == "rgb"
        assert config["data"]["init_args"]["seed"] == 9

    def test_overrides_have_the_types_of_yaml(self, base: str) -> None:
        config = resolved(
            "--config", base, "--stages.teacher.trainer.max_epochs=2", "--stages.latents.model.pooled=false"
        )
        assert config["stages"]["teacher"]["trainer"] == {"max_epochs": 2}
        assert config["stages"]["latents"]["model"]["init_args"]["pooled"] is False

    def test_overlay_changes_what_it_names_and_nothing_else(self, base: str) -> None:
        Path("over.yaml").write_text(
            "shared: {num_clusters: 3}\ntrainer: {max_epochs: 4}\n"
            "stages: {teacher: {model: {init_args: {num_layers: 2}}}, latents: {model: {init_args: {iterations: 2}}}}\n"
        )
        before, after = resolved("--config", base), resolved("--config", base, "--config", "over.yaml")
        assert after["shared"] == {**before["shared"], "num_clusters": 3}
        assert after["trainer"] == {**before["trainer"], "max_epochs": 4}
        latents = before["stages"]["latents"]
        latents["model"]["init_args"] |= {"num_clusters": 3, "iterations": 2}
        assert after["stages"]["latents"] == latents
        teacher = before["stages"]["teacher"]
        teacher["model"]["init_args"]["num_layers"] = 2
        assert after["stages"]["teacher"] == teacher

    def test_printed_config_is_a_config(self, base: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            parse(["fit", "--config", base, "--print_config"])
        assert stop.value.code == 0
        Path("printed.yaml").write_text(capsys.readouterr().out)
        assert resolved("--config", "printed.yaml") == resolved("--config", base)

    def test_stage_can_be_left_away(self, base: str) -> None:
        Path("over.yaml").write_text("stages: {latents: null}\n")
        for words in (
            ["--config", "over.yaml"],
            ["--stages.latents", "null"],
            ["--stages.latents=null", "--stages.teacher.trainer.max_epochs=1"],
        ):
            experiment = experiment_from(resolved("--config", base, *words))
            assert [stage.name for stage in experiment.stages] == ["teacher"]

    def test_printed_config_lacks_a_dropped_stage(self, base: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            parse(["fit", "--config", base, "--print_config", "--stages.teacher", "null"])
        Path("printed.yaml").write_text(capsys.readouterr().out)
        assert list(resolved("--config", "printed.yaml")["stages"]) == ["latents"]

    def test_stages_have_any_names_in_the_order_of_the_first_config(self, base: str) -> None:
        own = BASE.replace("  teacher:", "  masked_autoencoder:").replace("  latents:", "  clusters:")
        Path("own.yaml").write_text(own)
        model = "model: {class_path: lvd_lightning.stages.ConditionalStudent}"
        Path("over.yaml").write_text(
            f"stages: {{patches: {{{model}}}, clusters: {{model: {{init_args: {{pca: 2}}}}}}}}"
        )
        config = resolved(
            *("--config", "own.yaml", "--config", "over.yaml"),
            *("--stages.patches.model.num_units=5", "--stages.masked_autoencoder.trainer.max_epochs", "4"),
        )
        assert list(config["stages"]) == ["masked_autoencoder", "clusters", "patches"]
        assert config["stages"]["clusters"]["model"]["init_args"]["pca"] == 2
        assert config["stages"]["patches"]["model"]["init_args"]["num_units"] == 5
        assert config["stages"]["masked_autoencoder"]["trainer"]["max_epochs"] == 4
        experiment = experiment_from(config)
        assert [stage.name for stage in experiment.stages] == ["masked_autoencoder", "clusters", "patches"]
        assert experiment.earlier("patches") == {"masked_autoencoder": ("features",), "clusters": ("latents",)}

    @pytest.mark.parametrize("name", ["evaluate", "report", "a.b", "two words", "1st", "a-b"])
    def test_stages_have_names_of_folders_and_options(
        self, base: str, capsys: pytest.CaptureFixture[str], name: str
    ) -> None:
        Path(base).write_text(BASE.replace("  latents:", f'  "{name}":'))
        assert main(["fit", "--config", base]) == 2
        assert f"error: stages.{name}: a stage is named by letters, digits and underscores" in capsys.readouterr().err


class TestStages:
    def test_inherit_from_the_top_level_and_not_from_each_other(self, base: str) -> None:
        text = BASE + "  another: {model: {class_path: lvd_lightning.stages.MAETeacher}}\n"
        Path(base).write_text(text)
        experiment = experiment_from(resolved("--config", base))
        teacher, another = experiment.stage("teacher"), experiment.stage("another")
        assert teacher.trainer(Path())["max_epochs"] == 1
        assert teacher.trainer(Path())["limit_val_batches"] == 3
        assert another.trainer(Path())["max_epochs"] == 7
        assert another.data is teacher.data is experiment.data

    def test_data_of_its_own(self, base: str) -> None:
        text = BASE.replace("    trainer: {max_epochs: 1}\n", "    data: {class_path: datamodules.Photos}\n")
        Path(base).write_text(text)
        experiment = experiment_from(resolved("--config", base))
        assert type(experiment.stage("teacher").data()).__name__ == "Photos"
        assert type(experiment.stage("latents").data()).__name__ == "Arrays"

    def test_callbacks_are_made_afresh(self, base: str) -> None:
        callbacks = "[{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val/loss}}]"
        experiment = experiment_from(resolved("--config", base, f"--trainer.callbacks={callbacks}"))
        first, second = (experiment.stage("teacher").trainer(Path())["callbacks"] for _ in range(2))
        assert first[0].monitor == "val/loss"
        assert first[0] is not second[0]
        record = experiment.config["trainer"]["callbacks"][0]
        assert record == {
            "class_path": "lightning.pytorch.callbacks.EarlyStopping",
            "init_args": {"monitor": "val/loss"},
        }

    def test_number_of_clusters_is_nothing_to_the_teacher(self, base: str) -> None:
        few, many = (experiment_from(resolved("--config", base, f"--shared.num_clusters={k}")) for k in (5, 6))
        assert few.stage("teacher").config == many.stage("teacher").config
        assert few.stage("latents").config != many.stage("latents").config

    def test_devices_and_workers_are_no_part_of_what_a_stage_is(self, base: str) -> None:
        here = experiment_from(resolved("--config", base))
        there = experiment_from(resolved("--config", base, "--trainer.devices=2", "--data.num_workers=3"))
        assert [stage.config for stage in here.stages] == [stage.config for stage in there.stages]


class TestGradients:
    """What a Trainer does with gradients reaches the stages that have some; EM adds up flows instead."""

    def test_of_a_whole_experiment(self) -> None:
        words = ("--trainer.gradient_clip_val=0.5", "--trainer.accumulate_grad_batches=3")
        with pytest.warns(UserWarning, match="does not apply to") as caught:
            experiment = experiment_from(resolved("--config", "photos", *words))
        said = [str(warning.message) for warning in caught if "does not apply to" in str(warning.message)]
        assert [text.removeprefix("trainer.").split(", which EM trains")[0] for text in said] == [
            "gradient_clip_val does not apply to conditional, prior, finetune, baseline",
            "accumulate_grad_batches does not apply to baseline",
        ]
        told = {stage.name: stage.trainer(Path()) for stage in experiment.stages if stage.name != "latents"}
        assert [name for name, found in told.items() if "gradient_clip_val" in found] == ["teacher"]
        steps = [name for name, found in told.items() if found.get("accumulate_grad_batches") == 3]
        assert steps == ["teacher", "conditional", "prior", "finetune"]
        plain = experiment_from(resolved("--config", "photos"))
        assert experiment.stage("baseline").config == plain.stage("baseline").config

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("conditional.trainer.gradient_clip_val=1", "cannot be set: EM has no gradients that could be clipped"),
            ("baseline.trainer.accumulate_grad_batches=2", "cannot be set: its batches are those of batch_size"),
            ("prior.trainer.accumulate_grad_batches=0", "got 0, expected a number of batches, at least 1"),
        ],
    )
    def test_of_a_stage_without_any(self, capsys: pytest.CaptureFixture[str], word: str, message: str) -> None:
        assert main(["fit", "--config", "photos", f"--stages.{word}"]) == 2
        printed = capsys.readouterr()
        assert f"error: stages.{word.split('=')[0]}" in printed.err
        assert message in printed.err
        assert "starts" not in printed.out


class TestSharedValues:
    """A misspelt shared value would be read by nothing, and the run be another one than meant."""

    @pytest.mark.parametrize("command", ["fit", "test"])
    def test_misspelt_on_the_command_line(self, base: str, capsys: pytest.CaptureFixture[str], command: str) -> None:
        assert main([command, "--config", base, "--shared.num_cluster=3"]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: shared.num_cluster (from the command line): there is no such shared value")
        assert "did you mean shared.num_clusters? known are color, num_clusters, patch_size, region" in lines[0]

    def test_misspelt_in_an_overlay(self, base: str, capsys: pytest.CaptureFixture[str]) -> None:
        Path("over.yaml").write_text("shared: {pach_size: 2}\n")
        assert main(["fit", "--config", base, "--config=over.yaml"]) == 2
        error = capsys.readouterr().err
        assert "shared.pach_size (over.yaml): there is no such shared value in base.yaml, and nothing refers" in error
        assert "did you mean shared.patch_size?" in error

    def test_without_anything_near(self, base: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["fit", "--config", base, "--shared.depth=2"]) == 2
        assert "as ${shared.depth}; known are color, num_clusters, patch_size, region" in capsys.readouterr().err

    @pytest.mark.parametrize("reference", ["${shared.layers}", "${..shared.layers}", "${shared[layers]}"])
    def test_a_new_one_that_something_refers_to(self, base: str, reference: str) -> None:
        assert references(f"a: 1\nb: x{reference}\n") == ["layers"]
        if reference.startswith("${shared"):
            model = f"{{init_args: {{num_layers: '{reference}'}}}}"
            Path("over.yaml").write_text(f"shared: {{layers: 2}}\nstages: {{teacher: {{model: {model}}}}}\n")
            config = resolved("--config", base, "--config", "over.yaml")
            assert config["stages"]["teacher"]["model"]["init_args"]["num_layers"] == 2

    def test_a_new_one_that_the_command_line_refers_to(self, base: str) -> None:
        shared, reference = {"patch_size": 4, "rounds": 2}, "--stages.latents.model.iterations=${shared.rounds}"
        check_shared(shared, [Path(base)], [reference])
        with pytest.raises(ValueError, match="shared.rounds"):
            check_shared(shared, [Path(base)], ["--shared.rounds=2"])
        for words in ([reference], reference.split("=")):
            stages = resolved("--config", base, "--shared.rounds", "2", *words, "--seed", "1")["stages"]
            assert stages["latents"]["model"]["init_args"]["iterations"] == 2

    def test_one_that_an_overlay_needs_no_longer(self, base: str) -> None:
        Path("over.yaml").write_text("stages: {latents: null}\n")
        assert (
            resolved("--config", base, "--config", "over.yaml", "--shared.num_clusters=3")["shared"]["num_clusters"]
            == 3
        )


def test_wandb_is_one_run_for_all_stages(base: str) -> None:
    config = resolved("--config", base, "--config", "overlays/wandb")
    experiment = experiment_from(config)
    assert experiment.wandb == experiment.stage("teacher").wandb == {"project": "lvd-lightning", "log_model": False}
    assert experiment.stage("teacher").trainer(Path("runs/base/teacher"))["logger"] == []
    config["stages"]["teacher"]["trainer"] = {"logger": "lightning.pytorch.loggers.WandbLogger"}
    config["stages"]["again"] = {**config["stages"]["teacher"], "trainer": {}}
    with pytest.raises(ValueError, match=r"stages\.again\.trainer\.logger: .* an experiment is one W&B run"):
        experiment_from(config)


def test_merge_drops_arguments_of_another_class() -> None:
    one = {"class_path": "A", "init_args": {"x": 1, "y": 2}}
    assert merge(one, {"init_args": {"y": 3}}) == {"class_path": "A", "init_args": {"x": 1, "y": 3}}
    assert merge(one, {"class_path": "B", "init_args": {"z": 3}}) == {"class_path": "B", "init_args": {"z": 3}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.max_epoch=3"], "the Trainer has no argument 'max_epoch'; it takes accelerator"),
        (["--stages.teacher.trainer.precision=float7"], "trainer.precision"),
        (["--stages.teacher.model.learning_rate=3"], "Option 'learning_rate' is not accepted"),
        (["--stages.teacher.model.lr=fast"], "Parser key \"lr\": Expected a <class 'float'>. Got value: fast"),
        (["--stages.student.model.lr=3"], "unrecognized arguments: --stages.student.model.lr=3"),
        (["--stages.latents.model.clusters=3"], "Option 'clusters' is not accepted"),
        (
            ["--stages.latents.model.num_clusters=0"],
            "stages.latents: num_clusters: got 0, expected a whole number of at least 1",
        ),
        (["--stages.latents.trainer.max_epochs=3"], "stages.latents.trainer cannot be set: a Latents is run without a"),
        (["--stages.teacher=3"], "--stages.teacher: got '3', expected null, which drops the stage; its parts are"),
        (["--stages.student", "null"], "--stages.student: there is no such stage; the config has teacher, latents"),
        (["--stages.teacher", "null", "--stages.teacher.trainer.max_epochs=3"], "stages.teacher has settings but no"),
        (["--trainer.fast_dev_run=true"], "trainer.fast_dev_run cannot be set: it writes no checkpoints"),
        (["--stages.teacher.trainer.devices=2"], "one job runs all stages, on the same devices; set trainer.devices"),
        (["--name=a/b"], "name 'a/b' does not name a directory"),
        (["--stage=techer"], "this experiment has no stage 'techer'; its stages are teacher, latents"),
        (["--stage=latents"], "run stage 'teacher' first"),
        (["--data.path=nowhere.npy"], "nowhere.npy"),
        (["--shared.patch_size=0"], "patch_size"),
        (
            ["--trainer.check_val_every_n_epoch=0"],
            "stages.teacher.trainer.check_val_every_n_epoch: got 0, expected more",
        ),
        (["--trainer.limit_train_batches=0"], "stages.teacher.trainer.limit_train_batches: got 0, expected more"),
        (["--shared.color=grey"], "expected one of rgb, ycocg_r, ycbcr_lossy"),
        (["--stages.latents.model.num_clusters=${shared.k}"], "Interpolation key"),
        (["--trainer.logger=lightning.pytorch.loggers.NoLogger"], "trainer.logger"),
        (["--trainer.logger.init_args.name=x"], "trainer.logger can only be given as a whole"),
        (["--changed=perhaps"], "perhaps"),
        (["--trainer.devices=-3"], "trainer.devices -3: this machine cannot give them"),
        (["--trainer.devices=many"], "set trainer.accelerator and trainer.devices to what it has"),
        pytest.param(
            ["--trainer.accelerator=gpu"],
            "this machine cannot give them (",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_mistakes_are_one_line(
    base: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["fit", "--config", base, *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "model: {class_path: lvd_lightning.stages.ConditionalStudent, init_args: {num_units: 0}}",
            "num_units: got 0",
        ),
        (
            "model: {class_path: lvd_lightning.stages.ConditionalStudent}\n"
            "    trainer: {callbacks: [{class_path: callbacks.Prune, init_args: {every_n_epochs: 0}}]}",
            "every_n_epochs: got 0",
        ),
        (
            "model: {class_path: lvd_lightning.stages.ConditionalStudent, init_args: {structure: poon_domingos,\n"
            "      structure_settings: {product: kronecker}}}\n"
            "    trainer: {callbacks: [{class_path: callbacks.GrowClusters, init_args: {target: 3}}]}",
            "GrowClusters: circuits with Kronecker products do not grow; set structure_settings.product: hadamard",
        ),
    ],
)
def test_mistakes_of_later_stages_come_before_the_first_one_runs(
    base: str, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    Path("more.yaml").write_text(f"stages:\n  conditional:\n    {setting}\n")
    assert main(["fit", "--config", base, "--config", "more.yaml"]) == 2
    assert "error: stages.conditional" in (printed := capsys.readouterr()).err
    assert message in printed.err
    assert "starts" not in printed.out
    assert not Path("runs/base/teacher").exists()


def test_mistakes_without_a_config(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        [],
        ["fit"],
        ["fit", "--config", base, "--data=null"],
        ["fit", "--name", "x"],
        ["train", "--config", base],
        ["test", "--config", base],
    ):
        assert main(arguments) == 2
        assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            "latents: {num_clusters: 5, pooled: true}",
            "stages.latents is a stage like the others now: write latents: {model: {class_path: "
            "lvd_lightning.stages.Latents, init_args: {num_clusters: 5, pooled: True}}}",
        ),
        (
            "conditional: {model: {class_path: lvd_lightning.modules.ConditionalStudent}}",
            "lvd_lightning.modules.ConditionalStudent is called lvd_lightning.stages.ConditionalStudent now",
        ),
        (
            "joint: {model: {class_path: lvd_lightning.modules.JointStudent}}",
            "lvd_lightning.modules.JointStudent is called lvd_lightning.stages.FinetuneStudent now",
        ),
        (
            "conditional: {model: {class_path: lvd_lightning.stages.ConditionalStudent, init_args: {num_latents: 4}}}",
            "stages.conditional.model.init_args.num_latents is called num_units now",
        ),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(
    base: str, capsys: pytest.CaptureFixture[str], written: str, message: str
) -> None:
    Path("old.yaml").write_text(f"stages:\n  {written}\n")
    assert main(["fit", "--config", base, "--config", "old.yaml"]) == 2
    assert capsys.readouterr().err == f"error: old.yaml: {message}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stages.latents.pooled=false"], "--stages.latents.pooled is called --stages.latents.model.pooled now"),
        (
            ["--stages.conditional.model.num_latents", "8"],
            "--stages.conditional.model.num_latents is called --stages.conditional.model.num_units now",
        ),
        (
            ["--stages.conditional.model.init_args.num_latents=8"],
            "--stages.conditional.model.init_args.num_latents is called --stages.conditional.model.num_units now",
        ),
        (
            ["--stages.finetune.model=lvd_lightning.modules.JointStudent"],
            "lvd_lightning.modules.JointStudent is called lvd_lightning.stages.FinetuneStudent now",
        ),
        (["--stages.finetune.model", "JointStudent"], "JointStudent is called FinetuneStudent now"),
    ],
)
def test_an_old_name_on_the_command_line_is_refused_with_the_new_one(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["fit", "--config", "photos", *words]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ("stages: {latents: null}", "stage 'conditional' needs latents; no stage before it leaves them"),
        ("stages: {conditional: null}", "stage 'prior' needs conditionals; no stage before it leaves them"),
        ("stages: {prior: null}", "stage 'finetune' needs prior; no stage before it leaves it"),
        ("stages: {prior: null, finetune: null}", "stage 'baseline' needs model; no stage before it leaves it"),
        (
            "stages: {teacher: null, latents: {model: {init_args: {method: codes, num_clusters: null}}}}",
            "stage 'latents' needs features; no stage before it leaves them",
        ),
    ],
)
def test_a_missing_need_is_said_before_the_first_stage(
    base: str, capsys: pytest.CaptureFixture[str], overlay: str, message: str
) -> None:
    Path("over.yaml").write_text(overlay)
    assert main(["fit", "--config", "photos", "--config", "over.yaml"]) == 2
    printed = capsys.readouterr()
    assert printed.err == f"error: {message}\n"
    assert "starts" not in printed.out


def test_one_line_keeps_what_matters() -> None:
    message = "Does not validate against any of the Union subtypes\n  Subtypes: [A, B]\n  Errors:\n    - No such x"
    assert one_line(message) == "No such x"


def test_fit_continues_and_asks_when_the_config_has_changed(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", base, "--stage", "teacher"]) == 0
    assert not Path("runs/base/latents").exists()
    assert main(["fit", "--config", base]) == 0
    assert "teacher: finished before, skipped" in capsys.readouterr().out
    summary = json.loads(Path("runs/base/report/summary.json").read_text())
    assert set(summary) == {"stages", "protocol"}
    assert list(summary["stages"]) == ["teacher", "latents"]
    assert summary["protocol"] == {"color": "ycocg_r", "region": "whole", "lossy": False}

    assert main(["fit", "--config", "runs/base/config.yaml"]) == 0
    capsys.readouterr()
    changed = ["fit", "--config", base, "--stages.latents.model.iterations=3"]
    assert main(changed) == 2
    assert "latents: model.init_args.iterations 50 -> 3" in capsys.readouterr().err
    assert main([*changed, "--changed=restart"]) == 0
    assert "teacher: finished before, skipped" in capsys.readouterr().out
    assert OmegaConf.load("runs/base/config.yaml").stages.latents.model.init_args.iterations == 3


@pytest.mark.parametrize("content", [b"{", b"\x00\x00", b"a: [", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["teacher/config.yaml", "teacher/done.json"])
def test_a_damaged_file_of_a_run_is_one_line(
    base: str, capsys: pytest.CaptureFixture[str], name: str, content: bytes
) -> None:
    for stage in ("teacher", "latents"):
        Path("runs/base", stage).mkdir(parents=True, exist_ok=True)
        Path("runs/base", stage, "done.json").write_text("{}")
    Path("runs/base", name).write_bytes(content)
    assert main(["fit", "--config", base, "--changed=continue"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    what = "is no configuration" if name.endswith(".yaml") else "cannot be read"
    assert lines[0].startswith(f"error: runs/base/{name}: {what} (")


def test_runs_from_before_ycocg_r_had_more_codes(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They say ycocg_r and hold what 256 values of every channel made, here a teacher or a circuit."""
    assert main(["fit", "--config", base, "--stage", "teacher", "--shared.color", "ycocg_r_mod256"]) == 0
    run = Path("runs/base")
    for path in run.rglob("config.yaml"):
        path.write_text(path.read_text().replace("ycocg_r_mod256", "ycocg_r"))
    (run / "latents").mkdir()
    record = run / "latents" / "config.yaml"
    record.write_text((run / "teacher" / "config.yaml").read_text())
    pc.save(pc.Circuit([pc.hclt([-1, 0], 2, pc.Categorical(256))]), run / "latents" / "conditional")
    capsys.readouterr()
    for left in ("teacher", "conditional"):
        for command in (["fit", "--config", base], ["test", "--config", base], ["test", "--run", str(run)]):
            assert main(command) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert "wrap around in bytes, which are called ycocg_r_mod256 now" in line
        with pytest.raises(ValueError, match="ycocg_r_mod256"):
            Run.open(run)
        if left == "teacher":
            (run / "teacher" / "teacher.json").unlink()
    pc.save(pc.Circuit([pc.hclt([-1, 0], 2, pc.Categorical(511))]), run / "latents" / "conditional")
    assert Run.open(run).config.stages["teacher"] is not None


def test_a_run_that_another_process_works_on(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(Path("runs/base")):
        assert main(["fit", "--config", base]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: another process is working on runs/base (process ")


def test_stages_that_come_or_go_are_noticed(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Latents of pixels are not those of a teacher that is added later, nor the other way round."""
    Path("pixels.yaml").write_text("stages: {teacher: null, latents: {model: {init_args: {context: none}}}}")
    with_teacher = ["fit", "--config", base, "--stages.latents.model.context=none"]
    without = ["fit", "--config", base, "--config", "pixels.yaml"]
    assert main(without) == 0
    assert main(with_teacher) == 2
    assert "stage 'teacher' has no result there), and 'latents' has a result" in capsys.readouterr().err
    assert main([*with_teacher, "--changed=restart"]) == 0
    assert "latents: starts" in capsys.readouterr().out
    assert main(without) == 2
    assert "stage 'teacher' is not part of this one" in capsys.readouterr().err
    assert main([*without, "--changed=restart"]) == 0
    assert "latents: starts" in capsys.readouterr().out
    assert not Path("runs/base/teacher").exists()


def test_warnings_take_one_line(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "--config", base]) == 2
    assert warnings.formatwarning("one\ntwo", UserWarning, "file.py", 3) == "UserWarning: one two\n"


def test_help_is_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", "photos", "--help"])
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= 45
    assert "lvd_lightning.stages.ConditionalStudent" in printed
    for stage in ("teacher", "latents", "conditional", "prior", "finetune", "baseline"):
        with pytest.raises(SystemExit):
            main(["fit", "--config", "photos", "--help", stage])
        printed = capsys.readouterr().out
        assert len(printed.splitlines()) <= 40
        assert max(map(len, printed.splitlines())) <= 120
        assert f"--stages.{stage}.model." in printed
    assert main(["fit", "--config", "photos", "--help", "student"]) == 2
    assert "--help student: there is no such stage; the config has teacher, latents" in capsys.readouterr().err
