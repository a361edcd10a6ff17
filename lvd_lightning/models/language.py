"""A hidden Markov model of the words of a text: the circuit, what it is a model of, and how likely texts are under it.

Shapes: B windows, T positions, K states, V words; L tokens of a sequence that may be shorter than T.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lvd_lightning import circuits as pc
from lvd_lightning.files import parse_json, write_json
from lvd_lightning.models.hmm_graph import HMMTables, hmm_from_tables, tables_of
from lvd_lightning.parts import Tokens, describe_parts, parts_from

__all__ = ["HiddenMarkovModel"]

_FILE = "language.json"


class HiddenMarkovModel(nn.Module):
    r"""p(x) = sum_z p(z_0) prod_t p(z_t | z_t-1) prod_t p(x_t | z_t) of windows of T tokens.

    Args:
        circuit: a hidden Markov model (`pc.hmm`) over T categorical variables, with one head.
        reserved: a token that alone has the last state for itself (such as the end of a text), or None. It matters only
            where states are given: a position with this token then counts as being in the last state.

    Attributes:
        parts: the tokens of a window, as datamodules describe them.
        num_states: K.

    Raises:
        ValueError: a circuit of another structure, or a reserved token outside the vocabulary.

    References:
        Liu, Zhang and Van den Broeck, Scaling Up Probabilistic Circuits by Latent Variable Distillation, 2023
        (arXiv 2210.04398), section 2.

    Example:
        >>> model = HiddenMarkovModel(pc.Circuit(pc.hmm(length=4, num_states=3, num_tokens=10)))
        >>> model.log_prob(torch.tensor([[3, 1, 4, 1]])).shape  # nats
        torch.Size([1])
        >>> model.log_prob(torch.tensor([[3, 1]])).shape  # two words, whatever follows
        torch.Size([1])
    """

    def __init__(self, circuit: pc.Circuit, reserved: int | None = None) -> None:
        super().__init__()
        tables = tables_of(circuit)
        self.circuit = circuit
        self.homogeneous = tables.homogeneous
        self.num_states, vocabulary = tables.emission_SKV.shape[1:]
        self.parts = Tokens(circuit.num_variables, vocabulary)
        if reserved is not None and not 0 <= reserved < vocabulary:
            raise ValueError(f"reserved: got {reserved}, expected a token 0..{vocabulary - 1}")
        self.reserved = reserved

    @classmethod
    def from_tables(cls, tables: HMMTables, length: int, reserved: int | None = None) -> HiddenMarkovModel:
        """The model with these parameters, of windows of `length` tokens.

        Raises:
            ValueError: see `hmm_from_tables`.
        """
        return cls(pc.Circuit(hmm_from_tables(tables, length)), reserved)

    @property
    def length(self) -> int:
        """T, tokens of a window."""
        return self.parts.num_parts

    @property
    def num_tokens(self) -> int:
        """V, words of the vocabulary."""
        return self.parts.vocabulary

    @property
    def num_dims(self) -> int:
        """Dimensions of an example: its tokens."""
        return self.length

    @property
    def num_parameters(self) -> int:
        """Free parameters; those that positions share count once."""
        return self.circuit.num_parameters

    def tables(self) -> HMMTables:
        """The parameters in the order of positions."""
        return tables_of(self.circuit)

    def forward(self, x: Tensor) -> Tensor:
        """Same as `log_prob`."""
        return self.log_prob(x)

    def log_prob(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """log p of the observed tokens in nats, shape (B,).

        Args:
            x: int (B, L), L at most T; what follows a shorter sequence is summed out.
            observed: bool (B, L); False: the word is missing, and what x holds there may be anything.

        Raises:
            ValueError: sequences longer than T, a token that there is none of, or a mask of another shape.
        """
        x, observed = self.padded(x, observed)
        limit = self.circuit.batch_limit
        masks = [None] * len(x.split(limit)) if observed is None else observed.split(limit)
        found = [self.circuit.log_prob(part, observed=mask)[:, 0] for part, mask in zip(x.split(limit), masks)]
        return torch.cat(found)

    def log_prob_and_objective(self, x: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
        """log p(x) and log p(x, z) in nats, both (B,); without z twice log p(x). z: int64 (B, T)."""
        log_B = self.log_prob(x)
        return log_B, log_B if z is None else self.lvd_objective(x, z)

    def lvd_objective(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x, z) in nats, shape (B,); x, z: int64 (B, T)."""
        self.parts.split(x)
        if z.shape != x.shape:
            raise ValueError(f"z: got shape {tuple(z.shape)}, expected {tuple(x.shape)}, a state per token")
        x, z = x.long(), self.with_reserved(x, z)
        tables, t_T = self.tables(), torch.arange(self.length, device=x.device)
        t_T = torch.zeros_like(t_T) if self.homogeneous else t_T
        log_B = tables.initial_K.log()[z[:, 0]]
        log_B = log_B + tables.emission_SKV[t_T, z, x].log().sum(1)
        return log_B + tables.transition_SKK[t_T[: self.length - 1], z[:, :-1], z[:, 1:]].log().sum(1)

    def with_reserved(self, x: Tensor, z: Tensor) -> Tensor:
        """The states z (B, T) of tokens x (B, T), with the last state where the reserved token is."""
        return z if self.reserved is None else z.masked_fill(x == self.reserved, self.num_states - 1)

    def padded(self, x: Tensor, observed: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Sequences (B, L) as windows (B, T): what is not there counts as missing; no mask if nothing is missing."""
        if x.ndim != 2 or x.shape[1] > self.length:
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, expected (batch, {self.length} tokens or fewer): cut longer texts "
                "into windows"
            )
        if observed is not None and (observed.dtype != torch.bool or observed.shape != x.shape):
            raise ValueError(
                f"observed: got {observed.dtype} {tuple(observed.shape)}, expected bool {tuple(x.shape)}, as x"
            )
        missing = self.length - x.shape[1]
        if missing == 0:
            return x, observed
        seen = torch.ones_like(x, dtype=torch.bool) if observed is None else observed
        return nn.functional.pad(x, (0, missing)), nn.functional.pad(seen, (0, missing), value=False)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`n` exact samples, int64 (n, T); generator: on the circuit's device."""
        return self.circuit.sample(n, generator=generator)

    def posterior(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """p(z_t = k | the observed tokens), (B, L, K); x, observed: see `log_prob`."""
        length = x.shape[1]
        x, observed = self.padded(x, observed)
        found = [self.circuit.posterior(x, t, observed=observed) for t in range(length)]
        return torch.stack(found, 1)

    def save(self, folder: Path) -> None:
        """Write the circuit and what it is a model of into `folder`; the latter last, as the sign of completeness."""
        pc.save(self.circuit, folder / "hmm")
        write_json(folder / _FILE, {"parts": describe_parts(self.parts), "reserved": self.reserved})

    @classmethod
    def load(cls, folder: Path) -> HiddenMarkovModel:
        """Read what `save` wrote.

        Raises:
            ValueError: something is missing or damaged.
        """
        path = folder / _FILE
        if not path.is_file():
            raise ValueError(f"{folder}: holds no hidden Markov model ({path.name} is missing); run its stage first")
        try:
            saved = parse_json(path.read_text())
            model = cls(pc.load(folder / "hmm"), saved["reserved"])
            if parts_from(saved["parts"]).arguments != model.parts.arguments:
                raise ValueError(f"{path.name} is of {saved['parts']}, the circuit of {model.parts.arguments}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder}: holds no complete hidden Markov model ({error}); run its stage again"
            ) from error
        return model
