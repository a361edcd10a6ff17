"""The masked autoencoder: features of exactly the visible patches, masks, positions, and a loss that falls."""

import pytest
import torch
from torch import Tensor

from lvd_lightning.color import patchify
from lvd_lightning.teachers import MAE

NUM_PATCHES = 16


@pytest.fixture
def mae() -> MAE:
    torch.manual_seed(0)
    return MAE(
        image_size=16,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        decoder_hidden_size=16,
        decoder_num_layers=1,
        decoder_num_heads=2,
    ).eval()


def _images(count: int, seed: int = 0, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def _random_visible(seed: int = 1) -> Tensor:
    return torch.rand(NUM_PATCHES, NUM_PATCHES, generator=torch.Generator().manual_seed(seed)) < 0.3


def _features_by_hand(mae: MAE, images: Tensor, visible: Tensor) -> Tensor:
    """One sequence per image and patch, built from the transformer's own parts."""
    vit = mae.vit_mae.vit
    pixels = images.double() / 127.5 - 1
    embedded = vit.embeddings.patch_embeddings(pixels) + vit.embeddings.position_embeddings[:, 1:]
    rows = []
    for i in range(NUM_PATCHES):
        seen = sorted({i, *visible[i].nonzero()[:, 0].tolist()})
        hidden = torch.cat([vit.embeddings.cls_token.expand(len(images), -1, -1), embedded[:, seen]], dim=1)
        for layer in vit.layers:
            hidden = layer(hidden)
        rows.append(vit.layernorm(hidden)[:, 1 + seen.index(i)])
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("max_tokens", [None, 7, 40])
@pytest.mark.parametrize("case", ["alone", "random", "all", "ancestors"])
def test_features_are_those_of_one_patch_at_a_time(mae: MAE, case: str, max_tokens: int | None) -> None:
    visible = {
        "alone": torch.eye(NUM_PATCHES, dtype=torch.bool),
        "random": _random_visible(),
        "all": torch.ones(NUM_PATCHES, NUM_PATCHES, dtype=torch.bool),
        "ancestors": torch.ones(NUM_PATCHES, NUM_PATCHES, dtype=torch.bool).tril(),
    }[case]
    images = _images(5)
    given = None if case == "alone" else visible
    expected = _features_by_hand(mae.double(), images, visible).float()
    torch.testing.assert_close(mae.float().features(images, given, max_tokens), expected, rtol=1e-4, atol=1e-5)


def test_an_invisible_patch_never_changes_a_feature(mae: MAE) -> None:
    visible = _random_visible()
    images = _images(3)
    before = mae.features(images, visible)
    for j in range(NUM_PATCHES):
        changed = images.clone()
        row, column = 4 * (j // 4), 4 * (j % 4)
        changed[:, :, row : row + 4, column : column + 4] ^= 255
        after = mae.features(changed, visible)
        seen = visible[:, j].clone()
        seen[j] = True
        assert torch.equal(after[:, ~seen], before[:, ~seen])
        assert (after[:, seen] != before[:, seen]).any(-1).all()


def test_features_know_positions(mae: MAE) -> None:
    """The same pixels at two places are encoded differently: the position embeddings are not left at zero."""
    images = torch.full((1, 3, 16, 16), 90, dtype=torch.uint8)
    features = mae.features(images)[0]
    distance = torch.cdist(features, features) + 1e9 * torch.eye(NUM_PATCHES)
    assert distance.min() > 1e-2
    assert mae.vit_mae.decoder.decoder_pos_embed[0, 1:].unique(dim=0).shape[0] == NUM_PATCHES


@pytest.mark.parametrize(("mask_ratio", "expected"), [(0.0, 1), (0.1, 2), (0.5, 8), (0.9, 14), (1.0, 15)])
def test_the_mask_ratio_is_the_calls_own(mae: MAE, mask_ratio: float, expected: int) -> None:
    noise = torch.rand(4, NUM_PATCHES, generator=torch.Generator().manual_seed(0))
    output = mae(_images(4), mask_ratio, noise)
    assert output.masked.sum(1).tolist() == [expected] * 4
    assert torch.equal(output.masked, noise >= noise.sort(1).values[:, NUM_PATCHES - expected, None])


def test_the_loss_is_the_squared_error_on_masked_patches(mae: MAE) -> None:
    images = _images(3)
    output = mae(images, 0.6, torch.rand(3, NUM_PATCHES))
    error = (output.reconstruction - (images.float() / 127.5 - 1)).square()
    expected = torch.stack([patchify(error, 4)[b][output.masked[b]].mean() for b in range(3)])
    torch.testing.assert_close(output.loss, expected)


def test_masked_pixels_do_not_reach_the_reconstruction(mae: MAE) -> None:
    noise = torch.rand(2, NUM_PATCHES)
    images = _images(2)
    output = mae(images, 0.5, noise)
    hidden = output.masked.view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    again = mae(torch.where(hidden, 255 - images, images), 0.5, noise)
    torch.testing.assert_close(again.reconstruction, output.reconstruction)


def test_the_loss_falls(mae: MAE) -> None:
    """Images that are smooth ramps: what is hidden follows from what is seen and from where it is."""
    generator = torch.Generator().manual_seed(0)
    slope = torch.rand(64, 3, 2, generator=generator) * 8
    grid = torch.arange(16.0)
    ramps = slope[..., 0, None, None] * grid[:, None] + slope[..., 1, None, None] * grid
    images = ramps.to(torch.uint8)
    optimizer = torch.optim.AdamW(mae.train().parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = mae(images, 0.5, torch.rand(64, NUM_PATCHES, generator=generator)).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])


def test_wrong_arguments_are_named(mae: MAE) -> None:
    with pytest.raises(ValueError, match="image_size: got 18"):
        MAE(image_size=18)
    with pytest.raises(ValueError, match="hidden_size: got 30"):
        MAE(hidden_size=30)
    with pytest.raises(ValueError, match="expected whole numbers"):
        mae.features(_images(1).float())
    with pytest.raises(ValueError, match=r"expected bool with shape \(16, 16\)"):
        mae.features(_images(1), torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask_ratio: got 1\.5"):
        mae(_images(1), 1.5, torch.rand(1, NUM_PATCHES))
    with pytest.raises(ValueError, match="noise: got shape"):
        mae(_images(2), 0.5, torch.rand(1, NUM_PATCHES))
