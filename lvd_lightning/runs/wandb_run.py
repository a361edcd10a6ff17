"""Weights & Biases: one run per experiment, in which the names of stages are prefixes; it goes on when the run does."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from lvd_lightning.files import read_json, write_json

__all__ = ["STATE", "StageLogger", "WandbRun"]

STATE = "wandb.json"
# Numbers of steps are taken by so many at a time, so that the file that remembers them is seldom written.
_RESERVED = 1000


class WandbRun:
    """The W&B run of an experiment, opened when something is first logged to it. Of a job, the first rank's alone.

    `wandb.json` in the run directory has its id and how far its steps are, so that a later process adds to it. Offline
    each process leaves a folder `wandb/offline-run-*-ID`; `wandb sync` puts those of one id together. A process that
    was killed logs again what it had logged since its last checkpoint: the same values at the same steps of the stage.

    Args:
        run_dir: the run's directory.
        settings: arguments of Lightning's WandbLogger, and of `wandb.init`, as the config has them; `log_model` stands
            for an artifact with the best checkpoint of every stage.
        config: the resolved configuration.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, run_dir: Path, settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        if find_spec("wandb") is None:
            raise ImportError("trainer.logger is a WandbLogger, but wandb is not installed: pip install wandb")
        self.run_dir = run_dir
        self.settings = dict(settings)
        self.config = config
        self.keeps_models = bool(self.settings.pop("log_model", False))
        self._run: Any = None
        self._step = self._reserved = 0
        self._state: dict[str, Any] = {}
        self._defined: set[str] = set()

    @property
    def run(self) -> Any:
        """What `wandb.init` gives."""
        if self._run is None:
            import wandb

            self._state = _read_state(self.run_dir / STATE)
            if not self._state:
                self._state = {"id": self._given("id") or secrets.token_hex(4), "step": 0}
                write_json(self.run_dir / STATE, self._state)
            self._run = wandb.init(
                **{
                    "name": self.run_dir.name,
                    "project": os.environ.get("WANDB_PROJECT", "lvd-lightning"),
                    "resume": "allow",
                    **{key: value for key, value in self.settings.items() if key not in _OF_THE_LOGGER},
                },
                id=self._state["id"],
                dir=str(self.run_dir),
                mode=_mode(self.settings.get("offline")),
                config=dict(self.config),
            )
            self._step = self._reserved = max(int(self._state["step"]), int(self._run.step))
        return self._run

    def log(self, values: Mapping[str, Any]) -> None:
        """One row of the history."""
        run = self.run
        if self._step >= self._reserved:
            self._reserved = self._step + _RESERVED
            self._remember(step=self._reserved)
        run.log(dict(values), step=self._step)
        self._step += 1

    def log_stage(self, stage: str, values: Mapping[str, Any], step: int) -> None:
        """Values of a stage, named `STAGE/...`, over `STAGE/step`: its own optimizer steps."""
        if stage not in self._defined:
            self.run.define_metric(f"{stage}/step")
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._defined.add(stage)
        self.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in values.items()}})

    def finish_stage(self, stage: str, figures: Mapping[str, Any], best: Path) -> None:
        """A stage's figures, in the summary under its name, and its best checkpoint if models are kept."""
        import wandb

        self.run.summary.update({f"{stage}/{name}": value for name, value in figures.items()})
        if self.keeps_models and best.is_file():
            artifact = wandb.Artifact(f"{self.run_dir.name}-{stage}", type="model", metadata=dict(figures))
            artifact.add_file(str(best), name=best.name, policy="immutable")  # of a finished stage it stays as it is
            self.run.log_artifact(artifact, aliases=["best"])

    def log_report(
        self,
        stages: Sequence[str],
        figures: Mapping[str, Any],
        columns: Sequence[str],
        rows: list[list[Any]],
        folder: Path,
    ) -> None:
        """The final table, the pictures of the report, and figures for the summary; once for these stages."""
        if _read_state(self.run_dir / STATE).get("reported") == list(stages):
            return
        import wandb

        pictures = {f"report/{path.stem}": wandb.Image(str(path)) for path in sorted(folder.glob("*.png"))}
        self.log({"report/table": wandb.Table(columns=[*columns], data=rows), **pictures})
        self.run.summary.update(figures)
        self._remember(reported=list(stages))

    def finish(self, exit_code: int) -> None:
        """Close the run, if it was opened; another exit code than 0 says that it did not come to its end."""
        if self._run is not None:
            self._remember(step=self._step)
            self._run.finish(exit_code=exit_code)
            self._run = None
            self._defined.clear()

    def _given(self, name: str) -> str | None:
        found = self.settings.get(name) or self.settings.get("version")
        return None if found is None else _checked_id(str(found), "trainer.logger")

    def _remember(self, **values: Any) -> None:
        self._state |= values
        write_json(self.run_dir / STATE, self._state)


class StageLogger(WandbLogger):
    """What a stage's Trainer logs to, and where its pictures go: names begin with the stage's, steps are its own."""

    def __init__(self, run: WandbRun, stage: str) -> None:
        super().__init__(save_dir=run.run_dir)
        self._of_experiment = run
        self._stage = stage
        self._last_step = 0

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> Any:
        return self._of_experiment.run

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """The run's config has those of all stages."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self._last_step = self._last_step if step is None else step
        self._of_experiment.log_stage(self._stage, metrics, self._last_step)


# Arguments of Lightning's logger that `wandb.init` has not, or that are decided here.
_OF_THE_LOGGER = (
    *("offline", "version", "id", "save_dir", "dir", "experiment", "prefix", "checkpoint_name", "add_file_policy"),
    *("anonymous", "config", "mode"),
)


def _mode(offline: Any) -> Literal["online", "offline"] | None:
    """Offline unless there is an account or the environment says what to do; None leaves it to the environment."""
    if offline is not None:
        return "offline" if offline else "online"
    return None if "WANDB_MODE" in os.environ else "online" if "WANDB_API_KEY" in os.environ else "offline"


def _read_state(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        raise ValueError(f'{path}: expected {{"id": ..., "step": ...}}: remove it, and a new W&B run begins')
    _checked_id(found.get("id"), str(path))
    return found


def _checked_id(found: Any, where: str) -> str:
    """An id becomes the name of a folder and part of an address."""
    if not isinstance(found, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", found):
        raise ValueError(f"{where}: got W&B id {found!r}, expected 1 to 64 letters, digits, '-' and '_'")
    return found
