"""Structures by name: the geometry that patches have, sizes, and students and baselines that are made of them."""

import json
from typing import Any

import pytest
import torch

import lvd_lightning.circuits as pc
from lvd_lightning.color import patchify
from lvd_lightning.models.structures import PartStructure
from lvd_lightning.stages import CircuitBaseline, ConditionalStudent

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on small loaders

SHAPE = (3, 2, 2)
BYTES = pc.Categorical(256)
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("hclt", {}),
    ("rat_spn", {"num_repetitions": 2}),
    ("rat_spn", {"depth": 1, "product": "kronecker"}),
    ("poon_domingos", {}),
    ("poon_domingos", {"delta": [1], "product": "kronecker"}),
]


def test_rectangles_of_a_patch_are_its_variables() -> None:
    """Leaves are the three channels of one pixel, and every region is a rectangle, in the order of `patchify`."""
    graph = PartStructure.of("poon_domingos", None).graph((3, 4, 4), 2, leaf=BYTES)
    place = torch.arange(48).view(1, 3, 4, 4)  # what a variable of the one patch of this image is
    assert torch.equal(patchify(place, 4)[0, 0], torch.arange(48))
    row, column = (torch.arange(16).view(4, 4) // 4).expand(3, 4, 4), torch.arange(4).expand(3, 4, 4)
    scopes = {scope for index, scope in enumerate(graph.scopes()) if graph.nodes[index].kind != "input"}
    for scope in scopes:
        inside = torch.zeros(48, dtype=torch.bool)
        inside[sorted(scope)] = True
        inside = inside.view(3, 4, 4)
        assert torch.equal(inside[0], inside[1])
        assert torch.equal(inside[0], inside[2])
        height, width = (len(found[inside].unique()) for found in (row, column))
        assert int(inside[0].sum()) == height * width
    assert len(scopes) == 100  # all rectangles of 4 x 4 pixels


@pytest.mark.parametrize(("side", "steps"), [(1, [1]), (2, [1]), (4, [1]), (8, [2, 1]), (32, [8, 4, 2, 1])])
def test_steps_follow_from_the_side(side: int, steps: list[int]) -> None:
    found, told = (PartStructure.of("poon_domingos", given) for given in (None, {"delta": steps}))
    nodes = [len(kind.graph((1, side, side), 1, leaf=BYTES).nodes) for kind in (found, told)]
    assert nodes[0] == nodes[1]


def test_repetitions_share_the_inputs_of_single_variables() -> None:
    graph = PartStructure.of("rat_spn", {"num_repetitions": 3}).graph((3, 4, 4), 2, leaf=BYTES)
    assert sorted(node.variable for node in graph.nodes if node.kind == "input") == list(range(48))
    assert len(graph.nodes[graph.root].children) == 3


@pytest.mark.parametrize(("name", "settings"), KINDS)
@pytest.mark.parametrize("units", [1, 3])
def test_number_of_parameters(name: str, settings: dict[str, Any], units: int) -> None:
    """The polynomial, where a random structure is the one that the same generator draws."""
    kind, tree = PartStructure.of(name, settings), torch.arange(-1, 11)
    counts = kind.num_parameters(SHAPE, leaf=BYTES, generator=torch.Generator().manual_seed(3))
    graph = kind.graph(SHAPE, units, leaf=BYTES, parents=tree, generator=torch.Generator().manual_seed(3))
    assert sum(count * units**power for power, count in counts.items()) == pc.Circuit(graph).num_parameters


@pytest.mark.parametrize(("name", "settings"), KINDS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("init", ["quantiles", "random"])
def test_students_learn(run: Any, name: str, settings: dict[str, Any], tied: bool, init: str) -> None:
    module = ConditionalStudent(3, tied=tied, init=init, structure=name, structure_settings=settings, slots=3.0)
    run.begin("conditional", module)
    images, z = run.data.splits["train"], run.data.z["train"]
    before = module.assembled.lvd_objective(images, z).mean()
    run.trainer("conditional", 4).fit(module, datamodule=run.data)
    assert module.assembled.lvd_objective(images, z).mean() > before + 5
    graph = module.assembled.conditional.to_graph()[0]
    kinds = {type(node.units) for node in graph.nodes if node.kind == "product" and len(node.children) == 2}
    assert (torch.Tensor in kinds) == (settings.get("product") == "kronecker")


@pytest.mark.parametrize(("name", "settings"), KINDS[1:])
def test_everything_after_it_works(run: Any, name: str, settings: dict[str, Any]) -> None:
    """Files, likelihoods of whole images, samples, completions, means; several heads."""
    module = ConditionalStudent(
        2, num_heads=2, min_examples=5, structure=name, structure_settings=settings, val_images=8
    )
    results = run.complete("conditional", module)
    circuit, images = module.assembled, run.data.splits["val"][:6]
    assert results["num_heads"] == circuit.num_states == sum(module.heads_per_circuit) > 3
    evidence = circuit.evidence(images)
    loaded = pc.load(run.folder / "conditional" / "conditional")
    by_hand = torch.cat(list(loaded.log_prob(patchify(images, 2).flatten(0, 1))), 1)
    heads = [g * loaded.num_heads + h for g, count in enumerate(module.heads_per_circuit) for h in range(count)]
    torch.testing.assert_close(evidence.flatten(0, 1), by_hand[:, heads].detach())
    observed = torch.zeros(images.shape, dtype=torch.bool)
    observed[..., :3] = True
    generator = torch.Generator().manual_seed(0)
    filled = circuit.inpaint(images, observed, generator=generator)
    assert torch.equal(filled[observed], images[observed])
    assert circuit.sample(3, generator=generator).shape == (3, 3, 4, 4)
    mean = circuit.expected(images, observed)
    torch.testing.assert_close(mean[observed], images[observed].to(mean.dtype))
    assert mean.min() >= 0
    assert mean.max() <= 255


@pytest.mark.parametrize(("name", "settings"), KINDS)
@pytest.mark.parametrize("init", ["quantiles", "random"])
def test_baselines_are_sized_and_learn(run: Any, name: str, settings: dict[str, Any], init: str) -> None:
    """The fewest units with as many parameters as wanted, nearly; the plan says all that a second start needs."""
    (run.folder / "finetune").mkdir()
    run.finish("finetune", {"num_parameters": 70_000})
    settings = settings | ({"depth": 6} if settings.get("depth") else {})
    make = {"structure": name, "structure_settings": settings, "seconds": 0, "init": init, "batch_size": 40}
    module = run.begin("baseline", CircuitBaseline(**make))
    size = module.circuit("em").num_parameters
    units = json.loads((run.folder / "baseline" / "plan.json").read_text())["num_units"]
    assert size >= 0.98 * 70_000
    fewer = run.begin("baseline", CircuitBaseline(**make, num_units=units - 1))  # the plan stays
    assert fewer.circuit("em").num_parameters == size
    generator = run.context("baseline").generator("parameters")
    counts = module.structure.num_parameters((3, 4, 4), leaf=BYTES, generator=generator)
    assert sum(count * (units - 1) ** power for power, count in counts.items()) < 0.98 * 70_000
    before = module.circuit("em").log_prob(run.data.splits["train"].flatten(1)).mean()
    run.trainer("baseline", 3).fit(module)
    assert module.circuit("em").log_prob(run.data.splits["train"].flatten(1)).mean() > before


@pytest.mark.parametrize(
    ("structure", "settings", "message"),
    [
        ("hmm", None, "structure: got 'hmm', expected one of hclt, rat_spn, poon_domingos"),
        ("hclt", {"depth": 2}, "structure_settings: hclt has no setting 'depth'; its settings are: none"),
        ("rat_spn", {"delta": 2}, "structure_settings: rat_spn has no setting 'delta'; .* depth, num_repetitions, pro"),
        ("rat_spn", {"depth": 0}, "structure_settings.depth: got 0, expected a whole number of at least 1"),
        ("rat_spn", {"num_repetitions": 1.5}, "structure_settings.num_repetitions: got 1.5, expected a whole number"),
        ("rat_spn", {"product": "sum"}, "structure_settings.product: got 'sum', expected one of hadamard, kronecker"),
        ("poon_domingos", {"delta": []}, r"structure_settings.delta: got \[\], expected pixels"),
        ("poon_domingos", {"delta": [2, 0]}, r"structure_settings.delta: got \[2, 0\], expected pixels"),
    ],
)
def test_wrong_settings_are_named(structure: Any, settings: dict[str, Any] | None, message: str) -> None:
    for kind in (ConditionalStudent, CircuitBaseline):
        with pytest.raises(ValueError, match=message):
            kind(structure=structure, structure_settings=settings)
