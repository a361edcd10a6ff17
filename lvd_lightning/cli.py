"""The command line: `fit` runs an experiment, `validate` and `test` print what its trained circuit reaches.

What needs no library is answered before one is imported: the overview, an unknown command, a config that is not there.
"""

import argparse
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvd_lightning.stopping import (
    EXIT_CODE,
    Stopped,
    failed_elsewhere,
    handled_signals,
    requested,
    stop_if_requested,
    tell_failure,
)
from lvd_lightning.use.commands import COMMANDS, run_command
from lvd_lightning.use.options import CommandParser

if TYPE_CHECKING:
    from lvd_lightning.runs.experiment import Experiment

__all__ = ["CONFIG_FOLDER", "find_config", "main", "one_line", "parse", "run"]

CONFIG_FOLDER = Path(__file__).resolve().parents[1] / "configs"
_COMMANDS = {
    "fit": "run every stage of an experiment that is not finished, then evaluate and write the report",
    "validate": "print what a finished run's model reaches on the validation examples",
    "test": "print what a finished run's model reaches on the test examples",
    "plan": "print what every stage will take on so many processes: memory, messages, files, hours",
    "infill": "fill in the words that are <mask> in a text, with the model of a finished run on texts",
    **{name: command.text for name, command in COMMANDS.items()},
}
# Commands that take no configuration of an experiment.
_WITHOUT_CONFIG = ("infill", *COMMANDS)


def find_config(name: str) -> Path:
    """The file that `--config name` means: a path as it is, else a file in configs/, with or without .yaml.

    Raises:
        ValueError: there is none.
    """
    for path in (Path(name), CONFIG_FOLDER / name, CONFIG_FOLDER / f"{name}.yaml"):
        if path.is_file():
            return path
    known = sorted(str(path.relative_to(CONFIG_FOLDER).with_suffix("")) for path in CONFIG_FOLDER.rglob("*.yaml"))
    raise ValueError(f"there is no config {name!r}; configs/ has {', '.join(known)}")


def parse(arguments: Sequence[str] | None = None) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The command, the resolved configuration of the experiment, and the options that are not part of it.

    Raises:
        ArgumentError: an argument that the command does not take, or a value of a wrong type.
        ValueError: no such command, config, stage or shared value, or a name that was changed.
    """
    command, words = _split(sys.argv[1:] if arguments is None else arguments)
    if command in _WITHOUT_CONFIG:
        raise ValueError(f"{command}: takes no configuration of an experiment; run it by `main`")
    files = _config_files(words)
    from lvd_lightning.runs.arguments import parse_arguments

    return command, *parse_arguments(command, _COMMANDS[command], words, files)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake is one line and exit code 2.

    A signal that stops `fit` ends it with exit code 75 (`stopping.EXIT_CODE`), Ctrl-C with 130.
    """
    warnings.formatwarning = _one_line_warning
    try:
        command, words = _split(sys.argv[1:] if arguments is None else arguments)
        if command == "infill":
            _infill(words)
            return 0
        if command in COMMANDS:
            run_command(command, words)
            return 0
        with handled_signals() if command == "fit" else nullcontext():  # before the library is imported
            command, config, options = parse([command, *words])
            from lvd_lightning.runs.configuration import experiment_from

            stop_if_requested()
            if command == "plan":
                from lvd_lightning.runs.plan import print_plan

                print_plan(experiment_from(config), **options)
                return 0
            try:
                run(command, experiment_from(config), **options)
            except Exception as error:
                _end_with_the_others(error)
                raise
    except Stopped as stopped:
        if _is_first_rank():
            from lvd_lightning.runs.slurm import requeue_after

            name = signal.Signals(stopped.signal).name
            print(f"stopped by {name}: the same command goes on from here", file=sys.stderr)
            requeue_after(stopped.signal)
        return EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_of_user(error):
            raise
        if _is_first_rank() or getattr(error, "of_one_rank", False):
            print(f"error: {one_line(str(error))}", *getattr(error, "__notes__", []), file=sys.stderr)
        return 2
    return 0


