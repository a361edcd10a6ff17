"""Vector-quantised autoencoder: a patch's feature is its encoding before quantisation, and its code the nearest.

Shapes: B images, C channels, H x W pixels, P patches, p patch side, X = p p pixels of a patch, E features, K codes,
Q raw parameters of a pixel's distribution.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, relu
from transformers import GPT2Config, GPT2Model

from lvd_lightning.checks import check_choice, check_counts, expect
from lvd_lightning.color import patchify, unpatchify
from lvd_lightning.teachers.codebook import Codebook
from lvd_lightning.teachers.logistics import LogisticMixture
from lvd_lightning.teachers.scaling import PixelScale, image_sides

__all__ = ["DECODERS", "VQVAE", "CodePrior", "VQVAEOutput"]

DECODERS = ("independent", "convolutional")

_LOGISTIC_STD = math.pi / math.sqrt(3.0)  # of a logistic distribution of scale one


class VQVAEOutput(NamedTuple):
    """What a vector-quantised autoencoder makes of a batch.

    log_likelihood: log p(x | z(x)) of each image in nats, with shape (B,).
    log_prior: log p(z(x)) of each image's codes in nats, with shape (B,).
    commitment: mean squared distance of each image's features from their codes, with shape (B,).
    features: before quantisation, with shape (B, P, E).
    codes: z(x), int64 with shape (B, P).
    """

    log_likelihood: Tensor
    log_prior: Tensor
    commitment: Tensor
    features: Tensor
    codes: Tensor

    @property
    def elbo(self) -> Tensor:
        """log p(x | z(x)) + log p(z(x)) in nats, with shape (B,): the codes are certain, so no entropy is added."""
        return self.log_likelihood + self.log_prior


class VQVAE(nn.Module):
    """Vector-quantised autoencoder whose likelihood is a distribution of whole numbers, with a prior over its codes.

    A convolutional encoder sees the whole image and gives one vector per patch; the decoder sees the nearest codes. The
    `independent` decoder gives the pixels of patch i a distribution that depends on the code of patch i alone, as the
    circuit has it, whose patches are independent given their latents; the `convolutional` one looks at neighbours too.
    Given the codes pixels are independent, channels of a pixel are not (see `LogisticMixture`). The prior is a causal
    transformer over the codes, row by row.

    `forward` changes nothing: after a training step, give its features and codes to `codebook.update`.

    Args:
        image_size: side of square images, or (height, width); multiples of `patch_size`.
        patch_size: side of a patch, a power of two and at least 2.
        channels: of the encoder, and of the decoder's hidden layers (twice as many in the independent one).
        num_residual_blocks: of the encoder and of the decoder each.
        num_features: E.
        codebook_size: K.
        decoder: one of `DECODERS`.
        num_components: of a pixel's mixture.
        codebook_decay: see `Codebook`.
        prior_hidden_size: width of the prior, a multiple of `prior_num_heads`.
        num_channels: C.
        num_categories: values of a pixel, one number or one for each channel.

    References:
        van den Oord et al., Neural Discrete Representation Learning, 2017, arXiv:1711.00937.
        Liu et al., Understanding the Distillation Process from Deep Generative Models to Tractable Probabilistic
        Circuits, ICML 2023, for the independent decoder.
    """

    #: See `lvd_lightning.teachers`.
    contextual = False
    positional = False

    def __init__(
        self,
        image_size: int | Sequence[int] = 32,
        patch_size: int = 4,
        channels: int = 128,
        num_residual_blocks: int = 2,
        num_features: int = 128,
        codebook_size: int = 1024,
        decoder: str = "independent",
        *,
        num_components: int = 10,
        codebook_decay: float = 0.99,
        prior_hidden_size: int = 128,
        prior_num_layers: int = 4,
        prior_num_heads: int = 4,
        prior_dropout: float = 0.1,
        num_channels: int = 3,
        num_categories: int | Sequence[int] = 256,
    ) -> None:
        super().__init__()
        height, width = image_sides(image_size)
        halves = patch_size >= 2 and not patch_size & (patch_size - 1)
        expect(halves, "patch_size", patch_size, "a power of two, 2 or more: the encoder halves sides")
        tiles = min(height, width) >= patch_size and not height % patch_size and not width % patch_size
        expect(tiles, "image_size", image_size, f"multiples of patch_size, {patch_size}")
        check_choice(DECODERS, decoder=decoder)
        check_counts(num_components=num_components)
        self.init_args: dict[str, Any] = {
            "image_size": [height, width],
            "patch_size": patch_size,
            "channels": channels,
            "num_residual_blocks": num_residual_blocks,
            "num_features": num_features,
            "codebook_size": codebook_size,
            "decoder": decoder,
            "num_components": num_components,
            "codebook_decay": codebook_decay,
            "prior_hidden_size": prior_hidden_size,
            "prior_num_layers": prior_num_layers,
            "prior_num_heads": prior_num_heads,
            "prior_dropout": prior_dropout,
            "num_channels": num_channels,
            "num_categories": num_categories if isinstance(num_categories, int) else list(num_categories),
        }
        self.image_shape = (num_channels, height, width)
        self.scale = PixelScale(self.image_shape, num_categories)
        self.patch_size = patch_size
        grid = (height // patch_size, width // patch_size)
        self.num_patches = grid[0] * grid[1]
        self.num_features = num_features
        self.num_components = num_components
        halvings = patch_size.bit_length() - 1
        raw = LogisticMixture.num_parameters(num_components, num_channels)
        self.encoder = _encoder(num_channels, channels, num_residual_blocks, num_features, halvings)
        self.codebook = Codebook(codebook_size, num_features, decay=codebook_decay)
        self.decoder: IndependentDecoder | ConvolutionalDecoder
        if decoder == "independent":
            self.decoder = IndependentDecoder(num_features, 2 * channels, num_residual_blocks, patch_size**2, raw)
        else:
            self.decoder = ConvolutionalDecoder(num_features, channels, num_residual_blocks, grid, patch_size, raw)
        self.decoder.last.weight.data.mul_(0.3)  # so that training begins near what the biases say
        self._place_components(torch.zeros(num_channels), torch.full((num_channels,), 0.5))
        self.prior = CodePrior(
            codebook_size, self.num_patches, prior_hidden_size, prior_num_layers, prior_num_heads, prior_dropout
        )

    def forward(self, images: Tensor) -> VQVAEOutput:
        """Encode, quantise, and take the likelihoods of images (B, C, H, W), as the datamodule gives them.

        Gradients of the likelihood pass through the quantisation to the encoder unchanged; those of the prior stay in
        the prior.
        """
        features_BPE = self._encode(images)
        codes_BP = self.codebook.nearest(features_BPE)
        quantized_BPE = self.codebook.codes[codes_BP]
        commitment_B = (features_BPE - quantized_BPE).square().mean((1, 2))
        through_BPE = features_BPE + (quantized_BPE - features_BPE).detach()
        log_BPX = self.likelihood(through_BPE).log_prob(self._pixels(images))
        return VQVAEOutput(log_BPX.sum((1, 2)), self.prior(codes_BP), commitment_B, features_BPE, codes_BP)

    @torch.no_grad()
    def start_from(self, images: Tensor) -> None:
        """Give pixels about the distribution that they have in some images (B, C, H, W), whatever the codes.

        For a decoder that has not been trained: it saves hundreds of steps of finding out.
        """
        values_CN = self._scaled(images).transpose(0, 1).flatten(1)
        std_C, mean_C = torch.std_mean(values_CN, dim=1)
        self._place_components(mean_C, std_C.clamp_min(self.scale.smallest_step))

    @torch.no_grad()
    def features(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """The continuous encoding of every patch, float32 with shape (B, P, E); one pass over the whole image.

        Args:
            images: whole numbers with shape (B, C, H, W), as the datamodule gives them.
            visible: None. Each patch is encoded in sight of all others; no part of the image can be hidden.
        """
        if visible is not None:
            raise ValueError(
                f"visible: got shape {tuple(visible.shape)}, expected None: a VQVAE encodes whole images, so there is "
                "nothing to choose (set latents.context to none)"
            )
        return self._encode(images).float()

    def activations(self, scaled: Tensor) -> list[Tensor]:
        """What the encoder's blocks make of whole images, each (B, places, channels), features last; gradients flow.

        Args:
            scaled: floating point images (B, C, H, W) in [-1, 1].
        """
        found, map_BCHW = [], scaled
        for layer in self.encoder:
            map_BCHW = layer(map_BCHW)
            if not isinstance(layer, nn.Conv2d):  # a convolution is seen after its nonlinearity
                found.append(map_BCHW.flatten(2).transpose(1, 2))
        return [*found, map_BCHW.flatten(2).transpose(1, 2)]

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """The code of every patch, int64 with shape (B, P)."""
        return self.codebook.nearest(self._encode(images))

    @torch.no_grad()
    def elbo(self, images: Tensor) -> Tensor:
        """The evidence lower bound log p(x | z(x)) + log p(z(x)) <= log p(x) in nats, with shape (B,)."""
        return self(images).elbo

    @torch.no_grad()
    def reconstruct(self, codes: Tensor) -> Tensor:
        """The means of the pixels given codes (B, P), rounded; with shape (B, C, H, W)."""
        mean_BPCX = self.likelihood(self.codebook.codes[codes]).mean()
        return unpatchify(mean_BPCX.round().flatten(2), self.patch_size, *self.image_shape[1:]).to(self.scale.dtype)

    def likelihood(self, quantized: Tensor) -> LogisticMixture:
        """The distributions of all pixels given vectors (B, P, E); leading dimensions (B, P)."""
        raw, values = self.decoder(quantized.to(self._dtype)), tuple(self.scale.num_categories)
        return LogisticMixture.from_raw(_precise(raw), self.num_components, self.image_shape[0], values)

    def _encode(self, images: Tensor) -> Tensor:
        encoded: Tensor = self.encoder(self._scaled(images))
        return encoded.flatten(2).transpose(1, 2)

    def _scaled(self, images: Tensor) -> Tensor:
        """Images in [-1, 1], in the type of the parameters."""
        return self.scale.floats(images, self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        """That of the network's parameters; the codebook keeps float32 at least."""
        return self.decoder.last.weight.dtype

    def _pixels(self, images: Tensor) -> Tensor:
        """The pixels of every patch, with shape (B, P, C, X)."""
        return patchify(images, self.patch_size).unflatten(2, (self.image_shape[0], -1))

    @torch.no_grad()
    def _place_components(self, mean: Tensor, std: Tensor) -> None:
        """Components side by side over the first channel, each as wide as the others; mean, std: with shape (C,)."""
        bias = self.decoder.last_bias().unflatten(0, (self.num_components, -1))  # (M, Q / M, X or 1)
        channels = len(mean)
        steps = torch.linspace(-1.5, 1.5, self.num_components) if self.num_components > 1 else torch.zeros(1)
        bias.zero_()
        bias[:, 1 : 1 + channels] = mean[:, None]
        bias[:, 1] += (steps * std[0])[:, None]
        bias[:, 1 + channels : 1 + 2 * channels] = (std / _LOGISTIC_STD).log()[:, None]
        bias[:, 1 + channels] -= 0.5 * math.log(self.num_components)


