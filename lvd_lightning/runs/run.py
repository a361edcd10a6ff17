"""A run directory, opened: its configuration, its data, what its stages left."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lvd_lightning.context import DONE_MARKER
from lvd_lightning.files import read_json
from lvd_lightning.runs.configuration import experiment_from
from lvd_lightning.runs.experiment import Experiment
from lvd_lightning.runs.old_codes import check_codes
from lvd_lightning.runs.run_directory import RUN_CONFIG, read_config
from lvd_lightning.runs.settings import EVALUATE, REPORT, ExperimentSettings
from lvd_lightning.stages.stage import Stage

__all__ = ["Run", "RunStage"]


@dataclass(frozen=True)
class RunStage:
    """A stage of a run: its name, its folder, and its class, which says what it leaves there."""

    name: str
    folder: Path
    kind: type[Stage]

    @property
    def is_finished(self) -> bool:
        return (self.folder / DONE_MARKER).is_file()

    @property
    def title(self) -> str:
        """What reports call the model that it left."""
        return self.kind.model_title or self.name

    def figures(self) -> dict[str, Any]:
        """The figures that it left for the report, its seconds among them; none until it is finished."""
        return read_figures(self.folder)

    def baselines(self) -> dict[str, dict[str, Any]]:
        """The figures of models that it trained for comparison, by name; mostly none."""
        path = self.folder / "baseline.json"
        return dict(read_json(path)) if self.is_finished and path.is_file() else {}

    def references(self) -> dict[str, dict[str, Any]]:
        """The figures of models of another kind, which the run's have to be compared with, by name; mostly none."""
        path = self.folder / "reference.json"
        return dict(read_json(path)) if self.is_finished and path.is_file() else {}

    def model(self, device: torch.device | str = "cpu") -> nn.Module:
        """The model that it left, for evaluation.

        Raises:
            ValueError: it leaves none, or is not finished.
        """
        if "model" not in self.kind.leaves:
            raise ValueError(f"stage {self.name!r}: a {self.kind.__name__} leaves no model")
        if not self.is_finished:
            raise ValueError(f"stage {self.name!r}: {self.folder} is not finished: run it first")
        return self.kind.load_model(self.folder).to(device).eval()


@dataclass(frozen=True)
class Run:
    """What a run directory holds, by way of the experiment that made it.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from lvd_lightning import Run
        >>> config = '''
        ... name: mine
        ... data: {class_path: datamodules.Photos}
        ... stages: {latents: {model: {class_path: lvd_lightning.stages.Latents, init_args: {num_clusters: 8}}}}
        ... '''
        >>> with TemporaryDirectory() as folder:  # a run that was begun and has no result yet
        ...     _ = (Path(folder) / "config.yaml").write_text(config)
        ...     run = Run.open(folder)
        >>> [stage.name for stage in run.stages], run.figures()
        (['latents'], {'stages': {}})

    Of a finished run there are `run.model().log_prob(run.data().batch("test", torch.arange(4)))` and more, see
    docs/stages.md.
    """

    experiment: Experiment

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """The run in a directory, finished or not, which may have been moved.

        Raises:
            ValueError: the directory is none of a run, or of one with codes that are called otherwise now.
        """
        folder = Path(path).resolve()
        config = folder / RUN_CONFIG
        if not config.is_file():
            raise ValueError(f"{path} is no run directory: it holds no {RUN_CONFIG}")
        found = experiment_from({**read_config(config), "name": folder.name, "run_dir": str(folder.parent)})
        check_codes(found)
        return cls(found)

    @property
    def dir(self) -> Path:
        return self.experiment.run_dir

    @property
    def config(self) -> ExperimentSettings:
        """What it was told."""
        return ExperimentSettings.from_mapping(self.experiment.config)

    @property
    def stages(self) -> tuple[RunStage, ...]:
        """All stages in order, finished or not."""
        return tuple(RunStage(stage.name, self.dir / stage.name, stage.kind) for stage in self.experiment.stages)

    def stage(self, name: str) -> RunStage:
        """The stage of this name; a ValueError names those that there are."""
        self.experiment.stage(name)
        return next(stage for stage in self.stages if stage.name == name)

    def leaving(self, kind: str) -> list[RunStage]:
        """The finished stages that left an artefact of a kind, in order."""
        return [stage for stage in self.stages if kind in stage.kind.leaves and stage.is_finished]

    def artefact(self, kind: str) -> Path | None:
        """The folder of the last finished stage that left an artefact of a kind, or None."""
        found = self.leaving(kind)
        return found[-1].folder if found else None

    def data(self) -> Any:
        """The datamodule, set up."""
        data = self.experiment.data()
        data.prepare_data()
        data.setup("fit")
        return data

    def model(self, device: torch.device | str = "cpu") -> nn.Module:
        """The model of the last finished stage that left one.

        Raises:
            ValueError: there is none.
        """
        return self.final_stage().model(device)

    def final_stage(self) -> RunStage:
        """The last finished stage that left a model; a ValueError without one."""
        found = self.leaving("model")
        if not found:
            raise ValueError(
                f"{self.dir} holds no trained model: `train.py fit --run {self.dir}` goes on until it does"
            )
        return found[-1]

    def figures(self) -> dict[str, Any]:
        """What report/summary.json says; before there is a report, the figures of finished stages."""
        path = self.dir / REPORT / "summary.json"
        if path.is_file():
            return dict(read_json(path))
        return {"stages": self.stage_figures()}

    def stage_figures(self) -> dict[str, dict[str, Any]]:
        """The figures of the finished stages, in order."""
        return {stage.name: stage.figures() for stage in self.stages if stage.is_finished}

    def evaluation(self) -> dict[str, Any]:
        """What `evaluate_run` found; nothing before that."""
        return read_figures(self.dir / EVALUATE)

    def baselines(self) -> dict[str, Any]:
        """The figures of models for comparison by name; if several stages trained some, by the stage's name as well."""
        found = {stage.name: stage.baselines() for stage in self.stages if stage.baselines()}
        if len(found) == 1:
            return next(iter(found.values()))
        return {f"{stage} {name}": figures for stage, models in found.items() for name, figures in models.items()}

    def references(self) -> dict[str, Any]:
        """The figures of models of another kind by name, of all stages that have some."""
        return {name: figures for stage in self.stages for name, figures in stage.references().items()}


def read_figures(folder: Path) -> dict[str, Any]:
    """What the done-marker of a folder says; nothing without one."""
    path = folder / DONE_MARKER
    return dict(read_json(path)) if path.is_file() else {}
