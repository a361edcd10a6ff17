"""What a stage's folder says of the data: which examples its results are of, and what of them was left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lvd_lightning.files import read_json, write_json
from lvd_lightning.runs.experiment import Experiment
from lvd_lightning.runs.run_directory import forget
from lvd_lightning.runs.settings import EVALUATE, REPORT

__all__ = ["DATA_RECORD", "adopt_data", "check_same_data", "left_out", "record_data", "stages_with_data"]

DATA_RECORD = "data.json"


def record_data(folder: Path, data: Any) -> None:
    """Write down in a stage's folder what data it works on.

    data: a datamodule. Its `identity`, a digest per split, says which examples have which numbers; without one nothing
    is recorded. Its `left_out` says how many files were not used, by reason.
    """
    identity = getattr(data, "identity", None)
    if identity is not None:
        content = {"identity": dict(identity), "left_out": dict(getattr(data, "left_out", {}))}
        write_json(folder / DATA_RECORD, content, indent=2)


def stages_with_data(experiment: Experiment) -> list[str]:
    """The names of the stages whose folders say what data they were begun with."""
    return [stage.name for stage in experiment.stages if (experiment.run_dir / stage.name / DATA_RECORD).is_file()]


def adopt_data(experiment: Experiment, data: Mapping[str, Any], changed: str = "refuse") -> None:
    """Check that stages go on with the data that they were begun with: what they keep goes by the numbers of examples.

    data: the datamodules of `stages_with_data`.
    changed: "refuse", "restart" or "continue", as in `adopt_run_directory`. Figures of examples are told anew in any
        case.
    """
    found = {name: _others(experiment.run_dir / name, datamodule) for name, datamodule in data.items()}
    found = {name: splits for name, splits in found.items() if splits}
    if not found:
        return
    first = next(iter(found))
    if changed == "refuse":
        raise ValueError(
            f"{experiment.run_dir} was begun with other data ({first}: {_told(found[first])}): give this one another "
            f"--name, or say --changed restart to do stage {first!r} and those after it again, or --changed continue "
            "to keep what there is and go on"
        )
    if changed == "restart":
        forget(experiment, first)
        return
    for name in found:
        record_data(experiment.run_dir / name, data[name])
    forget(experiment, only=(EVALUATE, REPORT))


def check_same_data(experiment: Experiment, stage: str, data: Any) -> None:
    """Raise a ValueError if a stage's result is of other data than these, wherever they lie."""
    splits = _others(experiment.run_dir / stage, data)
    if splits:
        raise ValueError(
            f"{experiment.run_dir} was trained with other data ({stage}: {_told(splits)}): give the same as then"
        )


def left_out(run_dir: Path, stages: list[str]) -> dict[str, int]:
    """How many files were not used, by reason, as the first stage that says so has it; nothing without one."""
    for name in stages:
        path = run_dir / name / DATA_RECORD
        if path.is_file():
            return dict(read_json(path)["left_out"])
    return {}


def _others(folder: Path, data: Any) -> list[str]:
    """The splits whose examples are others than those recorded in a stage's folder."""
    path, identity = folder / DATA_RECORD, getattr(data, "identity", None)
    if identity is None or not path.is_file():
        return []
    recorded = read_json(path)["identity"]
    return [split for split in recorded if recorded[split] != identity.get(split)]


def _told(splits: list[str]) -> str:
    return f"the examples of {', '.join(splits)} are others, have other names or come in another order"
