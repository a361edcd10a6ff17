"""The command line: `fit` runs an experiment, `validate` and `test` print what its trained circuit reaches."""

import argparse
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lvd_lightning.runs.configuration import experiment_from, merge
from lvd_lightning.runs.experiment import CHANGED, STAGES, Experiment
from lvd_lightning.runs.shared_values import check_shared
from lvd_lightning.stages.stage import StageModule

__all__ = ["CONFIG_FOLDER", "find_config", "main", "one_line", "parse", "run"]

CONFIG_FOLDER = Path(__file__).resolve().parents[1] / "configs"
_USER_ERRORS = (ArgumentError, ValueError, OSError, ImportError, MisconfigurationException, OmegaConfBaseException)
# Not Any, for which jsonargparse takes every class_path for one to resolve, and fills in all its defaults.
_Plain = bool | int | float | str | list | dict | None
# Arguments that are plain mappings: a second --config is laid over the first key by key.
_MAPPINGS = ("shared", "trainer", "stages.latents", *(f"stages.{name}.trainer" for name in STAGES if name != "latents"))
_EMPTY: dict[str, Any] = {"trainer": {}}  # what the parser makes of a stage that no config mentions
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
    """The command, the resolved configuration of the experiment, and the options that are not part of it.

    Raises:
        ArgumentError: an argument that no command takes, or a value of a wrong type.
        ValueError: a shared value that nothing knows (see `check_shared`).
    """
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
    config = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(dumped)))
    check_shared(config["shared"], _config_files(arguments), sys.argv[1:] if arguments is None else arguments)
    config["stages"] = {name: settings for name, settings in config["stages"].items() if settings not in ({}, _EMPTY)}
    return command, config, options


def _config_files(arguments: Sequence[str] | None) -> list[Path]:
    """The files that --config names, in order."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config", action="append", default=[])
    return [find_config(name) for name in parser.parse_known_args(arguments)[0].config]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake is one line and exit code 2."""
    warnings.formatwarning = _one_line_warning
    try:
        command, config, options = parse(arguments)
        run(command, experiment_from(config), **options)
    except _USER_ERRORS as error:
        if getattr(rank_zero_only, "rank", 0) == 0:
            print(f"error: {one_line(str(error))}", *getattr(error, "__notes__", []), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def run(command: str, experiment: Experiment, stage: str | None = None, changed: str = "refuse") -> None:
    """Run a command on the processes that the experiment's devices ask for."""
    from lvd_lightning.ranks import Ranks
    from lvd_lightning.runs.pipeline import Pipeline

    ranks = Ranks(experiment.devices)
    pipeline = Pipeline(experiment, ranks)
    if command == "fit":
        pipeline.run(only=stage, changed=changed)
    else:
        pipeline.print_bpd("val" if command == "validate" else "test")
    ranks.close()


def one_line(message: str) -> str:
    """A message without line breaks, and without what jsonargparse tells of alternatives nobody meant."""
    text = " ".join(message.split())
    text = re.sub(r"Does not validate against any of the Union subtypes Subtypes: .*? Errors: - ", "", text)
    text = re.sub(r" - Expected a? ?<class 'NoneType'>", "", text)
    text = re.sub(r" Given value type: .*", "", text)
    return re.sub(r" - Not a valid subclass of .*", "", text)


def _one_line_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> str:
    return f"{category.__name__}: {one_line(str(message))}\n"


def _command_parser(command: str, text: str) -> ArgumentParser:
    parser = ArgumentParser(parser_mode="omegaconf+", exit_on_error=False, description=text)
    parser.add_argument("--config", action=ConfigFile, help="a file or a name in configs/; a second one is an overlay")
    parser.add_argument("--name", type=str | None, help="the run's directory in run_dir")
    parser.add_argument("--run_dir", type=str, default="runs", help="where runs are kept")
    parser.add_argument("--seed", type=int, default=0, help="all random numbers derive from it")
    parser.add_argument(
        "--shared", type=dict[str, _Plain], default={}, help="values that stages refer to as ${shared.key}"
    )
    parser.add_subclass_arguments(LightningDataModule, "data", fail_untyped=False, required=False)
    parser.add_argument("--trainer", type=dict[str, _Plain], default={}, help="arguments of every stage's Trainer")
    for name in STAGES:
        if name == "latents":
            parser.add_argument("--stages.latents", type=dict[str, _Plain] | None, help="settings of the clustering")
            continue
        parser.add_subclass_arguments(StageModule, f"stages.{name}.model", fail_untyped=False, required=False)
        parser.add_subclass_arguments(LightningDataModule, f"stages.{name}.data", fail_untyped=False, required=False)
        parser.add_argument(
            f"--stages.{name}.trainer", type=dict[str, _Plain], default={}, help=f"laid over trainer for {name}"
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
