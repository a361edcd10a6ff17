"""Run directories with a random circuit over small pictures, as a finished run leaves them."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import lvd_lightning.circuits as pc
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.parts import ImagePatches
from lvd_lightning.use.codes import ImageCodes
from lvd_lightning.use.sampling import write_png
from lvd_lightning.use.trained import Trained, open_trained

__all__ = ["HEADS", "picture_folder", "random_circuit", "random_pictures", "trained_run"]

#: Heads of the circuits, which all positions share.
HEADS = (2, 1)
CONFIG = """
name: {name}
data: {{class_path: {data}, init_args: {{patch_size: {patch}{more}}}}}
stages: {{finetune: {{model: {{class_path: lvd_lightning.stages.FinetuneStudent}}}}}}
"""


def random_circuit(
    parts: ImagePatches, leaf: pc.Distribution | list[pc.Distribution], seed: int = 0
) -> AssembledCircuit:
    """Uneven parameters, so that conditionals differ; trees that are no chains."""
    generator = torch.Generator().manual_seed(seed)
    num_dims = len(parts.split(torch.zeros(1, *parts.example_shape))[0, 0])
    graphs = []
    for number, heads in enumerate(HEADS):
        tree = (torch.arange(num_dims) - 1) // (1 + number)
        graphs.append(pc.hclt(tree, 3, leaf, num_heads=heads, generator=generator))
    tree = (torch.arange(parts.num_parts) - 1) // 2
    prior = pc.hclt(tree, sum(HEADS), pc.SoftEvidence(sum(HEADS)), generator=generator)
    for graph in (prior, *graphs):
        for node in graph.nodes:
            if node.weight is not None:
                node.weight = node.weight**3 / (node.weight**3).sum(1, keepdim=True)
    return AssembledCircuit(pc.Circuit(prior), pc.Circuit(graphs), parts)


def trained_run(
    folder: Path,
    color: str = "ycocg_r",
    seed: int = 0,
    side: int = 8,
    patch: int = 4,
    family: Callable[[int], pc.Distribution] = pc.DiscretizedLogistic,
) -> Trained:
    """A run directory `folder` over pictures of `side` pixels; color "grey": those of scikit-learn's digits.

    family: of the leaves, by the number of values.
    """
    codes = ImageCodes("grey", num_levels=17) if color == "grey" else ImageCodes(color)
    numbers = [17] if color == "grey" else [256, 511, 511] if color == "ycocg_r" else [256] * 3
    parts = ImagePatches((len(numbers), side, side), patch, numbers)
    leaf: list[pc.Distribution] = [family(n) for n in numbers for _ in range(patch**2)]
    folder.mkdir(parents=True)
    data = "datamodules.Digits" if codes.is_grey else "datamodules.Photos"
    more = "" if codes.is_grey else f", image_size: {side}, color: {color}"
    (folder / "config.yaml").write_text(CONFIG.format(name=folder.name, data=data, patch=patch, more=more))
    (folder / "finetune").mkdir()
    random_circuit(parts, leaf, seed).save(folder / "finetune")
    (folder / "finetune" / "done.json").write_text(json.dumps({"seconds": 1.0}))
    return open_trained(folder)


def random_pictures(count: int, side: int = 8, levels: int = 256, seed: int = 1) -> Tensor:
    """uint8 (count, 3, side, side), blotches of random colours; grey ones with the given number of levels."""
    generator = torch.Generator().manual_seed(seed)
    channels = 3 if levels == 256 else 1
    coarse = torch.randint(levels, (count, channels, side // 4, side // 4), generator=generator)
    fine = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
    fine = (fine + torch.randint(-2, 3, fine.shape, generator=generator)).clamp(0, levels - 1)
    return (fine.double() * 255 / (levels - 1)).round().to(torch.uint8).expand(-1, 3, -1, -1)


def picture_folder(folder: Path, pictures: Tensor) -> Path:
    """The pictures as PNG, half of them in a folder inside."""
    for number, picture in enumerate(pictures):
        place = folder / "more" if number % 2 else folder
        place.mkdir(parents=True, exist_ok=True)
        write_png(place / f"{number:02}.png", picture)
    return folder
