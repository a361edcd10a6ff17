"""Code blocks, links and commands of the project's pages."""

import re
from pathlib import Path

__all__ = ["PAGES", "ROOT", "blocks", "commands", "missing_links"]

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks" / "RESULTS.md"])


def blocks(language: str, page: Path) -> list[str]:
    """The code blocks of one language; "" for those without."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def commands(page: Path) -> list[str]:
    """Commands that start an experiment or use one, without their comments."""
    lines = [line.split(" #")[0].strip() for block in blocks("sh", page) for line in block.splitlines()]
    return [line for line in lines if line.startswith("python train.py ")]


def missing_links(page: Path) -> list[str]:
    """Targets of links and pictures of a page that are no files here."""
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    return [target for target in targets if "://" not in target and not (page.parent / target).exists()]