def run(command: str, experiment: "Experiment", stage: str | None = None, changed: str = "refuse") -> None:
    """Run a command on the processes that the experiment's devices ask for."""
    from lvd_lightning.ranks import Ranks
    from lvd_lightning.runs.pipeline import Pipeline

    ranks = Ranks(experiment.devices, experiment.timeout_minutes)
    pipeline = Pipeline(experiment, ranks)
    if command == "fit":
        pipeline.run(only=stage, changed=changed)
    else:
        pipeline.print_likelihood("val" if command == "validate" else "test")
    ranks.close()


def _end_with_the_others(error: Exception) -> None:
    """What a process of several does about an error: it ends without a word if another one has failed before it.

    Messages that fail because another process has stopped are no errors either. Else the others are told, and end, so
    that the error is the last thing that is printed.
    """
    number = requested()
    if number is not None and not _is_of_user(error):
        raise Stopped(number) from error
    if tell_failure(one_line(str(error))):
        error.of_one_rank = True  # type: ignore[attr-defined]
    elif failed_elsewhere() is not None:
        raise SystemExit(2) from error


def _infill(words: Sequence[str]) -> None:
    """Print completions of a text."""
    parser = CommandParser(prog="train.py infill", description=_COMMANDS["infill"], exit_on_error=False)
    parser.add_argument("--run", required=True, help="the run's directory, such as runs/text")
    parser.add_argument("--samples", type=int, default=5, help="completions that are drawn (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("text", nargs="+", help='such as "the king said unto <mask> <mask> of the land"')
    chosen = parser.parse_args(list(words))
    from lvd_lightning.runs.infill import print_completions
    from lvd_lightning.runs.run import Run

    print_completions(Run.open(chosen.run), " ".join(chosen.text), chosen.samples, chosen.seed)


def one_line(message: str) -> str:
    """A message without line breaks, and without what jsonargparse tells of alternatives nobody meant."""
    text = " ".join(message.split())
    text = re.sub(r"Does not validate against any of the Union subtypes Subtypes: .*? Errors: - ", "", text)
    text = re.sub(r" - Expected a? ?<class 'NoneType'>", "", text)
    text = re.sub(r" Given value type: .*", "", text)
    return re.sub(r" - Not a valid subclass of .*", "", text)


def _one_line_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> str:
    return f"{category.__name__}: {one_line(str(message))}\n"


def _split(words: Sequence[str]) -> tuple[str, list[str]]:
    """The command and what follows it; prints the overview and exits when it is asked for."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, exit_on_error=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in _COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    first, rest = (words[0], list(words[1:])) if words else ("", [])
    if first in _COMMANDS:
        return first, rest
    if first in ("-h", "--help"):
        parser.print_help()
        raise SystemExit(0)
    given = f"got {first!r}" if words else "got no command"
    raise ValueError(f"{given}, expected one of {', '.join(_COMMANDS)}; train.py --help tells what they do")


def _config_files(words: Sequence[str]) -> list[Path]:
    """The files that --run and --config name: a run's own configuration first, then overlays in order."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--run", action="append", default=[])
    found = parser.parse_known_args(words)[0]
    runs = [Path(name) / "config.yaml" for name in found.run]
    for path in runs:
        if not path.is_file():
            raise ValueError(f"--run {path.parent}: there is no run, its config.yaml is missing")
    return [*runs, *(find_config(name) for name in found.config)]


def _is_of_user(error: Exception) -> bool:
    """Whether an error is about what a user said, and not a mistake of this program."""
    kinds: list[type[BaseException]] = [argparse.ArgumentError, ValueError, OSError, ImportError]
    # A library whose error this is was imported by whoever raised it.
    for module, name in (
        ("lightning.pytorch.utilities.exceptions", "MisconfigurationException"),
        ("omegaconf.errors", "OmegaConfBaseException"),
    ):
        if module in sys.modules:
            kinds.append(getattr(sys.modules[module], name))
    return isinstance(error, tuple(kinds))


def _is_first_rank() -> bool:
    """One process alone says what is wrong."""
    utilities = sys.modules.get("lightning.pytorch.utilities")
    return utilities is None or getattr(utilities.rank_zero_only, "rank", 0) == 0
