"""What a run directory says it was made of, and how that compares with an experiment."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from lvd_lightning.context import DONE_MARKER
from lvd_lightning.files import write_atomically
from lvd_lightning.runs.checkpoint import LAST_CHECKPOINT
from lvd_lightning.runs.experiment import Experiment, PlannedStage
from lvd_lightning.runs.objects import class_of
from lvd_lightning.runs.settings import EVALUATE, REPORT
from lvd_lightning.runs.yaml_files import plain_yaml
from lvd_lightning.stages.stage import Stage

__all__ = [
    "CHANGED",
    "RUN_CONFIG",
    "adopt_run_directory",
    "check_trained_with",
    "differences",
    "forget",
    "read_config",
    "record_stage",
]

CHANGED = ("refuse", "restart", "continue")
RUN_CONFIG = "config.yaml"


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """The dotted keys at which two nested configurations differ, each with its two values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(name for name in new if name not in old)]
        missing: Any = "(absent)"
        pairs = [(f"{key}.{name}".lstrip("."), old.get(name, missing), new.get(name, missing)) for name in keys]
        return [line for name, a, b in pairs for line in differences(a, b, name)]
    return [] if old == new else [f"{key} {old} -> {new}"]


def adopt_run_directory(experiment: Experiment, changed: str = "refuse") -> None:
    """Make the run directory, or check that what it holds was made by this experiment.

    changed: what to do when a stage with a result or a checkpoint had another configuration:
        "refuse": a ValueError that names the keys;
        "restart": remove that stage and those after it, so that they start again;
        "continue": keep what there is and go on under the new configuration.
    """
    begun = [stage for stage in experiment.stages if _recorded(experiment, stage) is not None]
    found = {stage.name: differences(_recorded(experiment, stage), _plain(stage.config)) for stage in begun}
    found = {name: lines for name, lines in found.items() if lines}
    _check_order(experiment, [stage.name for stage in begun], changed)
    if found and changed == "refuse":
        lines = [f"{name}: {line}" for name, lines in found.items() for line in lines]
        shown = "; ".join(lines[:8]) + ("; ..." if len(lines) > 8 else "")
        raise ValueError(
            f"{experiment.run_dir} was begun with another configuration ({shown}): give this one another --name, or "
            f"say --changed restart to do stage {next(iter(found))!r} and those after it again, "
            "or --changed continue to keep what there is and go on"
        )
    if found and changed == "restart":
        forget(experiment, next(iter(found)))
    elif found:
        for name in found:
            record_stage(experiment, experiment.stage(name))
    experiment.run_dir.mkdir(parents=True, exist_ok=True)
    _write_config(experiment.run_dir / RUN_CONFIG, experiment.config)


def _check_order(experiment: Experiment, begun: list[str], changed: str) -> None:
    """Results must not stand on stages that came, went, moved or were removed since: as `changed` says, see above.

    Stages that leave nothing, on which no other can build, may come and go.
    """
    names = [stage.name for stage in experiment.stages if stage.kind.leaves]
    used = [name for name in begun if name in names]
    if not used:
        return
    last = used[-1]
    come = [name for name in names[: names.index(last)] if name not in used]
    before = _order_before(experiment.run_dir)
    gone = [
        name
        for name in (before[: before.index(last)] if last in before else [])
        if name not in names and (experiment.run_dir / name / DONE_MARKER).is_file()
    ]
    known = [name for name in used if name in before]
    moved = [name for name, other in zip(known, sorted(known, key=before.index)) if name != other]
    if not (come or gone or moved):
        return
    if changed == "refuse":
        what = [
            *(f"stage {name!r} has no result there" for name in come),
            *(f"stage {name!r} is not part of this one" for name in gone),
            *(f"stage {name!r} stood elsewhere" for name in moved),
        ]
        raise ValueError(
            f"{experiment.run_dir} was begun with other stages ({'; '.join(what)}), and {last!r} has a result: "
            f"give this one another --name, or say --changed restart to do {[*come, *gone, *moved][0]!r} and those "
            "after it again, or --changed continue to keep what there is and go on"
        )
    if changed == "restart":
        for name in gone:
            shutil.rmtree(experiment.run_dir / name, ignore_errors=True)
        after = [name for name in names if gone and name in before[before.index(gone[0]) :]]
        forget(experiment, min([*come, *moved, *after[:1]], key=names.index))


def _order_before(run_dir: Path) -> list[str]:
    """The names of the stages that the run directory was last begun with, in order, of those that leave something."""
    path = run_dir / RUN_CONFIG
    stages = (read_config(path).get("stages") or {}) if path.is_file() else {}
    return [name for name, settings in stages.items() if settings and _leaves_something(settings)]


def _leaves_something(settings: Mapping[str, Any]) -> bool:
    """Unless its class says that it leaves nothing: one that is not there any more may have left something."""
    try:
        return bool(class_of(settings["model"]["class_path"], Stage).leaves)
    except (ValueError, KeyError, TypeError):
        return True


def record_stage(experiment: Experiment, stage: PlannedStage) -> None:
    """Make the stage's folder and write down in it what the stage is."""
    folder = experiment.run_dir / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    _write_config(folder / RUN_CONFIG, stage.config)


def check_trained_with(experiment: Experiment, stage: str) -> None:
    """Raise a ValueError if a stage's result in the run directory is of other data or shared settings than these.

    Where the data lie and how many examples a batch has may differ.
    """
    path = experiment.run_dir / stage / RUN_CONFIG
    if not path.is_file():
        return
    recorded, config = read_config(path), _plain(experiment.stage(stage).config)
    parts = [
        line
        for key in ("seed", "data")
        for line in differences(recorded.get(key), config.get(key), key)
        if not line.startswith(("data.init_args.path ", "data.init_args.batch_size "))
    ]
    if parts:
        raise ValueError(
            f"{experiment.run_dir} was trained with other settings ({'; '.join(parts[:8])}): give the same as then, or "
            f"--run {experiment.run_dir} in place of a --config"
        )


def read_config(path: Path) -> dict[str, Any]:
    """A configuration as it was written into a run directory."""
    try:
        plain_yaml(path)
        found = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, ValueError, OSError) as error:  # OmegaConf has an OSError for a file of one word
        raise ValueError(
            f"{path}: is no configuration ({error}): put back the one that the run was made with, or begin another run"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no configuration")
    return {str(key): value for key, value in found.items()}


def _recorded(experiment: Experiment, stage: PlannedStage) -> Any:
    """The configuration of a stage that has something to lose, a result or a checkpoint; else None."""
    folder = experiment.run_dir / stage.name
    worth_keeping = any((folder / name).is_file() for name in (DONE_MARKER, LAST_CHECKPOINT))
    path = folder / RUN_CONFIG
    return read_config(path) if worth_keeping and path.is_file() else None


def _write_config(path: Path, config: Mapping[str, Any]) -> None:
    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(_plain(config))))


def forget(experiment: Experiment, first: str | None = None, only: tuple[str, ...] = ()) -> None:
    """Remove a stage's folder and what stands on it, the last first; or the folders `only`."""
    names = [stage.name for stage in experiment.stages]
    later = [] if first is None else [*reversed(names[names.index(first) :]), EVALUATE, REPORT]
    for name in (*later, *only):
        shutil.rmtree(experiment.run_dir / name, ignore_errors=True)


def _plain(config: Any) -> Any:
    """The same values as YAML gives them back: lists for tuples, dicts for mappings."""
    if isinstance(config, Mapping):
        return {str(key): _plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [_plain(value) for value in config]
    return config
