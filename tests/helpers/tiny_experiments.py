"""Experiments on 8 x 8 images that take seconds, run as the command line runs them."""

from pathlib import Path

from lvd_lightning.cli import main

__all__ = ["TINY", "TINY_TEACHER", "fit"]

SMALL_TEACHER = {
    **{"hidden_size": 8, "num_layers": 1, "num_heads": 1, "intermediate_size": 8, "num_pictures": 4},
    **{"decoder_hidden_size": 8, "decoder_num_layers": 1, "decoder_num_heads": 1},
}
#: What makes its own teacher, a masked autoencoder, small.
TINY_TEACHER = [f"--stages.teacher.model.{name}={value}" for name, value in SMALL_TEACHER.items()]
#: What makes `configs/photos.yaml` small.
TINY = [
    *("--config=photos", "--shared.num_clusters=3", "--trainer.accelerator=cpu", "--trainer.devices=1"),
    *("--data.image_size=8", "--data.num_train=64", "--data.num_val=16", "--data.num_test=16", "--data.batch_size=16"),
    *(f"--stages.{name}.trainer.max_epochs=1" for name in ("teacher", "conditional", "prior", "finetune")),
    "--stages.conditional.model.num_units=2",
]


def fit(run_dir: Path, *arguments: str) -> Path:
    """Run an experiment to its end; its directory."""
    assert main(["fit", *TINY, *arguments, f"--run_dir={run_dir}"]) == 0
    return run_dir / "photos"
