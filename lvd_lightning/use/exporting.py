"""A trained circuit as a folder that can be given away: weights, what they are of, figures, pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lvd_lightning
from lvd_lightning import circuits as pc
from lvd_lightning.files import write_atomically, write_json
from lvd_lightning.runs.pictures import grid, save_image
from lvd_lightning.seeds import generator_for
from lvd_lightning.use.explained_heads import heads_of
from lvd_lightning.use.folders import new_folder
from lvd_lightning.use.trained import CONFIG, FORMAT, Trained

__all__ = ["export"]

_CARD = """---
license: {license}
library_name: lvd-lightning
tags: [probabilistic-circuit, image-generation, lossless-compression, inpainting]
---

# {name}

A probabilistic circuit over whole pictures of {width} x {height} pixels, trained by latent variable distillation. Its
likelihoods, marginals, conditionals and conditional samples are exact.

![Samples](pictures/samples.png)

| | |
|---|---|
| parameters | {parameters:,} |
| latent values of a patch | {values} |
| patches | {patches} of {patch} x {patch} pixels |
| code of the pictures | {code} |

## Figures

{figures}

## Use

```python
from lvd_lightning.use import from_pretrained

trained = from_pretrained(".")  # this folder, or a copy of it
pictures = trained.codes.to_rgb(trained.circuit.sample(4))  # uint8 (4, 3, {height}, {width})
```

`python train.py score|sample|inpaint|compress|explain --run .` takes this folder in place of a run. Loading runs no
code from it: `config.json`, `assembled.json` and two safetensors files are read.

Licence of the weights: {license}. They were trained by lvd-lightning {version}.
"""


def export(trained: Trained, out: Path, *, license: str = "apache-2.0", pyjuice: bool = False, seed: int = 0) -> None:
    """Write a folder that `from_pretrained` reads, laid out as model hubs expect it; pushing it is the user's command.

    `prior.safetensors`, `conditional.safetensors` and `assembled.json` (the circuit), `config.json` (the code of its
    pictures), `README.md` (a model card with the figures and their protocol), `figures.json`, `pictures/`, and of
    circuits with several heads `heads.csv`, which of them grew from which. Neither paths nor data of the training are
    in it: pictures are drawn by the circuit.

    Args:
        trained: see `open_trained`.
        out: a new folder; it appears when it is complete.
        license: of the weights, as model hubs call it.
        pyjuice: whether the conditional circuits are written for PyJuice as well, `pyjuice/conditional_0.jpc` and so
            on; it knows categorical, Bernoulli and Gaussian leaves, and has no prior over soft evidence.
        seed: of the samples that are shown.

    Raises:
        ValueError: the folder holds something, or the leaves are none that PyJuice knows.
        ImportError: PyJuice is asked for and not installed.
    """
    circuit = trained.circuit
    with new_folder(out) as folder:
        if pyjuice:
            _write_pyjuice(circuit.conditional, folder / "pyjuice")
        circuit.save(folder)
        tree = heads_of(trained)
        if tree is not None:
            tree[0].write(folder, tree[1])
        (folder / "pictures").mkdir()
        samples = circuit.sample(64, generator=generator_for(seed, "export", device=trained.device)).cpu()
        rgb = trained.codes.to_rgb(samples)
        save_image(folder / "pictures" / "samples.png", grid(rgb, 8), rgb.shape[-1])
        figures = {} if trained.run is None else trained.run.figures()
        write_json(folder / "figures.json", figures, indent=2)
        height, width = trained.size
        card = _CARD.format(
            license=license,
            name=trained.name,
            width=width,
            height=height,
            parameters=circuit.num_parameters,
            values=circuit.num_states,
            patches=circuit.num_positions,
            patch=trained.parts.patch_size,
            code=", ".join(f"{key} {value}" for key, value in trained.codes.plain().items()),
            figures=_figures(figures),
            version=lvd_lightning.__version__,
        )
        write_atomically(folder / "README.md", card)
        config = {
            "format": FORMAT,
            "library_version": lvd_lightning.__version__,
            "name": trained.name,
            "license": license,
            "codes": trained.codes.plain(),
        }
        write_json(folder / CONFIG, config, indent=2)


def _write_pyjuice(conditional: pc.Circuit, folder: Path) -> None:
    roots = pc.to_pyjuice(conditional)
    import pyjuice

    folder.mkdir()
    for number, root in enumerate(roots):
        pyjuice.save(str(folder / f"conditional_{number}.jpc"), root)


def _figures(summary: Mapping[str, Any]) -> str:
    """The test figures of a summary as a table, with the protocol."""
    test = summary.get("test")
    if not test:
        return "The run has no report yet: no figures."
    rows = [
        f"| {key} | {value:,.4f} |" if isinstance(value, float) else f"| {key} | {value:,} |"
        for key, value in test.items()
    ]
    protocol = summary.get("protocol", {})
    noted = f"\n\nProtocol: {json.dumps(protocol)}; on the test images of the run." if protocol else ""
    return "\n".join(["| on test images | |", "|---|---:|", *rows]) + noted
