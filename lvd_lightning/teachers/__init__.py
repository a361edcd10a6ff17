"""Teachers: networks that give every part of an example, a patch of an image or a word, a feature vector.

The contract of a teacher, an nn.Module: `features(images, visible=None)` takes uint8 images [B, C, H, W] as the
datamodule gives them and returns features [B, P, E]; row i of `visible`, bool [P, P], says which patches may be seen
while patch i is encoded; a teacher may refuse it, and says what None means. Besides,

- `init_args` holds the constructor's arguments, plain values all;
- `contextual` says whether `visible` may be given: if so, features for clustering are taken in context (see
  `lvd_lightning.latents`), else in one pass over the whole image;
- `positional` says whether a feature tells the position of its patch too, not its content alone.

A teacher that is a latent variable model has `codes(images)`, int64 [B, P], the nearest of the vectors
`codebook.codes` [K, E] to its features, and `elbo(images)` [B], a lower bound of log p(image) in nats. Flows have
`elbo` as well, `log_prob_bound(images, num_draws)`, and `sample`. The density of a flow of a table is exact, and its
`elbo` no bound.

One that losses on samples look through has `activations(scaled)`: for floating point images [B, C, H, W] in -1..1 a
list of what its layers make of them, each [B, places, channels] and differentiable, the features of all patches last.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lvd_lightning.teachers.io import load_teacher, register_teacher, save_teacher

if TYPE_CHECKING:
    from lvd_lightning.teachers.encoder import Encoder
    from lvd_lightning.teachers.image_flow import ImageFlow
    from lvd_lightning.teachers.mae import MAE, MAEOutput
    from lvd_lightning.teachers.table_flow import TableFlow
    from lvd_lightning.teachers.vqvae import VQVAE, VQVAEOutput

_HOMES = {
    "Encoder": "encoder",
    "ImageFlow": "image_flow",
    "MAE": "mae",
    "MAEOutput": "mae",
    "TableFlow": "table_flow",
    "VQVAE": "vqvae",
    "VQVAEOutput": "vqvae",
}

__all__ = [
    "MAE",
    "VQVAE",
    "Encoder",
    "ImageFlow",
    "MAEOutput",
    "TableFlow",
    "VQVAEOutput",
    "load_teacher",
    "register_teacher",
    "save_teacher",
]


def __getattr__(name: str) -> Any:
    """A teacher is imported when it is asked for, and with it the library of transformers, which takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
