"""Teachers: networks that give every patch of an image a feature vector.

The contract of a teacher, an nn.Module: `features(images, visible=None)` takes uint8 images [B, C, H, W] as the
datamodule gives them and returns features [B, P, E]; row i of `visible`, bool [P, P], says which patches may be seen
while patch i is encoded, None means each alone. `init_args` holds the constructor's arguments, plain values all.
"""

from lvd_lightning.teachers.io import load_teacher, save_teacher
from lvd_lightning.teachers.mae import MAE, MAEOutput

__all__ = ["MAE", "MAEOutput", "load_teacher", "save_teacher"]
