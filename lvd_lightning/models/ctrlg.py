"""Homogeneous hidden Markov models in the form that Ctrl-G reads to steer a language model.

Shapes: K states, V tokens.
"""

from __future__ import annotations

from pathlib import Path

from lvd_lightning.checks import expect
from lvd_lightning.files import read_tensors, write_json, write_tensors
from lvd_lightning.models.hmm_graph import HMMTables
from lvd_lightning.models.language import HiddenMarkovModel

__all__ = ["from_ctrlg", "to_ctrlg"]

_TENSORS, _CONFIG = "model.safetensors", "config.json"
#: Ctrl-G's logarithm of 0.
LOG_ZERO = -1e10


def to_ctrlg(model: HiddenMarkovModel, folder: str | Path, eos_token_id: int) -> Path:
    """Write a homogeneous model as `model.safetensors` and `config.json` into a folder; returns the folder.

    The tensors, all float32:

    - `alpha_exp` (K, K): p(z_t+1 = j | z_t = i) at [i, j];
    - `beta` (K, V): log p(x_t = v | z_t = k), in nats; -1e10 for what never comes;
    - `gamma_exp` (1, K): p(z_0 = k), as its training code has it, and `gamma` (K,), log p(z_0 = k), as its library has.

    `config.json` has the arguments of Ctrl-G's class: `hidden_states` (and `hidden_size`, another name of it),
    `vocab_size`, `eos_token_id`.

    Args:
        model: homogeneous; its words are the language model's tokens, by the same numbers.
        folder: made if it is not there.
        eos_token_id: the token that ends a text.

    Raises:
        ValueError: a model with tables of their own for every position, or a token that there is none of.

    References:
        Zhang et al., Adaptable Logical Control for Large Language Models, 2024 (arXiv 2406.13892).

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import lvd_lightning.circuits as pc
        >>> model = HiddenMarkovModel(pc.Circuit(pc.hmm(length=4, num_states=3, num_tokens=10, homogeneous=True)))
        >>> with TemporaryDirectory() as folder:
        ...     again = from_ctrlg(to_ctrlg(model, folder, eos_token_id=0), length=4)
        >>> again.num_states, again.homogeneous
        (3, True)
    """
    if not model.homogeneous:
        raise ValueError("model: has tables of its own for every position; Ctrl-G reads homogeneous models")
    expect(0 <= eos_token_id < model.num_tokens, "eos_token_id", eos_token_id, f"a token 0..{model.num_tokens - 1}")
    tables, folder = model.tables(), Path(folder)
    initial_K = tables.initial_K.float().cpu()
    tensors = {
        "alpha_exp": tables.transition_SKK[0].float().cpu().contiguous(),
        "beta": tables.emission_SKV[0].float().cpu().log().clamp_min(LOG_ZERO).contiguous(),
        "gamma_exp": initial_K[None].contiguous(),
        "gamma": initial_K.log().clamp_min(LOG_ZERO),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / _TENSORS, tensors, metadata={"format": "pt"})
    sizes = {"hidden_states": model.num_states, "hidden_size": model.num_states, "vocab_size": model.num_tokens}
    write_json(folder / _CONFIG, {**sizes, "eos_token_id": eos_token_id}, indent=2)
    return folder


def from_ctrlg(folder: str | Path, length: int) -> HiddenMarkovModel:
    """Read what `to_ctrlg` wrote, or a folder with a model of Ctrl-G's own.

    Args:
        folder: with `model.safetensors`; of first states either `gamma_exp` or `gamma` will do.
        length: tokens of a window, T, which a homogeneous model leaves open.

    Raises:
        ValueError: a file or tensor is missing, or tensors do not fit together.
    """
    folder = Path(folder)
    path = folder / _TENSORS
    if not path.is_file():
        raise ValueError(f"{folder}: holds no model in the form of Ctrl-G ({_TENSORS} is missing)")
    tensors = read_tensors(path)
    lacking = [name for name in ("alpha_exp", "beta") if name not in tensors]
    if "gamma_exp" not in tensors and "gamma" not in tensors:
        lacking.append("gamma_exp or gamma")
    if lacking:
        raise ValueError(f"{path}: lacks {', '.join(lacking)}; it has {', '.join(sorted(tensors))}")
    initial = tensors["gamma_exp"] if "gamma_exp" in tensors else tensors["gamma"].exp()
    rows = (initial.reshape(-1), tensors["alpha_exp"], tensors["beta"].exp())
    initial_K, transition_KK, emission_KV = (found.float() / found.float().sum(-1, keepdim=True) for found in rows)
    tables = HMMTables(initial_K, transition_KK[None], emission_KV[None])
    try:
        return HiddenMarkovModel.from_tables(tables, length)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
