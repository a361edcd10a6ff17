"""Max-product completions against the maximum over all latent values, one circuit at a time."""

import itertools

import torch
from helpers.assemblies import STATES, Assembly
from torch import Tensor

import lvd_lightning.circuits as pc
from lvd_lightning.models.decoding import max_product


def test_it_is_the_largest_over_all_latent_values(assembled: Assembly, images: Tensor) -> None:
    circuit = assembled.circuit
    observed = torch.zeros(images.shape, dtype=torch.bool)
    observed[:, :, :, :3] = True
    completed, log_B = max_product(circuit, images, observed)
    x_BPD, mask_BPD = circuit.split(images).long(), circuit.split(observed)
    best_BPK = torch.empty(len(images), circuit.num_positions, STATES)
    for position, state in itertools.product(range(circuit.num_positions), range(STATES)):
        g, head = (int(found) for found in circuit.head_index.locate(torch.tensor(state), torch.tensor(position)))
        single = pc.Circuit(assembled.graphs[g])
        best_BPK[:, position, state] = single.mpe(x_BPD[:, position], mask_BPD[:, position], head=head)[1]
    z_TP = torch.tensor(list(itertools.product(range(STATES), repeat=circuit.num_positions)))
    latent = [best_BPK[:, p, z_TP[:, p]] for p in range(circuit.num_positions)]
    torch.testing.assert_close(log_B, (circuit.prior_log_prob(z_TP).detach() + sum(latent)).amax(1))
    assert completed.dtype == images.dtype
    assert bool((completed == images)[observed].all())
    # What was found is worth as much as was said: decoded once more, with all of it given.
    torch.testing.assert_close(max_product(circuit, completed, torch.ones_like(observed))[1], log_B)
