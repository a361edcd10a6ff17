"""The VQ-VAE: a normalised prior, decoders that see what they should, gradients that go where they should."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from lvd_lightning.teachers import VQVAE
from lvd_lightning.teachers.vqvae import DECODERS, CodePrior

SIZES = {"channels": 8, "num_features": 6, "codebook_size": 5, "num_components": 2}
PRIOR = {"prior_hidden_size": 8, "prior_num_layers": 1, "prior_num_heads": 2}


def _make(image_size: int = 16, patch_size: int = 4, decoder: str = "independent", **sizes: int) -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(image_size, patch_size, decoder=decoder, **(SIZES | PRIOR | sizes)).eval()


def _images(count: int, size: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def _ramps(count: int, generator: torch.Generator) -> Tensor:
    """Grey images whose brightness grows to the right and downwards."""
    slope = torch.rand(count, 1, 2, 1, generator=generator) * 8
    grid = torch.arange(16.0)
    grey = slope[:, :, 0, :, None] * grid[:, None] + slope[:, :, 1, :, None] * grid
    return grey.to(torch.uint8).expand(-1, 3, -1, -1).contiguous()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("image_size", "patch_size"), [(8, 2), (16, 4), (16, 8)])
def test_every_patch_has_a_feature_and_a_code(image_size: int, patch_size: int, decoder: str) -> None:
    vqvae, images = _make(image_size, patch_size, decoder), _images(3, image_size)
    num_patches = (image_size // patch_size) ** 2
    features, codes = vqvae.features(images), vqvae.codes(images)
    assert features.shape == (3, num_patches, 6)
    assert features.dtype == torch.float32
    distance = torch.cdist(features.double(), vqvae.codebook.codes.double().expand(3, -1, -1))
    assert torch.equal(codes, distance.argmin(-1))
    again = vqvae.reconstruct(codes)
    assert again.shape == images.shape
    assert again.dtype == torch.uint8


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_elbo_is_likelihood_plus_prior(decoder: str) -> None:
    vqvae, images = _make(decoder=decoder), _images(3)
    codes = vqvae.codes(images)
    raw = vqvae.decoder(vqvae.codebook.codes[codes])
    expected = torch.zeros(3)
    for b, i in itertools.product(range(3), range(16)):
        top, left = 4 * (i // 4), 4 * (i % 4)
        pixels = images[b, :, top : top + 4, left : left + 4].flatten(1)
        mixture = type(vqvae.likelihood(vqvae.codebook.codes[codes])).from_raw(raw[b, i], 2, 3)
        expected[b] += mixture.log_prob(pixels).sum()
    output = vqvae(images)
    torch.testing.assert_close(output.log_likelihood, expected)
    torch.testing.assert_close(vqvae.elbo(images), expected + vqvae.prior(codes))
    torch.testing.assert_close(output.elbo, vqvae.elbo(images))
    assert not vqvae.elbo(images).requires_grad


def test_the_prior_sums_to_one() -> None:
    torch.manual_seed(0)
    prior = CodePrior(3, 5, hidden_size=8, num_layers=2, num_heads=2, dropout=0.1).eval().double()
    with torch.no_grad():
        for parameter in prior.parameters():  # far from uniform
            parameter.mul_(4.0)
    sequences = torch.tensor(list(itertools.product(range(3), repeat=5)))
    log_prob = prior(sequences)
    assert log_prob.logsumexp(0).item() == pytest.approx(0.0, abs=1e-6)
    assert log_prob.std() > 0.5
    # In any order of the positions another distribution: they are told apart.
    assert (prior(sequences.flip(1)) - log_prob).abs().max() > 0.1


def test_the_independent_decoder_sees_one_code() -> None:
    changed = {}
    for decoder in DECODERS:
        vqvae = _make(decoder=decoder)
        codes = torch.zeros(1, 16, dtype=torch.int64)
        other = codes.clone()
        other[0, 5] = 1
        before, after = (vqvae.decoder(vqvae.codebook.codes[z])[0] for z in (codes, other))
        changed[decoder] = (before != after).flatten(1).any(1).nonzero()[:, 0].tolist()
    assert changed["independent"] == [5]
    assert {1, 4, 5, 6, 9} <= set(changed["convolutional"])


def test_a_feature_belongs_to_its_patch() -> None:
    vqvae = _make(32, num_residual_blocks=0)
    images = _images(1, 32)
    before = vqvae.features(images)[0]
    for patch in (0, 7, 18, 63):
        changed = images.clone()
        top, left = 4 * (patch // 8), 4 * (patch % 8)
        changed[..., top : top + 4, left : left + 4] ^= 255
        moved = (vqvae.features(changed)[0] - before).square().sum(1)
        assert moved[patch] > 0
        rows, columns = torch.arange(64) // 8 - patch // 8, torch.arange(64) % 8 - patch % 8
        far = torch.maximum(rows.abs(), columns.abs()) > 2
        assert (moved[far] == 0).all()


def test_reconstructions_are_decoded_where_the_code_is() -> None:
    vqvae = _make()
    codes = torch.arange(16)[None] % 5
    image = vqvae.reconstruct(codes)[0]
    for k in range(5):
        alone = vqvae.reconstruct(torch.full((1, 16), k))[0, :, :4, :4]
        for patch in range(k, 16, 5):
            top, left = 4 * (patch // 4), 4 * (patch % 4)
            assert torch.equal(image[:, top : top + 4, left : left + 4], alone)


def _gradients(module: torch.nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None and p.grad.abs().max() > 0]


def test_gradients_pass_the_quantisation_and_stay_in_the_prior() -> None:
    vqvae, images = _make(), _images(3)
    vqvae(images).log_prior.sum().backward()
    assert _gradients(vqvae.prior)
    assert not _gradients(vqvae.encoder)
    assert not _gradients(vqvae.decoder)
    vqvae.zero_grad()
    output = vqvae(images)
    output.features.retain_grad()
    output.log_likelihood.sum().backward()
    assert _gradients(vqvae.encoder)
    assert _gradients(vqvae.decoder)
    assert not _gradients(vqvae.prior)
    quantized = vqvae.codebook.codes[output.codes].requires_grad_()
    vqvae.likelihood(quantized).log_prob(vqvae._pixels(images)).sum().backward()
    torch.testing.assert_close(output.features.grad, quantized.grad)


def test_the_commitment_is_the_distance_from_the_codes() -> None:
    vqvae, images = _make(), _images(3)
    output = vqvae(images)
    nearest = torch.cdist(output.features, vqvae.codebook.codes.expand(3, -1, -1)).min(-1).values
    torch.testing.assert_close(output.commitment, (nearest.square() / 6).mean(1))


def test_a_pass_changes_nothing() -> None:
    vqvae = _make().train()
    before = {name: tensor.clone() for name, tensor in vqvae.state_dict().items()}
    vqvae(_images(3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in vqvae.state_dict().items())


@pytest.mark.parametrize("num_components", [1, 4])
@pytest.mark.parametrize("decoder", DECODERS)
def test_it_may_start_from_the_colours_of_images(decoder: str, num_components: int) -> None:
    """Channels of other means and widths, one of them constant, as grey images have under ycocg_r."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20, 3, 16, 16, generator=generator) * torch.tensor([30.0, 15.0, 0.0]).view(3, 1, 1)
    images = (noise + torch.tensor([90.0, 160.0, 128.0]).view(3, 1, 1)).round().clamp(0, 255).to(torch.uint8)
    vqvae = _make(decoder=decoder, num_components=num_components)
    vqvae.decoder.last.weight.data.zero_()  # what the biases say alone
    vqvae.start_from(images)
    bits = -vqvae(images).log_likelihood.mean() / (256 * math.log(2))
    entropy = sum(math.log2(width * math.sqrt(2 * math.pi * math.e)) for width in (30, 15))
    # A channel that never changes is given a standard deviation of one value, which costs two bits at first.
    assert entropy + 1.0 < bits < entropy + 2.5
    mean = vqvae.reconstruct(vqvae.codes(images)).float().mean((0, 2, 3))
    torch.testing.assert_close(mean, images.float().mean((0, 2, 3)), rtol=0, atol=2.0)


