"""Distillation: partners, what is inherited and what stays as it was, distances against their definitions."""

from collections.abc import Callable

import pytest
import torch
from helpers.flows import disturbed
from torch import Tensor

from lvd_lightning.normalizing_flows import Glow, TabularFlow
from lvd_lightning.normalizing_flows.distillation import (
    hidden_distance,
    inherit_permutations,
    inherit_weights,
    inherited_orders,
    latent_distance,
    partners,
    synthesis_distance,
)
from lvd_lightning.normalizing_flows.tabular import random_orders

pytestmark = pytest.mark.usefixtures("double_precision")


def glow(num_steps: int, seed: int = 0, hidden_size: int = 4) -> Glow:
    torch.manual_seed(seed)
    return disturbed(Glow((3, 4, 4), num_steps, 2, hidden_size, torch.Generator().manual_seed(seed)), by=0.05)


def tabular(num_steps: int, orders: list[list[int]] | None = None) -> TabularFlow:
    torch.manual_seed(0)
    orders = orders or random_orders(5, num_steps, torch.Generator().manual_seed(1))
    return disturbed(TabularFlow("maf", 5, orders, hidden_size=6, num_hidden_layers=1))


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def unchanged(module: torch.nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(("teacher", "student"), [(5, 3), (32, 8), (8, 2), (4, 4), (7, 1), (10, 9)])
def test_partners_rise_and_the_last_steps_are_partners(teacher: int, student: int) -> None:
    found = partners(teacher, student)
    assert len(found) == len(set(found)) == student
    assert found == sorted(found)
    assert found[-1] == teacher - 1
    assert student == 1 or found[0] == 0


def test_of_five_steps_and_three_the_first_third_and_fifth_are_partners() -> None:
    assert [step + 1 for step in partners(5, 3)] == [1, 3, 5]
    with pytest.raises(
        ValueError, match="num_steps: got 4 for a student of a flow of 3 steps, expected as many at most"
    ):
        partners(3, 4)


def test_inherited_permutations_are_the_products_between_partners_and_the_teachers_stay() -> None:
    teacher, student = glow(5), glow(3, seed=7)
    before = state(teacher)
    inherit_permutations(student, teacher)
    x = torch.arange(24.0)
    for level, channels in enumerate((12, 24)):
        theirs = [step.convolution.permutation for step in teacher.level_steps(level)]
        ours = [step.convolution.permutation for step in student.level_steps(level)]
        values = x[:channels]
        for permutation in theirs:
            values = values[permutation]
        whole = x[:channels]
        for permutation in ours:
            whole = whole[permutation]
        assert torch.equal(values, whole)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1][theirs[2]])
        ours[0][0] = -1  # a copy: what is done to it is not done to the teacher
    assert unchanged(teacher, before)


def test_inherited_orders_are_those_of_partners() -> None:
    teacher = tabular(5)
    assert inherited_orders(teacher, 3) == [teacher.orders[number].tolist() for number in (0, 2, 4)]


@pytest.mark.parametrize("kind", ["glow", "tabular"])
def test_a_student_of_as_many_steps_that_inherits_everything_is_its_teacher(kind: str) -> None:
    if kind == "glow":
        teacher, student = glow(3), glow(3, seed=5)
        inherit_permutations(student, teacher)
        x = torch.randn(2, 3, 4, 4)
    else:
        first = tabular(3)
        first.start_from(3 + torch.randn(9, 5))
        teacher, student = first, disturbed(tabular(3, inherited_orders(first, 3)))
        x = torch.randn(2, 5)
    before = state(teacher)
    assert not torch.allclose(student.encode(x).log_prob, teacher.encode(x).log_prob)
    inherit_weights(student, teacher)
    assert torch.equal(student.encode(x).log_prob, teacher.encode(x).log_prob)
    for parameter in student.parameters():
        parameter.data.zero_()
    assert unchanged(teacher, before)


def test_a_shorter_student_inherits_the_weights_of_its_partners() -> None:
    teacher, student = glow(5), glow(3, seed=5)
    inherit_weights(student, teacher)
    for step, partner in enumerate((0, 2, 4)):
        ours, theirs = student.level_steps(1)[step], teacher.level_steps(1)[partner]
        assert torch.equal(ours.coupling.last.weight, theirs.coupling.last.weight)
        assert torch.equal(ours.norm.shift, theirs.norm.shift)
    with pytest.raises(ValueError, match="inherit_weights: levels.0.steps.0.coupling.body.0.weight has shape"):
        inherit_weights(glow(3, hidden_size=5), teacher)


def test_distances_are_means_of_squares_over_partners() -> None:
    teacher, student = tabular(5), tabular(3)
    x = torch.randn(4, 5)
    ours, theirs = student.encode(x), teacher.encode(x)
    expected = (ours.latents[0] - theirs.latents[0]).square().mean()
    assert latent_distance(ours, theirs).item() == pytest.approx(expected.item())
    squares = [(ours.hidden[i] - theirs.hidden[j]).square().mean() for i, j in enumerate((0, 2, 4))]
    assert hidden_distance(ours, theirs).item() == pytest.approx(torch.stack(squares).mean().item())
    flow, other = glow(2), glow(4)
    images = torch.randn(3, 3, 4, 4)
    a, b = flow.encode(images), other.encode(images)
    sums = sum((p - q).square().sum().item() for p, q in zip(a.hidden, b.hidden, strict=True))
    assert hidden_distance(a, b).item() == pytest.approx(sums / (3 * (48 + 24)))
    assert hidden_distance(a, a).item() == 0


@pytest.mark.parametrize("of_features", [False, True])
@pytest.mark.parametrize("make", [glow, tabular])
def test_what_is_synthesised_is_compared_and_teaches_the_student_alone(
    make: Callable[[int], Glow | TabularFlow], of_features: bool
) -> None:
    teacher, student = make(3), make(2)
    teacher.requires_grad_(False)

    def distance(of: Glow | TabularFlow) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return synthesis_distance(of, teacher, 6, 0.7, of_features, torch.zeros(()), generator)

    assert distance(teacher).item() < 1e-9
    found = distance(student)
    assert found.item() > 1e-3
    found.backward()
    moved = [p.grad for p in student.parameters() if p.grad is not None and bool(p.grad.any())]
    assert moved
    if not of_features:
        z = [
            0.7 * torch.randn(6, *shape, generator=g)
            for g in [torch.Generator().manual_seed(0)]
            for shape in student.latent_shapes
        ]
        expected = ((student.decode(z) - teacher.decode(z)) / teacher.data_scale).abs().mean()
        assert found.item() == pytest.approx(expected.item())
