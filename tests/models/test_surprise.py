"""Surprise of parts and pixels against the difference of two marginals, by enumeration of the latent values."""

import torch
from helpers.assemblies import Assembly
from torch import Tensor

from lvd_lightning.models.surprise import part_surprise, pixel_surprise


def test_surprise_of_a_part_is_what_it_adds_to_the_rest(assembled: Assembly, images: Tensor) -> None:
    circuit, images = assembled.circuit, images[:3]
    found_BP = part_surprise(circuit, images)
    whole_B = assembled.log_joint(images).logsumexp(1)
    for position in (0, 2):
        mask_PD = torch.ones(circuit.num_positions, 12, dtype=torch.bool)
        mask_PD[position] = False
        rest = circuit.parts.join(mask_PD.expand(len(images), -1, -1))
        rest_B = assembled.log_joint(images, rest).logsumexp(1)
        torch.testing.assert_close(found_BP[:, position], rest_B - whole_B)


def test_surprise_of_a_pixel_is_what_it_adds_to_all_others(assembled: Assembly, images: Tensor) -> None:
    images = images[:3]
    found_BHW = pixel_surprise(assembled.circuit, images)
    whole_B = assembled.log_joint(images).logsumexp(1)
    for row, column in ((0, 0), (1, 2)):
        rest = torch.ones(images.shape, dtype=torch.bool)
        rest[:, :, row, column] = False
        rest_B = assembled.log_joint(images, rest).logsumexp(1)
        torch.testing.assert_close(found_BHW[:, row, column], rest_B - whole_B)
