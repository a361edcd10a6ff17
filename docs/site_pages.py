"""What mkdocs does besides: pages of the repository that lie outside of docs/ become pages of the site.

Pages link to them as readers of the repository need it, and links are turned to where they are on the site.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("CONTRIBUTING.md", "benchmarks/RESULTS.md")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages, and the pictures beside them."""
    pictures = [str(path.relative_to(ROOT)) for path in ROOT.glob("benchmarks/*.png")]
    for name in (*OUTSIDE, *pictures):
        files.append(File.generated(config, f"repository/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turn links across the border of docs/, in both directions."""
    source = page.file.src_uri
    up = "../" * source.count("/")
    if source.startswith("repository/"):
        return re.sub(r"\]\((?:\.\./)*docs/", f"]({up}", markdown)
    names = "|".join(map(re.escape, OUTSIDE))
    return re.sub(rf"\]\((?:\.\./)+({names})", rf"]({up}repository/\1", markdown)
