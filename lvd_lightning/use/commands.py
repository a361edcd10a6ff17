"""The commands that use a finished run: what they take and what they print. Each imports the libraries it needs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lvd_lightning.use.options import (
    Command,
    CommandParser,
    add_batch,
    add_fit,
    add_out,
    add_seed,
    add_sources,
    folder_of,
    open_chosen,
)

__all__ = ["COMMANDS", "run_command"]


def run_command(name: str, words: Sequence[str]) -> None:
    """Read the words after a command's name, and do what it does.

    Raises:
        ValueError: a mistake of the user, in one line.
    """
    command = COMMANDS[name]
    parser = CommandParser(
        prog=f"train.py {name}",
        description=command.text,
        epilog=f"example: python train.py {name} {command.example}",
        exit_on_error=False,
    )
    parser.add_argument("--run", required=True, help="a finished run's directory, or a folder that `export` wrote")
    command.add_options(parser)
    if command.computes:
        parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    command.act(parser.parse_args(list(words)))


def _score_options(parser: argparse.ArgumentParser) -> None:
    add_sources(parser, "pictures; two folders or archives are two sets, the second the one that should stand out")
    add_out(parser, "score")
    add_fit(parser)
    parser.add_argument("--shown", type=int, default=12, help="outliers whose surprise is drawn (default: 12)")
    parser.add_argument("--max-images", type=int, help="at most so many of each set, chosen at random")
    add_seed(parser, "that choice")


def _score(chosen: argparse.Namespace) -> None:
    trained = open_chosen(chosen)
    from lvd_lightning.use.pictures import PictureSet
    from lvd_lightning.use.scoring import score

    many = [Path(found).is_dir() or Path(found).suffix.lower() == ".zip" for found in chosen.images]
    groups = [[found] for found in chosen.images] if all(many) and len(many) == 2 else [chosen.images]
    out = folder_of(chosen, "score")
    with ExitStack() as opened:
        sets = [opened.enter_context(PictureSet(group)) for group in groups]
        settings: dict[str, Any] = {"num_shown": chosen.shown, "max_images": chosen.max_images, "seed": chosen.seed}
        scores = score(trained, sets, out, fit=chosen.fit, **settings)
    for one in scores.pictures[:5]:
        print(f"{one.bpd:.4f}  {one.name}" + (f"  (set {one.source + 1})" if len(groups) > 1 else ""))
    if len(scores.pictures) > 5:
        print(f"... and {len(scores.pictures) - 5} likelier ones")
    for source in range(len(groups)):
        bpd = scores.bpd(source)
        print(f"set {source + 1}: {len(bpd)} pictures, {sum(bpd) / len(bpd):.4f} bits per dimension on average")
    if scores.auroc is not None:
        print(f"AUROC of bits per dimension, second set against first: {scores.auroc:.4f}")
    print(f"score: {out}")


def _sample_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", "--num-samples", type=int, default=64, help="how many are drawn (default: 64)")
    parser.add_argument("--given", help="is refused: a circuit has no classes; `inpaint` conditions on pixels")
    add_out(parser, "sample")
    add_seed(parser, "what is drawn")


def _sample(chosen: argparse.Namespace) -> None:
    if chosen.given is not None:
        raise ValueError(
            f"--given: got {chosen.given!r}, but these circuits have no classes to condition on; `train.py inpaint` "
            "draws what is missing of a picture given the rest"
        )
    trained = open_chosen(chosen)
    from lvd_lightning.use.sampling import sample

    out = folder_of(chosen, "sample")
    sample(trained, chosen.num_samples, out, seed=chosen.seed)
    print(f"sample: {chosen.num_samples} pictures in {out}")


def _inpaint_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="a picture")
    missing = parser.add_mutually_exclusive_group(required=True)
    missing.add_argument("--mask", metavar="FILE", help="a picture of the same size whose bright pixels are missing")
    missing.add_argument("--box", metavar="x,y,w,h", help="what is missing: left, top, width and height in pixels")
    missing.add_argument("--half", choices=("left", "right", "top", "bottom"), help="the half that is missing")
    parser.add_argument("--samples", type=int, default=8, help="completions that are drawn (default: 8)")
    parser.add_argument("--animation", choices=("gif", "webp"), default="gif", help="of the samples (default: gif)")
    add_out(parser, "inpaint")
    add_fit(parser)
    add_seed(parser, "the samples")


def _inpaint(chosen: argparse.Namespace) -> None:
    trained = open_chosen(chosen)
    from functools import partial

    from lvd_lightning.use.inpainting import inpaint
    from lvd_lightning.use.missing import missing_box, missing_half, missing_in
    from lvd_lightning.use.pictures import PictureSet

    with PictureSet([chosen.image]) as pictures:
        if len(pictures) != 1:
            raise ValueError(f"{chosen.image}: holds {len(pictures)} pictures, expected one")
        picture = pictures[0]
    if chosen.mask is not None:
        missing = partial(missing_in, Path(chosen.mask))
    else:
        missing = partial(missing_box, chosen.box) if chosen.box is not None else partial(missing_half, chosen.half)
    out = folder_of(chosen, "inpaint")
    settings: dict[str, Any] = {"num_samples": chosen.samples, "animation": chosen.animation, "seed": chosen.seed}
    found = inpaint(trained, picture, missing, out, fit=chosen.fit, **settings)
    uncertain = float(found.deviation[found.deviation > 0].mean()) if bool((found.deviation > 0).any()) else 0.0
    print(f"inpaint: {out} (deviation of missing pixels {uncertain:.1f} levels on average)")


def _compress_options(parser: argparse.ArgumentParser) -> None:
    add_sources(parser, "pictures of the circuit's size and colours, without transparency")
    parser.add_argument("-o", "--out", metavar="FILE", required=True, help="the file to write, such as a.lvd")
    parser.add_argument("--fit", choices=("tile",), help="tile: pictures of any size, piece by piece (default: refuse)")
    add_batch(parser)


def _compress(chosen: argparse.Namespace) -> None:
    trained = open_chosen(chosen)
    from lvd_lightning.use.compressing import compress
    from lvd_lightning.use.pictures import PictureSet

    with PictureSet(chosen.images) as pictures:
        found = compress(trained, pictures, Path(chosen.out), fit=chosen.fit, batch=chosen.batch)
        before = pictures.num_bytes
    print(
        f"compress: {found.num_pictures} pictures, {before:,} -> {found.num_bytes:,} bytes "
        f"({found.header_bytes:,} of them names and checksums), {found.num_pictures / found.seconds:.2f} a second"
    )
    print(f"{found.bpd:.4f} bits per dimension, of which the circuit promises {found.model_bpd:.4f}")


def _decompress_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="what `compress` wrote")
    parser.add_argument("-o", "--out", metavar="FOLDER", required=True, help="a new folder for the pictures")
    add_batch(parser)


def _decompress(chosen: argparse.Namespace) -> None:
    trained = open_chosen(chosen)
    from lvd_lightning.use.decompressing import decompress

    written = decompress(trained, Path(chosen.file), Path(chosen.out), batch=chosen.batch)
    print(f"decompress: {len(written)} pictures in {chosen.out}")


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", metavar="FOLDER", required=True, help="a new folder")
    parser.add_argument("--license", default="apache-2.0", help="of the weights (default: apache-2.0)")
    parser.add_argument("--pyjuice", action="store_true", help="write the conditional circuits for PyJuice as well")
    add_seed(parser, "the samples that it shows")


def _export(chosen: argparse.Namespace) -> None:
    trained = open_chosen(chosen)
    from lvd_lightning.use.exporting import export

    export(trained, Path(chosen.out), license=chosen.license, pyjuice=chosen.pyjuice, seed=chosen.seed)
    print(f"export: {chosen.out}; in Python lvd_lightning.use.from_pretrained({chosen.out!r})")


def _explain_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clusters", type=int, default=24, help="latent values that are shown (default: 24)")
    add_out(parser, "explain")
    add_seed(parser, "the patches that are drawn")


def _explain(chosen: argparse.Namespace) -> None:
    trained = open_chosen(chosen)
    from lvd_lightning.use.explaining import explain

    out = folder_of(chosen, "explain")
    found = explain(trained, out, num_clusters=chosen.clusters, seed=chosen.seed)
    strongest = max(found.edges, key=lambda edge: edge[2], default=None)
    if strongest is not None:
        print(f"strongest edge of the prior: patches {strongest[1]} and {strongest[0]}, {strongest[2]:.2f} bits")
    print(f"explain: {out / 'summary.md'}")


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--open", action="store_true", help="show it in the browser")


def _report(chosen: argparse.Namespace) -> None:
    from lvd_lightning.runs.page import PAGE
    from lvd_lightning.runs.report import is_written, write_report_page
    from lvd_lightning.runs.run import Run

    run = Run.open(chosen.run)
    if not is_written(run):
        raise ValueError(
            f"{chosen.run}: has no report of all its stages yet; `train.py fit --run {chosen.run}` writes it"
        )
    page = run.dir / "report" / PAGE
    if not page.is_file():  # the report is older than such pages
        page = write_report_page(run, run.data())
    print(f"report: {page}")
    if chosen.open:
        import webbrowser

        webbrowser.open(page.as_uri())


COMMANDS = {
    "score": Command(
        "bits per dimension of pictures: outliers, where they surprise, AUROC of two folders",
        "--run runs/photos holidays.zip --fit resize",
        _score_options,
        _score,
    ),
    "sample": Command(
        "draw pictures from a finished run: a grid, PNG files, an NPZ archive",
        "--run runs/photos -n 64",
        _sample_options,
        _sample,
    ),
    "inpaint": Command(
        "complete a picture of which pixels are missing: samples, mean, most likely completion, deviation",
        "--run runs/photos cat.png --fit resize --box 8,8,16,16",
        _inpaint_options,
        _inpaint,
    ),
    "compress": Command(
        "compress pictures into one file without loss, by a finished run",
        "--run runs/photos pictures.zip --fit tile -o a.lvd",
        _compress_options,
        _compress,
    ),
    "decompress": Command(
        "write the pictures of such a file as they were",
        "--run runs/photos a.lvd -o pictures",
        _decompress_options,
        _decompress,
    ),
    "export": Command(
        "write a folder to give away: weights, model card, figures, samples",
        "--run runs/photos -o photos_circuit",
        _export_options,
        _export,
    ),
    "explain": Command(
        "show what a circuit has learnt: clusters, the prior's tree, leaves, growth",
        "--run runs/photos",
        _explain_options,
        _explain,
    ),
    "report": Command(
        "the report of a run as one page for a browser: table, curves, pictures",
        "--run runs/photos --open",
        _report_options,
        _report,
        computes=False,
    ),
}