class CodePrior(nn.Module):
    """p(z_1) p(z_2 | z_1) ...: a causal transformer (GPT-2's architecture) over the P codes of an image.

    Args:
        num_codes: K; one more token marks the beginning.
        num_patches: P.
    """

    def __init__(
        self, num_codes: int, num_patches: int, hidden_size: int, num_layers: int, num_heads: int, dropout: float
    ) -> None:
        super().__init__()
        divides = hidden_size >= 1 and not hidden_size % num_heads
        expect(divides, "prior_hidden_size", hidden_size, f"a multiple of prior_num_heads, {num_heads}")
        config = GPT2Config(
            vocab_size=num_codes + 1,
            n_positions=num_patches,
            n_embd=hidden_size,
            n_layer=num_layers,
            n_head=num_heads,
            activation_function="gelu_pytorch_tanh",  # GPT-2's own "gelu_new" in one operation
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=num_codes,
            eos_token_id=num_codes,
            use_cache=False,
        )
        self.num_codes = num_codes
        self.gpt2 = GPT2Model(config)

    def forward(self, codes: Tensor) -> Tensor:
        """log p(z) in nats, with shape (B,); codes int64 with shape (B, P)."""
        begin_B1 = codes.new_full((len(codes), 1), self.num_codes)
        hidden_BPE = self.gpt2(torch.cat([begin_B1, codes[:, :-1]], dim=1)).last_hidden_state
        logits_BPK = linear(hidden_BPE, self.gpt2.wte.weight[: self.num_codes])
        nats_N = cross_entropy(_precise(logits_BPK).flatten(0, 1), codes.flatten(), reduction="none")
        return -nats_N.view(codes.shape).sum(1)


