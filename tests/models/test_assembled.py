"""The circuit over whole images against sums over all latents, one conditional at a time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lvd_lightning.circuits as pc
from lvd_lightning.circuits import circuit as limits
from lvd_lightning.models import assembled as module
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.parts import ImagePatches

VALUES = 4
# Two pixels of different patches: the prior alone connects them.
PIXELS = ((0, 0, 1), (2, 3, 2))


def chi_square(counts: Tensor, expected: Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def counts_of(images: Tensor) -> Tensor:
    """How often the two pixels have each pair of values, (VALUES ** 2,)."""
    (a, b) = (images[:, c, y, x].long() for c, y, x in PIXELS)
    return torch.bincount(a * VALUES + b, minlength=VALUES**2).double()


def every_pair(image: Tensor) -> Tensor:
    """One image with all pairs of values at the two pixels."""
    out = image.repeat(VALUES**2, 1, 1, 1)
    for (c, y, x), value in zip(PIXELS, torch.cartesian_prod(*[torch.arange(VALUES)] * 2).T, strict=True):
        out[:, c, y, x] = value.to(torch.uint8)
    return out


def test_likelihood_is_the_sum_over_latents(assembled: Any, images: Tensor) -> None:
    expected = assembled.log_joint(images).logsumexp(1)
    torch.testing.assert_close(assembled.circuit.log_prob(images).detach(), expected)
    torch.testing.assert_close(assembled.circuit(images).detach(), expected)


def test_evidence_is_that_of_single_circuits(assembled: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    observed = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    observed[0], observed[1] = True, False
    for mask in (None, observed):
        torch.testing.assert_close(assembled.circuit.evidence(images, mask), assembled.given(images, mask))
    whole = assembled.circuit.evidence(images, observed)
    monkeypatch.setattr(limits, "MAX_NUMBERS", {"cpu": 1, "cuda": 1})
    torch.testing.assert_close(assembled.circuit.evidence(images, observed), whole)


def test_lvd_objective_is_one_term_of_the_sum(assembled: Any, images: Tensor) -> None:
    z = torch.randint(3, (len(images), 4), generator=torch.Generator().manual_seed(0))
    place = z @ torch.tensor([27, 9, 3, 1])
    expected = assembled.log_joint(images)[torch.arange(len(images)), place]
    torch.testing.assert_close(assembled.circuit.lvd_objective(images, z).detach(), expected)


def test_evidence_that_was_left_inexact_is_computed_again_where_it_counts(
    assembled: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies below the margin is lost here altogether: the objective stays exact, log p(x) is never overstated."""
    circuit = assembled.circuit
    z = torch.randint(3, (len(images), 4), generator=torch.Generator().manual_seed(0))
    expected = assembled.log_joint(images).logsumexp(1)
    objective = circuit.lvd_objective(images, z)
    exact = circuit.evidence

    def lossy(images: Tensor, observed: Tensor | None = None, margin: float | None = None) -> Tensor:
        found = exact(images, observed)
        return found if margin is None else found.masked_fill(found < found.amax(-1, keepdim=True) - margin, -torch.inf)

    monkeypatch.setattr(circuit, "evidence", lossy)
    monkeypatch.setattr(module, "MARGIN", 1e-9)  # only the best value is left
    torch.testing.assert_close(circuit.log_prob_and_objective(images, z), (expected, objective))
    log_p = circuit.log_prob(images)
    assert bool((log_p <= expected + 1e-9).all())
    assert bool((log_p < expected - 1e-3).any())
    monkeypatch.setattr(
        circuit,
        "evidence",
        lambda images, observed=None, margin=None: exact(images) - (torch.inf if margin else 0.0),
    )
    torch.testing.assert_close(circuit.log_prob(images), expected)


@pytest.mark.parametrize("num_latents", [None, 2])
def test_prior_is_normalised(
    make_assembly: Callable[..., Any], double_precision: None, num_latents: int | None
) -> None:
    circuit = make_assembly("tied", num_latents).circuit
    z = torch.cartesian_prod(*[torch.arange(3)] * 4)
    assert circuit.prior_log_prob(z).exp().sum().item() == pytest.approx(1.0)


def test_number_of_parameters(assembled: Any) -> None:
    # The prior over z: a row for the root, three rows for each of three edges, two free numbers in each.
    given = sum(pc.Circuit(graph).num_parameters for graph in assembled.graphs)
    assert assembled.circuit.num_parameters == 2 + 3 * 3 * 2 + given
    assert assembled.circuit.num_dims == 48


