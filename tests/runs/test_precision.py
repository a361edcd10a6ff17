"""Precision of the Trainer: circuits are trained in float32 or float64, and the stages may differ."""

import json
from pathlib import Path

import pytest

from lvd_lightning.cli import main, parse
from lvd_lightning.runs.configuration import experiment_from

SMALL_TEACHER = {
    **{"hidden_size": 8, "num_layers": 1, "num_heads": 1, "intermediate_size": 8, "num_pictures": 0},
    **{"decoder_hidden_size": 8, "decoder_num_layers": 1, "decoder_num_heads": 1},
}
ARGUMENTS = [
    *("fit", "--config=photos", "--shared.num_clusters=3", "--trainer.accelerator=cpu", "--trainer.devices=1"),
    *("--data.image_size=8", "--data.num_train=64", "--data.num_val=16", "--data.num_test=16", "--data.batch_size=16"),
    *(f"--stages.teacher.model.{name}={value}" for name, value in SMALL_TEACHER.items()),
    *("--stages.conditional.model.num_units=2", "--stages.baseline=null"),
    *(f"--stages.{name}.trainer.max_epochs=1" for name in ("teacher", "conditional", "prior", "finetune")),
]
CIRCUITS = ("conditional", "prior", "finetune")


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed", "16-mixed", "bf16", "16"])
def test_circuits_refuse_less_than_float32_before_any_stage(precision: str, tmp_path: Path) -> None:
    whole = [*ARGUMENTS, f"--trainer.precision={precision}"]
    message = (
        rf"^stages\.conditional\.trainer\.precision: got {precision}, but circuits are trained in 32-true or 64-true; "
        rf"to train a teacher in {precision}, set it there alone: --stages\.teacher\.trainer\.precision {precision}$"
    )
    with pytest.raises(ValueError, match=message):
        experiment_from(parse(whole)[1])
    assert main([*whole, f"--run_dir={tmp_path}"]) == 2
    assert not list(tmp_path.iterdir())
    experiment_from(parse([*ARGUMENTS, f"--stages.teacher.trainer.precision={precision}"])[1])


@pytest.mark.parametrize("stages", [("finetune",), ("prior",), CIRCUITS], ids="-".join)
def test_circuits_are_trained_in_float64(stages: tuple[str, ...], tmp_path: Path) -> None:
    words = [*ARGUMENTS, *(f"--stages.{name}.trainer.precision=64-true" for name in stages)]
    assert main([*words, "--name=run", f"--run_dir={tmp_path}"]) == 0
    assert json.loads((tmp_path / "run/report/summary.json").read_text())["test"]["bpd"] > 0


SMALL_VQVAE = {
    **{"channels": 8, "num_residual_blocks": 1, "num_features": 4, "codebook_size": 8, "num_components": 2},
    **{"prior_hidden_size": 8, "prior_num_layers": 1, "prior_num_heads": 1, "num_pictures": 0},
}
OTHER_TEACHER = [
    *(word for word in ARGUMENTS if "stages.teacher.model" not in word),
    "--stages.teacher.model.class_path=lvd_lightning.stages.VQVAETeacher",
    *(f"--stages.teacher.model.{name}={value}" for name, value in SMALL_VQVAE.items()),
]


@pytest.mark.parametrize("words", [ARGUMENTS, OTHER_TEACHER], ids=["mae", "vqvae"])
@pytest.mark.parametrize(
    "precision",
    ["--trainer.precision=64-true", "--stages.teacher.trainer.precision=bf16-true"],
    ids=["all in float64", "teacher in bfloat16"],
)
def test_teachers_take_the_type_of_their_parameters(words: list[str], precision: str, tmp_path: Path) -> None:
    assert main([*words, precision, "--name=run", f"--run_dir={tmp_path}"]) == 0
    assert json.loads((tmp_path / "run/report/summary.json").read_text())["test"]["bpd"] > 0


def test_flows_refuse_less_than_float32_before_any_stage() -> None:
    flow = [*OTHER_TEACHER[:1], "--config=photos", "--stages.teacher.model.class_path=lvd_lightning.stages.FlowTeacher"]
    experiment_from(parse([*flow, "--stages.teacher.trainer.precision=64-true"])[1])
    message = (
        r"^stages\.teacher\.trainer\.precision: got bf16-true, but flows are trained in 32-true or 64-true; set it for "
        r"this stage alone: --stages\.teacher\.trainer\.precision 32-true$"
    )
    with pytest.raises(ValueError, match=message):
        experiment_from(parse([*flow, "--stages.teacher.trainer.precision=bf16-true"])[1])