class IndependentDecoder(nn.Module):
    """An MLP for each patch alone: (B, P, E) to (B, P, Q, X)."""

    def __init__(self, num_features: int, width: int, num_blocks: int, num_pixels: int, num_raw: int) -> None:
        super().__init__()
        self.num_raw = num_raw
        blocks = [_Residual(nn.Linear(width, width), nn.Linear(width, width)) for _ in range(num_blocks)]
        self.layers = nn.Sequential(nn.Linear(num_features, width), *blocks, nn.ReLU())
        self.last = nn.Linear(width, num_raw * num_pixels)

    def forward(self, quantized: Tensor) -> Tensor:
        out_BPQX: Tensor = self.last(self.layers(quantized)).unflatten(-1, (self.num_raw, -1))
        return out_BPQX

    def last_bias(self) -> Tensor:
        """The bias of the raw parameters, a view with shape (Q, X)."""
        return self.last.bias.detach().view(self.num_raw, -1)


class ConvolutionalDecoder(nn.Module):
    """The encoder's mirror image: (B, P, E) to (B, P, Q, X), every patch in sight of its neighbours."""

    def __init__(
        self, num_features: int, channels: int, num_blocks: int, grid: tuple[int, int], patch_size: int, num_raw: int
    ) -> None:
        super().__init__()
        self.grid, self.patch_size = grid, patch_size
        layers: list[nn.Module] = [nn.Conv2d(num_features, channels, 3, padding=1)]
        layers += [_convolutional_block(channels) for _ in range(num_blocks)]
        widths = [channels, *[max(1, channels // 2)] * (patch_size.bit_length() - 1)]
        for wide, narrow in pairwise(widths):
            layers += [nn.ReLU(), nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1)]
        self.layers = nn.Sequential(*layers, nn.ReLU())
        self.last = nn.Conv2d(widths[-1], num_raw, 1)

    def forward(self, quantized: Tensor) -> Tensor:
        map_BEhw = quantized.transpose(1, 2).unflatten(2, self.grid)
        raw_BQHW = self.last(self.layers(map_BEhw))
        return patchify(raw_BQHW, self.patch_size).unflatten(2, (raw_BQHW.shape[1], -1))

    def last_bias(self) -> Tensor:
        """The bias of the raw parameters, a view with shape (Q, 1)."""
        assert self.last.bias is not None
        return self.last.bias.detach()[:, None]


class _Residual(nn.Module):
    """x + second(relu(first(relu(x))))."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(relu(self.first(relu(x))))
        return out


def _convolutional_block(channels: int) -> _Residual:
    narrow = max(1, channels // 4)
    return _Residual(nn.Conv2d(channels, narrow, 3, padding=1), nn.Conv2d(narrow, channels, 1))


def _encoder(num_channels: int, channels: int, num_blocks: int, num_features: int, halvings: int) -> nn.Sequential:
    """Images to maps of features, every side halved so many times; half the channels before the last halving."""
    widths = [num_channels, *[max(1, channels // 2)] * (halvings - 1), channels]
    layers: list[nn.Module] = []
    for narrow, wide in pairwise(widths):
        layers += [nn.Conv2d(narrow, wide, 4, stride=2, padding=1), nn.ReLU()]
    layers.append(nn.Conv2d(channels, channels, 3, padding=1))
    layers += [_convolutional_block(channels) for _ in range(num_blocks)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(channels, num_features, 1))


def _precise(values: Tensor) -> Tensor:
    """Half precision as float32, in which the tails of a likelihood have their digits; others as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
