"""A configuration as values of known types: what an experiment and each of its stages is told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvd_lightning.checks import check_above
from lvd_lightning.ranks import TIMEOUT_MINUTES

__all__ = ["EVALUATE", "REPORT", "ClassSettings", "ExperimentSettings", "StageSettings", "check_stage_name"]

# Folders of a run directory beside those of its stages.
EVALUATE = "evaluate"
REPORT = "report"


@dataclass(frozen=True)
class ClassSettings:
    """A class by its import path, and the arguments that an object of it is made with."""

    class_path: str
    init_args: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_value(cls, value: Any, key: str) -> ClassSettings:
        """From {class_path, init_args}, or a class path alone; ValueErrors name `key`."""
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping) or not value.get("class_path"):
            raise ValueError(f"{key}: got {value!r}, expected {{class_path: ..., init_args: {{...}}}}")
        return cls(str(value["class_path"]), dict(value.get("init_args") or {}))

    def plain(self, without: tuple[str, ...] = ()) -> dict[str, Any]:
        """The same as a mapping, without some arguments."""
        init_args = {key: value for key, value in self.init_args.items() if key not in without}
        return {"class_path": self.class_path, "init_args": init_args}


@dataclass(frozen=True)
class StageSettings:
    """One stage.

    model: its class. data: a datamodule of its own, or None for the experiment's. trainer: laid over the experiment's.
    """

    model: ClassSettings
    data: ClassSettings | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_mapping(cls, name: str, settings: Mapping[str, Any]) -> StageSettings:
        """ValueErrors name the stage."""
        check_stage_name(name)
        if not settings.get("model"):
            raise ValueError(f"stages.{name} has settings but no model: give it one, or make the stage null")
        data = settings.get("data")
        return cls(
            ClassSettings.from_value(settings["model"], f"stages.{name}.model"),
            None if not data else ClassSettings.from_value(data, f"stages.{name}.data"),
            dict(settings.get("trainer") or {}),
        )


@dataclass(frozen=True)
class ExperimentSettings:
    """An experiment.

    name, run_dir: the run's directory is `run_dir`/`name`. seed: all random numbers derive from it. shared: values that
    others refer to as ${shared.key}. data, trainer: what stages have that say nothing else. stages: by name, in order.
    checkpoint_minutes, timeout_minutes: see `Experiment`.
    """

    name: str
    run_dir: str
    seed: int
    shared: Mapping[str, Any]
    data: ClassSettings
    trainer: Mapping[str, Any]
    stages: Mapping[str, StageSettings]
    checkpoint_minutes: float | None = None
    timeout_minutes: float = TIMEOUT_MINUTES

    @classmethod
    def from_mapping(cls, config: Mapping[str, Any]) -> ExperimentSettings:
        """From a resolved configuration; stages that are null, or that nothing is said of, are left away.

        Raises:
            ValueError: there is no name, no data, no stage, or a stage without a model.
        """
        name = str(config.get("name") or "")
        if not name or Path(name).name != name or name.startswith("."):
            raise ValueError(f"name {name!r} does not name a directory: give the run one, in its config or by --name")
        stages = {
            str(stage): StageSettings.from_mapping(str(stage), settings)
            for stage, settings in (config.get("stages") or {}).items()
            if settings and any(settings.get(part) for part in ("model", "data", "trainer"))
        }
        if not stages:
            raise ValueError("the experiment has no stages: give one by --config, for example --config photos")
        minutes = {key: config[key] for key in ("checkpoint_minutes", "timeout_minutes") if key in config}
        check_above(0, **minutes)
        if not config.get("data"):
            raise ValueError(
                "the experiment has no data: give it a datamodule, as in data: {class_path: datamodules.Photos}"
            )
        return cls(
            name,
            str(config.get("run_dir") or "runs"),
            int(config.get("seed") or 0),
            dict(config.get("shared") or {}),
            ClassSettings.from_value(config["data"], "data"),
            dict(config.get("trainer") or {}),
            stages,
            **minutes,
        )


def check_stage_name(name: str) -> None:
    """Raise a ValueError if this cannot be the name of a stage: it names a folder and is part of options."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name in (EVALUATE, REPORT):
        raise ValueError(
            f"stages.{name}: a stage is named by letters, digits and underscores, beginning with a letter, and not "
            f"{EVALUATE} or {REPORT}"
        )
