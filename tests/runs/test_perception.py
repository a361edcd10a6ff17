"""What samples look like: of a circuit that draws test images, of one that draws noise; on one rank and on several."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lvd_lightning.parts import ImagePatches
from lvd_lightning.ranks import Ranks
from lvd_lightning.runs.contrast import contrast
from lvd_lightning.runs.frechet import frechet_distance
from lvd_lightning.runs.perception import Perception, perception_table


class Colours:
    """Bright and dark halves in colours of their own, as a datamodule would give them."""

    image_shape = (3, 4, 4)
    parts = ImagePatches((3, 4, 4), 2)

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        colour = torch.randint(0, 120, (300, 3, 1, 1), generator=generator)
        side = torch.tensor([0, 0, 100, 100])
        noise = torch.randint(0, 10, (300, 3, 4, 4), generator=generator)
        self.test = (colour + side + noise).to(torch.uint8)

    def num_examples(self, split: str) -> int:
        return len(self.test)

    def batch(self, split: str, rows: Tensor) -> Tensor:
        assert split == "test"
        return self.test[rows]

    def to_rgb(self, images: Tensor) -> Tensor:
        return images.to(torch.uint8)


class Copies:
    """Draws test images."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.images[torch.randint(len(self.images), (n,), generator=generator)]


class Mean(nn.Module):
    """Sees the mean of every channel of every patch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def activations(self, scaled: Tensor) -> list[Tensor]:
        return [self.scale * ImagePatches((3, 4, 4), 2).split(scaled).unflatten(2, (3, 4)).mean(3)]


def ranks(rank: int = 0, size: int = 1, sent: list[Tensor] | None = None) -> Any:
    def total(values: Tensor) -> Tensor:
        sent.append(values)  # type: ignore[union-attr]
        return values

    return SimpleNamespace(
        rank=rank,
        world_size=size,
        device=torch.device("cpu"),
        share=lambda indices: indices[rank::size],
        sum=total,
    )


def test_samples_like_test_images_have_their_figures() -> None:
    data = Colours()
    perception = Perception(data, Mean(), Ranks({"accelerator": "cpu", "devices": 1}), seed=0, num_samples=620)
    found, test = perception.of_samples(Copies(data.test)), perception.of_test()  # type: ignore[arg-type]
    assert found["std"] == pytest.approx(test["std"], rel=0.05)
    assert found["saturation"] == pytest.approx(test["saturation"], rel=0.05)
    assert found["border_step"] == pytest.approx(test["border_step"], rel=0.05)
    assert found["step_distance"] < 0.5
    assert test["step_distance"] == 0
    assert found["frechet_low"] <= found["frechet"] <= found["frechet_high"]
    assert found["frechet"] < 0.02


def test_other_samples_have_others() -> None:
    data = Colours()
    perception = Perception(data, Mean(), ranks(), seed=0, num_samples=200)
    noise = torch.randint(256, (50, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found, test = perception.of_samples(Copies(noise)), perception.of_test()  # type: ignore[arg-type]
    assert found["step_distance"] > 20
    assert found["border_step"] < 0.2 * test["border_step"]
    assert found["frechet_low"] > 0.05
    assert "frechet" not in Perception(data, None, ranks(), seed=0, num_samples=60).of_samples(Copies(noise))  # type: ignore


def test_several_ranks_draw_what_one_draws() -> None:
    data, sent = Colours(), []
    alone = Perception(data, Mean(), ranks(), seed=3, num_samples=130)._draw(Copies(data.test))  # type: ignore[arg-type]
    for rank in range(2):
        Perception(data, Mean(), ranks(rank, 2, sent), seed=3, num_samples=130)._draw(Copies(data.test))  # type: ignore
    assert torch.equal(sum(sent).to(torch.uint8), alone)
    other = Perception(data, Mean(), ranks(), seed=4, num_samples=130)._draw(Copies(data.test))  # type: ignore[arg-type]
    assert not torch.equal(other, alone)


def test_the_distance_is_that_of_mean_features() -> None:
    data = Colours()
    perception = Perception(data, Mean(), ranks(), seed=0, num_samples=200)
    drawn = perception._draw(Copies(data.test.flip(0)[:40]))  # type: ignore[arg-type]
    found = perception.of_samples(Copies(data.test.flip(0)[:40]))  # type: ignore[arg-type]
    rows = torch.linspace(0, 299, 200).long()
    seen = [(images.double() / 127.5 - 1).mean((2, 3)) for images in (drawn, data.test[rows])]
    assert found["frechet"] == pytest.approx(frechet_distance(*seen), rel=1e-4)
    assert found["std"] == pytest.approx(contrast(drawn).std)


def test_the_table_has_a_line_for_every_model() -> None:
    figures = {"std": 61.23, "saturation": 0.5, "step_distance": 1.234, "border_step": 2.5, "isolated_pixels": 0.015}
    seen = {**figures, "frechet": 0.12345, "frechet_low": 0.1, "frechet_high": 0.2}
    *_, test, model = perception_table({"test images": figures, "perceptual": seen})
    assert test == "| test images | 61.2 | 0.500 | 1.23 | 2.50 | 1.50 % |  |"
    assert model == "| perceptual | 61.2 | 0.500 | 1.23 | 2.50 | 1.50 % | 0.1235 (0.1 to 0.2) |"