def test_circuits_of_patches(assembled: Any) -> None:
    z = torch.tensor([[0, 1, 2, 2], [1, 1, 0, 2]])
    circuit, head = assembled.circuit.head_index.locate(z)
    first = 0 if assembled.circuit.head_index.tied else 3 * torch.arange(4)
    before = torch.tensor([0, *[graph.num_heads for graph in assembled.graphs]]).cumsum(0)
    assert torch.equal(before[circuit] + head, z + first)


def test_samples_have_the_right_distribution(assembled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Few slots per pass, so that there are many passes.
    monkeypatch.setattr(limits, "MAX_NUMBERS", {"cpu": 4000 * assembled.circuit.conditional.plan.num_value_rows})
    drawn = assembled.circuit.sample(6000, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (6000, 3, 4, 4)
    assert drawn.dtype == torch.uint8
    pairs = every_pair(torch.zeros(3, 4, 4, dtype=torch.uint8))
    observed = torch.zeros(pairs.shape, dtype=torch.bool)
    for c, y, x in PIXELS:
        observed[:, c, y, x] = True
    expected = assembled.log_joint(pairs, observed).logsumexp(1).exp()
    assert expected.sum().item() == pytest.approx(1.0)
    assert chi_square(counts_of(drawn), 6000 * expected) < 44.3  # 0.01 % of 15 degrees of freedom


def test_samples_are_a_function_of_the_generator(assembled: Any) -> None:
    torch.manual_seed(1)
    one, same, other = (assembled.circuit.sample(20, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_inpainting_keeps_what_is_given_and_draws_the_rest_exactly(assembled: Any, images: Tensor) -> None:
    image, count = images[3], 6000
    observed = torch.ones(3, 4, 4, dtype=torch.bool)
    for c, y, x in PIXELS:
        observed[c, y, x] = False
    hidden = image.masked_fill(~observed, 255).expand(count, -1, -1, -1)  # no value of the circuits: it is not read
    drawn = assembled.circuit.inpaint(hidden, observed, generator=torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.uint8
    assert torch.equal(drawn[:, observed], image[observed].expand(count, -1))
    log_joint = assembled.log_joint(every_pair(image)).logsumexp(1)
    assert chi_square(counts_of(drawn), count * log_joint.softmax(0)) < 44.3


def test_redrawing_keeps_the_latent_values_and_nothing_else() -> None:
    """Of two heads one draws the values 0 and 1, the other one 2 and 3: values tell the head."""
    graphs = []
    for low in (True, False):
        graph = pc.hclt([-1, 0, 1, 2], 1, pc.Categorical(4))
        for node in graph.nodes:
            if node.kind == "input":
                node.params = torch.tensor([[0.5, 0.5, 0.0, 0.0] if low else [0.0, 0.0, 0.5, 0.5]])
        graphs.append(graph)
    prior = pc.Circuit(pc.hclt([-1, 0, 1, 2], 2, pc.SoftEvidence(2), generator=torch.Generator().manual_seed(0)))
    circuit = AssembledCircuit(prior, pc.Circuit(graphs), ImagePatches((1, 4, 4), 2, 4))
    x = circuit.sample(200, torch.Generator().manual_seed(1))
    again = circuit.redraw(x, torch.Generator().manual_seed(2))
    assert (again.dtype, again.shape) == (x.dtype, x.shape)
    assert torch.equal(again >= 2, x >= 2)
    assert float((again % 2 == x % 2).float().mean()) == pytest.approx(0.5, abs=0.05)


def test_inpainting_takes_one_mask_for_all_channels_or_one_per_image(assembled: Any, images: Tensor) -> None:
    observed = torch.zeros(len(images), 1, 4, 4, dtype=torch.bool)
    observed[0, :, :2] = True
    observed[1:] = True
    drawn = assembled.circuit.inpaint(images, observed, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn[1:], images[1:])
    assert torch.equal(drawn[0, :, :2], images[0, :, :2])
    assert not torch.equal(drawn[0], images[0])
    assert drawn.max() < VALUES


def test_expected_pixels_given_the_others(assembled: Any, images: Tensor) -> None:
    image = images[3]
    observed = torch.ones(3, 4, 4, dtype=torch.bool)
    for c, y, x in PIXELS:
        observed[c, y, x] = False
    hidden = torch.stack([image.masked_fill(~observed, 255), images[1]])
    mask = torch.stack([observed, torch.ones_like(observed)])
    found = assembled.circuit.expected(hidden, mask)
    assert torch.equal(found[1], images[1].to(found.dtype))
    assert torch.equal(found[0][observed], image[observed].to(found.dtype))
    pairs = every_pair(image)
    weight = assembled.log_joint(pairs).logsumexp(1).softmax(0)
    for c, y, x in PIXELS:
        torch.testing.assert_close(found[0, c, y, x], weight @ pairs[:, c, y, x].double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["tied", "both"])
def test_files_keep_every_bit(make_assembly: Callable[..., Any], images: Tensor, tmp_path: Path, kind: str) -> None:
    circuit = make_assembly(kind).circuit
    circuit.save(tmp_path)
    loaded = AssembledCircuit.load(tmp_path)
    assert torch.equal(loaded.log_prob(images), circuit.log_prob(images))
    assert (loaded.parts.arguments, loaded.head_index.tied) == (ImagePatches((3, 4, 4), 2).arguments, kind == "tied")
    for name, tensor in circuit.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


@pytest.mark.parametrize("missing", ["assembled.json", "prior.safetensors", "conditional.safetensors"])
def test_incomplete_folders_are_refused(make_assembly: Callable[..., Any], tmp_path: Path, missing: str) -> None:
    make_assembly("tied").circuit.save(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=f"{tmp_path}.*{missing}"):
        AssembledCircuit.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"patch_size": 2})])
def test_damaged_geometry_is_refused(make_assembly: Callable[..., Any], tmp_path: Path, content: str) -> None:
    make_assembly("tied").circuit.save(tmp_path)
    (tmp_path / "assembled.json").write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path)):
        AssembledCircuit.load(tmp_path)


