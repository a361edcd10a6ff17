"""The arguments of a command: a configuration from files, with what the command line lays over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings
from lightning.pytorch import LightningDataModule
from omegaconf import OmegaConf

from lvd_lightning.ranks import TIMEOUT_MINUTES
from lvd_lightning.runs.help import help_wanted, overview, stage_help
from lvd_lightning.runs.objects import merge
from lvd_lightning.runs.renamed import check_renamed
from lvd_lightning.runs.run_directory import CHANGED
from lvd_lightning.runs.settings import check_stage_name
from lvd_lightning.runs.shared_values import check_shared
from lvd_lightning.runs.yaml_files import plain_yaml
from lvd_lightning.stages.stage import Stage

__all__ = ["parse_arguments"]

#: Options that are not part of a configuration.
OPTIONS = ("stage", "changed", "ranks", "rates", "write_rates")

# Not Any, for which jsonargparse takes every class_path for one to resolve, and fills in all its defaults.
_Plain = bool | int | float | str | list | dict | None

# `parser_mode="omegaconf"` leaves references behind when the value they point to is changed on the command line.
set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


class ConfigFile(ActionConfigFile):
    """`--config`: a file, or YAML itself; a later one is an overlay, whose mappings are laid over key by key."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        stages = [f"stages.{name}.trainer" for name in vars(cfg.get("stages") or Namespace())]
        before = {key: cfg.get(key) for key in ("shared", "trainer", *stages)}
        super().__call__(parser, cfg, values, option_string)
        for key, value in before.items():
            if isinstance(value, Mapping) and isinstance(cfg.get(key), Mapping):
                cfg[key] = merge(value, cfg[key])


