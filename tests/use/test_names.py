"""Functions of `lvd_lightning.use` have the names of commands, whichever modules were imported before."""

import importlib
import pkgutil

import lvd_lightning.use
from lvd_lightning.use.commands import COMMANDS


def test_every_name_is_a_function_and_every_command_has_one() -> None:
    for found in pkgutil.iter_modules(lvd_lightning.use.__path__):
        importlib.import_module(f"lvd_lightning.use.{found.name}")
    for name in lvd_lightning.use.__all__:
        assert callable(getattr(lvd_lightning.use, name)), name
    assert {name for name, command in COMMANDS.items() if command.computes} <= set(lvd_lightning.use.__all__)