def test_parts_that_do_not_belong_together_are_named(make_assembly: Callable[..., Any]) -> None:
    circuit = make_assembly("tied").circuit
    prior, conditional, parts = circuit.prior, circuit.conditional, ImagePatches((3, 4, 4), 2)
    graphs = conditional.to_graph()
    with pytest.raises(ValueError, match="prior: has 4 variables, expected one for each of the 16 parts"):
        AssembledCircuit(prior, conditional, ImagePatches((3, 4, 4), 1))
    with pytest.raises(ValueError, match="prior: expected a single circuit over SoftEvidence"):
        AssembledCircuit(conditional, conditional, parts)
    with pytest.raises(ValueError, match="prior: expected a single circuit"):
        AssembledCircuit(pc.Circuit([prior.to_graph()]), conditional, parts)
    with pytest.raises(ValueError, match="conditional: has 2 heads, expected 3 .* or 12"):
        AssembledCircuit(prior, pc.Circuit(graphs[:2]), parts)
    with pytest.raises(ValueError, match="conditional: is a single circuit over 12"):
        AssembledCircuit(prior, pc.Circuit(graphs[0]), parts)
    with pytest.raises(ValueError, match="over 4 variables, expected a batch .* over the 12"):
        AssembledCircuit(prior, pc.Circuit([pc.hclt(torch.tensor([-1, 0, 1, 2]), 2, pc.Categorical(4))] * 3), parts)
    four = [pc.hclt(torch.arange(-1, 11), 2, pc.Categorical(4), num_heads=4) for _ in range(3)]
    with pytest.raises(ValueError, match="a circuit has heads of two positions"):
        AssembledCircuit(prior, pc.Circuit(four), parts)


def test_wrong_images_and_masks_are_named(make_assembly: Callable[..., Any], images: Tensor) -> None:
    circuit = make_assembly("tied").circuit
    with pytest.raises(ValueError, match="expects values in 0..3, got"):
        circuit.log_prob(images + 4)
    with pytest.raises(ValueError, match=r"x: got shape \(9, 3, 4, 2\), expected images \(batch, 3, 4, 4\)"):
        circuit.log_prob(images[..., :2])
    for wrong in (torch.ones(3, 4, 4), torch.ones(9, 3, 4, 2, dtype=torch.bool), torch.ones(1, 9, 3, 4, 4).bool()):
        with pytest.raises(ValueError, match="observed: expected bool of a shape that broadcasts"):
            circuit.inpaint(images, wrong)
