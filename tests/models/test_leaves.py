"""A family of inputs from a config: sizes come from the data, and what does not fit them is named."""

import dataclasses
from typing import Any

import pytest

import lvd_lightning.circuits as pc
from lvd_lightning.models.leaves import LeafChoice


@dataclasses.dataclass(frozen=True)
class Density(pc.Gaussian):
    """A density that does not know how to be integrated."""

    @classmethod
    def for_values(cls, num_values: int | None, **settings: Any) -> pc.Distribution:
        return cls(**settings)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, pc.Categorical(256)),
        ("Binomial", pc.Binomial(255)),
        ("lvd_lightning.circuits.DiscretizedLogistic", pc.DiscretizedLogistic(256)),
        (
            {"class_path": "lvd_lightning.circuits.Categorical", "init_args": {"num_categories": 300}},
            pc.Categorical(300),
        ),
        ({"class_path": "Gaussian"}, pc.DiscretizedGaussian(256)),
        ({"class_path": "Gaussian", "init_args": {"min_std": 0.5}}, pc.DiscretizedGaussian(256, min_std=0.5)),
    ],
)
def test_sizes_come_from_the_data(given: Any, expected: pc.Distribution) -> None:
    assert LeafChoice(given).over(pc.Categorical(256)) == expected


def test_every_variable_has_its_own_size() -> None:
    found = LeafChoice("Binomial").over([pc.Categorical(256), pc.Categorical(511)])
    assert found == [pc.Binomial(255), pc.Binomial(510)]
    smooth = {"class_path": "lvd_lightning.circuits.OrderedCategorical", "init_args": {"share": 0.1, "width": 2.0}}
    found = LeafChoice(smooth).over([pc.Categorical(256), pc.Categorical(511)])
    assert found == [pc.OrderedCategorical(size, share=0.1, width=2.0) for size in (256, 511)]
    assert LeafChoice("Gaussian").over(pc.Gaussian(min_std=0.1)) == pc.Gaussian()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("Nonsense", "leaf: the distribution 'Nonsense' is unknown, expected one of Bernoulli"),
        ("nowhere.Binomial", "leaf: no class 'nowhere.Binomial'"),
        ("lvd_lightning.circuits.Nonsense", "leaf: no class 'lvd_lightning.circuits.Nonsense'"),
        ("torch.nn.Linear", "leaf: torch.nn.Linear is no family"),
        ("SoftEvidence", "leaf: SoftEvidence is no family"),
        ({"init_args": {}}, "leaf: expected class_path"),
        ({"class_path": "Binomial", "init_args": {"trials": 3}}, "leaf: Binomial has no setting 'trials'.* total"),
    ],
)
def test_what_is_no_family_is_refused_at_once(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeafChoice(given)


@pytest.mark.parametrize(
    ("given", "default", "message"),
    [
        ("Bernoulli", pc.Categorical(256), "leaf: Bernoulli.* has 2 values, but the data have 256"),
        (
            {"class_path": "Binomial", "init_args": {"total": 254}},
            pc.Categorical(256),
            "leaf: Binomial.* has 255 values, but the data have 256",
        ),
        (
            {"class_path": "Gaussian", "init_args": {"min_std": -1.0}},
            pc.Categorical(256),
            "leaf: DiscretizedGaussian: min_std must lie in",
        ),
        (
            {"class_path": "OrderedCategorical", "init_args": {"share": -1.0}},
            pc.Categorical(256),
            "leaf: OrderedCategorical: share: got -1.0, expected a number of at least 0",
        ),
        ("Binomial", pc.Gaussian(), "leaf: Binomial is over whole numbers, but the data are real"),
        (f"{__name__}.Density", pc.Categorical(256), "leaf: Density is a density, but the data are the whole numbers"),
    ],
)
def test_what_does_not_fit_the_data_is_named(given: Any, default: pc.Distribution, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeafChoice(given).over(default)
