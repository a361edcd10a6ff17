"""Parts of examples: patches of images of any shape and number of values, saved descriptions."""

import pytest
import torch

import lvd_lightning.circuits as pc
from lvd_lightning.parts import (
    ImagePatches,
    Parts,
    Tokens,
    WholeExample,
    describe_parts,
    example_leaf,
    parts_from,
    register_parts,
    variable_type,
)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 12), (2, 4, 16)])
def test_patches_are_put_back_together(shape: tuple[int, int, int]) -> None:
    patches = ImagePatches(shape, 4)
    assert isinstance(patches, Parts)
    for x in (torch.randint(256, (5, *shape)), torch.rand(5, *shape), torch.rand(5, *shape) < 0.5):
        found = patches.split(x)
        assert found.shape == (5, patches.num_parts, shape[0] * 16)
        assert torch.equal(patches.join(found), x)


def test_leaves_are_those_of_the_channels() -> None:
    assert ImagePatches((3, 4, 4), 2).leaf == pc.Categorical(256)
    mixed = ImagePatches((3, 4, 4), 2, (256, 511, 511))
    assert mixed.leaf == [pc.Categorical(number) for number in (256, 511, 511) for _ in range(4)]
    of_image = example_leaf(mixed)
    assert of_image == [pc.Categorical(number) for number in (256, 511, 511) for _ in range(16)]


@pytest.mark.parametrize(
    ("numbers", "dtype"), [(2, torch.uint8), (256, torch.uint8), ((256, 511, 511), torch.int16), (70000, torch.int32)]
)
def test_values_are_kept_in_the_smallest_type(numbers: int | tuple[int, ...], dtype: torch.dtype) -> None:
    assert variable_type(ImagePatches((3, 4, 4), 2, numbers)) == dtype


def test_descriptions_make_the_same_parts() -> None:
    patches = ImagePatches((3, 8, 12), 4, (256, 511, 511))
    assert parts_from(describe_parts(patches)).arguments == patches.arguments


def test_classes_of_ones_own_are_registered() -> None:
    class Halves(ImagePatches):
        pass

    halves = Halves((1, 4, 4), 2)
    with pytest.raises(ValueError, match="Halves is not known to saved circuits; call register_parts"):
        describe_parts(halves)
    register_parts(Halves)
    assert type(parts_from(describe_parts(halves))) is Halves
    with pytest.raises(ValueError, match="the class 'system' is unknown, expected one of .*ImagePatches"):
        parts_from({"class": "system", "arguments": {}})


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="patch_size: 3 does not tile images of 4 x 8"):
        ImagePatches((1, 4, 8), 3)
    with pytest.raises(ValueError, match="num_categories: got"):
        ImagePatches((3, 4, 4), 2, (256, 511))
    with pytest.raises(ValueError, match="shape: got"):
        ImagePatches((4, 4), 2)
    patches = ImagePatches((1, 4, 4), 2)
    with pytest.raises(ValueError, match=r"x: got shape \(2, 1, 4, 6\), expected images \(batch, 1, 4, 4\)"):
        patches.split(torch.zeros(2, 1, 4, 6))
    with pytest.raises(ValueError, match=r"parts: got shape \(2, 4, 5\), expected \(batch, 4, 4\)"):
        patches.join(torch.zeros(2, 4, 5))


def test_a_text_falls_into_its_tokens() -> None:
    tokens = Tokens(5, vocabulary=300)
    assert isinstance(tokens, Parts)
    assert (tokens.num_parts, tokens.shape, tokens.example_shape) == (5, (1,), (5,))
    assert (tokens.leaf, variable_type(tokens)) == (pc.Categorical(300), torch.int16)
    x = torch.randint(300, (7, 5))
    assert torch.equal(tokens.join(tokens.split(x)), x)
    assert torch.equal(tokens.split(x)[:, 2], x[:, 2:3])
    assert parts_from(describe_parts(tokens)).arguments == tokens.arguments


@pytest.mark.parametrize("shape", [(5,), (2, 4), (2, 5, 1)])
def test_windows_of_another_length_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected windows \(batch, 5\)"):
        Tokens(5, vocabulary=9).split(torch.zeros(shape))


def test_tokens_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parts: got shape \(2, 4, 1\), expected \(batch, 5, 1\)"):
        Tokens(5, vocabulary=9).join(torch.zeros(2, 4, 1))


@pytest.mark.parametrize(("length", "vocabulary", "name"), [(0, 9, "length"), (5, 1, "vocabulary")])
def test_tokens_without_length_or_choice_are_refused(length: int, vocabulary: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got"):
        Tokens(length, vocabulary)


def test_a_whole_example_is_one_part() -> None:
    """Of images whose channels differ; files know it."""
    patches = ImagePatches((3, 4, 6), 2, (4, 7, 7))
    whole = WholeExample(describe_parts(patches))
    assert (whole.num_parts, whole.shape, whole.example_shape) == (1, (3, 4, 6), (3, 4, 6))
    assert list(whole.leaf) == [pc.Categorical(4)] * 24 + [pc.Categorical(7)] * 48
    x = torch.randint(4, (5, 3, 4, 6), dtype=torch.uint8)
    assert torch.equal(whole.split(x)[:, 0], x.flatten(1))
    assert torch.equal(whole.join(whole.split(x)), x)
    again = parts_from(describe_parts(whole))
    assert isinstance(again, WholeExample)
    assert again.arguments == whole.arguments
    with pytest.raises(ValueError, match=r"x: got shape \(5, 3, 4, 5\), expected examples \(batch, 3, 4, 6\)"):
        whole.split(x[..., :5])
    with pytest.raises(ValueError, match=r"parts: got shape \(5, 2, 36\), expected \(batch, 1, 72\)"):
        whole.join(torch.zeros(5, 2, 36))
