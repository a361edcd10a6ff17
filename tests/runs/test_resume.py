"""A run of all real stages that is killed in each of them; run as a script, it is that run."""

import json
import signal
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from helpers.interrupting import kill_once
from helpers.processes import as_script, exit_codes
from helpers.run_content import content

STAGES = ("teacher", "latents", "conditional", "prior", "finetune", "baseline", "perceptual")
# Nothing in these but times, or, in pictures, times drawn; a page has the name of its run.
TIMES = ("spent.json", "summary.md", "summary.json", "training.png", "config.yaml", "index.html")
SMALL_TEACHER = {
    **{"hidden_size": 8, "num_layers": 1, "num_heads": 1, "intermediate_size": 8, "num_pictures": 4},
    **{"decoder_hidden_size": 8, "decoder_num_layers": 1, "decoder_num_heads": 1},
}
ARGUMENTS = [
    *("fit", "--config=photos", "--config=overlays/adversarial", "--shared.num_clusters=3"),
    *("--trainer.accelerator=cpu", "--trainer.devices=1"),
    *("--data.image_size=8", "--data.num_train=64", "--data.num_val=16", "--data.num_test=16", "--data.batch_size=16"),
    *(f"--stages.teacher.model.{name}={value}" for name, value in SMALL_TEACHER.items()),
    *("--stages.conditional.model.num_units=2", "--stages.baseline.model.num_units=2"),
    *(f"--stages.{name}.trainer.max_epochs=3" for name in STAGES if name != "latents"),
]
# The baseline measures how many steps fit into its time; here they are given.
PLAN = {"parents": [-1, *range(191)], "num_units": 2, "seconds": 1.0, "steps": {"em": 9, "anemone": 9}}


def before(module: Any, name: str, stage: str, run_dir: Path) -> None:
    """Have a function of a module kill the process when it is called."""
    function = getattr(module, name)

    def killing(*arguments: Any, **keywords: Any) -> Any:
        kill_once(run_dir, stage)
        return function(*arguments, **keywords)

    setattr(module, name, killing)


def fit(run_dir: Path) -> int:
    from lvd_lightning.cli import main
    from lvd_lightning.runs import perception, pipeline, report
    from lvd_lightning.stages import latents

    torch.set_num_threads(1)
    perception.NUM_SAMPLES = 60
    before(latents, "write_clusters", "latents", run_dir)
    before(pipeline, "evaluate_run", "evaluate", run_dir)
    before(report, "inpainting_picture", "report", run_dir)
    (run_dir / "baseline").mkdir(parents=True, exist_ok=True)
    (run_dir / "baseline" / "plan.json").write_text(json.dumps(PLAN))
    callback = "--trainer.callbacks=[{class_path: helpers.interrupting.KillInSecondEpoch}]"
    return main([*ARGUMENTS, callback, f"--name={run_dir.name}", f"--run_dir={run_dir.parent}"])


def test_run_that_is_killed_in_every_stage_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    result = as_script(__file__, str(tmp_path))
    assert result.returncode == 0, result.stderr
    codes = json.loads(result.stdout.splitlines()[-1])
    assert codes == {"killed": [-signal.SIGKILL] * 9 + [0], "whole": [0]}, result.stderr
    assert result.stdout.count("goes on after epoch 1\n") == 6
    assert len(list(tmp_path.glob("killed-*"))) == len(STAGES) + 2
    whole, killed = (
        {path.relative_to(tmp_path / name): path for path in sorted((tmp_path / name).rglob("*.*")) if path.is_file()}
        for name in ("whole", "killed")
    )
    assert list(whole) == list(killed)
    for name, path in whole.items():
        if name.name not in TIMES:
            assert content(path) == content(killed[name]), name


if __name__ == "__main__":
    # This process imports everything and computes nothing, so that the forked ones can.
    import_module("lvd_lightning.runs.pipeline")
    runs = {name: exit_codes(partial(fit, Path(sys.argv[1]) / name), most=12) for name in ("whole", "killed")}
    print(json.dumps(runs))
