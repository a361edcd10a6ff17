"""Words that have to occur do, exactly as under the hidden Markov model, and in what a language model generates."""

import itertools

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessorList

import lvd_lightning.circuits as pc
from lvd_lightning.models.hmm_graph import random_tables
from lvd_lightning.models.infilling import next_word
from lvd_lightning.models.language import HiddenMarkovModel
from lvd_lightning.models.words_occur import MissingWords, WordsOccur

T, K, V = 5, 3, 4


def model_of(length: int = T) -> HiddenMarkovModel:
    tables = random_tables(length, K, V, True, torch.Generator().manual_seed(0), torch.float64)
    sharp = type(tables)(*(table**3 / (table**3).sum(-1, keepdim=True) for table in vars(tables).values()))
    return HiddenMarkovModel.from_tables(sharp, length)


def holds(row: list[int], words: list[list[int]]) -> bool:
    return all(
        any(row[start : start + len(word)] == word for start in range(len(row) - len(word) + 1)) for word in words
    )


WORDS = [[[2]], [[0], [3]], [[1, 1], [1, 2]], [[0, 1, 0], [1, 0, 1]], [[2, 0], [0]]]


@pytest.mark.parametrize("words", WORDS, ids=str)
def test_the_automaton_knows_what_came(words: list[list[int]]) -> None:
    automaton = MissingWords(words)
    for row in itertools.product(range(V), repeat=5):
        assert bool(automaton.done_S[automaton.after(row)]) == holds(list(row), words)


@pytest.mark.parametrize("words", WORDS, ids=str)
@pytest.mark.parametrize("prompt", [[], [1, 0]])
def test_it_is_the_posterior_of_the_model(words: list[list[int]], prompt: list[int]) -> None:
    """Steering the model's own next words, the chances of all continuations are exact: p(x | all words occur)."""
    length = 4
    model, whole = model_of(), model_of(length + len(prompt))
    steer = WordsOccur(model, words, len(prompt), length)
    rows = torch.tensor(list(itertools.product(range(V), repeat=length)))
    texts = torch.cat([torch.tensor(prompt, dtype=torch.int64).expand(len(rows), -1), rows], 1)
    log_p = torch.zeros(len(rows), dtype=torch.float64)
    for t in range(length):
        so_far = texts[:, : len(prompt) + t]
        log_p += (
            steer(so_far, next_word(model, so_far).log())
            .log_softmax(1)
            .nan_to_num(nan=-torch.inf)[torch.arange(len(rows)), rows[:, t]]
        )
    kept = torch.tensor([holds(row, words) for row in rows.tolist()])
    wanted = whole.log_prob(texts).detach().masked_fill(~kept, -torch.inf)
    torch.testing.assert_close(log_p.exp(), wanted.softmax(0))


def test_the_end_waits_for_the_words() -> None:
    """Texts that end early count as well; the chance of the words is that of all texts up to the end."""
    model, end, length = model_of(), 3, 3
    steer = WordsOccur(model, [[2]], 0, length, eos_token_id=end)
    p = dict.fromkeys(itertools.product(range(V), repeat=length), 0.0)
    for row in p:
        x = torch.tensor([row])
        stop = row.index(end) + 1 if end in row else length
        if 2 in row[:stop]:
            p[row] = float(model.log_prob(x).exp().detach())
    chance = sum(p.values())
    scores = steer(torch.zeros(1, 0, dtype=torch.int64), next_word(model, torch.zeros(1, 0, dtype=torch.int64)).log())
    assert float(scores.exp().sum()) == pytest.approx(chance)
    for first in range(V):
        found = sum(value for row, value in p.items() if row[0] == first)
        assert float(scores[0, first].exp()) == pytest.approx(found)
    ended = steer(torch.tensor([[2, end]]), torch.zeros(1, V))
    assert ended.tolist() == [[0.0] * V]


def test_settings_that_make_no_sense_are_refused() -> None:
    model = model_of()
    with pytest.raises(ValueError, match="expected one word or more"):
        WordsOccur(model, [], 0, 4)
    with pytest.raises(ValueError, match=r"words: got \[\[4\]\], expected tokens 0..3"):
        WordsOccur(model, [[4]], 0, 4)
    with pytest.raises(ValueError, match="which ends a text"):
        WordsOccur(model, [[1]], 0, 4, eos_token_id=1)
    with pytest.raises(ValueError, match="max_new_tokens: 2 tokens cannot hold all words"):
        WordsOccur(model, [[1], [2], [0]], 0, 2)
    with pytest.raises(ValueError, match="expected a homogeneous one"):
        WordsOccur(HiddenMarkovModel.from_tables(random_tables(T, K, V, False), T), [[1]], 0, 4)
    with pytest.raises(ValueError, match="expected a prompt of 2 tokens and fewer than 4 others"):
        WordsOccur(model, [[1]], 2, 4)(torch.zeros(1, 6, dtype=torch.int64), torch.zeros(1, V))


def test_a_small_gpt_says_the_words() -> None:
    """Trained on a text of its own, of 30 words; two rarer ones have to come in 12 new tokens."""
    vocabulary, length = 30, 16
    generator = torch.Generator().manual_seed(0)
    text_NT = torch.multinomial(1 / torch.arange(1.0, vocabulary + 1), 4000 * length, True, generator=generator)
    text_NT = ((text_NT.view(-1, length).cumsum(1)) % vocabulary).sort(1).values  # words in order, as if of a grammar
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 32}
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, bos_token_id=0, eos_token_id=None, **sizes))
    adam = torch.optim.Adam(gpt.parameters(), 3e-3)
    for batch in text_NT.split(64)[:40]:
        adam.zero_grad()
        gpt(batch, labels=batch).loss.backward()
        adam.step()
    tables = random_tables(length, 12, vocabulary, True, generator)
    model = HiddenMarkovModel.from_tables(tables, length)
    optimizer = pc.Anemone(model, lr=0.5)
    for batch in text_NT.split(500):
        optimizer.zero_grad()
        (-model.log_prob(batch).sum()).backward()
        optimizer.step()
    words = [[11], [23]]
    prompt = text_NT[:200, :2]
    settings = {"do_sample": True, "max_new_tokens": 12, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    gpt.eval()
    steer = LogitsProcessorList([WordsOccur(model, words, 2, 12)])
    shares = []
    for processors in (LogitsProcessorList(), steer):
        torch.manual_seed(1)
        drawn = gpt.generate(prompt, logits_processor=processors, **settings)
        assert drawn.shape == (200, 14)
        shares.append(sum(holds(row, words) for row in drawn[:, 2:].tolist()) / 200)
    assert shares[0] < 0.6
    assert shares[1] == 1.0
