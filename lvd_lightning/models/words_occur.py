"""Generation with a language model in which given words certainly occur, steered by a hidden Markov model.

Shapes: B sequences, L tokens so far, R tokens to come, S states of the automaton, K states of the model, V tokens,
W tokens that words are made of.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from lvd_lightning.checks import check_counts, expect
from lvd_lightning.models.infilling import states_before
from lvd_lightning.models.language import HiddenMarkovModel

__all__ = ["MissingWords", "WordsOccur"]


class MissingWords:
    """Which words are still missing, as a finite automaton that reads tokens (Aho and Corasick, 1975).

    A state is what has been read of a word that may be going on, and the set of words that came. A token that is in no
    word ends what was going on, whichever it is.

    Args:
        words: each a sequence of one token or more.

    Attributes:
        special: the tokens that words are made of, in order.
        next_SW: the state after reading special[w] in state s; S states, 0 is the first.
        other_S: the state after any other token.
        done_S: bool, whether all words came.

    Raises:
        ValueError: no words, or an empty one.

    Example:
        >>> automaton = MissingWords([[3], [5, 3]])
        >>> automaton.special, len(automaton.done_S)
        ([3, 5], 6)
        >>> [bool(automaton.done_S[automaton.after(tokens)]) for tokens in ([3, 5], [5, 3])]
        [False, True]
    """

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        if not words or not all(len(word) for word in words):
            raise ValueError(f"words: got {words}, expected one word or more, each of one token or more")
        self.special = sorted({int(token) for word in words for token in word})
        children, fallback, ends = _trie(words)

        def step(node: int, token: int) -> int:
            while node and token not in children[node]:
                node = fallback[node]
            return children[node].get(token, 0)

        everything = (1 << len(words)) - 1
        number = {(0, 0): 0}
        waiting, rows, others = deque([(0, 0)]), [], []

        def numbered(node: int, found: int) -> int:
            pair = (0 if found == everything else node, found)  # nothing matters any more
            if pair not in number:
                number[pair] = len(number)
                waiting.append(pair)
            return number[pair]

        while waiting:
            node, found = waiting.popleft()
            after = [step(node, token) for token in self.special]
            rows.append([numbered(place, found | ends[place]) for place in after])
            others.append(numbered(0, found))
        self.next_SW = torch.tensor(rows)
        self.other_S = torch.tensor(others)
        self.done_S = torch.tensor([found == everything for _, found in number])
        self._column = {token: column for column, token in enumerate(self.special)}

    def after(self, tokens: Iterable[int], state: int = 0) -> int:
        """The state after some tokens."""
        for token in tokens:
            column = self._column.get(int(token))
            state = int(self.other_S[state] if column is None else self.next_SW[state, column])
        return state


class WordsOccur(LogitsProcessor):
    r"""For `generate` of transformers: in what is generated, each of some words occurs, in any order.

    With x the tokens so far, it adds to the score of a token v

    .. math:: \log p(\text{all words occur} \mid x, v)

    under a homogeneous hidden Markov model, exactly, by dynamic programming over the tokens that are still to come, the
    state of the model and the words that are still missing. What is left for a token is the language model's share
    times the chance that the sentence can still hold the words. A token after which they cannot all come any more gets
    -inf, the end of the text among them as long as a word is missing: so all words certainly occur. If the language
    model is the hidden Markov model itself, samples are exact ones given that the words occur.

    Time and memory grow with the states of the automaton, of which there are at least two to the number of words.

    Args:
        model: homogeneous; its words are the language model's tokens, by the same numbers. Scores of further tokens
            become -inf.
        words: each a sequence of one token or more.
        prompt_length: tokens before those that are generated; words in it do not count.
        max_new_tokens: the most that are generated, as told to `generate`.
        eos_token_id: the token that ends a text, or None.

    Raises:
        ValueError: a model that is not homogeneous, words of tokens that there are none of, or too few new tokens to
            hold them.

    References:
        Zhang et al., Adaptable Logical Control for Large Language Models, 2024 (arXiv 2406.13892).

    Example:
        >>> import lvd_lightning.circuits as pc
        >>> model = HiddenMarkovModel(pc.Circuit(pc.hmm(length=4, num_states=3, num_tokens=10, homogeneous=True)))
        >>> steer = WordsOccur(model, words=[[7]], prompt_length=1, max_new_tokens=1)
        >>> scores = steer(torch.tensor([[2]]), torch.zeros(1, 10))  # the one word that is left to say
        >>> scores.argmax(), int(scores.isfinite().sum())
        (tensor(7), 1)
    """

    def __init__(
        self,
        model: HiddenMarkovModel,
        words: Sequence[Sequence[int]],
        prompt_length: int,
        max_new_tokens: int,
        eos_token_id: int | None = None,
    ) -> None:
        if not model.homogeneous:
            raise ValueError("model: has tables of its own for every position, expected a homogeneous one")
        check_counts(max_new_tokens=max_new_tokens)
        expect(prompt_length >= 0, "prompt_length", prompt_length, "0 or more")
        self.automaton = MissingWords(words)
        used = [*self.automaton.special, *([] if eos_token_id is None else [eos_token_id])]
        expect(min(used) >= 0 and max(used) < model.num_tokens, "words", words, f"tokens 0..{model.num_tokens - 1}")
        if eos_token_id in self.automaton.special:
            raise ValueError(f"words: hold the token {eos_token_id}, which ends a text: nothing can follow it")
        self.model, self.prompt_length, self.max_new_tokens = model, prompt_length, max_new_tokens
        self.eos_token_id = eos_token_id
        tables = model.tables()
        self._emission_KV = tables.emission_SKV[0].double()
        self._ahead_RSK = self._look_ahead(tables.transition_SKK[0].double())
        if not bool((self._ahead_RSK[max_new_tokens, 0] > 0).any()):
            raise ValueError(f"max_new_tokens: {max_new_tokens} tokens cannot hold all words under the model")

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V or more) of the next token after `input_ids` (B, prompt and L), steered."""
        remaining = self.max_new_tokens - (input_ids.shape[1] - self.prompt_length)
        if not 1 <= remaining <= self.max_new_tokens or scores.shape[1] < self.model.num_tokens:
            raise ValueError(
                f"input_ids: got {tuple(input_ids.shape)} with scores {tuple(scores.shape)}, expected a prompt of "
                f"{self.prompt_length} tokens and fewer than {self.max_new_tokens} others, and scores of "
                f"{self.model.num_tokens} tokens or more"
            )
        generated = input_ids[:, self.prompt_length :].tolist()
        ended_B = torch.tensor([self.eos_token_id in row for row in generated], device=scores.device)
        state_B = torch.tensor([self.automaton.after(row) for row in generated])
        chance_BV = self._chances(states_before(self.model, input_ids.to(self._emission_KV.device)), state_B, remaining)
        steered = torch.full_like(scores, -torch.inf)
        added = chance_BV.log().to(scores.device, scores.dtype)
        steered[:, : self.model.num_tokens] = scores[:, : self.model.num_tokens] + added
        return torch.where(ended_B[:, None], scores, steered)  # what follows the end is padding

    def _chances(self, belief_BK: Tensor, state_B: Tensor, remaining: int) -> Tensor:
        """p(all words occur | the tokens so far and the next one is v), (B, V); belief: of the next token's state."""
        automaton, emission_KV = self.automaton, self._emission_KV
        ahead_SK = self._ahead_RSK[remaining - 1]  # after the next token; of the state that emits it
        joint_BV = (belief_BK * ahead_SK[automaton.other_S[state_B]]) @ emission_KV
        next_BW = automaton.next_SW[state_B]
        joint_BW = torch.einsum("bk,bwk,kw->bw", belief_BK, ahead_SK[next_BW], emission_KV[:, automaton.special])
        joint_BV[:, automaton.special] = joint_BW
        chance_BV = joint_BV / (belief_BK @ emission_KV).clamp_min(torch.finfo(torch.float64).tiny)
        if self.eos_token_id is not None:
            chance_BV[:, self.eos_token_id] = automaton.done_S[state_B].to(chance_BV)
        done_B1 = automaton.done_S[state_B].to(chance_BV.device)[:, None]
        return torch.where(done_B1, 1.0, chance_BV.clamp_max(1.0))

    def _look_ahead(self, transition_KK: Tensor) -> Tensor:
        """p(all words occur within r more tokens | state s of the automaton, the last token's state k), (R + 1, S, K).

        Given the state that emitted the last token, the next one comes of `transition_KK`; for r = 0 it is 0 or 1.
        """
        automaton, K = self.automaton, len(transition_KK)
        done_S1 = automaton.done_S.to(self._emission_KV)[:, None].expand(-1, K)
        special_KW = self._emission_KV[:, automaton.special]
        other_K = 1 - special_KW.sum(1)
        if self.eos_token_id is not None:  # a text that ends with a word missing fails
            other_K = other_K - self._emission_KV[:, self.eos_token_id]
        found = [done_S1]
        for _ in range(self.max_new_tokens):
            later_SK = found[-1]
            here_SK = later_SK[automaton.other_S] * other_K.clamp_min(0.0)
            here_SK = here_SK + torch.einsum("swk,kw->sk", later_SK[automaton.next_SW], special_KW)
            here_SK = here_SK @ transition_KK.T
            found.append(torch.where(automaton.done_S.to(here_SK.device)[:, None], 1.0, here_SK))
        return torch.stack(found)


def _trie(words: Sequence[Sequence[int]]) -> tuple[list[dict[int, int]], list[int], list[int]]:
    """Children of every node by token, the node of its longest proper suffix, and the words that end there as bits."""
    children: list[dict[int, int]] = [{}]
    ends = [0]
    for number, word in enumerate(words):
        node = 0
        for token in map(int, word):
            if token not in children[node]:
                children[node][token] = len(children)
                children.append({})
                ends.append(0)
            node = children[node][token]
        ends[node] |= 1 << number
    fallback = [0] * len(children)
    waiting = deque(children[0].values())
    while waiting:
        node = waiting.popleft()
        ends[node] |= ends[fallback[node]]
        for token, child in children[node].items():
            suffix = fallback[node]
            while suffix and token not in children[suffix]:
                suffix = fallback[suffix]
            fallback[child] = children[suffix].get(token, 0)
            waiting.append(child)
    return children, fallback, ends
