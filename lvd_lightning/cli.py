"""The command line: `fit` runs an experiment, `validate` and `test` print what its trained circuit reaches."""

import os
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lvd_lightning.configuration import experiment_from, merge
from lvd_lightning.experiment import CHANGED, STAGES, Experiment
from lvd_lightning.modules.stage import StageModule

__all__ = ["CONFIG_FOLDER", "find_config", "main", "parse"]

CONFIG_FOLDER = Path(__file__).resolve().parents[1] / "configs"
_USER_ERRORS = (ArgumentError, ValueError, OSError, ImportError, MisconfigurationException, OmegaConfBaseException)
# Arguments that are plain mappings: a second --config is laid over the first key by key.
_MAPPINGS = ("shared", "trainer", "stages.latents", *(f"stages.{name}.trainer" for name in STAGES if name != "latents"))
_COMMANDS = {
    "fit": "run every stage of an experiment that is not finished, then evaluate and write the report",
    "validate": "print the bits per dimension of a finished run's circuit on the validation images",
    "test": "print the bits per dimension of a finished run's circuit on the test images",
}

# `parser_mode="omegaconf"` leaves references behind when the value they point to is changed on the command line.
set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


class ConfigFile(ActionConfigFile):
    """`--config`: a path, or the name of a file in configs/ from any working directory; a later one is an overlay.

    The name is looked up here and not in `sys.argv`, which the processes of a distributed run read again.
    """

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        before = {key: cfg.get(key) for key in _MAPPINGS}
        super().__call__(parser, cfg, str(find_config(values)), option_string)
        for key, value in before.items():
            if isinstance(value, Mapping) and isinstance(cfg.get(key), Mapping):
                cfg[key] = merge(value, cfg[key])


def find_config(name: str) -> Path:
    """The file that `--config name` means: a path as it is, else a file in configs/, with or without .yaml.

    Raises:
        TypeError: there is none (jsonargparse makes it a message about the argument).
    """
    candidates = (Path(name), CONFIG_FOLDER / name, CONFIG_FOLDER / f"{name}.yaml")
    for path in candidates:
        if path.is_file():
            return path
    known = sorted(str(path.relative_to(CONFIG_FOLDER).with_suffix("")) for path in CONFIG_FOLDER.rglob("*.yaml"))
    raise TypeError(f"there is no config {name!r}; configs/ has {', '.join(known)}")


def parse(arguments: Sequence[str] | None = None) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The command, the resolved configuration of the experiment, and the options that are not part of it."""
    parser = ArgumentParser(parser_mode="omegaconf+", exit_on_error=False, description=__doc__, prog="train.py")
    commands = parser.add_subcommands(dest="command")
    for name, text in _COMMANDS.items():
        commands.add_subcommand(name, _command_parser(name, text), help=text)
    parsed = parser.parse_args(arguments)
    command = parsed.command
    chosen: Namespace = parsed[command]
    options = {key: chosen.pop(key) for key in ("stage", "changed") if key in chosen}
    chosen.pop("config", None)
    dumped = _command_parser(command, "").dump(chosen, skip_validation=True)
    config = OmegaConf.to_container(OmegaConf.create(dumped))
    assert isinstance(config, dict)
    return command, {str(key): value for key, value in config.items()}, options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake is one line and exit code 2."""
    experiment: Experiment | None = None
    try:
        command, config, options = parse(arguments)
        experiment = experiment_from(config)
        _run(command, experiment, **options)
    except _USER_ERRORS as error:
        if getattr(rank_zero_only, "rank", 0) == 0:
            kept = _keep_traceback(experiment)
            print(f"error: {' '.join(str(error).split())}{kept}", file=sys.stderr)
        return 2
    return 0


def _run(command: str, experiment: Experiment, stage: str | None = None, changed: str = "refuse") -> None:
    from lvd_lightning.pipeline import Pipeline
    from lvd_lightning.ranks import Ranks

    ranks = Ranks(experiment.devices)
    pipeline = Pipeline(experiment, ranks)
    if command == "fit":
        pipeline.run(only=stage, changed=changed)
    else:
        pipeline.print_bpd("val" if command == "validate" else "test")
    ranks.close()


def _command_parser(command: str, text: str) -> ArgumentParser:
    parser = ArgumentParser(parser_mode="omegaconf+", exit_on_error=False, description=text)
    parser.add_argument("--config", action=ConfigFile, help="a file or a name in configs/; a second one is an overlay")
    parser.add_argument("--name", type=str | None, help="the run's directory in run_dir")
    parser.add_argument("--run_dir", type=str, default="runs", help="where runs are kept")
    parser.add_argument("--seed", type=int, default=0, help="all random numbers derive from it")
    parser.add_argument(
        "--shared", type=dict[str, Any], default={}, help="values that stages refer to as ${shared.key}"
    )
    parser.add_subclass_arguments(LightningDataModule, "data", fail_untyped=False, required=False)
    parser.add_argument("--trainer", type=dict[str, Any], default={}, help="arguments of every stage's Trainer")
    for name in STAGES:
        if name == "latents":
            parser.add_argument("--stages.latents", type=dict[str, Any] | None, help="settings of the clustering")
            continue
        parser.add_subclass_arguments(StageModule, f"stages.{name}.model", fail_untyped=False, required=False)
        parser.add_subclass_arguments(LightningDataModule, f"stages.{name}.data", fail_untyped=False, required=False)
        parser.add_argument(
            f"--stages.{name}.trainer", type=dict[str, Any], default={}, help=f"laid over trainer for {name}"
        )
    if command == "fit":
        parser.add_argument("--stage", type=str | None, help="run this stage alone")
        parser.add_argument(
            "--changed",
            choices=CHANGED,
            default=CHANGED[0],
            help="what to do when the run was begun with another config",
        )
    return parser


def _keep_traceback(experiment: Experiment | None) -> str:
    """Leave the details in the run directory, if there is one: the message names the mistake, not the way to it."""
    if experiment is None or not experiment.run_dir.is_dir():
        return ""
    path = experiment.run_dir / "error.txt"
    try:
        path.write_text(traceback.format_exc())
    except OSError:
        return ""
    return f" (details: {os.path.relpath(path)})"