def parse_arguments(
    command: str, description: str, words: Sequence[str], files: Sequence[Path]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The resolved configuration, and the options that are not part of it.

    words: the command line after the command; files: what its --run and --config stand for, in order.
    """
    contents = [_content(path) for path in files]
    check_renamed(contents, files, words)
    names = _stage_names(contents)
    wanted = help_wanted(words)
    if wanted is not None:
        print(_help(command, description, contents, names, wanted))
        raise SystemExit(0)
    dropped, rest = _without_dropped(_without_configs(words), names)
    referring, rest = _without_references(rest)
    configs = [*map(str, files), *(f"{{stages: {{{name}: null}}}}" for name in dropped), *referring]
    parser = _parser(command, description, names)
    chosen: Namespace = parser.parse_args([*(f"--config={config}" for config in configs), *rest])
    options = {key: chosen.pop(key) for key in OPTIONS if key in chosen}
    run = chosen.pop("run", None)
    chosen.pop("config", None)
    dumped = parser.dump(chosen, skip_validation=True)
    config = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(dumped)))
    if run is not None:
        folder = Path(run).resolve()
        config |= {"name": folder.name, "run_dir": str(folder.parent)}
    check_shared(config["shared"], files, words)
    config["stages"] = {
        name: settings for name, settings in (config.get("stages") or {}).items() if settings and any(settings.values())
    }
    return config, options


def _help(
    command: str, description: str, contents: Sequence[Mapping[str, Any]], names: Sequence[str], stage: str
) -> str:
    """The overview, or the settings of a stage as the configs have them."""
    models: dict[str, dict[str, Any]] = {name: {} for name in names}
    for content in contents:
        for name, settings in (content.get("stages") or {}).items():
            model = (settings or {}).get("model") or {}
            models[str(name)] = merge(models[str(name)], {"class_path": model} if isinstance(model, str) else model)
    models = {name: model for name, model in models.items() if model.get("class_path")}
    if not stage:
        parser = _plain_parser(command, description)
        parser.usage = f"train.py {command} --config CONFIG [options]"
        shown = overview({name: str(model["class_path"]) for name, model in models.items()})
        return f"{parser.format_help().rstrip()}\n\n{shown}"
    if stage not in models:
        raise ValueError(f"--help {stage}: there is no such stage; the config has {', '.join(models) or 'none'}")
    return stage_help(stage, str(models[stage]["class_path"]), models[stage].get("init_args") or {})


def _content(path: Path) -> dict[str, Any]:
    """A config's values as they are written; nothing of a file that is no YAML, which the parser will say."""
    try:
        found = plain_yaml(path)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _stage_names(contents: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those of the first config in their order, then those that only overlays have."""
    names: dict[str, None] = {}
    for content in contents:
        stages = content.get("stages") or {}
        if not isinstance(stages, Mapping):
            raise ValueError(f"stages: got {stages!r}, expected a mapping of names to stages")
        for name in stages:
            check_stage_name(str(name))
            names[str(name)] = None
    return list(names)


def _without_configs(words: Sequence[str]) -> list[str]:
    """The words without --config and its values, which are given to the parser as the files that they mean."""
    rest, remaining = [], iter(words)
    for word in remaining:
        if word == "--config":
            next(remaining, None)
        elif not word.startswith("--config="):
            rest.append(word)
    return rest


def _without_dropped(words: Sequence[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The stages that `--stages.NAME null` drops, and the other words."""
    dropped, rest, remaining = [], [], iter(words)
    for word in remaining:
        option, equals, value = word.partition("=")
        prefix, _, name = option.partition(".")
        if prefix != "--stages" or not name or "." in name:
            rest.append(word)
            continue
        value = value if equals else next(remaining, "")
        if name not in names:
            raise ValueError(f"{option}: there is no such stage; the config has {', '.join(names) or 'none'}")
        if value not in ("null", "None"):
            raise ValueError(
                f"{option}: got {value!r}, expected null, which drops the stage; its parts are {option}.model, "
                f"{option}.data and {option}.trainer"
            )
        dropped.append(name)
    return dropped, rest


def _without_references(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options whose values refer to others, as YAML, and the other words.

    On the command line jsonargparse looks for what an argument of a class refers to at a wrong depth; in a config not.
    """
    configs, rest, remaining = [], [], iter(words)
    for word in remaining:
        option, equals, value = word.partition("=")
        if not option.startswith("--") or (not equals and "." not in option):
            rest.append(word)
            continue
        value = value if equals else next(remaining, "")
        if "${" not in value:
            rest += [word] if equals else [option, value]
            continue
        keys = option.removeprefix("--").split(".")
        for number, key in enumerate(keys[:-1]):
            if key in ("model", "data") and keys[number + 1] not in ("init_args", "class_path"):
                keys.insert(number + 1, "init_args")
        content: Any = yaml.safe_load(value)
        for key in reversed(keys):
            content = {key: content}
        configs.append(yaml.safe_dump(content, default_flow_style=True, width=1 << 20).strip())
    return configs, rest


def _parser(command: str, description: str, stages: Sequence[str]) -> ArgumentParser:
    parser = _plain_parser(command, description)
    parser.add_subclass_arguments(LightningDataModule, "data", fail_untyped=False, required=False)
    for name in stages:
        parser.add_subclass_arguments(Stage, f"stages.{name}.model", fail_untyped=False, required=False)
        parser.add_subclass_arguments(LightningDataModule, f"stages.{name}.data", fail_untyped=False, required=False)
        parser.add_argument(
            f"--stages.{name}.trainer", type=dict[str, _Plain], default={}, help=f"laid over trainer for {name}"
        )
    return parser


def _plain_parser(command: str, description: str) -> ArgumentParser:
    """The options that name no class."""
    parser = ArgumentParser(
        parser_mode="omegaconf+",
        exit_on_error=False,
        allow_abbrev=False,
        description=description,
        prog=f"train.py {command}",
    )
    parser.add_argument("--config", action=ConfigFile, help="a file or a name in configs/; a second one is an overlay")
    parser.add_argument("--run", type=str | None, help="the directory of a run that was begun, in place of its config")
    if command == "fit":
        parser.add_argument("--stage", type=str | None, help="run this stage alone")
        parser.add_argument(
            "--changed",
            choices=CHANGED,
            default=CHANGED[0],
            help="what to do when the run was begun with another config",
        )
    if command == "plan":
        parser.add_argument("--ranks", type=int, default=1, help="processes of the job, on all machines together")
        parser.add_argument(
            "--rates", type=str | None, help="a YAML file of measured rates, as --write_rates writes it"
        )
        parser.add_argument(
            "--write_rates", type=str | None, help="write what the finished stages of the run reached, for --rates"
        )
    parser.add_argument("--name", type=str | None, help="in run_dir")
    parser.add_argument("--run_dir", type=str, default="runs", help="where runs are kept")
    parser.add_argument(
        "--checkpoint_minutes",
        type=float | None,
        default=10.0,
        help="within epochs",
    )
    parser.add_argument(
        "--timeout_minutes",
        type=float,
        default=TIMEOUT_MINUTES,
        help="for a process that hangs",
    )
    parser.add_argument("--seed", type=int, default=0, help="all random numbers derive from it")
    parser.add_argument(
        "--shared", type=dict[str, _Plain], default={}, help="values that stages refer to as ${shared.key}"
    )
    parser.add_argument("--trainer", type=dict[str, _Plain], default={}, help="arguments of every stage's Trainer")
    return parser
