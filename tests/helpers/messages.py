"""The messages of all errors that the code raises, and whether a page quotes them."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from helpers.pages import ROOT

__all__ = ["Message", "messages", "pattern", "quotes"]

FOLDERS = ("lvd_lightning", "datamodules", "callbacks")
#: Errors that end a command with one line, by the names under which they are raised; `unreadable` says its own.
KINDS = {"ValueError", "OSError", "FileNotFoundError", "ImportError", "ModuleNotFoundError", "TypeError"}
#: What a message puts in, as the templates below have it.
HOLE = "{}"
#: What stands in the page for something of the user's.
STANDS = re.compile(r"\.\.\.|\b[A-Z]{2,}\b|\b[A-Z]\b")


class Message(NamedTuple):
    """where: file and line. text: the message with `{}` for what is put in."""

    where: str
    text: str


@cache
def messages() -> tuple[Message, ...]:
    """Every message that is written where its error is raised; others are put together by what raises them."""
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for line, text in _raised(ast.parse(path.read_text())):
                found.append(Message(f"{path.relative_to(ROOT)}:{line}", " ".join(text.split())))
    return tuple(found)


def pattern(quoted: str) -> re.Pattern[str]:
    """What finds a message that a page quotes: words in capitals and `...` stand for anything."""
    pieces = [_plain(piece) for piece in STANDS.split(quoted)]
    return re.compile(".*?".join(re.escape(piece) for piece in pieces))


def quotes(patterns: list[re.Pattern[str]], message: Message) -> bool:
    """Whether one of the patterns finds a message."""
    return any(found.search(_plain(message.text)) for found in patterns)


def _plain(text: str) -> str:
    return re.sub(r"[`'\"]", "", text)


def _raised(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            text = _text(node.exc.args[0])
            if ast.unparse(node.exc.func) in KINDS and text is not None and len(re.findall("[a-z]", text)) > 6:
                yield node.lineno, text


def _text(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant):
        return str(node.value) if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_text(node.left) or HOLE) + (_text(node.right) or HOLE)
    return None
