"""The report as one page: well formed, complete, and without a way out of the file."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.trained_runs import trained_run

from lvd_lightning.cli import main
from lvd_lightning.runs.page import write_page
from lvd_lightning.runs.run import Run

VOID = {"meta", "img", "br", "input", "link", "hr"}
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
#: Leaves one curve, points at its first number, and sorts the models by bits per dimension, the largest first.
READER = """
for (const box of document.querySelectorAll("#choices input")) if (box.value !== "val/bpd" && box.checked) box.click();
document.querySelector("#curves circle").dispatchEvent(new MouseEvent("mouseenter"));
const byBits = document.querySelectorAll("th.sortable")[1];
byBits.click();
byBits.click();
"""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")


class Page(HTMLParser):
    """Elements that are open, everything that could be loaded, and the texts of cells and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.targets: list[str] = []
        self.cells: list[str] = []
        self.scripts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.targets += [str(found[name]) for name in ("src", "href", "action", "data", "srcset") if name in found]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((found.get("type") or "", ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(data)
        if self.open and self.open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    trained_run(tmp_path / "a <run>", side=4, patch=2)
    folder = tmp_path / "a <run>"
    rows = "epoch,step,seconds,val/bpd,train/bpd\n0,1,2.0,8.7,\n0,1,2.5,,8.9\n1,2,4.0,8.5,\n2,3,5.0,nan,\n"
    (folder / "finetune" / "metrics.csv").write_text(rows)
    (folder / "finetune" / "done.json").write_text(json.dumps({"seconds": 5.0, "val_bpd": 8.5}))
    (folder / "report").mkdir()
    (folder / "report" / "samples.png").write_bytes(PIXEL)
    models = [["finetuned </script> circuit", "8.5000"], ["baseline, EM", "10.2500"]]
    pictures = {"samples.png": "Samples", "absent.png": "Nothing"}
    run = Run.open(folder)
    return write_page(run, folder / "report", "Bits & more.", "bpd", ["model", "test bpd"], models, pictures)


def test_it_is_whole_and_holds_what_the_report_says(page: Path) -> None:
    text = page.read_text()
    found = Page(text)
    assert found.cells[:4] == ["finetuned </script> circuit", "8.5000", "baseline, EM", "10.2500"]
    assert found.cells[4:] == ["finetune", "5", "val_bpd 8.5"]
    assert "Bits &amp; more." in text
    assert "<h1>a &lt;run&gt;</h1>" in text
    assert "Nothing" not in text
    assert not re.search(r"@\w+@", text)
    (kind, metrics), (_, script) = found.scripts
    assert kind == "application/json"
    assert json.loads(metrics) == {
        "finetune": {"train/bpd": [[2.5, 8.9, 0]], "val/bpd": [[2.0, 8.7, 0], [4.0, 8.5, 1]]}
    }
    assert "addEventListener" in script


def test_nothing_is_loaded_from_elsewhere(page: Path) -> None:
    text = page.read_text()
    targets = Page(text).targets
    assert len(targets) == 1
    assert base64.b64decode(targets[0].removeprefix("data:image/png;base64,")) == PIXEL
    outside = set(re.findall(r"https?://[^\s\"']+", text)) - {"http://www.w3.org/2000/svg"}  # a name, nothing is loaded
    assert outside == set()
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|@import|url\(", text)


def in_browser(page: Path, script: str = "") -> str:
    """The page as a browser that reaches no network has it, after a script that does what a reader would do."""
    browser = next((found for found in map(shutil.which, BROWSERS) if found), None)
    if browser is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)}")
    used = page.with_name("used.html")
    used.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--user-data-dir={page.parent / 'profile'}"]
    offline = "--host-resolver-rules=MAP * ~NOTFOUND"
    return subprocess.run([browser, *flags, offline, used.as_uri()], capture_output=True, text=True, timeout=60).stdout


def test_a_browser_draws_the_curves(page: Path) -> None:
    shown = in_browser(page)
    assert shown.count("<polyline") == 2
    assert '<option value="finetune">' in shown


def test_a_reader_chooses_curves_and_sorts_the_table(page: Path) -> None:
    shown = in_browser(page, READER)
    assert shown.count("<polyline") == 1
    assert "val/bpd: 8.7 after epoch 1, 2 s" in shown
    assert Page(shown).cells[:4] == ["baseline, EM", "10.2500", "finetuned </script> circuit", "8.5000"]


def test_the_command_makes_a_page_for_an_older_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = "name: run\ndata: {class_path: datamodules.Digits, init_args: {patch_size: 4}}\nstages:\n"
    stage = "  latents: {model: {class_path: lvd_lightning.stages.Latents, init_args: {num_clusters: 3}}}\n"
    run = tmp_path / "run"
    (run / "latents").mkdir(parents=True)
    (run / "config.yaml").write_text(config + stage)
    (run / "latents" / "done.json").write_text(json.dumps({"seconds": 2.0}))
    assert main(["report", "--run", str(run)]) == 2
    error = capsys.readouterr().err
    assert "has no report of all its stages yet; `train.py fit --run" in error
    assert error.count("\n") == 1
    (run / "report").mkdir()
    (run / "report" / "summary.json").write_text(json.dumps({"stages": {"latents": {"seconds": 2.0}}}))
    assert main(["report", "--run", str(run)]) == 0
    assert capsys.readouterr().out == f"report: {run / 'report' / 'index.html'}\n"
    assert Page((run / "report" / "index.html").read_text()).cells == ["latents", "2"]
