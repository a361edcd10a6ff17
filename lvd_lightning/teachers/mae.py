"""Masked autoencoder for small images; a patch's feature is its encoding given chosen other patches.

Shapes: B images, C channels, H x W pixels, P patches, E features, T tokens of a sequence, V visible patches, S sets of
visible patches.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from lvd_lightning.checks import check_between, check_counts, expect
from lvd_lightning.color import patchify, unpatchify
from lvd_lightning.teachers.scaling import PixelScale, image_sides

__all__ = ["MAE", "MAEOutput"]

# Tokens encoded at once: activations of one layer stay in the processor's cache, or keep a GPU busy in a few GiB.
_MAX_TOKENS = {"cpu": 2048, "cuda": 262_144}


class MAEOutput(NamedTuple):
    """What a masked autoencoder makes of a batch.

    loss: mean squared error over the masked patches of each image, with shape (B,); pixels scaled to [-1, 1].
    reconstruction: the decoder's images in [-1, 1], visible patches included, with shape (B, C, H, W).
    masked: which patches the encoder did not see, bool with shape (B, P).
    """

    loss: Tensor
    reconstruction: Tensor
    masked: Tensor


class MAE(nn.Module):
    """Masked autoencoder: an encoder of the visible patches and a light decoder that predicts the masked ones.

    The transformer layers are those of `transformers`; masking, initialisation and loss are done here, because the
    share of masked patches changes from call to call, and because transformers 5 leaves position embeddings built from
    a config at zero. Position embeddings are fixed (sines and cosines); the class token is kept, and sees what the
    patches see.

    Args:
        image_size: side of square images, or (height, width); multiples of `patch_size`.
        patch_size: side of a patch.
        hidden_size: width of the encoder and of the features, a multiple of 4 and of `num_heads`.
        intermediate_size: hidden units of the encoder's MLPs; None: four times `hidden_size`. The decoder's likewise.
        num_channels: C.
        num_categories: values of a pixel, one number or one for each channel.

    References:
        He et al., Masked Autoencoders Are Scalable Vision Learners, 2022, arXiv:2111.06377.
    """

    #: See `lvd_lightning.teachers`.
    contextual = True
    positional = True

    def __init__(
        self,
        image_size: int | Sequence[int] = 32,
        patch_size: int = 4,
        hidden_size: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        intermediate_size: int | None = None,
        *,
        decoder_hidden_size: int = 64,
        decoder_num_layers: int = 2,
        decoder_num_heads: int = 4,
        decoder_intermediate_size: int | None = None,
        num_channels: int = 3,
        num_categories: int | Sequence[int] = 256,
    ) -> None:
        super().__init__()
        height, width = image_sides(image_size)
        check_counts(patch_size=patch_size)
        tiles = not height % patch_size and not width % patch_size and height * width >= 2 * patch_size**2
        expect(tiles, "image_size", image_size, f"multiples of patch_size, {patch_size}, for two patches or more")
        _check_width("hidden_size", hidden_size, num_heads)
        _check_width("decoder_hidden_size", decoder_hidden_size, decoder_num_heads)
        self.init_args: dict[str, Any] = {
            "image_size": [height, width],
            "patch_size": patch_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "intermediate_size": intermediate_size or 4 * hidden_size,
            "decoder_hidden_size": decoder_hidden_size,
            "decoder_num_layers": decoder_num_layers,
            "decoder_num_heads": decoder_num_heads,
            "decoder_intermediate_size": decoder_intermediate_size or 4 * decoder_hidden_size,
            "num_channels": num_channels,
            "num_categories": num_categories if isinstance(num_categories, int) else list(num_categories),
        }
        self.image_shape = (num_channels, height, width)
        self.scale = PixelScale(self.image_shape, num_categories)
        self.patch_size = patch_size
        self.grid = (height // patch_size, width // patch_size)
        self.num_patches = self.grid[0] * self.grid[1]
        self.num_features = hidden_size
        self.vit_mae = ViTMAEForPreTraining(_config(self.init_args))
        self._initialize()

    def forward(self, images: Tensor, mask_ratio: float, noise: Tensor) -> MAEOutput:
        """Hide patches, encode the rest, decode all of them.

        Args:
            images: whole numbers with shape (B, C, H, W), as the datamodule gives them.
            mask_ratio: the share of patches to hide, rounded to whole patches; at least one is hidden and one seen.
            noise: any numbers with shape (B, P); of each image the patches with the largest are hidden.
        """
        if noise.shape != (len(images), self.num_patches):
            raise ValueError(f"noise: got shape {tuple(noise.shape)}, expected {(len(images), self.num_patches)}")
        num_masked = self.num_masked(mask_ratio)
        tokens_BPE = self._embed(images)
        shuffled_BP = noise.argsort(dim=1)
        restore_BP = shuffled_BP.argsort(dim=1)
        visible_BV = shuffled_BP[:, : self.num_patches - num_masked]
        tokens_BVE = tokens_BPE.gather(1, visible_BV[:, :, None].expand(-1, -1, self.num_features))
        patches_BPX = self.vit_mae.decoder(self._encode(tokens_BVE), restore_BP).logits
        masked_BP = restore_BP >= self.num_patches - num_masked
        error_BP = (patches_BPX - patchify(self._scaled(images), self.patch_size)).square().mean(-1)
        return MAEOutput(
            loss=(error_BP * masked_BP).sum(1) / num_masked,
            reconstruction=unpatchify(patches_BPX, self.patch_size, *self.image_shape[1:]),
            masked=masked_BP,
        )

    def num_masked(self, mask_ratio: float) -> int:
        """The number of patches that a mask ratio hides, 1 to P - 1."""
        check_between(0, 1, mask_ratio=mask_ratio)
        return min(max(round(mask_ratio * self.num_patches), 1), self.num_patches - 1)

    @torch.no_grad()
    def features(self, images: Tensor, visible: Tensor | None = None, max_tokens: int | None = None) -> Tensor:
        """The final encoding of every patch, each in a sequence of its own.

        Patches that see the same set share one sequence; sequences of one length are encoded together, without padding
        or attention masks, so a patch that is not visible cannot leak into a feature.

        Args:
            images: whole numbers with shape (B, C, H, W), as the datamodule gives them.
            visible: bool with shape (P, P); row i says which patches are seen while patch i is encoded, i itself always
                is. None: each patch alone.
            max_tokens: encode at most about so many tokens at once; None chooses by device.

        Returns:
            Features with shape (B, P, E), float32.
        """
        if visible is None:
            visible = torch.eye(self.num_patches, dtype=torch.bool)
        max_tokens = max_tokens or _MAX_TOKENS.get(images.device.type, _MAX_TOKENS["cpu"])
        tokens_BPE = self._embed(images)
        features_BPE = torch.empty_like(tokens_BPE, dtype=torch.float32)
        for group in _group_by_size(visible, self.num_patches, max_tokens):
            num_sets, num_visible = group.sets.shape
            step = max(1, max_tokens // (num_sets * (num_visible + 1)))
            for start in range(0, len(images), step):
                tokens_bSVE = tokens_BPE[start : start + step, group.sets]
                encoded_bSTE = self._encode(tokens_bSVE.flatten(0, 1)).unflatten(0, (-1, num_sets))
                features_BPE[start : start + step, group.patches] = encoded_bSTE[
                    :, group.set_of, group.slot + 1
                ].float()
        return features_BPE

    def activations(self, scaled: Tensor) -> list[Tensor]:
        """The encoding of every patch in sight of all others after every layer, each (B, P, E); gradients flow.

        Args:
            scaled: floating point images (B, C, H, W) in [-1, 1].
        """
        return [hidden_BTE[:, 1:] for hidden_BTE in self._layers(self._embedded(scaled))]

    def _embed(self, images: Tensor) -> Tensor:
        """Patch embeddings with their positions, with shape (B, P, E); nothing flows between patches here."""
        return self._embedded(self._scaled(images))

    def _embedded(self, scaled: Tensor) -> Tensor:
        embeddings = self.vit_mae.vit.embeddings
        projected_BEhw = embeddings.patch_embeddings.projection(scaled)
        return projected_BEhw.flatten(2).transpose(1, 2) + embeddings.position_embeddings[:, 1:]

    def _scaled(self, images: Tensor) -> Tensor:
        """Images in [-1, 1], in the type of the parameters."""
        return self.scale.floats(images, self.vit_mae.vit.embeddings.cls_token.dtype)

    def _encode(self, tokens_NVE: Tensor) -> Tensor:
        """Encodings of a class token and the given tokens, with shape (N, 1 + V, E)."""
        return self._layers(tokens_NVE)[-1]

    def _layers(self, tokens_NVE: Tensor) -> list[Tensor]:
        """What the layers make of them, the last one normalised."""
        embeddings = self.vit_mae.vit.embeddings
        class_token = embeddings.cls_token + embeddings.position_embeddings[:, :1]
        hidden_NTE = torch.cat([class_token.expand(len(tokens_NVE), -1, -1), tokens_NVE], dim=1)
        found = []
        for layer in self.vit_mae.vit.layers:
            hidden_NTE = layer(hidden_NTE)
            found.append(hidden_NTE)
        return [*found[:-1], self.vit_mae.vit.layernorm(hidden_NTE)]

    @torch.no_grad()
    def _initialize(self) -> None:
        """The published initialisation: Xavier for matrices, sines and cosines for positions, small tokens."""
        encoder, decoder = self.vit_mae.vit.embeddings, self.vit_mae.decoder
        for module in self.vit_mae.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(encoder.cls_token, std=0.02)
        nn.init.normal_(decoder.mask_token, std=0.02)
        for owner, name in ((encoder, "position_embeddings"), (decoder, "decoder_pos_embed")):
            width = getattr(owner, name).shape[-1]
            positions = torch.zeros(1, 1 + self.num_patches, width)
            positions[:, 1:] = _position_embeddings(self.grid, width)
            setattr(owner, name, nn.Parameter(positions, requires_grad=False))


class _Group(NamedTuple):
    """Sets of visible patches of one size, and the patches whose features are taken from them.

    sets: patches of each set, with shape (S, V); patches, set_of, slot: for each patch of the group its index, its set
    and its place in that set.
    """

    sets: Tensor
    patches: Tensor
    set_of: Tensor
    slot: Tensor


def _group_by_size(visible: Tensor, num_patches: int, max_tokens: int) -> list[_Group]:
    """Distinct rows of `visible`, grouped by how many patches they hold, at most `max_tokens` tokens in a group."""
    if visible.dtype != torch.bool or visible.shape != (num_patches, num_patches):
        raise ValueError(
            f"visible: got {visible.dtype} with shape {tuple(visible.shape)}, expected bool with shape "
            f"({num_patches}, {num_patches}): one row of visible patches per patch"
        )
    seen_PP = visible.cpu() | torch.eye(num_patches, dtype=torch.bool)
    sets_SP, set_of_P = seen_PP.unique(dim=0, return_inverse=True)
    size_S = sets_SP.sum(1)
    groups = []
    for size in size_S.unique().tolist():
        for members in (size_S == size).nonzero()[:, 0].split(max(1, max_tokens // (size + 1))):
            sets_SV = sets_SP[members].nonzero()[:, 1].view(len(members), size)
            patches, set_of = (set_of_P[:, None] == members).nonzero(as_tuple=True)
            slot = (sets_SV[set_of] == patches[:, None]).nonzero()[:, 1]
            groups.append(_Group(sets_SV, patches, set_of, slot))
    return groups


def _position_embeddings(grid: tuple[int, int], width: int) -> Tensor:
    """Sines and cosines of both coordinates of a grid (rows, columns), row by row, with shape (patches, width)."""
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    waves = []
    for side in grid:
        angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency
        waves.append(torch.cat([angle.sin(), angle.cos()], dim=1))
    rows, columns = waves[0][:, None].expand(-1, grid[1], -1), waves[1][None].expand(grid[0], -1, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).float()


def _check_width(name: str, width: int, num_heads: int) -> None:
    divides = width >= 1 and not width % 4 and not width % num_heads
    expect(divides, name, width, f"a multiple of 4 and of the number of heads, {num_heads}")


def _config(args: dict[str, Any]) -> ViTMAEConfig:
    return ViTMAEConfig(
        image_size=args["patch_size"],  # of one patch: grids that are not square have no positions there
        patch_size=args["patch_size"],
        num_channels=args["num_channels"],
        hidden_size=args["hidden_size"],
        num_hidden_layers=args["num_layers"],
        num_attention_heads=args["num_heads"],
        intermediate_size=args["intermediate_size"],
        decoder_hidden_size=args["decoder_hidden_size"],
        decoder_num_hidden_layers=args["decoder_num_layers"],
        decoder_num_attention_heads=args["decoder_num_heads"],
        decoder_intermediate_size=args["decoder_intermediate_size"],
        layer_norm_eps=1e-6,
    )