@pytest.mark.parametrize("decoder", DECODERS)
def test_it_learns(decoder: str) -> None:
    generator = torch.Generator().manual_seed(0)
    images, other = _ramps(32, generator), _ramps(32, generator)
    vqvae = _make(decoder=decoder, channels=16, codebook_size=16).train()
    vqvae.start_from(images)
    optimizer = torch.optim.Adam(vqvae.parameters(), lr=1e-2)
    bits = images[0].numel() * math.log(2)
    before = -vqvae.elbo(other).mean() / bits
    for _ in range(60):
        output = vqvae(images)
        loss = (-output.elbo / bits + 0.25 * output.commitment).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        vqvae.codebook.update(output.features, output.codes, generator)
    vqvae.eval()
    assert -vqvae.elbo(other).mean() / bits < before - 2.0
    codes = vqvae.codes(other)
    assert len(codes.unique()) > 5
    if decoder == "independent":  # the other takes longer to find out what is where
        error = (vqvae.reconstruct(codes).float() - other.float()).square().mean()
        assert error < 0.4 * other.float().var()


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="patch_size: got 3"):
        VQVAE(12, 3)
    with pytest.raises(ValueError, match="image_size: got 18"):
        VQVAE(18, 4)
    with pytest.raises(ValueError, match="decoder: got 'dense'"):
        VQVAE(decoder="dense")
    with pytest.raises(ValueError, match="num_components: got 0"):
        VQVAE(num_components=0)
    with pytest.raises(ValueError, match="prior_hidden_size: got 30"):
        VQVAE(prior_hidden_size=30)
    vqvae = _make()
    with pytest.raises(ValueError, match="expected whole numbers"):
        vqvae.features(_images(1).float())
    with pytest.raises(ValueError, match="encodes whole images"):
        vqvae.features(_images(1), torch.ones(16, 16, dtype=torch.bool))
